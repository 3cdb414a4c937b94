"""Runs the command line as a user does."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from wsl_d2.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]


def wsl_d2(*arguments, code=0, cwd=ROOT, **environment) -> str:
    """Runs `wsl-d2` in a process of its own, checks its exit status, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "wsl_d2", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in environment.items()},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def examples_of_help():
    verbs = [verb for entry in VERBS.values() for verb in (entry[1].values() if isinstance(entry, tuple) else [entry])]
    return "".join(f"```\n{inspect.cleandoc(verb.run.__doc__)}\n```\n" for verb in verbs)


def commands_of(document):
    """The lines of a README's code blocks that call `wsl-d2` or `tools/train_net.py`, whole, without comments."""
    text = examples_of_help() if document == "--help" else (ROOT / document).read_text()
    blocks = "".join(code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind != "python")
    for line in re.findall(r".*(?:wsl-d2|train_net\.py) .*", blocks.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word in ("wsl-d2", "tools/train_net.py")]
        if starts:
            ends = [i for i, word in enumerate(words) if word in ("&&", "|", ">", "&", ";") and i > starts[0]]
            chosen = words[starts[0] + 1 : (ends or [None])[0]]
            yield chosen if words[starts[0]] == "wsl-d2" else ["train", *chosen]
