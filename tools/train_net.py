#!/usr/bin/env python3
"""`wsl-d2 train`, where Detectron2's users look for it, and for torchrun to start."""

import sys

import wsl_d2  # noqa: F401  (registers backbones and weights)
from wsl_d2.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
