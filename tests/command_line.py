"""Runs the command line as a user does."""

import os
import subprocess
import sys
from pathlib import Path

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
