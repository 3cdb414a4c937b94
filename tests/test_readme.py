"""What the README names exists, and its Python runs."""

import ast
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import draw_front_page
import pyarrow
import pytest
import torch
import torchvision
import write_tables
from command_line import commands_of, wsl_d2
from pyarrow import parquet
from toy_data import jpeg
from toy_detections import write_own_data

from wsl_d2.cli.main import build_parser
from wsl_d2.errors import UserError

ROOT = Path(__file__).parents[1]


DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("[a-z]*/README.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_named_exists(document):
    text = (ROOT / document).read_text()
    named = set(
        re.findall(r"(?<![\w/.-])((?:wsl_d2|tools|configs|tests|datasets/prepare|datasets/mini)[\w/.-]*)", text)
    )
    paths = {name.rstrip(".") for name in named if "/" in name and "..." not in name}
    assert paths or document != "README.md"
    missing = [name for name in sorted(paths) if not (ROOT / name).exists()]
    assert not missing


def test_the_shard_example_runs_as_pasted(tmp_path, monkeypatch):

    from wsl_d2.data import HashtagDataset

    monkeypatch.chdir(tmp_path)
    Path("photo1.jpg").write_bytes(jpeg(0))
    text = (ROOT / "datasets" / "README.md").read_text()
    exec(next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "write_shard" in block), {})
    dataset = HashtagDataset("datasets/mine/train")
    assert len(dataset) == 1 and dataset.num_labels > 900


def test_tables_are_what_their_commands_print(monkeypatch):
    monkeypatch.chdir(ROOT)
    write_tables.main(["--check", *(str(ROOT / document) for document in DOCUMENTS)])


def test_the_picture_shows_the_records():
    draw_front_page.main(["--check"])


def test_wsl_weights_in_a_detector_as_pasted(tmp_path):
    """With the file from a mirror; its weights are 0, its name and shapes those of the public one."""
    section = (ROOT / "README.md").read_text().split("### WSL weights in my detector")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with torch.device("meta"):
        network = torchvision.models.resnext101_32x8d()
    path = mirror / "ig_resnext101_32x8-c38310e5.pth"
    torch.save({name: torch.zeros_like(tensor, device="cpu") for name, tensor in network.state_dict().items()}, path)
    (mirror / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    environment = os.environ | {"WSL_D2_WEIGHTS_MIRROR": str(mirror), "WSL_D2_CACHE": str(tmp_path / "cache")}
    try:
        for script in (code, code.replace("wsl://resnext101_32x8d", str(path))):
            (tmp_path / "detector.py").write_text(script)
            result = subprocess.run(
                [sys.executable, "detector.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert result.stdout == "520 tensors loaded\n", result.stderr
    finally:
        shutil.rmtree(mirror)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder as someone has it who follows the README: photos/, posts.parquet, train.json and val.json."""
    root = tmp_path_factory.mktemp("own")
    write_own_data(root, "photos")
    keys = sorted(path.stem for path in (root / "photos").iterdir())
    tags = [["dog", "love"] if i % 2 else ["cats"] for i in range(len(keys))]
    parquet.write_table(pyarrow.table({"key": keys, "hashtags": tags}), root / "posts.parquet")
    return root


def test_pretrain_on_my_photos_as_pasted(own_data):
    """With options at the ends that make it small; tests/study/test_gain.py runs the quickstart after it."""
    run = functools.partial(wsl_d2, cwd=own_data)
    pretraining, detector, _, check, _ = commands_of("README.md")
    small = ["--image-size", "32", "--total-images", "16", "--batch-size", "8", "--held-out", "0.3"]
    run(*pretraining, *small)
    folders = [[f"gain_{part}", str(own_data / f"{part}.json"), str(own_data / "photos")] for part in ("train", "val")]
    keys = {"COCO_FOLDERS": folders, "TRAIN": "('gain_train',)", "TEST": "('gain_val',)"}
    size = "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 INPUT.MASK_FORMAT bitmask SOLVER.IMS_PER_BATCH 2".split()
    length = "SOLVER.MAX_ITER 1 SOLVER.STEPS () MODEL.ROI_HEADS.NUM_CLASSES 4 MODEL.DEVICE cpu".split()
    run(*detector, *(text for key, value in keys.items() for text in (f"DATASETS.{key}", str(value))), *size, *length)
    assert "train.json" in run(*check)


@pytest.mark.parametrize("document", [*DOCUMENTS, "--help"])
def test_every_command_line_is_one_that_the_program_takes(document, capsys):
    for words in commands_of(document):
        try:
            build_parser().parse_args(words)
        except UserError as error:
            pytest.fail(f"{document}: wsl-d2 {shlex.join(words)}: {error}")
        except SystemExit as stop:
            assert stop.code == 0, capsys.readouterr().err


def test_the_words_of_the_troubleshooting_are_those_of_the_program():
    said = []
    for path in (ROOT / "wsl_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    section = (ROOT / "configs" / "README.md").read_text().split("## When something goes wrong")[1]
    quotes = re.findall(r"^\| `(.+?)` \|", section, re.M)
    parts = [[part for part in quote.split("…") if part.strip()] for quote in quotes]
    assert len(quotes) == 20
    assert not [
        quote for quote, part in zip(quotes, parts, strict=True) if not any(all(p in s for p in part) for s in said)
    ]
