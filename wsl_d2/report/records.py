"""Records of finished runs, kept in one file of JSON lines, and Markdown tables of what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from wsl_d2.analysis.ap_gain import SIZES
from wsl_d2.analysis.gain import shown_interval
from wsl_d2.analysis.records import RunError
from wsl_d2.analysis.study import mean_interval
from wsl_d2.files import write_atomically
from wsl_d2.report.gains import GAINS
from wsl_d2.report.numbers import mean_and_spread, with_interval
from wsl_d2.report.plots import IOU_NAMES

KINDS = ("run", "comparison", "study")
_LEFT_OUT = ("config",)  # of a run: its hash stands for it
_OF_GAIN = ("gain", "interval", "method_interval")


def read_records(path: str | Path) -> list[dict]:
    """Reads a file of records.

    Raises:
        RunError: there is none, or a line is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; collect finished runs first: wsl-d2 records FOLDER --records {path}")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}, line {number} is no JSON ({error}).") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise RunError(
                f"{path}, line {number} is no record, as `wsl-d2 records FOLDER --records FILE` writes them."
            )
        records.append(record)
    return records


def collect(folders: Iterable[Path], path: str | Path) -> list[dict]:
    """Adds the records of all finished runs, comparisons and studies below folders to a file, which it returns; those
    of a run, comparison or study that is collected again are replaced.

    Raises:
        RunError: a folder holds no record; nothing is written.
    """
    path = Path(path)
    rows = {_key(row): row for row in (read_records(path) if path.is_file() else [])}
    for folder in folders:
        found = [row for file in sorted(folder.rglob("*.json")) if (row := _read(folder, file)) is not None]
        if not found:
            raise RunError(f"{folder} holds no record.json, report.json or {GAINS}; is it the folder of finished runs?")
        rows |= {_key(row): row for row in found}
    records = [rows[key] for key in sorted(rows)]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in records))
    return records


def _key(row: dict) -> tuple[str, ...]:
    if row["kind"] == "run" and "stage" not in row:
        return row["kind"], row["name"], row["config_sha256"], str(row["seed"])
    return row["kind"], row["name"]


def _read(folder: Path, file: Path) -> dict | None:
    name = file.parent.relative_to(folder).as_posix()
    if file.name == "record.json":
        record = {key: value for key, value in json.loads(file.read_text()).items() if key not in _LEFT_OUT}
        cell = file.parent / "study_cell.json"
        if not cell.is_file():
            return {"kind": "run", **record}
        noted = json.loads(cell.read_text())
        own = {"name": name, "stage": noted["stage"], "values": noted["values"], "seconds": noted["seconds"]}
        return {"kind": "run", **record, **own}
    if file.name == GAINS:
        return {"kind": "comparison", "name": name, **_reduced(json.loads(file.read_text()))}
    if file.name == "report.json" and "analysis" in (content := json.loads(file.read_text())):
        return {"kind": "study", **content, "name": content["study"]}
    return None


def _reduced(comparison: dict) -> dict:
    """What a table shows of a comparison: AP, and the gains in it, also by size and supercategory."""

    def parts(row: dict) -> dict[str, dict]:
        sizes = {f"{size} objects": row[metric] for metric, size in SIZES.items() if metric in row}
        return sizes | row.get("supercategories", {})

    kept = ("num_images", "num_resamples", "seed_sd", "baselines", "iou_types", "iterations", "images_per_batch")
    types = comparison["iou_types"]
    return {
        **{key: comparison[key] for key in kept},
        "runs": {name: {t: run[t]["AP"] for t in types} for name, run in comparison["runs"].items()},
        "gains": [
            {"candidate": row["candidate"], "baseline": row["baseline"]}
            | {
                t: {key: row[t]["AP"][key] for key in _OF_GAIN}
                | {"verdict": row[t]["verdict"]}
                | {"parts": {name: {key: gain[key] for key in _OF_GAIN} for name, gain in parts(row[t]).items()}}
                for t in types
            }
            for row in comparison["gains"]
        ],
    }


