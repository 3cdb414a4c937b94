#!/usr/bin/env python3
"""`wsl-d2 train`, where Detectron2's users look for it, and for torchrun to start."""

import signal
import sys

for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):  # the imports take seconds, in which a scheduler may send one
    signal.signal(getattr(signal, name), lambda *_: sys.exit(75))

import wsl_d2  # noqa: E402, F401  (registers backbones and weights)
from wsl_d2.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
