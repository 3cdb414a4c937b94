"""Whatever a table or a JSON holds as hashtags -> a list of raw hashtags. The one rule for all readers.

- a list of strings: as it is; empty strings, which fill up lists of fixed length, are no hashtags;
- a text: split at commas, never at blanks: "hot dog, New York" is two hashtags. In a part with a '#' inside, only the
  #words count, and adjoining ones come apart: "#beach#dog"; one with a '#' in front alone may have blanks;
- a text that is a list in Python's or JSON's writing, "['dog', 'cat']": that list;
- a caption: its #words alone;
- nothing (null): none.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

# A hashtag in running text ends at a blank, at the next '#', and at punctuation that no service allows in one.
_WORD = re.compile(r"[#＃]([^\s#＃,;:!?.\"'()\[\]{}<>|/\\@*+=^`~&%$…。、，！？]+)")


def parse_hashtags(value: Any) -> list[str]:
    """Returns the raw hashtags in a value.

    Raises:
        ValueError: the value is neither null, a text nor a list of texts; the message is the reason.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return _parse_text(value)
    if not isinstance(value, list):
        raise ValueError("hashtags are no list and no text")
    if not all(isinstance(hashtag, str) for hashtag in value):
        raise ValueError("hashtags are not all strings")
    return [_encodable(hashtag) for hashtag in value if hashtag]


def parse_caption(text: object) -> list[str]:
    """Returns the #words of a caption, a text or None, without their '#'; ValueError for anything else."""
    if text is not None and not isinstance(text, str):
        raise ValueError("the caption is not text")
    return _WORD.findall(_encodable(text)) if text else []


def _parse_text(text: str) -> list[str]:
    text = _encodable(text.strip())
    if text.startswith("[") and text.endswith("]"):
        for read in (ast.literal_eval, json.loads):
            try:
                found = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and all(isinstance(hashtag, str) for hashtag in found):
                return [_encodable(hashtag) for hashtag in found if hashtag]
    hashtags = []
    for part in map(str.strip, text.split(",")):
        hashtags += parse_caption(part) if "#" in part[1:] or "＃" in part[1:] else [part] if part else []
    return hashtags


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold halves of surrogate pairs
        raise ValueError("hashtags are no valid Unicode") from error
    return text
