"""Checkpoints that survive a kill at any moment: written aside in the background, flushed, renamed, with a SHA-256."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import threading
import zipfile

import torch
from detectron2.checkpoint import DetectionCheckpointer

from wsl_d2.checkpoint import read_pkl
from wsl_d2.errors import UserError
from wsl_d2.files import HashingWriter, open_atomically, sha256_of, sync_folder, write_atomically

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class DamagedCheckpointError(UserError, RuntimeError):
    """All checkpoints of a run are damaged."""


def checksum_path(path: str) -> str:
    """Returns the file beside a checkpoint that holds its SHA-256, as ``sha256sum -c`` reads it."""
    return f"{path}.sha256"


def find_damage(path: str) -> str | None:
    """Checks a checkpoint by the SHA-256 beside it, or where there is none by the CRC-32 of its parts.

    Returns:
        What is wrong, or None.
    """
    if not os.path.isfile(path):
        return "there is no such file"
    try:
        with open(checksum_path(path)) as file:
            expected = file.read().split()
    except FileNotFoundError:
        return _find_damage_by_crc(path)
    found = sha256_of(path)
    if not expected or found != expected[0]:
        return f"its SHA-256 is {found}, {checksum_path(path)} says {expected[0] if expected else 'nothing'}"
    return None


def _find_damage_by_crc(path: str) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        return None if member is None else f"the CRC-32 of its part {member} is wrong"
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"it is truncated or not a checkpoint ({error})"


def write_checkpoint(path: str, data: dict) -> None:
    """Writes a checkpoint and its checksum; at every moment the file of that name, old or new, is whole and loads.

    Raises:
        OSError: the disk is full, or another failure; what was there before is left as it was.
    """
    folder, name = os.path.split(path)
    is_new = not os.path.exists(path)
    try:
        with open_atomically(path) as file:
            hashing = HashingWriter(file)
            torch.save(data, hashing)  # type: ignore[arg-type]
            line = f"{hashing.hexdigest()}  {name}\n"
            if is_new:
                write_atomically(checksum_path(path), line)
            else:  # without a checksum for a moment, never with another file's
                file.flush()
                os.fsync(file.fileno())
                with contextlib.suppress(FileNotFoundError):
                    os.remove(checksum_path(path))
        if not is_new:
            write_atomically(checksum_path(path), line)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the system says; torch's writer turns a full disk into a RuntimeError about positions in the file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(error) if cause is None else cause.strerror or str(cause)


def _copy_to_host(value):
    """A copy of nested dicts, lists and tensors that later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(item) for item in value)
    return value


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but atomic, in the background, and safe to read.

    A file appears under its final name only when it is complete and on disk. No code in a file is executed.
    """

    _writing: threading.Thread | None = None
    _failure: OSError | None = None
    # Called by :meth:`_write` once a checkpoint is whole, with its path.
    after_saving = staticmethod(lambda path: None)
    # Called with what a file holds, before any of it is loaded.
    before_loading = staticmethod(lambda checkpoint: None)

    def save(self, name: str, *, in_background: bool = False, **kwargs) -> None:
        """Saves model and checkpointables as ``name.pth``.

        Args:
            name: without ending.
            in_background: return once the state is copied to the host's memory, and write it while training goes on.
                One save at a time: a second one waits for the first. See :meth:`wait` for failures.
            kwargs: further plain data to store, as in fvcore's ``Checkpointer.save``.

        Raises:
            OSError: this save failed, or the one in the background before it.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        self.wait()
        data = {"model": self.model.state_dict()}
        data |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if not in_background:
            self._write(path, data)
            return
        data = _copy_to_host(data)

        def write() -> None:
            try:
                self._write(path, data)
            except OSError as error:
                self._failure = error

        self._writing = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._writing.start()

    def _write(self, path: str, data: dict) -> None:
        write_checkpoint(path, data)
        self.tag_last_checkpoint(os.path.basename(path))
        self.after_saving(path)

    def is_writing(self) -> bool:
        """Whether a save in the background is in progress."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> bool:
        """Waits for the save in the background; returns whether there was one.

        Raises:
            OSError: it failed.
        """
        if self._writing is None:
            return False
        self._writing.join()
        self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return True

    def numbered_checkpoints(self) -> dict[int, str]:
        """Returns iteration -> path of the checkpoints ``model_<iteration>.pth`` in the folder."""
        names = os.listdir(self.save_dir) if self.save_dir and os.path.isdir(self.save_dir) else []
        return {
            int(found[1]): os.path.join(self.save_dir, found[0]) for n in names if (found := _NUMBERED.fullmatch(n))
        }

    def remove(self, path: str) -> None:
        """Removes a checkpoint and its checksum."""
        for file in (path, checksum_path(path)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(file)

    def remove_leftovers(self) -> None:
        """Removes the temporary files and lone checksums of a killed save."""
        for path in glob.glob(os.path.join(glob.escape(self.save_dir), "*.partial-*")):
            os.remove(path)
        for path in glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth.sha256")):
            if not os.path.exists(path.removesuffix(".sha256")):
                os.remove(path)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, even if ``last_checkpoint`` is lost."""
        return super().has_checkpoint() or bool(self.numbered_checkpoints())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but falls back to the previous checkpoint, with a warning, where the newest one is damaged.

        The search begins at ``last_checkpoint``; a file whose checksum is wrong is never used.

        Raises:
            DamagedCheckpointError: all checkpoints are damaged.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=resume)
        newest = self.get_checkpoint_file()
        numbered = [file for _, file in sorted(self.numbered_checkpoints().items(), reverse=True)]
        if not os.path.basename(newest):  # an empty or lost pointer
            candidates = numbered
        elif newest in numbered:
            candidates = numbered[numbered.index(newest) :]
        else:
            number = _NUMBERED.fullmatch(os.path.basename(newest))
            candidates = [newest, *(f for f in numbered if number is None or f < newest)]
        damages = []
        for file in candidates:
            damage = find_damage(file)
            if damage is None:
                return self.load(file)
            damages.append(f"{file}: {damage}")
            self.logger.warning(f"Checkpoint {damages[-1]}; falling back to the previous one")
        raise DamagedCheckpointError(
            f"no checkpoint in {self.save_dir} can be resumed from: {'; '.join(damages)}. Restore one, or remove "
            "last_checkpoint and the model_*.pth there to start again."
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

    def _load_model(self, checkpoint: dict):
        self.before_loading(checkpoint)
        return super()._load_model(checkpoint)

    def _torch_load(self, f: str) -> dict:
        return torch.load(f, map_location="cpu", weights_only=True)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points ``last_checkpoint`` at a file, atomically."""
        write_atomically(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)
