"""Training on Detectron2's engine: setup and main, the two trainers, their hooks."""

from wsl_d2.engine.main import main, run, run_command_line, setup
from wsl_d2.engine.trainer import DetectionTrainer, WSLTrainer

__all__ = ["DetectionTrainer", "WSLTrainer", "main", "run", "run_command_line", "setup"]
