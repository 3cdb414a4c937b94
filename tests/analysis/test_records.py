"""Run folders, and which of them can be compared."""

import json
import random
import shutil

import pytest
import yaml
from detectron2.config import get_cfg

from wsl_d2 import add_wsl_config
from wsl_d2.analysis.records import RunError, check_comparable, initialization_of, read_metrics, read_run
from wsl_d2.report.records import table_of_costs, table_of_means
from wsl_d2.run_keys import KEYS_OF_INITIALIZATION, KEYS_OF_PLACE_AND_SPEED, flatten, is_among


def full_config():
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("t",), ("v",)
    return cfg


COUNTING = sorted(
    key for key in flatten(full_config()) if not is_among(key, KEYS_OF_PLACE_AND_SPEED + KEYS_OF_INITIALIZATION)
)


def another(value):
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 3
    if isinstance(value, str):
        return f"{value}_x"
    return "other" if value is None else [*value, 7]


def set_value(config: dict, key: str, change=another) -> None:
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    config[last] = change(config[last])


def write_run(folder, config: dict, record: bool = True, data=None):
    """As an engine leaves it; without a record as Detectron2 does."""
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if record:
        data = {"annotations of v": "abc"} if data is None else data
        (folder / "record.json").write_text(json.dumps({"config": flatten(config), "data": data}))
    return folder


@pytest.fixture()
def config():
    return yaml.safe_load(full_config().dump())


def compare(a, b):
    check_comparable({"imagenet": [read_run(a)], "wsl": [read_run(b)]})


@pytest.mark.parametrize("key", random.Random(0).sample(COUNTING, 30))
@pytest.mark.parametrize("record", [True, False])
def test_any_key_that_counts_is_refused(tmp_path, config, key, record):
    first = write_run(tmp_path / "a", config, record)
    second = shutil.copytree(first, tmp_path / "b")
    compare(first, second)
    changed = yaml.safe_load(yaml.safe_dump(config))
    set_value(changed, key)
    write_run(second, changed, record)
    with pytest.raises(RunError) as caught:
        compare(first, second)
    ours, theirs = flatten(changed)[key], flatten(config)[key]
    assert f"{key}: {theirs} in imagenet ({first}), {ours} in wsl ({second})" in str(caught.value)
    assert str(caught.value).count(" in imagenet (") == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [*KEYS_OF_INITIALIZATION, "OUTPUT_DIR", "WANDB.PROJECT", "SOLVER.CHECKPOINT_PERIOD"])
def test_initialization_place_and_speed_are_free(tmp_path, config, key):
    first = write_run(tmp_path / "a", config)
    changed = yaml.safe_load(yaml.safe_dump(config))
    set_value(changed, key)
    second = write_run(tmp_path / "b", changed)
    compare(first, second)
    told = initialization_of({"imagenet": [read_run(first)], "wsl": [read_run(second)]})
    assert set(told) == {key} & set(KEYS_OF_INITIALIZATION)


@pytest.mark.parametrize("order", [("scratch", "imagenet", "wsl"), ("imagenet", "scratch", "wsl")])
def test_what_random_weights_cannot_freeze_is_part_of_their_initialization(tmp_path, config, order):
    """FREEZE_AT and NORM are free between a run without weights and runs with them, and not among the latter."""

    def runs(**norms):
        found = {}
        for name in order:
            changed = yaml.safe_load(yaml.safe_dump(config))
            changed["MODEL"]["WEIGHTS"] = "" if name == "scratch" else f"{name}.pth"
            changed["MODEL"]["BACKBONE"]["FREEZE_AT"] = 0 if name == "scratch" else 2
            changed["MODEL"]["RESNETS"]["NORM"] = norms[name]
            found[name] = [read_run(write_run(tmp_path / name, changed))]
        return found

    equal = runs(scratch="SyncBN", imagenet="FrozenBN", wsl="FrozenBN")
    check_comparable(equal)
    told = initialization_of(equal)
    assert told["MODEL.RESNETS.NORM"] == {name: ["SyncBN" if name == "scratch" else "FrozenBN"] for name in order}
    assert told["MODEL.BACKBONE.FREEZE_AT"]["scratch"] == [0]
    with pytest.raises(RunError) as caught:
        check_comparable(runs(scratch="SyncBN", imagenet="FrozenBN", wsl="SyncBN"))
    assert str(caught.value).count(" in imagenet (") == 1
    assert "MODEL.RESNETS.NORM: 'FrozenBN' in imagenet" in str(caught.value)


def test_every_difference_is_listed(tmp_path, config):
    first = write_run(tmp_path / "a", config)
    for key in ("SOLVER.GAMMA", "MODEL.FPN.OUT_CHANNELS", "DATASETS.TEST"):
        set_value(config, key)
    second = write_run(tmp_path / "b", config, data={"annotations of v": "def", "another fact": "1"})
    with pytest.raises(RunError) as caught:
        compare(first, second)
    for part in ("SOLVER.GAMMA: 0.1 in", "MODEL.FPN.OUT_CHANNELS: 256 in", "DATASETS.TEST: ['v'] in"):
        assert part in str(caught.value)
    assert f"annotations of v: abc in imagenet ({first}), def in wsl ({second})" in str(caught.value)
    assert "another fact" not in str(caught.value)  # of the other run it is not known
    assert "Use --force" in str(caught.value)


def test_a_key_that_one_run_lacks_is_a_difference(tmp_path, config):
    first = write_run(tmp_path / "a", config)
    del config["SOLVER"]["EMA_DECAY"]
    with pytest.raises(RunError, match="SOLVER.EMA_DECAY: 0 in imagenet .*, not there in wsl"):
        compare(first, write_run(tmp_path / "b", config))


