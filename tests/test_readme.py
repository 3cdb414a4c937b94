"""What the README names exists, and its Python runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["README.md", "datasets/README.md", "tools/requirements/README.md"])
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
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = next(block for block in re.findall(r" {3}```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    assert blocks
    exec("\n".join(line[3:] for line in code.splitlines()), {})
    dataset = HashtagDataset("datasets/mine/train")
    assert len(dataset) == 1 and dataset.num_labels > 900
