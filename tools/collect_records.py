#!/usr/bin/env python3
"""Collects the records of finished runs in one file, and writes a table of their results into a Markdown file.

tools/collect_records.py output/demo --records results.jsonl                 # every record.json below the folder
tools/collect_records.py --records results.jsonl --table README.md --columns bbox/AP segm/AP [--check]

The table stands between `<!-- RESULTS: written by tools/collect_records.py -->` and `<!-- /RESULTS -->`. A run
that is collected again replaces its row.
"""

import argparse
import json
import sys
from pathlib import Path

from readme_marks import write_table


def key(record: dict) -> tuple:
    return record["name"], record["config_sha256"], record["seed"]


def collect(folders: list[Path], known: list[dict]) -> list[dict]:
    rows = {key(record): record for record in known}
    for folder in folders:
        found = sorted(folder.rglob("record.json"))
        if not found:
            sys.exit(f"error: {folder} holds no record.json; is it the folder of finished runs?")
        for path in found:
            record = json.loads(path.read_text(encoding="utf-8"))
            rows[key(record)] = record
    return [rows[place] for place in sorted(rows)]


def table(records: list[dict], columns: list[str]) -> str:
    chosen = [record for record in records if all(record["results"].get(column) is not None for column in columns)]
    if not chosen:
        names = sorted({name for record in records for name in record["results"]})
        sys.exit(f"error: no record has all of {', '.join(columns)}; there are {', '.join(names)}")
    lines = [
        f"| run | {' | '.join(columns)} | weights | seed | config | commit |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for record in chosen:
        values = " | ".join(f"{record['results'][column]:.1f}" for column in columns)
        weights = record["weights"]["sha256"][:12] or record["weights"]["path"] or "none"
        facts = [weights, str(record["seed"]), record["config_sha256"][:12], record["versions"].get("commit", "-")]
        lines.append(f"| {record['name']} | {values} | {' | '.join(facts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--records", type=Path, required=True, help="JSON lines, one run each; made if it is missing")
    parser.add_argument("--table", type=Path, help="Markdown file")
    parser.add_argument("--columns", nargs="+", default=["bbox/AP", "segm/AP"], help="results shown")
    parser.add_argument("--check", action="store_true", help="with --table: only compare; exits 1 if it differs")
    args = parser.parse_args()
    lines = args.records.read_text(encoding="utf-8").splitlines() if args.records.exists() else []
    records = collect(args.folders, [json.loads(line) for line in lines])
    if args.folders:
        args.records.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if args.table:
        write_table(args.table, "RESULTS", "tools/collect_records.py", table(records, args.columns), args.check)


if __name__ == "__main__":
    main()
