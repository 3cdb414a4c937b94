"""Checkpoints that a kill at any moment leaves whole: written aside, flushed, renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import zipfile

import torch
from detectron2.checkpoint import DetectionCheckpointer

from wsl_d2.checkpoint import read_pkl


class DamagedCheckpointError(RuntimeError):
    """No checkpoint of a run is whole."""


def find_damage(path: str) -> str | None:
    """Compares the content of a file of ``torch.save`` with the checksums in it, which ``torch.load`` does not.

    Returns:
        What is wrong, or None.
    """
    if not os.path.isfile(path):
        return "there is no such file"
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        return None if member is None else f"its part {member} has another checksum"
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"it is cut off or no checkpoint ({error})"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; a file appears under its final name only when it is complete and on disk, and no code
    in a file is executed when it is read."""

    def save(self, name: str, **kwargs) -> None:
        """Saves model and checkpointables as ``name.pth``; arguments as in fvcore's ``Checkpointer.save``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with open(f"{path}.partial", "wb") as file:
                torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.partial", path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into RuntimeError
            raise OSError(f"{path}: {error}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{path}.partial")
        self.tag_last_checkpoint(f"{name}.pth")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but a damaged newest checkpoint gives way to the one before it, with a warning.

        Raises:
            DamagedCheckpointError: there are checkpoints to resume from, and all of them are damaged.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=resume)
        newest = self.get_checkpoint_file()
        others = sorted(glob.glob(os.path.join(glob.escape(self.save_dir), "model_[0-9]*.pth")), reverse=True)
        damages = []
        for file in [newest, *(file for file in others if file < newest)]:
            damage = find_damage(file)
            if damage is None:
                return self.load(file)
            damages.append(f"{file}: {damage}")
            self.logger.warning(f"Checkpoint {damages[-1]}; trying the one before it")
        raise DamagedCheckpointError(
            f"no checkpoint in {self.save_dir} can be resumed from: {'; '.join(damages)}. Restore one, or remove "
            "last_checkpoint there to start again."
        )

    def _load_file(self, filename: str) -> dict:
        """Detectron2 unpickles a .pkl whatever is in it; here it may hold numpy arrays only.

        Raises:
            IncompleteLoadError: it holds something else.
        """
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        data = read_pkl(filename)
        if "model" in data and "__author__" in data:  # Detectron2's model zoo
            return data
        blobs = data.get("blobs", data)  # Caffe2: detectors have "blobs", classifiers do not
        model = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict:
        return torch.load(f, map_location="cpu", weights_only=True)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points ``last_checkpoint`` at a file, atomically."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        with open(f"{path}.partial", "w") as file:
            file.write(last_filename_basename)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)
