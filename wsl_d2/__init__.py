"""wsl_d2: weakly supervised pretraining of ResNeXt backbones on hashtagged images, for Detectron2.

Importing the package registers its backbones, the ``HashtagClassifier`` and the prefixes of public weights with
Detectron2; that is its one side effect. The parts that need no Detectron2 (``wsl_d2.hashtags``,
``wsl_d2.analysis``) still import through this package, so the check below is the only place that has to say how to
obtain Detectron2.
"""

import warnings

__version__ = "0.1.0"

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
    from wsl_d2.checkpoint import catalog  # noqa: F401  (registers wsl://, torchvision:// and timm:// paths)
from wsl_d2.config import add_wsl_config  # noqa: E402

__all__ = ["__version__", "add_wsl_config"]
