"""wsl_d2: weakly supervised pretraining of ResNeXt backbones on hashtagged images, for Detectron2.

Importing the package registers its backbones, the ``HashtagClassifier`` and the prefixes of public weights with
Detectron2; that is its one side effect. With WSL_D2_REGISTER=0 in the environment it does not, which is for programs
that need ``wsl_d2.hashtags`` or ``wsl_d2.analysis`` alone: they start faster and take 0.5 GB less memory without torch.
"""

import os
import warnings

__version__ = "0.1.0"
__all__ = ["__version__"]

if os.environ.get("WSL_D2_REGISTER", "1") != "0":
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "wsl_d2 needs detectron2, which is not published on PyPI under its own name. Either run `make setup` in a "
            "clone of this repository, or install it from source after torch:\n"
            "  pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2'"
        ) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch's about torch.jit.script in detectron2's modules
        from wsl_d2 import modeling  # noqa: F401  (registers backbones and the meta-architecture)
        from wsl_d2.checkpoint import load_pretrained  # noqa: F401  (registers wsl://, torchvision:// and timm:// paths)
    from wsl_d2.config import add_wsl_config  # noqa: F401

    __all__ += ["add_wsl_config", "load_pretrained"]
