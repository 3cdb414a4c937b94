"""Runs the command line as a user does."""

import inspect
import os
import re
import shlex
from pathlib import Path

from forks import fork, new_log, read_log

from wsl_d2.cli.main import VERBS

_COMMAND = "import sys; from wsl_d2.cli.main import main; sys.exit(main())"
ROOT = Path(__file__).resolve().parents[1]


def wsl_d2(*arguments, code=0, cwd=ROOT, **environment) -> str:
    """Runs `wsl-d2` in a process of its own, checks its exit status, and returns what it prints."""
    log, environ = new_log(), os.environ | {name: str(value) for name, value in environment.items()}
    process = fork(_COMMAND, ["wsl-d2", *map(str, arguments)], environ, log, cwd)
    process.join()
    printed, errors = read_log(log, "stdout"), read_log(log, "stderr")
    assert process.exitcode == code, printed + errors
    assert "Traceback" not in errors, errors
    return printed + errors


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
