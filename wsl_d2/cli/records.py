"""The verb records."""

from __future__ import annotations

import argparse

from wsl_d2.cli.verb import Verb, local_path


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=local_path, help="of finished runs, comparisons or studies")
    parser.add_argument("--records", type=local_path, required=True, help="file of JSON lines; made if it is missing")
    parser.add_argument(
        "--table",
        choices=("runs", "gains", "means", "parts", "costs", "studies"),
        help="table to print in Markdown; means: of the gains over comparisons, such as those of several worlds; "
        "parts: gains by size and supercategory; costs: minutes of runs and of those they stand on",
    )
    parser.add_argument("--results", nargs="+", default=["bbox/AP", "segm/AP"], help="of the tables of runs and costs")
    parser.add_argument(
        "--stage", help="of a study, whose runs those tables show; of runs all if left out, of costs detect"
    )


def records(args: argparse.Namespace) -> None:
    """Collects the records of finished runs in one file, and prints tables of what came out.

    wsl-d2 records output/demo --records results.jsonl
    wsl-d2 records --records results.jsonl --table gains

    A run that is collected again replaces its record. Every run leaves a record.json, every comparison an ap_gain.json.
    """
    from wsl_d2.report.records import (
        collect,
        read_records,
        table_of_costs,
        table_of_gains,
        table_of_means,
        table_of_parts,
        table_of_runs,
        table_of_studies,
    )

    rows = collect(args.folders, args.records) if args.folders else read_records(args.records)
    if args.table == "gains":
        print(table_of_gains(rows))
    elif args.table == "means":
        print(table_of_means(rows))
    elif args.table == "costs":
        print(table_of_costs(rows, args.results, args.stage or "detect"))
    elif args.table == "parts":
        print(table_of_parts(rows))
    elif args.table == "studies":
        print(table_of_studies(rows))
    elif args.table == "runs":
        print(table_of_runs(rows, args.results, args.stage))
    else:
        counts = {kind: sum(row["kind"] == kind for row in rows) for kind in ("run", "comparison", "study")}
        hours = sum(row.get("seconds") or 0.0 for row in rows) / 3600
        told = [f"{number} of kind {kind}" for kind, number in counts.items()]
        print(f"{args.records}: " + ", ".join(told + [f"{hours:.1f} hours of studies' runs"] * (hours > 0)))


RECORDS = Verb(records, _arguments, extra="analysis")
