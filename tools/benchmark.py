#!/usr/bin/env python3
"""Measures wsl_d2 against named peers in the same run and prints the ratios.

tools/benchmark.py SECTION [OPTIONS]; tools/benchmark.py SECTION --help shows a section's options.
"""

import importlib
import sys
from pathlib import Path

SECTIONS_FOLDER = Path(__file__).with_name("benchmarks")


def sections() -> dict[str, str]:
    """The sections, each with the first line of its docstring."""
    found = {}
    for path in sorted(SECTIONS_FOLDER.glob("[!_]*.py")):
        found[path.stem] = path.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    return found


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    known = sections()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {name:10} {summary}" for name, summary in known.items()))
        return
    name, *rest = arguments
    if name not in known:
        sys.exit(f"benchmark.py: unknown section {name!r}; choose one of {', '.join(known)}")
    importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    main()