def table_of_runs(records: Sequence[dict], results: Sequence[str], stage: str | None = None) -> str:
    """A row for each run that has the results.

    Args:
        records: of any kind.
        results: metrics, such as "bbox/AP".
        stage: of a study; all runs if None.

    Raises:
        RunError: no run has them.
    """
    runs = [row for row in records if row["kind"] == "run" and stage in (None, row.get("stage"))]
    chosen = [row for row in runs if all(row["results"].get(name) is not None for name in results)]
    if not chosen:
        names = sorted({name for row in runs for name in row["results"]})
        raise RunError(f"no run has all of {', '.join(results)}; there are {', '.join(names) or 'no runs'}.")
    rows = []
    for row in chosen:
        weights = row["weights"]["sha256"][:12] or row["weights"]["path"] or "none"
        values = [f"{row['results'][name]:.1f}" for name in results]
        rows.append(
            [row["name"], *values, weights, row["seed"], row["config_sha256"][:12], row["versions"].get("commit", "-")]
        )
    return markdown(["run", *results, "weights", "seed", "config", "commit"], rows)


def table_of_gains(records: Sequence[dict]) -> str:
    """A row for each arm of each comparison, the best first: its AP, and its gain over each baseline with the 95%
    interval; over trainings and images where the runs allow it, else over images.

    Raises:
        RunError: there is no comparison.
    """
    comparisons = [row for row in records if row["kind"] == "comparison"]
    if not comparisons:
        raise RunError("the records hold no comparison; finish the study, and collect its folder again.")
    types = comparisons[0]["iou_types"]
    baselines = comparisons[0]["baselines"]
    header = ["comparison", "start", *(f"{IOU_NAMES[t]} AP" for t in types)]
    header += [f"{IOU_NAMES[t]} AP over `{baseline}`" for t in types for baseline in baselines]
    rows = []
    for comparison in comparisons:
        gains = {(row["candidate"], row["baseline"]): row for row in comparison["gains"]}
        for arm, cells in sorted(comparison["runs"].items(), key=lambda item: -item[1][types[0]]["mean"]):
            aps = [mean_and_spread(cells[t]["mean"], cells[t]["sd"]) for t in types]
            over = [_gain(gains.get((arm, baseline), {}).get(t)) for t in types for baseline in baselines]
            rows.append([comparison["name"].removeprefix("report/"), f"`{arm}`", *aps, *over])
    if len(comparisons) == 1:
        header, rows = header[1:], [row[1:] for row in rows]
    return markdown(header, rows)


def table_of_parts(records: Sequence[dict]) -> str:
    """Where the gain of the first candidate of each comparison is: a row for each size of objects and supercategory.

    Raises:
        RunError: no comparison tells it.
    """
    rows = []
    header: list[str] = []
    for comparison in records:
        if comparison["kind"] != "comparison" or "parts" not in comparison["gains"][0][comparison["iou_types"][0]]:
            continue
        types, baselines = comparison["iou_types"], comparison["baselines"]
        candidate = comparison["gains"][0]["candidate"]
        gains = {row["baseline"]: row for row in comparison["gains"] if row["candidate"] == candidate}
        columns = [(t, baseline) for t in types for baseline in baselines]
        header = ["comparison", "of", *(f"{IOU_NAMES[t]} AP over `{baseline}`" for t, baseline in columns)]
        for part in gains[baselines[0]][types[0]]["parts"]:
            cells = [_gain(gains[baseline][t]["parts"][part]) for t, baseline in columns]
            if set(cells) != {"-"}:
                rows.append([f"{comparison['name'].removeprefix('report/')}, `{candidate}`", part, *cells])
    if not rows:
        raise RunError("the records hold no comparison that tells of its parts; collect its folder again.")
    return markdown(header, rows)


def table_of_means(records: Sequence[dict]) -> str:
    """The mean of each gain over the comparisons, such as those of several worlds or datasets, each of which counts as
    one; with its 95% interval by Student's t: of what another world like them would give on average. Detectors of
    other lengths of training have rows of their own.

    Raises:
        RunError: there are not two comparisons with a gain in common.
    """
    groups: dict[int, list[dict]] = {}
    for row in records:
        if row["kind"] == "comparison":
            groups.setdefault(row["iterations"], []).append(row)
    rows = []
    types = sorted({t for found in groups.values() for row in found for t in row["iou_types"]})
    for iterations, comparisons in sorted(groups.items()):
        gains = [{(row["candidate"], row["baseline"]): row for row in found["gains"]} for found in comparisons]
        for pair in gains[0] if len(gains) > 1 else []:
            if all(pair in found for found in gains):
                cells = [_mean_gain([found[pair].get(t) for found in gains]) for t in types]
                rows.append([f"`{pair[0]}`", f"`{pair[1]}`", f"{iterations:,}", len(gains), *cells])
    if not rows:
        raise RunError(
            f"the records hold {sum(map(len, groups.values()))} comparison(s) without a gain in common; a mean needs "
            "two that have one, of detectors that were trained for as many iterations."
        )
    return markdown(["start", "over", "iterations", "comparisons", *(f"{IOU_NAMES[t]} AP" for t in types)], rows)


