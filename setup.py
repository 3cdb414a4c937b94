"""Packaging of wsl_d2. detectron2 is left out on purpose: PyPI lacks it under its own name."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "wsl_d2" / "version.py").read_text(encoding="utf-8"), re.M)
if VERSION is None:
    raise RuntimeError('wsl_d2/version.py has no line `__version__ = "..."`')

setup(
    name="wsl-d2",
    version=VERSION.group(1),
    description="Weakly supervised pretraining on hashtags, and its transfer to detection, on detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["wsl_d2", "wsl_d2.*"]),
    package_data={"wsl_d2.hashtags": ["*.txt", "*.tsv"]},
    entry_points={"console_scripts": ["wsl-d2=wsl_d2.cli.main:main"]},
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "aiohttp",
        "daft>=0.7",
        "emoji>=2.10",
        "filelock",
        "fsspec",
        "fvcore",
        "iopath",
        "matplotlib",
        "nltk>=3.9.3",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "hydra-core>=1.3.8",
        "pillow>=12.3",
        "pyarrow>=15",
        "pyyaml",
        "pycocotools>=2.0.8",
        "safetensors>=0.4",
        "scipy>=1.11",
        "simplejpeg>=1.9",
        "symspellpy>=6.9",
        "setuptools<81",  # tensorboard and fvcore of this age still import pkg_resources
        "tensorboard",
        "tqdm",
        "yacs>=0.1.8",
    ],
    extras_require={
        "duplicates": ["faiss-cpu"],
        "fast-eval": ["faster-coco-eval>=1.6"],
        "cluster": ["submitit"],
        "demo": ["resvg-py>=0.5"],
        "timm": ["timm>=1.0"],
        "test": [
            "faiss-cpu",
            "faster-coco-eval>=1.6",
            "hypothesis",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "scikit-learn",
            "submitit",
            "timm>=1.0",
            "webdataset>=1.0",
        ],
        "lint": ["mypy>=1.10", "ruff>=0.6"],
    },
)
