#!/usr/bin/env python3
"""Injects faults into real runs and prints the table that tells what became of them.

tools/fault_matrix.py            # all of `pytest -m fault`, about twenty minutes on two cores
tools/fault_matrix.py --last     # the table of the last results
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

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
    parser.add_argument("--last", action="store_true", help="inject nothing")
    args = parser.parse_args()
    if not args.last:
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
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit("error: not all faults were survived")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
