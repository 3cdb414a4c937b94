"""The rooms of wsl_d2 and who may import whom, read from the syntax trees; nothing is imported here."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room may import from itself and from the floors below its own, not from those beside it.
FLOORS = (
    ("errors", "files", "process", "run_keys", "version"),
    ("jobs",),
    ("coco", "config", "hashtags", "modeling"),
    ("checkpoint", "data"),
    ("duplicates", "evaluation", "transfer"),
    ("analysis", "engine"),
    ("study",),
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
# room -> its own floors; its __init__, which only hands names on, is above them
INNER_FLOORS = {
    "data": (("format", "remote", "runner"), ("order", "posts"), ("read",), ("write",), ("__init__",)),
}
# The rooms of wsl_d2 that a room may import where the floors would allow more: analysis knows training by its files.
ONLY_ROOMS = {"analysis": {"errors", "files", "run_keys", "version", "coco"}}
# room -> the libraries beside Python's own that it may import; any if it is not named
LIBRARIES = {
    **dict.fromkeys(FLOORS[0], {"numpy"}),
    "coco": {"numpy", "pycocotools"},
    "hashtags": {"numpy", "nltk", "emoji", "ahocorasick"},
    "analysis": {"numpy", "scipy", "pycocotools", "yaml"},
    "data.format": {"numpy", "tqdm", "fsspec"},
    "data.remote": {"fsspec", "aiohttp"},
    "jobs": {"submitit"},
    "data.runner": {"tqdm"},
    "data.order": {"numpy", "tqdm"},
    "data.posts": {"numpy", "pyarrow", "fsspec"},
    "data.write": {"numpy", "tqdm", "filelock"},
}
FORBIDDEN_MODULES = {"pkg_resources", "model_zoo"}
FORBIDDEN_ARGUMENTS = {("weights_only", False), ("allow_pickle", True)}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill"}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import, also inside functions, and of every name imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def module_name(path: str) -> str:
    """Returns the dotted name of a file of wsl_d2; a package's ends in "__init__"."""
    return ".".join(Path(path).with_suffix("").parts)


def module_imports(files: dict[str, str]) -> Iterator[tuple[str, int, str, str]]:
    """Yields (path, line, importing module, imported module of wsl_d2) of every import within wsl_d2."""
    modules = set(map(module_name, files))
    for path, source in files.items():
        for line, name in imports(ast.parse(source), list(Path(path).parts[:-1])):
            if name.partition(".")[0] != "wsl_d2":
                continue
            parts = name.split(".")  # of a module, of a package, or of a name in one of them
            candidates = [".".join(parts[:end]) for end in (len(parts), len(parts) - 1)]
            names = [name for one in candidates for name in (one, f"{one}.__init__")]
            yield path, line, module_name(path), next((name for name in names if name in modules), candidates[0])


def floor_of(floors: tuple, room: str) -> int | None:
    return next((number for number, rooms in enumerate(floors) if room in rooms), None)


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a module of wsl_d2 may import another one by the floors."""
    (_, room, *inner), (_, other, *other_inner) = importer.split("."), imported.split(".")
    if room != other:
        floor, below = floor_of(FLOORS, room), floor_of(FLOORS, other)
        if room in ONLY_ROOMS:
            return other in ONLY_ROOMS[room]
        return floor is not None and below is not None and below < floor
    if room in INNER_FLOORS and inner[0] != other_inner[0]:
        floor, below = floor_of(INNER_FLOORS[room], inner[0]), floor_of(INNER_FLOORS[room], other_inner[0])
        return floor is not None and below is not None and below < floor
    return True


def room_of(module: str) -> str:
    """Returns the room of a module: "engine", or with a room that has floors of its own "data.format"."""
    _, room, *inner = module.split(".")
    return f"{room}.{inner[0]}" if room in INNER_FLOORS else room


def layering_violations(files: dict[str, str]) -> list[str]:
    """What files of wsl_d2, path below the repository's root -> source, import against the rules."""
    found = []
    for path in files:
        _, room, *inner = module_name(path).split(".")
        if floor_of(FLOORS, room) is None or room in INNER_FLOORS and floor_of(INNER_FLOORS[room], inner[0]) is None:
            found.append(f"{path}: {room_of(module_name(path))} is no room of the design; give it a floor")
    for path, line, importer, imported in module_imports(files):
        if not is_allowed(importer, imported):
            found.append(f"{path}:{line}: {room_of(importer)} must not import {imported}")
    for path, source in files.items():
        room = room_of(module_name(path))
        for line, name in imports(ast.parse(source), list(Path(path).parts[:-1])):
            top = name.partition(".")[0]
            if top in ("tools", "tests"):
                found.append(f"{path}:{line}: wsl_d2 must not import {top}")
            elif top not in {"wsl_d2", *sys.stdlib_module_names, *LIBRARIES.get(room, {top})}:
                found.append(f"{path}:{line}: {room} must not import {top}")
    return found


