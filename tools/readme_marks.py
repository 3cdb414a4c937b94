"""Tables in Markdown files that tools write between two marks."""

import sys
from pathlib import Path


def write_table(path: Path, name: str, tool: str, table: str, check: bool) -> None:
    """Replaces what stands between ``<!-- name: written by tool -->`` and ``<!-- /name -->``.

    Args:
        check: write nothing; exit with an error if the table is another one.
    """
    begin, end = f"<!-- {name}: written by {tool} -->", f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"error: {path} must have the lines {begin} and {end} once each")
    before, rest = text.split(begin)
    new = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if check:
        sys.exit(0 if new == text else f"error: the table {name} in {path} is out of date; run {tool}")
    path.write_text(new, encoding="utf-8")
