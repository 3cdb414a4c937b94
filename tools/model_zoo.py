#!/usr/bin/env python3
"""Prints the table of backbones of README.md from the code: parameters, multiply-adds, public weights.

tools/model_zoo.py
"""

import argparse

from wsl_d2.checkpoint import WSL_WEIGHTS
from wsl_d2.modeling import RESNEXT_ARCHITECTURES, count_complexity

IMAGE_SIZE = 224

# ImageNet-1k top-1 / top-5 of the public weights as given by https://github.com/facebookresearch/WSL-Images
PUBLISHED_ACCURACY = {
    "resnext101_32x8d": "82.2 / 96.4",
    "resnext101_32x16d": "84.2 / 97.2",
    "resnext101_32x32d": "85.1 / 97.5",
    "resnext101_32x48d": "85.4 / 97.6",
}


def table() -> str:
    """The table in Markdown."""
    rows = [
        f"| backbone | parameters, M | multiply-adds at {IMAGE_SIZE}, G | public WSL weights | their top-1 / top-5 |",
        "|---|---|---|---|---|",
    ]
    for name in RESNEXT_ARCHITECTURES:
        parameters, multiply_adds = count_complexity(name, image_size=IMAGE_SIZE)
        weights = f"`wsl://{name}`" if name in WSL_WEIGHTS else "-"
        accuracy = PUBLISHED_ACCURACY.get(name, "-")
        rows.append(f"| `{name}` | {parameters / 1e6:.2f} | {multiply_adds / 1e9:.2f} | {weights} | {accuracy} |")
    return "\n".join(rows)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())
