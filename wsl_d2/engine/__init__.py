"""Training on Detectron2's engine: the plan of a run, setup and main, the two trainers, their hooks.

Names are imported when they are first asked for, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsl_d2.engine.main import main, run, setup
    from wsl_d2.engine.plan import RunPlan, open_plan
    from wsl_d2.engine.trainer import DetectionTrainer, WSLTrainer

_MODULE_OF = {
    "DetectionTrainer": "trainer",
    "RunPlan": "plan",
    "WSLTrainer": "trainer",
    "main": "main",
    "open_plan": "plan",
    "run": "main",
    "setup": "main",
}

__all__ = ["DetectionTrainer", "RunPlan", "WSLTrainer", "main", "open_plan", "run", "setup"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
