"""The wheel holds what the package needs, and each extra what its commands import."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from toy_backbones import RGB_STATISTICS, SMALL

from wsl_d2.checkpoint import export_backbone
from wsl_d2.cli.main import VERBS
from wsl_d2.cli.verb import Verb
from wsl_d2.modeling import make_resnext

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ALL_VERBS = {
    " ".join(filter(None, (name, inner))): verb
    for name, entry in VERBS.items()
    for inner, verb in ({"": entry} if isinstance(entry, Verb) else entry[1]).items()
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, unpacked as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "repository"
    copy.mkdir()
    for name in ("wsl_d2", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def distributions_of(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for requirements, as far as they are installed here."""
    found: set[str] = set()
    todo = list(requirements)
    while todo:
        text = todo.pop()
        name = re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("_", "-")
        extras = re.findall(r"[\w-]+", (re.match(r"[\w.-]+\[([\w, -]+)\]", text) or ["", ""])[1])
        if name == "wsl-d2":
            todo += [requirement for extra in extras for requirement in PROJECT["optional-dependencies"][extra]]
        elif name not in found and "extra ==" not in text:
            found.add(name)
            try:
                todo += metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue  # of another Python or platform
    return found


def run_with(extras: str, code: str, site: Path, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python as where pip installed detectron2 and `wsl-d2[extras]`: every other package is hidden."""
    modules = metadata.packages_distributions()
    detectron2 = modules["detectron2"][0]
    needed = distributions_of([*PROJECT["dependencies"], detectron2, f"wsl-d2[{extras}]"])
    hidden = {
        module
        for module, names in modules.items()
        if module != "wsl_d2" and not needed & {name.lower().replace("_", "-") for name in names}
    }
    assert {"hypothesis", "webdataset"} < hidden and not hidden & {"torch", "yacs", "detectron2"}
    hide = f"""
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
    (folder / "script.py").write_text(hide + code)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "ignore", "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_code_configs_and_data(site):
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "wsl_d2").rglob("*")
        if path.suffix in (".py", ".tsv", ".txt", ".typed")
    }
    expected |= {
        f"wsl_d2/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "configs").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"wsl_d2/py.typed", "wsl_d2/hashtags/stop_hashtags.tsv", "wsl_d2/configs/Base-RCNN-FPN.yaml"} < expected
    assert {path for path in found if ".dist-info/" not in path} == expected


def test_the_hard_requirements_are_enough_to_load_weights_into_a_detector(site, tmp_path):
    backbone = make_resnext(SMALL)
    export_backbone(backbone, tmp_path / "backbone.pth", **RGB_STATISTICS)
    code = """
from detectron2.config import get_cfg
from detectron2.modeling import build_model
import wsl_d2
from wsl_d2.checkpoint import load_backbone
cfg = get_cfg()
wsl_d2.add_wsl_config(cfg)
cfg.merge_from_file(wsl_d2.get_config_file("Base-Miniworld-Mask-RCNN-FPN.yaml"))
cfg.MODEL.WEIGHTS = "backbone.pth"
model = build_model(cfg)
print(load_backbone(model, cfg.MODEL.WEIGHTS, cfg).num_tensors)
wsl_d2.load_pretrained(model, cfg, 0)
print(wsl_d2.__file__, wsl_d2.get_config_file("Base-Miniworld-Mask-RCNN-FPN.yaml"))
"""
    result = run_with("", code, site, tmp_path)
    assert result.returncode == 0, result.stderr
    count, paths = result.stdout.splitlines()
    assert 0 < int(count) <= len(backbone.state_dict())
    package = site / "wsl_d2"
    assert paths == f"{package}/__init__.py {package}/configs/Base-Miniworld-Mask-RCNN-FPN.yaml"


@pytest.mark.parametrize("extras", sorted({verb.extra for verb in ALL_VERBS.values()}))
def test_an_extra_is_enough_for_its_commands(site, tmp_path, extras):
    imports = []
    for path in {Path(sys.modules[v.run.__module__].__file__) for v in ALL_VERBS.values() if v.extra == extras}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(ast.unparse(node))
    assert len(imports) > 5
    code = "\n".join(["import wsl_d2", *sorted({line for line in imports if "__future__" not in line})])
    result = run_with(extras, code, site, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["hashtags", "explain", "dog", "--vocabulary", "17k"],
            r"hashtags explain: emoji is not .*: pip install 'wsl-d2\[pretrain\]'",
        ),
        (
            ["compare", "--run=a=a", "--baseline=a", "--ground-truth=a", "--output=a"],
            r"compare: scipy is not .*: pip install 'wsl-d2\[analysis\]'",
        ),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(site, tmp_path, arguments, told):
    code = f"sys.argv[0] = 'wsl-d2'\nfrom wsl_d2.cli.main import main\nsys.exit(main({arguments}))"
    result = run_with("", code, site, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"wsl-d2 {told}\n", result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py"]
