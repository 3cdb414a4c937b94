"""The kit for a GPU runs in small on a CPU; the views of the self-supervised peer."""

import json

import pytest
import torch
from benchmarks import gpu
from benchmarks.self_supervised import random_views


@pytest.mark.parametrize("only", ["fits", pytest.param("", marks=pytest.mark.long)])
def test_the_gpu_kit_in_small(tmp_path, capsys, only):
    gpu.main(["--small", "--minutes", "30", "--output", str(tmp_path / "gpu.json"), "--only", only])
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [row["name"] for row in results] == [step["name"] for step in gpu.plan_of(True) if only in step["name"]]
    assert not [row for row in results if "error" in row]
    assert all(value > 0 for row in results for value in row.get("images_per_second", {}).values())
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} | " in printed for row in results)


def test_what_has_no_time_is_named(tmp_path, capsys):
    gpu.main(["--small", "--minutes", "0", "--output", str(tmp_path / "gpu.json")])
    assert capsys.readouterr().out.count("left out: no time") == len(gpu.plan_of(True)) == len(gpu.plan_of(False)) - 2


def test_views_are_crops_in_other_colors_each_its_own():
    images = torch.arange(48.0).mul(5).expand(64, 3, 48, 48).clone()  # brighter to the right
    torch.manual_seed(0)
    views = random_views(images)
    assert views.shape == images.shape and 0 <= views.min() and views.max() <= 255
    slopes = views.diff(dim=-1).mean((1, 2, 3))
    assert (slopes > 0).any() and (slopes < 0).any()  # flipped or not
    assert len(views.mean((1, 2, 3)).unique()) == len(images)
    dark = random_views(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert dark.abs().max() == 0
