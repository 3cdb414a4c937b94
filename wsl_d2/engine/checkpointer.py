"""Checkpoints that a kill at any moment leaves whole: written aside, flushed, renamed."""

from __future__ import annotations

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; a file appears under its final name only when it is complete and on disk."""

    def save(self, name: str, **kwargs) -> None:
        """Saves model and checkpointables as ``name.pth``; arguments as in fvcore's ``Checkpointer.save``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with open(f"{path}.partial", "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points ``last_checkpoint`` at a file, atomically."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        with open(f"{path}.partial", "w") as file:
            file.write(last_filename_basename)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)