def test_the_record_and_the_yaml_spell_alike(tmp_path, config):
    """Tuples and lists, ints and whole floats; a run of Detectron2 beside one with a record."""
    config["SOLVER"]["STEPS"], config["SOLVER"]["GAMMA"] = [60, 80], 1
    first = write_run(tmp_path / "a", config, record=False)
    second = write_run(tmp_path / "b", config)
    flat = flatten(config) | {"SOLVER.STEPS": "(60, 80)", "SOLVER.GAMMA": "1.0"}
    (second / "record.json").write_text(json.dumps({"config": flat}))
    compare(first, second)


def test_the_record_counts_and_a_config_changed_after_the_run_is_said(tmp_path, config):
    first, second = write_run(tmp_path / "a", config), write_run(tmp_path / "b", config)
    set_value(config, "TEST.DETECTIONS_PER_IMAGE")
    set_value(config, "MODEL.WEIGHTS")
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    run = read_run(second)
    assert run.value("TEST.DETECTIONS_PER_IMAGE") == 100 and run.changed == {"TEST.DETECTIONS_PER_IMAGE": "203"}
    with pytest.raises(RunError, match="100 in .*b/record.json, 203 in config.yaml, which was changed after the run"):
        compare(first, second)


def test_an_older_record_leaves_config_yaml_to_count(tmp_path, config):
    first = write_run(tmp_path / "a", config, record=False)
    (first / "record.json").write_text(json.dumps({"config_sha256": "0", "data": {"annotations of v": "abc"}}))
    run = read_run(first)
    assert run.config == flatten(config) and run.data == {"annotations of v": "abc"} and run.changed == {}


def test_what_is_missing_or_damaged_is_named(tmp_path, config):
    folder = write_run(tmp_path / "a", config)
    (folder / "record.json").write_text("{")
    with pytest.raises(RunError, match="record.json cannot be read"):
        read_run(folder)
    (folder / "record.json").unlink()
    for text, message in (
        ("a: [", "cannot be read: while"),
        ("!!python/tuple [1]", "cannot be read"),
        ("3", "no config"),
    ):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(RunError, match=message) as caught:
            read_run(folder)
        assert "\n" not in str(caught.value)
    (folder / "config.yaml").unlink()
    with pytest.raises(RunError, match="config.yaml does not exist; finish the run with"):
        read_run(folder)


def test_metrics_of_a_resumed_run_count_the_last_record(tmp_path):
    lines = [
        {"iteration": 0, "a": 1.0},
        {"iteration": 20, "a": 2.0},
        {"iteration": 20, "a": 3.0},
        {"iteration": 40, "b": 1},
        {"no": "iteration"},
        [],
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 60, "a"')
    assert read_metrics(tmp_path) == {"a": ([0, 20], [1.0, 3.0]), "b": ([40], [1])}


def test_the_mean_of_gains_counts_each_comparison_as_one():
    def comparison(world, gain, iterations):
        row = {"candidate": "wsl", "baseline": "imagenet", "bbox": {"gain": gain}}
        alone = {"candidate": "wsl", "baseline": f"only_{world}", "bbox": {"gain": 50.0}}
        of = {"kind": "comparison", "name": f"report/world={world}", "iou_types": ["bbox"], "iterations": iterations}
        return of | {"gains": [row, alone]}

    rows = [comparison(world, gain, 300) for world, gain in enumerate((8.0, 9.0, 10.0))]
    table = table_of_means([*rows, comparison(0, 50.0, 900)])  # the one of longer trainings is not mixed in
    assert table.splitlines()[2:] == ["| `wsl` | `imagenet` | 300 | 3 | +9.0 [+6.5,\xa0+11.5] |"]  # t(2) = 4.30, sd 1
    with pytest.raises(RunError, match=r"1 comparison\(s\) without a gain in common; a mean needs two"):
        table_of_means(rows[:1])


def test_a_run_costs_what_it_stands_on():
    def run(stage, seconds, ap=None, **values):
        results = {} if ap is None else {"bbox/AP": ap}
        return {"kind": "run", "stage": stage, "values": values, "seconds": seconds, "results": results}

    runs = [run("pretrain", 600 + 120 * seed, arm="wsl", seed=seed) for seed in (0, 1)]
    runs += [run("detect", 60.0 * n, 20.0 + seed, n=n, arm="wsl", seed=seed) for n in (1, 3) for seed in (0, 1)]
    runs += [run("detect", 60.0, 5.0, n=1, arm="scratch", seed=0)]
    runs += [run("other_detectors", 6000.0, 9.0, arm=arm, seed=0) for arm in ("wsl", "scratch")]  # no part of these
    table = table_of_costs(runs, ["bbox/AP"], "detect").splitlines()
    assert table[0] == "| n | arm | runs | pretrain, min | detect, min | in all, min | bbox/AP |"
    assert table[2:] == [
        "| 1 | scratch | 1 | 0.0 | 1.0 | 1.0 | 5.0 |",
        "| 1 | wsl | 2 | 11.0 | 1.0 | 12.0 | 20.5 |",
        "| 3 | wsl | 2 | 11.0 | 3.0 | 14.0 | 20.5 |",
    ]
    with pytest.raises(
        RunError, match="no run of stage probe has all of bbox/AP; the stages of the records: detect, oth"
    ):
        table_of_costs(runs, ["bbox/AP"], "probe")