def _mean_gain(gains: Sequence[dict | None]) -> str:
    if any(gain is None or gain["gain"] is None for gain in gains):
        return "-"
    mean, half_width = mean_interval(gain["gain"] for gain in gains if gain)
    return with_interval(mean, mean - half_width, mean + half_width)


def table_of_costs(records: Sequence[dict], results: Sequence[str], stage: str) -> str:
    """What runs cost, with those that they stand on: a row for each setting but the seed, the cheapest first.

    Args:
        records: of any kind.
        results: metrics, such as "bbox/AP".
        stage: of a study, whose runs have the results. What they stand on are the runs of its other stages with the
            same values on all of their axes, but those that have such results, too.

    Raises:
        RunError: no run of the stage has the results.
    """
    runs = [row for row in records if row["kind"] == "run" and "stage" in row]
    chosen: list[dict] = []
    others: list[dict] = []
    for row in runs:
        has_results = all(row["results"].get(name) is not None for name in results)
        if not has_results:
            others.append(row)
        elif row["stage"] == stage:
            chosen.append(row)
    if not chosen:
        known = ", ".join(sorted({row["stage"] for row in runs})) or "none"
        raise RunError(f"no run of stage {stage} has all of {', '.join(results)}; the stages of the records: {known}.")
    settings: dict[tuple, list[tuple[dict, dict[str, float]]]] = {}  # -> run, and stage -> minutes
    for run in chosen:
        minutes = {stage: run["seconds"] / 60}
        for other in others:
            if other["values"].items() <= run["values"].items():
                minutes[other["stage"]] = minutes.get(other["stage"], 0.0) + other["seconds"] / 60
        setting = tuple((axis, value) for axis, value in run["values"].items() if axis != "seed")
        settings.setdefault(setting, []).append((run, minutes))
    before = {name for members in settings.values() for _, minutes in members for name in minutes} - {stage}
    stages = [*sorted(before), stage]
    costs = {
        key: [sum(minutes.get(name, 0.0) for _, minutes in members) / len(members) for name in stages]
        for key, members in settings.items()
    }
    axes = [axis for axis, _ in next(iter(settings)) if len({dict(key).get(axis) for key in settings}) > 1]
    table = [
        [*(dict(key).get(axis, "-") for axis in axes), len(members)]
        + [f"{minutes:.1f}" for minutes in (*costs[key], sum(costs[key]))]
        + [f"{sum(run['results'][name] for run, _ in members) / len(members):.1f}" for name in results]
        for key, members in sorted(settings.items(), key=lambda item: sum(costs[item[0]]))
    ]
    return markdown([*axes, "runs", *(f"{name}, min" for name in stages), "in all, min", *results], table)


def _gain(gain: dict | None) -> str:
    if gain is None or gain["gain"] is None:  # of a baseline; of a size without objects
        return "-"
    shown = with_interval(gain["gain"], *shown_interval(gain))
    return shown + ("" if gain["method_interval"] else " over images")


def table_of_studies(records: Sequence[dict]) -> str:
    """The tables of all studies: each level of an axis with its result and its difference from the baseline, or each
    series with its slope; and sentences that say what it shows.

    Raises:
        RunError: there is no study.
    """
    from wsl_d2.report.study import heading_of_item, sentences_of_item, table_of_item

    studies = [row for row in records if row["kind"] == "study"]
    if not studies:
        raise RunError("the records hold no study with levels or scaling; finish it, and collect its folder again.")
    parts = []
    for study in studies:
        for item in study["analysis"]:
            told = "\n".join(f"- {sentence}" for sentence in sentences_of_item(item))
            title = f"{study['title']}: {heading_of_item(item)}"
            parts.append(f"{title}\n\n{markdown(*table_of_item(item))}\n\n{told}")
    return "\n\n".join(parts)


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [list(map(str, header)), ["---"] * len(header), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