def find_circle(files: dict[str, str]) -> list[str]:
    """Returns modules that import each other in a circle, the first one again at the end; [] if there is none."""
    graph: dict[str, set[str]] = {}
    for _, _, importer, imported in module_imports(files):
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


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


def test_imports_follow_the_floors():
    files = sources("wsl_d2")
    assert "wsl_d2/engine/main.py" in files
    assert layering_violations(files) == []


def test_no_modules_import_each_other():
    assert find_circle(sources("wsl_d2")) == []


def test_every_room_is_there():
    """A name in the tables above that stands for nothing would allow what nobody looks at."""
    modules = set(map(module_name, sources("wsl_d2")))
    rooms = {module.split(".")[1] for module in modules}
    assert rooms == {room for floor in FLOORS for room in floor}
    for room, floors in INNER_FLOORS.items():
        inner = {module.split(".")[2] for module in modules if module.startswith(f"wsl_d2.{room}.")}
        assert inner == {name for floor in floors for name in floor}
    assert LIBRARIES.keys() <= set(map(room_of, modules))


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
        ("wsl_d2/hashtags/a.py", "from ..data import write_shard", "hashtags must not import wsl_d2.data"),
        ("wsl_d2/hashtags/a.py", "from wsl_d2 import config", "hashtags must not import wsl_d2.config"),
        ("wsl_d2/modeling/a.py", "from wsl_d2 import data", "modeling must not import wsl_d2.data"),
        ("wsl_d2/modeling/a.py", "from .. import data", "modeling must not import wsl_d2.data"),
        ("wsl_d2/modeling/a.py", "from wsl_d2 import __version__", "modeling must not import wsl_d2"),
        ("wsl_d2/checkpoint/a.py", "import wsl_d2.data.format.tar", "checkpoint must not import wsl_d2.data"),
        ("wsl_d2/data/read/a.py", "from wsl_d2.engine.main import setup", "data.read must not import wsl_d2.engine"),
        ("wsl_d2/data/read/a.py", "from ..write import posts", "data.read must not import wsl_d2.data.write"),
        ("wsl_d2/data/order/a.py", "from ..posts import readers", "data.order must not import wsl_d2.data.posts"),
        ("wsl_d2/data/write/a.py", "from wsl_d2.data import make_view", "data.write must not import wsl_d2.data"),
        ("wsl_d2/data/order/a.py", "from torch.utils.data import Sampler", "data.order must not import torch"),
        ("wsl_d2/errors.py", "import yaml", "errors must not import yaml"),
        ("wsl_d2/files.py", "from wsl_d2.coco import read_coco", "files must not import wsl_d2.coco"),
        ("wsl_d2/analysis/a.py", "import torch", "analysis must not import torch"),
        ("wsl_d2/analysis/a.py", "from ..hashtags import Vocabulary", "analysis must not import wsl_d2.hashtags"),
        ("wsl_d2/engine/a.py", "from wsl_d2.analysis import records", "engine must not import wsl_d2.analysis"),
        ("wsl_d2/study/a.py", "from wsl_d2.report import study", "study must not import wsl_d2.report"),
        ("wsl_d2/engine/a.py", "from tools import demo", "wsl_d2 must not import tools"),
        ("wsl_d2/helpers/a.py", "", "no room of the design"),
        ("wsl_d2/data/helpers.py", "", "no room of the design"),
    ],
)
def test_a_wrong_import_is_found(path, source, violation):
    assert any(violation in line for line in layering_violations({path: source}))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wsl_d2/data/read/a.py", "import torch\nfrom wsl_d2.hashtags import Vocabulary\nfrom . import store"),
        ("wsl_d2/data/read/a.py", "from wsl_d2.data.order.sampler import HashtagSampler"),
        ("wsl_d2/analysis/__init__.py", "from .ap_gain import paired_bootstrap\nimport json, numpy"),
        ("wsl_d2/__init__.py", "from . import modeling\nfrom .config import add_wsl_config"),
        ("wsl_d2/engine/main.py", "from wsl_d2.data.read.loaders import build_train_loader"),
    ],
)
def test_a_right_import_is_not(path, source):
    assert layering_violations({path: source}) == []


def test_a_circle_is_found_also_through_functions_and_packages():
    files = {
        "wsl_d2/engine/__init__.py": "from wsl_d2.engine.one import f",
        "wsl_d2/engine/one.py": "from . import two",
        "wsl_d2/engine/two.py": "def g():\n    from wsl_d2.engine import f",
        "wsl_d2/engine/three.py": "from wsl_d2.engine.one import f",
    }
    circle = find_circle(files)
    assert circle[0] == circle[-1]
    assert set(circle) == {"wsl_d2.engine.__init__", "wsl_d2.engine.one", "wsl_d2.engine.two"}
    files["wsl_d2/engine/two.py"] = "import wsl_d2.hashtags.mapping"
    assert find_circle(files) == []


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
