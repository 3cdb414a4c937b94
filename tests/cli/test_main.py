"""What the command line answers to words that it does not know."""

import pytest

from wsl_d2.cli.main import main


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
