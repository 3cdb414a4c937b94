"""What importing wsl_d2 does, and what the command line does without."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from command_line import wsl_d2 as run_wsl_d2
from packaging.version import Version

import wsl_d2
from wsl_d2.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
# Of a process that is `wsl-d2`, as the package finds out by its arguments.
AS_COMMAND = "import sys; sys.argv = ['wsl-d2']; "
HEAVY = "sorted({'torch', 'torchvision', 'detectron2'} & sys.modules.keys())"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def verbs(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb of a parser, such as ("data", "make")."""
    found = [
        verb
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, inner in action.choices.items()
        for verb in verbs(inner, (*names, name))
    ]
    return found or [names]


def test_without_detectron2_the_import_says_how_to_get_it(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('no detectron2 here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import wsl_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "wsl_d2 needs detectron2" in result.stderr
    assert "make setup" in result.stderr and "git+https://github.com/facebookresearch/detectron2" in result.stderr


def test_importing_registers_no_dataset():
    run_python(
        "import detectron2.data as d; before = set(d.DatasetCatalog.list()); "
        "import wsl_d2, wsl_d2.data, wsl_d2.engine; "
        "assert set(d.DatasetCatalog.list()) == before; "
        "from detectron2.modeling import BACKBONE_REGISTRY as b, META_ARCH_REGISTRY as m; "
        "assert 'build_resnext101_32x48d_fpn_backbone' in b and 'HashtagClassifier' in m"
    )


def test_the_command_prints_the_version_of_the_package():
    assert run_wsl_d2("--version") == f"wsl_d2 {wsl_d2.__version__}\n"
    assert str(Version(wsl_d2.__version__)) == wsl_d2.__version__  # as installers spell it


def test_the_help_of_every_verb_imports_neither_torch_nor_detectron2():
    everything = verbs(build_parser())
    assert {("train",), ("data", "make"), ("hashtags", "vocabulary")} <= set(everything)
    code = f"""{AS_COMMAND}
from wsl_d2.cli.main import main
for verb in {[list(verb) for verb in everything]}:
    try:
        main([*verb, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, verb
    print("LOADED", *verb, {HEAVY})
"""
    printed = run_python(code)
    assert [line for line in printed.splitlines() if line.startswith("LOADED") and not line.endswith(" []")] == []
    for verb in everything:
        assert f"usage: wsl-d2 {' '.join(verb)} " in printed


def test_what_counts_writes_compares_and_reports_does_without_torch():
    rooms = ("hashtags", "analysis", "data/format", "data/order", "data/posts", "data/write", "duplicates")
    patterns = [*(f"{room}/*.py" for room in rooms), "report/[cprs]*.py", "study/[crs]*.py", "engine/cluster.py"]
    paths = [path for pattern in patterns for path in sorted((ROOT / "wsl_d2").glob(pattern))]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"]
    assert len(modules) > 20
    assert run_python(f"{AS_COMMAND} import {', '.join(modules)}; print({HEAVY})") == "[]\n"


def test_every_name_of_a_package_that_imports_late_can_be_had():
    code = (
        "import wsl_d2.data, wsl_d2.engine\n"
        "for package in (wsl_d2.data, wsl_d2.engine):\n"
        "    assert sorted(package.__all__) == sorted(package._MODULE_OF)\n"
        "    assert all(getattr(package, name).__name__ == name for name in package.__all__)"
    )
    run_python(code)


def test_the_command_is_told_from_other_programs(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "wsl_d2", "train"])
    for program, expected in [
        ("/usr/bin/wsl-d2", True),
        ("-m", True),
        (os.path.join("wsl_d2", "__main__.py"), True),
        ("tools/train_net.py", False),
        ("-c", False),
        ("", False),
    ]:
        monkeypatch.setattr(sys, "argv", [program])
        assert wsl_d2._is_command() is expected, program
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "pytest", "tests"])
    assert not wsl_d2._is_command()
