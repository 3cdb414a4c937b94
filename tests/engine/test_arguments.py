"""The command line of a run: Detectron2's arguments with their meanings, and ours."""

import argparse

import pytest
from detectron2.engine import default_argument_parser

from wsl_d2.engine.arguments import add_arguments


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_detectron2s_arguments_have_their_names_and_defaults():
    theirs, ours = vars(default_argument_parser().parse_args([])), vars(parse())
    assert {name: ours[name] for name in theirs} == theirs


def test_detectron2s_command_line_is_read_alike():
    line = "--config-file a.yaml --resume --num-gpus 8 --num-machines 2 --machine-rank 1 SOLVER.BASE_LR 0.1 SEED 3"
    theirs, ours = vars(default_argument_parser().parse_args(line.split())), vars(parse(*line.split()))
    assert {name: ours[name] for name in theirs} == theirs
    assert ours["opts"] == ["SOLVER.BASE_LR", "0.1", "SEED", "3"]


def test_settings_of_a_cluster_are_numbers_where_they_can_be():
    flags = [f"--cluster-parameter={text}" for text in ("nodes=2", "mem_gb=1.5", "slurm_partition=gpu", "a=b=c", "e=")]
    assert parse("--cluster", "slurm", *flags).cluster_parameter == [
        ("nodes", 2),
        ("mem_gb", 1.5),
        ("slurm_partition", "gpu"),
        ("a", "b=c"),
        ("e", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster-parameter", "nodes"], "'nodes' is not of the form NAME=VALUE"),
        (["--cluster", "cloud"], "invalid choice: 'cloud'"),
        (["--images-per-second", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err
