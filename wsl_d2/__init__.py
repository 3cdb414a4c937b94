"""wsl_d2: weakly supervised pretraining of ResNeXt backbones on hashtagged images, for Detectron2.

Importing the package registers its backbones, the ``HashtagClassifier`` and the prefixes of public weights with
Detectron2; that is its one side effect. The command ``wsl-d2``, whose verbs import what they need, does without it.
"""

import os
import sys
import warnings
from pathlib import Path

from wsl_d2.version import __version__

__all__ = ["__version__", "add_wsl_config", "get_config_file", "load_pretrained", "pretrain"]


def _is_command() -> bool:
    """Whether this is a process of `wsl-d2` or `python -m wsl_d2`; its pools and jobs included."""
    if "WSL_D2_JOB" in os.environ:  # set by wsl_d2.data.runner
        return True
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name == "-m":  # the package is imported before its __main__ runs
        return "wsl_d2" in sys.orig_argv[:4]
    return program.stem == "wsl-d2" or program.parts[-2:] == ("wsl_d2", "__main__.py")


if not _is_command():
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        from wsl_d2.errors import NO_DETECTRON2, MissingPackageError

        raise MissingPackageError(NO_DETECTRON2) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch's about torch.jit.script in detectron2's modules
        from wsl_d2 import modeling  # noqa: F401  (registers backbones and the meta-architecture)
        from wsl_d2.checkpoint import load_pretrained  # registers wsl://, torchvision:// and timm:// paths
    from wsl_d2.config import add_wsl_config, get_config_file


def __getattr__(name: str):
    if name == "pretrain":
        from wsl_d2.study.pretraining import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
