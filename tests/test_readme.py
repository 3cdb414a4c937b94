"""What the README names exists, and its Python runs."""

import hashlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from wsl_d2.cli.main import VERBS, build_parser
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
    from toy_data import jpeg

    from wsl_d2.data import HashtagDataset

    monkeypatch.chdir(tmp_path)
    Path("photo1.jpg").write_bytes(jpeg(0))
    text = (ROOT / "datasets" / "README.md").read_text()
    exec(next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "write_shard" in block), {})
    dataset = HashtagDataset("datasets/mine/train")
    assert len(dataset) == 1 and dataset.num_labels > 900


def test_tables_are_what_their_commands_print():
    subprocess.run([sys.executable, "tools/write_tables.py", "--check", *DOCUMENTS], cwd=ROOT, check=True)


def test_the_picture_shows_the_records():
    subprocess.run([sys.executable, "tools/draw_front_page.py", "--check"], cwd=ROOT, check=True)


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


def commands_of(document):
    """The lines of a README's code blocks that call `wsl-d2` or `tools/train_net.py`, whole, without comments."""
    text = examples_of_help() if document == "--help" else (ROOT / document).read_text()
    blocks = "".join(code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind != "python")
    for line in re.findall(r".*(?:wsl-d2|train_net\.py) .*", blocks.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word in ("wsl-d2", "tools/train_net.py")]
        if starts:
            ends = [i for i, word in enumerate(words) if word in ("&&", "|", ">", "&", ";") and i > starts[0]]
            chosen = words[starts[0] + 1 : (ends or [None])[0]]
            yield chosen if words[starts[0]] == "wsl-d2" else ["train", *chosen]


def examples_of_help():
    verbs = [verb for entry in VERBS.values() for verb in (entry[1].values() if isinstance(entry, tuple) else [entry])]
    return "".join(f"```\n{inspect.cleandoc(verb.run.__doc__)}\n```\n" for verb in verbs)


@pytest.mark.parametrize("document", [*DOCUMENTS, "--help"])
def test_every_command_line_is_one_that_the_program_takes(document, capsys):
    for words in commands_of(document):
        try:
            build_parser().parse_args(words)
        except UserError as error:
            pytest.fail(f"{document}: wsl-d2 {shlex.join(words)}: {error}")
        except SystemExit as stop:
            assert stop.code == 0, capsys.readouterr().err
