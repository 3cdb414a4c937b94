"""What a run can do beside training: average weights, compile, tell its utilization, go to a cluster."""

import hashlib
import json
import re
import sys
import time
from importlib import metadata

import pytest
import torch
import write_tables
from command_line import wsl_d2
from training_runs import INJECT, ROOT, losses, merged_records, train, train_together, weights


def test_the_average_is_evaluated_and_exported(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__EMA_DECAY=0.5)
    last = merged_records(tmp_path)
    assert last["hashtag_ema/num_images"] == 20 and 0 <= last["hashtag_ema/top1"] <= 100
    plain, averaged = (torch.load(tmp_path / f"backbone{end}.pth", weights_only=True)["model"] for end in ("", "_ema"))
    assert plain.keys() == averaged.keys()
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain if name.endswith("conv1.weight"))


def test_a_compiled_backbone_computes_the_same_under_the_same_names(datasets, whole_run, tmp_path):
    train(
        datasets, tmp_path, MODEL__COMPILE__ENABLED=True, MODEL__COMPILE__BACKEND="aot_eager", SOLVER__TOTAL_IMAGES=48
    )
    ours, theirs = losses(tmp_path), losses(whole_run)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert weights(tmp_path).keys() == weights(whole_run).keys()


def test_utilization_and_waiting_are_recorded(datasets, tmp_path):
    run = train(datasets, tmp_path, SOLVER__PEAK_TFLOPS=1.0, SOLVER__TOTAL_IMAGES=80)
    assert re.search(
        r"80 images seen, [\d.,]+ images/s, [\d.]+% waiting for data, [\d.]+% MFU, 0 images skipped, 0 steps skipped",
        run.stdout,
    )
    last = merged_records(tmp_path)
    assert 0 < last["mfu_percent"] < 100 and 0 <= last["data_wait_percent"] < 100
    # 3 x 2 x multiply-adds of the network on 32 x 32 pixels, about 5e6, at the recorded speed of one process
    assert last["mfu_percent"] == pytest.approx(100 * last["images_per_second"] * 6 * 5e6 / 1e12, rel=0.5)


def test_wandb_that_is_not_installed_is_one_clear_error(datasets, tmp_path):
    missing = INJECT + '\nsys.modules["wandb"] = None\nrun_command_line()\n'
    run = train(datasets, tmp_path, check=False, script=missing, WANDB__PROJECT="mine")
    assert run.returncode == 2 and "WANDB.PROJECT is 'mine', but wandb is not installed" in run.stderr


def test_a_run_on_a_cluster_is_the_run_of_its_processes(datasets, tmp_path):
    """Through submitit's executor for this machine; SLURM's differs in how the processes are started."""
    train_together(datasets, tmp_path / "two", 2)
    flags = ["--cluster", "local", "--cluster-parameter", "tasks_per_node=2", "--cluster-parameter", "timeout_min=5"]
    out = tmp_path / "out"
    run = train(datasets, out, launcher=(sys.executable,), flags=flags)
    assert re.search(rf"job \d+; its logs are in {out}/submitit", run.stdout)
    assert (out / "submitit").stat().st_mode & 0o077 == 0
    deadline = time.monotonic() + 90
    while not (out / "backbone.pth").exists():
        logs = [path.read_text() for path in (out / "submitit").glob("*.err")]
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)
    assert losses(out) == losses(tmp_path / "two")


OWN_LOSS = f"""{INJECT}
from detectron2.modeling import META_ARCH_REGISTRY
from wsl_d2.modeling import HashtagClassifier

@META_ARCH_REGISTRY.register()
class Twice(HashtagClassifier):
    def forward(self, batch):
        found = super().forward(batch)
        return {{"loss_twice": 2 * found["loss_hashtag"]}} if self.training else found

run_command_line()
"""


def test_a_projects_own_classifier_trains_as_ours(whole_run, datasets, tmp_path):
    train(datasets, tmp_path, script=OWN_LOSS, MODEL__META_ARCHITECTURE="Twice")
    assert losses(tmp_path)[0] == 2 * losses(whole_run)[0] and (tmp_path / "backbone.pth").exists()


def test_slurm_without_slurm_is_one_clear_error(datasets, tmp_path):
    script = INJECT + '\nos.environ["PATH"] = "/nowhere"\nrun_command_line()\n'
    run = train(datasets, tmp_path, check=False, script=script, flags=["--cluster", "slurm"])
    assert run.returncode == 2 and "--cluster slurm needs SLURM's commands" in run.stderr


def test_a_run_leaves_its_record(whole_run, datasets, tmp_path):
    record = json.loads((whole_run / "record.json").read_text())
    assert record["seed"] == 0 and record["iterations"] == 30 and record["processes"] == 1
    assert record["results"]["hashtag/num_images"] == 20 and record["weights"] == {"path": "", "sha256": ""}
    assert len(record["data"]["SHA-256 of the shards"]) == 64 and record["versions"]["torch"] == metadata.version(
        "torch"
    )
    weights_path = whole_run / "backbone.pth"
    train(datasets, tmp_path / "again", SOLVER__LOG_PERIOD=10, DATALOADER__NUM_WORKERS=1)
    train(datasets, tmp_path / "other", MODEL__WEIGHTS=str(weights_path))
    again, other = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("again", "other"))
    assert again["config_sha256"] == record["config_sha256"] != other["config_sha256"]
    assert other["weights"]["sha256"] == hashlib.sha256(weights_path.read_bytes()).hexdigest()


def test_records_become_a_table_that_can_be_checked(whole_run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "r.jsonl"
    shown = ["--table", "runs", "--results", "hashtag/top1", "hashtag/num_images"]
    printed = wsl_d2("records", whole_run, "--records", rows, *shown)
    top1 = json.loads((whole_run / "record.json").read_text())["results"]["hashtag/top1"]
    assert f"| {top1:.1f} | 20.0 | none | 0 |" in printed
    page = tmp_path / "page.md"
    page.write_text(f"a\n<!-- TABLE: wsl-d2 records --records {rows} {' '.join(shown)} -->\n\n<!-- /TABLE -->\nb\n")
    with pytest.raises(SystemExit, match="out of date"):
        write_tables.main([str(page), "--check"])
    write_tables.main([str(page)])
    assert printed in page.read_text() and page.read_text().startswith("a\n<!-- TABLE")
    write_tables.main([str(page), "--check"])
    wsl_d2("records", whole_run, "--records", rows)
    assert len(rows.read_text().splitlines()) == 1
    assert "holds no record.json" in wsl_d2("records", tmp_path / "nothing", "--records", rows, code=2)
    assert "no run has all of top7; there are hashtag/" in wsl_d2(
        "records", "--records", rows, "--table", "runs", "--results", "top7", code=2
    )
