"""`wsl-d2 duplicates`: judgements are kept, results belong to their images and options, refusals write nothing."""

import csv
import functools
import html
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from wsl_d2.cli.main import main
from wsl_d2.duplicates import finder as finder_module
from wsl_d2.duplicates import images as images_module
from wsl_d2.duplicates import search as search_module

FASTER = Path(__file__).resolve().parents[2] / "configs" / "Base-RCNN-FPN.yaml"


@pytest.fixture()
def run(folders, capsys, monkeypatch):
    """Runs the verb in the folder of ev and pre; returns what it prints, or with a code the line of its refusal."""
    monkeypatch.chdir(folders)
    defaults = {"--pretraining": "pre", "--evaluation": "ev", "--output": "out", "--workers": 1}

    def call(*arguments, code=0, **others):
        options = defaults | {f"--{name.replace('_', '-')}": value for name, value in others.items()}
        given = arguments or [str(word) for name, value in options.items() if value != "" for word in (name, value)]
        capsys.readouterr()
        assert main(["duplicates", *map(str, given)]) == code
        printed = capsys.readouterr()
        if code:
            assert printed.out == "" and printed.err.strip().count("\n") == 0, printed
        return printed.err if code else printed.out

    return call


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def judge(path, **judgements):
    """Writes judgements of evaluation images behind their rows, as an editor does."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line + judgements.get(line.split(".")[0], "") for line in lines) + "\n")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_command_keeps_judgements(run, folders):
    assert "6 pairs; 6 of 6 evaluation images have a duplicate" in run()
    fresh = (folders / "out" / "pairs.csv").read_bytes()
    judge(folders / "out" / "pairs.csv", e0="no", e3="yes")
    judged = (folders / "out" / "pairs.csv").read_bytes()
    assert "6 pairs, 1 judged no; 5 of 6 evaluation images have a duplicate" in run()
    assert (folders / "out" / "pairs.csv").read_bytes() == judged != fresh
    # taken back by hand, and a column of the person's own
    table = rows(folders / "out" / "pairs.csv")
    with open(folders / "out" / "pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [*table[0], "note"], delimiter=";")
        writer.writeheader()
        writer.writerows(row | {"note": "look again", "judged": ""} for row in table if row["evaluation"] == "e0.jpg")
    run()
    found = {row["evaluation"]: row for row in rows(folders / "out" / "pairs.csv")}
    assert found["e0.jpg"]["judged"] == "" and found["e0.jpg"]["note"] == "look again"
    assert found["e3.jpg"]["judged"] == "yes" and len(found) == 6


def test_a_judgement_survives_without_its_pair(run, folders):
    run()
    judge(folders / "out" / "pairs.csv", e0="no", e5="no")
    assert "judgements of pairs that are not among them, kept in out/judgements.csv: 1" in run(min_score=0.98)
    assert "e5.jpg" not in (folders / "out" / "pairs.csv").read_text()
    run()
    assert {row["evaluation"] for row in rows(folders / "out" / "pairs.csv") if row["judged"] == "no"} == {
        "e0.jpg", "e5.jpg"}  # fmt: skip
    (folders / "out" / "pairs.csv").write_text((folders / "out" / "pairs.csv").read_text().replace(",no\n", ",\n"))
    for min_score in (0.98, 0.9999, 0.85):
        run(min_score=min_score)
    assert not any(row["judged"] for row in rows(folders / "out" / "pairs.csv"))  # taken back stays taken back


def test_keys_that_a_spreadsheet_took_for_numbers(run, folders):
    """000012 comes back as 12; the row is still known by its id."""
    for number, path in enumerate(sorted((folders / "ev").iterdir())):
        path.rename(folders / "ev" / f"{number:06d}.jpg")
    run()
    path = folders / "out" / "pairs.csv"
    judge(path, **{"000002": "no"})
    judged = path.read_text()
    path.write_text(judged.replace("00000", ""))
    run()
    assert path.read_text() == judged


@pytest.mark.parametrize("min_score", [0.97, 0.98, 0.999999])
def test_a_higher_min_score_gives_what_a_new_folder_gives(run, folders, min_score):
    run()
    again = run(min_score=min_score)
    new = run(min_score=min_score, output="new")
    assert again.replace("out/", "new/") == new
    assert content(folders / "out").keys() == content(folders / "new").keys()
    for name in ("pairs.csv", "pairs.html"):
        assert content(folders / "out").get(name) == content(folders / "new").get(name)


def other_evaluation(folders):
    (folders / "ev" / "e3.jpg").unlink()


def other_content(folders):
    path = folders / "pre" / "p1.jpg"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xd8")


def own_table(folders):
    (folders / "out" / "pairs.csv").write_text("evaluation,pretraining,judged\ne0.jpg,p0.jpg,perhaps\n")


def damaged_state(folders):
    (folders / "out" / "progress.json").write_text('{"done": 6, "damaged": [], "pairs": []}')


def rows_of_others(folders):
    (folders / "out" / "progress.json").unlink()
    (folders / "ev" / "e3.jpg").unlink()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (other_evaluation, {}, "out holds results of other evaluation images: images 6, .*, not images 5"),
        (other_content, {}, "out holds results of other pretraining images"),
        (None, {"min_score": 0.8}, "out holds pairs with a score of at least 0.85"),
        (own_table, {}, "out/pairs.csv, row 2, column judged: 'perhaps'"),
        (damaged_state, {}, "out/progress.json is damaged, or of another version"),
        (rows_of_others, {}, "out/pairs.csv, row 2, column id: a pair of other images"),
        (None, {"evaluation": "nowhere"}, "nowhere does not exist"),
        (None, {"pretraining": "nowhere"}, "nowhere does not exist"),
        (None, {"output": "ev/e0.jpg"}, "ev/e0.jpg is no folder"),
        (None, {"min_score": 0.9, "weights": "x.pth"}, "--config-file and --weights belong together"),
        (None, {"judged": "out/pairs.csv"}, "give either --judged and --correct alone, or"),
        (None, {"pretraining": "", "evaluation": "", "output": "", "judged": "x.csv"}, "--judged and --correct belong"),
        (None, {"config_file": FASTER, "weights": "out/pairs.csv"}, "is of a GeneralizedRCNN; features need"),
        (None, {"output": ""}, "give --pretraining, --evaluation and --output"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(run, folders, change, options, message):
    run()
    judge(folders / "out" / "pairs.csv", e0="no")
    if change:
        change(folders)
    before = content(folders / "out"), set(folders.iterdir())
    assert re.search(message, run(code=2, **options))
    assert (content(folders / "out"), set(folders.iterdir())) == before


@pytest.mark.parametrize("score", ["nan", "1.5", "high"])
def test_a_min_score_that_is_none(run, folders, score):
    with pytest.raises(SystemExit, match="2"):
        run(min_score=score)
    assert not (folders / "out").exists()


@pytest.mark.parametrize("option", ["pretraining", "evaluation"])
def test_images_none_of_which_can_be_decoded(run, folders, option):
    (folders / "bad").mkdir()
    (folders / "bad" / "a.jpg").write_bytes(b"no picture")
    assert "bad: none of its 1 images can be decoded, the first 'a.jpg' (unknown format" in run(
        **{option: "bad"}, code=2
    )
    assert not (folders / "out" / "pairs.csv").exists()


def test_what_was_left_out_is_said(run, folders):
    (folders / "pre" / "._p0.jpg").write_bytes(b"x")
    (folders / "pre" / "z.jpg").write_bytes(b"")
    (folders / "ev" / "cut.jpg").write_bytes((folders / "ev" / "e0.jpg").read_bytes()[:-100])
    for _ in range(2):
        printed = run()
        assert "6 of 6 evaluation images have a duplicate" in printed
        assert "pre: skipped, hidden file: 1" in printed
        assert "pre: cannot be decoded: 1, the first 'z.jpg' (empty: 0 bytes)" in printed
        assert "ev: cannot be decoded: 1, the first 'cut.jpg' (truncated" in printed


def test_results_inside_of_the_images(run, folders):
    """What the first call writes is no image of the second."""
    for _ in range(2):
        assert run(pretraining=".").startswith("12 pairs;")


def test_stopped_and_gone_on_with(run, folders, monkeypatch, capsys):
    monkeypatch.setattr(images_module, "_PART", 2)
    monkeypatch.setattr(search_module, "_SAVE_SECONDS", 0)
    find, seen = finder_module.DuplicateFinder.find, []

    def stopped(self, keys, *args):
        if len(seen) == 4:
            assert json.loads((folders / "out" / "progress.json").read_text())["done"] == 4
            raise KeyboardInterrupt
        seen.extend(keys)
        return find(self, keys, *args)

    monkeypatch.setattr(finder_module.DuplicateFinder, "find", stopped)
    assert "the same command goes on" in run(code=130)
    assert json.loads((folders / "out" / "progress.json").read_text())["done"] == 4
    monkeypatch.setattr(
        finder_module.DuplicateFinder, "find", lambda self, keys, *args: seen.extend(keys) or find(self, keys, *args)
    )
    run()
    assert seen == [f"p{number}.jpg" for number in range(6)]
    run(output="new")
    assert (folders / "out" / "pairs.csv").read_bytes() == (folders / "new" / "pairs.csv").read_bytes()


def read_dying_once(read, source):
    """Kills its process at p3.jpg of the first call."""
    flag = Path(read.args[0]) / "died"
    if source == "p3.jpg" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return read(source)


def test_processes_find_the_same_also_where_one_is_killed(run, folders, monkeypatch, caplog):
    monkeypatch.setattr(images_module, "_PART", 2)
    run(output="one")
    pre = images_module.open_images(folders / "pre")
    pre.read = functools.partial(read_dying_once, pre.read)
    search_module.find_duplicates(images_module.open_images(folders / "ev"), pre, folders / "two", workers=2)
    assert f"{folders / 'pre'}, images 2 to 3: the process that did this was killed" in caplog.text
    for name in ("pairs.csv", "progress.json"):
        assert (folders / "one" / name).read_bytes() == (folders / "two" / name).read_bytes()
    assert {path.name for path in (folders / "two").iterdir()} == {"pairs.csv", "progress.json"}


def test_a_finished_search_is_not_done_again(run, monkeypatch):
    run()
    monkeypatch.setattr(search_module, "map_parts", None)
    assert "6 pairs" in run()


def test_judgements_travel_with_pairs_csv(run, folders):
    run()
    judge(folders / "out" / "pairs.csv", e0="no")
    (folders / "lower").mkdir()
    shutil.copy(folders / "out" / "pairs.csv", folders / "lower")
    run(output="lower", min_score=0.8)
    assert [row["evaluation"] for row in rows(folders / "lower" / "pairs.csv") if row["judged"]] == ["e0.jpg"]


def test_lower_bound(run, folders):
    run()
    judge(folders / "out" / "pairs.csv", e0="no")
    (folders / "c.json").write_text(json.dumps({f"e{number}.jpg": number != 5 for number in range(6)}))
    printed = run("--judged", "out/pairs.csv", "--correct", "c.json")
    assert printed == "accuracy 83.33 of 6 images; at least 16.67 with the 5 duplicated images counted as wrong\n"
    (folders / "c.json").write_text(json.dumps({"e9.jpg": True}))
    assert "'e9.jpg' is no evaluation image" in run("--judged", "out/pairs.csv", "--correct", "c.json", code=2)


def test_a_dataset_and_a_folder(run, folders, hashtag_folder):
    (folders / "some").mkdir()
    from wsl_d2.data import HashtagDataset

    dataset = HashtagDataset(hashtag_folder)
    (folders / "some" / "seven.jpg").write_bytes(dataset[7]["image"])
    run(pretraining=hashtag_folder, evaluation="some")
    assert ("seven.jpg", "000007") in {(r["evaluation"], r["pretraining"]) for r in rows(folders / "out" / "pairs.csv")}


def test_the_page_tells_what_finds_a_pair_in_the_table(run, folders):
    """Row number, score, judgement and both keys stand under each pair; keys are written by strangers."""
    name = "<script>alert(1)" + 60 * "W" + ".jpg"
    (folders / "pre" / "p0.jpg").rename(folders / "pre" / name)
    run()
    judge(folders / "out" / "pairs.csv", e0="no")
    run()
    page, table = (folders / "out" / "pairs.html").read_text(), rows(folders / "out" / "pairs.csv")
    sections = re.findall(r"<section>(.*?)</section>", page)
    assert len(sections) == len(table) == 6 and "<script" not in page
    for number, (section, row) in enumerate(zip(sections, table, strict=True), start=2):
        judged = f", judged {row['judged']}" if row["judged"] else ""
        assert section.endswith(f"<p>row {number}, score {float(row['score']):.4f}{judged}</p>")
        captions = re.findall(r"<figcaption>(.*?)</figcaption>", section)
        assert captions == [html.escape(row["evaluation"]), html.escape(row["pretraining"])]
        assert section.count("data:image/jpeg;base64,") == 2 and html.escape(row["evaluation"]) in section


def test_features_are_part_of_the_results(run, folders, monkeypatch):
    """A backbone's candidates, and a refusal of results without them."""
    from wsl_d2.config import load_config
    from wsl_d2.modeling.hashtag_classifier import HashtagClassifier

    cfg = load_config("", ["MODEL.BACKBONE.NAME", "build_resnext26_8x4d_backbone", "MODEL.RESNETS.NORM", "BN"])
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.OUT_FEATURES = "HashtagClassifier", "cpu", ["res5"]
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES, cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 1, 64
    (folders / "c.yaml").write_text(cfg.dump())
    model = HashtagClassifier(cfg)
    torch.save({"model": model.state_dict()}, folders / "w.pth")
    assert "6 pairs" in run(config_file="c.yaml", weights="w.pth", workers=2)
    assert all(float(row["cosine"]) > 0.5 for row in rows(folders / "out" / "pairs.csv"))
    assert "out holds results of other features: config" in run(code=2)
