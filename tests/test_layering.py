"""The rooms of wsl_d2 and who may import whom, read from the syntax trees; nothing is imported here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# modules that every room may import
GROUND_FLOOR = {"coco", "errors", "files", "run_keys", "version"}
# room -> the rooms of wsl_d2 that it may import, beside itself and the ground floor
ALLOWED_ROOMS = {name: set[str]() for name in GROUND_FLOOR} | {
    "hashtags": set(),
    "analysis": set(),
    "study": {"analysis"},
    "report": {"analysis", "study"},
    "duplicates": {"data", "config", "checkpoint"},
    "config": set(),
    "data": {"hashtags", "config"},
    "modeling": {"config"},
    "checkpoint": {"config", "modeling"},
    "evaluation": {"config", "modeling"},
    "transfer": {"hashtags", "data", "config", "modeling", "checkpoint", "evaluation"},
    "engine": {"hashtags", "data", "config", "modeling", "checkpoint", "evaluation"},
    "": {"config", "modeling", "checkpoint"},  # wsl_d2/__init__.py
}
# room -> the libraries that it may import; None: any
ALLOWED_LIBRARIES = {
    "hashtags": {"nltk", "numpy", "emoji", "symspellpy", "daft", "pyarrow", "fsspec", "tqdm", "matplotlib"},
    "analysis": {"numpy", "scipy", "pycocotools", "matplotlib", "PIL", "yaml", "submitit"},
    "study": {"numpy", "scipy", "yaml", "submitit"},
    "coco": {"numpy", "pycocotools"},
    "run_keys": set(),
}
FORBIDDEN_MODULES = {"pkg_resources", "model_zoo"}
FORBIDDEN_ARGUMENTS = {("weights_only", False), ("allow_pickle", True)}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill"}


def imports(tree: ast.AST, package: list[str]):
    """Yields (line, absolute dotted name) of every import, also inside functions, and of every name
    imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def layering_violations(source: str, path: str) -> list[str]:
    """What a file of wsl_d2, at `path` below the repository's root, imports against the rules."""
    parts = list(Path(path).with_suffix("").parts)
    package = parts[:-1]
    room = parts[1] if parts[1] != "__init__" else ""
    if room not in ALLOWED_ROOMS:
        return [f"{path}: {room!r} is no room of the design; add it to ALLOWED_ROOMS with what it may import"]
    found = []
    for line, name in imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top == "wsl_d2":
            target = rest.partition(".")[0]
            if target in ALLOWED_ROOMS and target not in ALLOWED_ROOMS[room] | GROUND_FLOOR | {room, ""}:
                found.append(f"{path}:{line}: {room or 'wsl_d2'} must not import wsl_d2.{target}")
        elif top in ("tools", "tests"):
            found.append(f"{path}:{line}: wsl_d2 must not import {top}")
        elif room in ALLOWED_LIBRARIES and top not in ALLOWED_LIBRARIES[room] | set(sys.stdlib_module_names):
            found.append(f"{path}:{line}: {room} must not import {top}")
    return found


def safety_violations(source: str, path: str) -> list[str]:
    """Unpickling, unsafe loading and modules that are gone or bring unchecked downloads."""
    tree = ast.parse(source)
    found = []
    for line, name in imports(tree, list(Path(path).parts[:-1])):
        parts = name.split(".")
        for module in FORBIDDEN_MODULES.intersection(parts):
            found.append(f"{path}:{line}: imports {module}")
        if parts[0] in UNPICKLERS and parts[-1] in ("load", "loads", "Unpickler"):
            found.append(f"{path}:{line}: imports {name}")
    # A subclass of Unpickler is safe if it decides itself what may be built, which is how pickle's manual says to.
    restricted = {
        base
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(item, ast.FunctionDef) and item.name == "find_class" for item in node.body)
        for base in node.bases
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in restricted:
            if node.value.id in UNPICKLERS and node.attr in ("load", "loads", "Unpickler"):
                found.append(f"{path}:{node.lineno}: {node.value.id}.{node.attr}")
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_MODULES:
            found.append(f"{path}:{node.lineno}: uses {node.attr}")
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in FORBIDDEN_ARGUMENTS:
                found.append(f"{path}:{node.value.lineno}: {node.arg}={node.value.value}")
    return found


def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_imports_follow_the_rooms():
    files = sources("wsl_d2")
    assert files
    assert [line for path, source in files.items() for line in layering_violations(source, path)] == []


def test_nothing_unpickles_or_loads_unsafely():
    files = sources("wsl_d2", "tools")
    assert [line for path, source in files.items() for line in safety_violations(source, path)] == []


@pytest.mark.parametrize(
    ("path", "source", "violation"),
    [
        ("wsl_d2/hashtags/a.py", "import torch.nn", "hashtags must not import torch"),
        (
            "wsl_d2/hashtags/a.py",
            "def f():\n    from detectron2 import x",
            "a.py:2: hashtags must not import detectron2",
        ),
        ("wsl_d2/hashtags/a.py", "from ..data import shards", "hashtags must not import wsl_d2.data"),
        ("wsl_d2/modeling/a.py", "from wsl_d2 import data", "modeling must not import wsl_d2.data"),
        ("wsl_d2/modeling/a.py", "from .. import data", "modeling must not import wsl_d2.data"),
        ("wsl_d2/checkpoint/a.py", "import wsl_d2.data.shards", "checkpoint must not import wsl_d2.data"),
        ("wsl_d2/data/a.py", "from wsl_d2.engine.main import setup", "data must not import wsl_d2.engine"),
        ("wsl_d2/analysis/a.py", "import torch", "analysis must not import torch"),
        (
            "wsl_d2/analysis/a.py",
            "from ..hashtags import Vocabulary",
            "analysis must not import wsl_d2.hashtags",
        ),
        ("wsl_d2/engine/a.py", "from tools import demo", "wsl_d2 must not import tools"),
        ("wsl_d2/helpers/a.py", "", "no room of the design"),
    ],
)
def test_a_wrong_import_is_found(path, source, violation):
    assert any(violation in line for line in layering_violations(source, path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wsl_d2/data/a.py", "import torch\nfrom ..hashtags import Vocabulary\nfrom . import shards"),
        ("wsl_d2/analysis/__init__.py", "from .ap_gain import paired_bootstrap\nimport json, numpy"),
        ("wsl_d2/__init__.py", "from . import modeling\nfrom .config import add_wsl_config"),
        ("wsl_d2/engine/main.py", "from wsl_d2.data.read.loaders import build_train_loader"),
    ],
)
def test_a_right_import_is_not(path, source):
    assert layering_violations(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle\nclass U(pickle.Unpickler): ...",
        "from pickle import loads",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "import pkg_resources",
        "from detectron2 import model_zoo",
        "detectron2.model_zoo.get_config_file(x)",
    ],
)
def test_an_unsafe_call_is_found(source):
    assert len(safety_violations(source, "tools/a.py")) == 1
