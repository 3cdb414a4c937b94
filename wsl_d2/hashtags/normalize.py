"""First step of text -> labels: the many spellings of a hashtag become one key."""

import unicodedata


def normalize_hashtag(text: str) -> str:
    """Reduces a hashtag, or a WordNet lemma name, to the key under which vocabularies know it.

    '#BrownBear', '#brown_bear', 'brown bear' and 'Brown-Bear' all become 'brownbear': compatibility forms are
    unified (NFKC), case is folded, and everything that is neither a letter nor a digit is dropped, the
    leading '#' or '＃' among it.

    Args:
        text: the hashtag with or without its '#'.

    Returns:
        The key; empty if the text holds no letter and no digit (a hashtag of emoji alone, say). Normalizing a
        key again does not change it.

    Raises:
        TypeError: `text` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"a hashtag must be a string, got {type(text).__name__}: {text!r}")
    if text.isascii():
        return text.lower() if text.isalnum() else "".join(filter(str.isalnum, text)).lower()
    previous = None
    while text != previous:  # dropping a mark can bring together letters that compose: repeat until stable
        previous = text
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = "".join(filter(str.isalnum, text))
    return text
