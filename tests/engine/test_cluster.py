"""Runs on a cluster, without one: what is submitted, and what a job does when it is stopped."""

import os
import signal
import subprocess
import sys

import pytest

from wsl_d2.engine import cluster, main
from wsl_d2.engine.cluster import ClusterJob, submit, without_cluster_options
from wsl_d2.engine.signals import Stopped
from wsl_d2.errors import ConfigError, LostProcessError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--cluster slurm --config-file a.yaml SEED 1", "--config-file a.yaml SEED 1"),
        ("--cluster=slurm --cluster-parameter=nodes=2 --resume", "--resume"),
        ("--resume --cluster-parameter nodes=2 --cluster slurm", "--resume"),
        ("--cluster slurm --max-restarts 5 --resume", "--resume"),
        ("--config-file a.yaml", "--config-file a.yaml"),
    ],
)
def test_a_job_gets_the_command_line_without_the_options_of_submitting(arguments, expected):
    assert without_cluster_options(arguments.split()) == expected.split()


@pytest.fixture()
def started(monkeypatch, tmp_path):
    """Stands in for training and for SLURM: `started.end` is raised at the end of the run."""
    pytest.importorskip("submitit")

    class Started:
        end = None
        arguments = None
        commands: list = []

    def run(args):
        Started.arguments = args
        if Started.end is not None:
            raise Started.end

    def call(command, **_):
        Started.commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setattr(cluster, "stop_at_once", lambda numbers: {})
    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment.__init__", lambda self: None)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment.export", lambda self, **_: None)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.chdir(tmp_path)
    Started.commands = []
    return Started


def test_a_job_always_resumes(started, tmp_path):
    ClusterJob(["--config-file", "a.yaml"], str(tmp_path))()
    assert started.arguments.resume and started.arguments.config_file == "a.yaml" and started.commands == []
    assert ClusterJob(["--resume"], ".").arguments == ["--resume"]
    assert ClusterJob(["--overwrite"], ".").arguments == ["--resume"]  # it was removed when the job was submitted


@pytest.mark.parametrize(
    ("number", "environ", "commands"),
    [
        (signal.SIGUSR2, {}, [["scontrol", "requeue", "17"]]),
        (signal.SIGUSR1, {"SLURM_PROCID": "0"}, [["scontrol", "requeue", "17"]]),
        (signal.SIGUSR1, {"SLURM_PROCID": "1"}, []),
        (signal.SIGUSR1, {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}, [["scontrol", "requeue", "15_2"]]),
        (signal.SIGTERM, {}, []),  # scancel
        (signal.SIGINT, {}, []),
    ],
)
def test_a_job_that_is_out_of_time_requeues_itself_once(started, tmp_path, monkeypatch, number, environ, commands):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    started.end = Stopped(number)
    with pytest.raises(Stopped) as stop:
        ClusterJob([], str(tmp_path))()
    assert started.commands == commands and stop.value.code == (130 if number == signal.SIGINT else 75)


def test_a_mistake_in_a_job_is_one_line(started, tmp_path, capsys):
    for error, code in ((ConfigError("no such\nkey"), 2), (LostProcessError("rank 1"), 1)):
        started.end = error
        with pytest.raises(SystemExit) as end:
            ClusterJob([], str(tmp_path))()
        assert end.value.code == code and started.commands == []
    assert capsys.readouterr().err == "wsl-d2: no such key\nwsl-d2: rank 1\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "--cluster slurm needs the time limit of a job, in minutes: --cluster-parameter timeout_min=1440"),
        ({"timeout_min": 2}, "timeout_min=2 is no longer than slurm_signal_delay_s=120"),
        ({"timeout_min": 5, "slurm_partitio": "gpu"}, "Unknown argument 'partitio'"),
        ({"timeout_min": 5, "mem_gb": "much"}, "mem_gb"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_submitted(monkeypatch, tmp_path, parameters, message):
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ConfigError, match=message):
        submit([], tmp_path / "jobs", "slurm", parameters)


def test_what_is_missing_for_submitting_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no sbatch on the PATH"):
        submit([], tmp_path / "jobs", "slurm", {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="--cluster needs submitit; run `pip install submitit`"):
        submit([], tmp_path / "jobs", "local", {})
    assert not (tmp_path / "jobs").exists()
