"""What the README names exists, and its Python runs."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

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
