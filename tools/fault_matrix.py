#!/usr/bin/env python3
"""Injects faults into real runs and writes the table of README.md that tells what became of them.

tools/fault_matrix.py            # all of `pytest -m fault`, about twenty minutes on two cores
tools/fault_matrix.py --check    # runs and writes nothing; exits 1 if the table is not that of the last results
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from readme_marks import write_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "faults" / "results.json"


def table(report: dict) -> str:
    """The report of ``pytest --fault-report`` in Markdown."""
    lines = ["| fault | injected | outcome |", "|---|---|---|"]
    for row in report["rows"].values():
        lines.append(f"| {row['fault']} | {row['injected']} | {'; '.join(row['outcomes'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    if not args.check:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "fault",
            "-n",
            "0",
            "tests/faults",
            "--fault-report",
            str(RESULTS),
        ]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit("error: not all faults were survived; the table is left as it is")
    write_table(
        ROOT / "README.md", "FAULTS", "tools/fault_matrix.py", table(json.loads(RESULTS.read_text())), args.check
    )


if __name__ == "__main__":
    main()
