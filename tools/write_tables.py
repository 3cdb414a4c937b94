#!/usr/bin/env python3
"""Fills the tables of Markdown files, each by the command that its mark names.

    tools/write_tables.py README.md datasets/README.md            # writes them
    tools/write_tables.py README.md datasets/README.md --check    # exits 1 if one is another

A table stands between `<!-- TABLE: COMMAND -->` and `<!-- /TABLE -->`. What COMMAND prints is the table; a test that
writes its own table, a COMMAND that begins with `pytest`, is left alone.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from wsl_d2.cli.main import main as wsl_d2

ROOT = Path(__file__).resolve().parent.parent
_MARK = re.compile(r"(<!-- TABLE: (.+?) -->\n)(.*?)(<!-- /TABLE -->)", re.S)


def replace_table(text: str, command: str, table: str) -> str:
    """Returns a Markdown text with the table of a command in its place.

    Raises:
        ValueError: the text has no mark, or several, of this command.
    """
    if sum(mark[2] == command for mark in _MARK.finditer(text)) != 1:
        raise ValueError(f"the lines <!-- TABLE: {command} --> and <!-- /TABLE --> must be there once")
    return _MARK.sub(lambda mark: mark[1] + table + "\n" + mark[4] if mark[2] == command else mark[0], text)


def print_table(command: str) -> str:
    """Runs a command and returns what it prints."""
    words = shlex.split(command)
    if words[0] == "wsl-d2":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status, text = wsl_d2(words[1:]), printed.getvalue()
    else:
        result = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        status, text = result.returncode, result.stdout
    if status:
        sys.exit(f"error: `{command}` ended with status {status}")
    return text.rstrip("\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    args.files = [file.resolve() for file in args.files]
    os.chdir(ROOT)
    for file in args.files:
        text = new = file.read_text(encoding="utf-8")
        for mark in _MARK.finditer(text):
            if not mark[2].startswith("pytest "):
                new = replace_table(new, mark[2], print_table(mark[2]))
        if args.check and new != text:
            sys.exit(f"error: a table of {file} is out of date; run tools/write_tables.py {file}")
        if not args.check:
            file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
