"""Runs on a cluster, without one: what is submitted, and what a job does when it is stopped."""

import subprocess
import sys

import pytest

from wsl_d2.engine import cluster
from wsl_d2.engine.cluster import ClusterJob, submit, without_cluster_options
from wsl_d2.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--cluster slurm --config-file a.yaml SEED 1", "--config-file a.yaml SEED 1"),
        ("--cluster=slurm --cluster-parameter=nodes=2 --resume", "--resume"),
        ("--resume --cluster-parameter nodes=2 --cluster slurm", "--resume"),
        ("--config-file a.yaml", "--config-file a.yaml"),
    ],
)
def test_a_job_gets_the_command_line_without_the_options_of_submitting(arguments, expected):
    assert without_cluster_options(arguments.split()) == expected.split()


@pytest.fixture()
def started(monkeypatch, tmp_path):
    """Stands in for training and for SLURM: `started.code` is the exit status of the run."""
    pytest.importorskip("submitit")

    class Started:
        code = None
        arguments = None
        commands: list = []

    def run(args):
        Started.arguments = args
        if Started.code is not None:
            raise SystemExit(Started.code)

    monkeypatch.setattr(cluster, "run", run)
    monkeypatch.setattr(subprocess, "run", lambda command, check: Started.commands.append(command))
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment.__init__", lambda self: None)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment.export", lambda self, **_: None)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    Started.commands = []
    return Started


def test_a_job_always_resumes(started, tmp_path):
    ClusterJob(["--config-file", "a.yaml"], str(tmp_path))()
    assert started.arguments.resume and started.arguments.config_file == "a.yaml" and started.commands == []
    assert ClusterJob(["--resume"], ".").arguments == ["--resume"]


def test_a_stopped_job_requeues_itself_once(started, tmp_path, monkeypatch):
    job = ClusterJob([], str(tmp_path))
    started.code = 75
    job()
    assert started.commands == [["scontrol", "requeue", "17"]]
    monkeypatch.setenv("RANK", "1")
    job()
    assert len(started.commands) == 1
    started.code = 2
    with pytest.raises(SystemExit):
        job()
    assert len(started.commands) == 1


def test_what_is_missing_for_submitting_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no sbatch on the PATH"):
        submit([], tmp_path / "jobs", "slurm", {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="--cluster needs submitit; run `pip install submitit`"):
        submit([], tmp_path / "jobs", "local", {})
    assert not (tmp_path / "jobs").exists()
