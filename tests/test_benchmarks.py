"""The kit for a GPU runs in small on a CPU."""

import json

import pytest
from benchmarks import gpu


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
