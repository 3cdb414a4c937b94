"""What the command line answers to words that it does not know."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsl_d2.cli.main import VERBS, main
from wsl_d2.cli.verb import Parser, read_user_text


def answer(capsys, *words) -> str:
    """The one line that a mistaken call prints."""
    try:
        status = main(list(words))
    except SystemExit as end:
        status = end.code
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1, line
    return line.strip()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "pretrain photos --output run --architecure resnext50_32x4d",
            "wsl-d2 pretrain: unrecognized arguments: --architecure resnext50_32x4d; did you mean --architecture? "
            "(see wsl-d2 pretrain --help)",
        ),
        (
            "pretrain photos --outptu run",
            "wsl-d2 pretrain: the following arguments are required: --output; unknown option --outptu; did you mean "
            "--output? (see wsl-d2 pretrain --help)",
        ),
        ("data check a.json b --secnds=3", "wsl-d2 data check: unrecognized arguments: --secnds=3; did you mean"),
        ("weights list --zzz", "wsl-d2 weights list: unrecognized arguments: --zzz (see wsl-d2 weights list --help)"),
    ],
)
def test_an_unknown_option_is_answered_by_its_verb(capsys, words, told):
    assert answer(capsys, *words.split()).startswith(told)


@pytest.mark.parametrize(
    ("words", "near", "see"),
    [
        ("pretrian photos", "pretrain", "wsl-d2 --help"),
        ("data chek a.json", "check", "wsl-d2 data --help"),
        ("weights convert a.pth b.pth --to torchvison", "torchvision", "wsl-d2 weights convert --help"),
    ],
)
def test_a_word_that_is_nearly_known_is_suggested(capsys, words, near, see):
    assert answer(capsys, *words.split()).endswith(f"; did you mean {near}? (see {see})")


@pytest.mark.parametrize("option", ["--dry-run", "--config-file=x.yaml"])
def test_options_after_key_value_pairs_are_named(capsys, option):
    told = answer(capsys, "train", "MODEL.DEVICE", "cpu", option, "SEED", "1")
    assert (
        told == f"wsl-d2 train: {option.partition('=')[0]} comes after KEY VALUE pairs; give all options before them."
    )


def test_a_key_without_a_value_is_named(capsys):
    told = "wsl-d2 train: a KEY VALUE pair is incomplete: SEED is the last of 3 words; give pairs such as SEED 1."
    assert answer(capsys, "train", "MODEL.DEVICE", "cpu", "SEED") == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("hashtags vocabulary --vocabulary 1.5k --output s3://b/v.json", "is a URL; give a local path"),
        ("data report s3://b/train --output page.html", "is a URL; give a local path"),
        ("data make posts.jsonl --images photos --vocabulary v.json --output=", "a path is empty"),
        ("predict= run photos --output=", "a path is empty"),
        ("study a.yaml --cluster-parameter mem_gb=8", "--cluster-parameter is for --cluster"),
        (
            "data from-folders photos --output out --runner-parameter mem_gb=8",
            "--runner-parameter is for --runner slurm",
        ),
    ],
)
def test_paths_and_options_that_would_be_taken_for_something_else(capsys, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in answer(capsys, *words.replace("predict=", "predict").split())
    assert not list(tmp_path.iterdir())


def test_the_help_shows_every_default(capsys):
    shown = 0
    for entry in VERBS.values():
        for verb in entry[1].values() if isinstance(entry, tuple) else [entry]:
            parser = Parser(prog="wsl-d2")
            verb.arguments(parser)
            text = " ".join(parser.format_help().split())
            for action in parser._actions:
                if type(action.default) in (int, float):
                    assert f"{action.help} (default: {action.default})" in text, action.option_strings
                    shown += action.default == 0
    assert shown > 5  # 0 is a default, too


def test_a_tilde_that_the_shell_left_is_the_home(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/a.json cannot be read" in answer(capsys, "data", "check", "~/a.json", "photos")
    assert f"{tmp_path}/ds" in answer(capsys, "data", "index", "~/ds", "--vocabulary", "~/v.json").replace(
        "v.json", "ds"
    )


def test_a_text_file_that_is_not_utf_8_is_named(capsys, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9")
    (tmp_path / "photos").mkdir()
    listed = str(tmp_path / "list.txt")
    told = f"{listed} is no UTF-8 text"
    assert told in answer(
        capsys, "data", "from-folders", str(tmp_path), "--files", listed, "--output", str(tmp_path / "o")
    )
    words = (
        "hashtags",
        "vocabulary",
        "--vocabulary",
        "mine",
        "--synsets",
        listed,
        "--output",
        str(tmp_path / "v.json"),
    )
    assert told in answer(capsys, *words)


def test_the_first_word_behind_a_byte_order_mark_is_a_word(tmp_path):
    (tmp_path / "synsets.txt").write_bytes(b"\xef\xbb\xbfn02084071 dog\r\n")
    assert read_user_text(tmp_path / "synsets.txt") == "n02084071 dog\n"


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"\xff"])
def test_a_line_that_is_no_record_is_named(capsys, tmp_path, line):
    (tmp_path / "r.jsonl").write_bytes(b'{"kind": "study", "name": "a"}\n' + line + b"\n")
    assert "r.jsonl, line 2 is no " in answer(capsys, "records", "--records", str(tmp_path / "r.jsonl"))


def test_a_study_file_that_is_not_utf_8_is_named(capsys, tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"title: caf\xe9\n")
    assert "s.yaml: not a readable study file" in answer(capsys, "study", str(tmp_path / "s.yaml"), "--plan")


def test_a_full_disk_is_named(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "a.jsonl").write_text('{"key": "1", "hashtags": ["dog"]}')
    told = answer(capsys, "hashtags", "count", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o"))
    assert told == f"wsl-d2 hashtags count: {tmp_path}/o/plan.json: No space left on device"


def test_a_terminal_of_ascii_alone_shows_what_it_can(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"key": "1", "hashtags": ["caf\\u00e9"]}')
    command = [sys.executable, "-m", "wsl_d2", "hashtags", "count", "a.jsonl", "--output", "o"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1: caf\\xe9" in done.stdout, done.stderr
