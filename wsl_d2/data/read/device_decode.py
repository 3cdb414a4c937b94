"""JPEG that is copied to the training device encoded, and decoded and cropped there (``INPUT.DECODING device``).

The crops are those of "exact" up to the decoder's rounding. Images that are not plain JPEG, and test images, are
cropped by the workers as in "exact". The device's decoder is less strict than theirs: it returns an image also for a
stream that is corrupt in the middle; verify the shards to find these.

Shapes: a batch of N crops of S x S pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from wsl_d2.data.read.decode import DamagedImageError, decode, open_image


@dataclass
class EncodedCrop:
    """An encoded image, and the crop to make of it.

    Args:
        data: JPEG bytes.
        box: left, top, right, bottom in pixels.
        size: of the crop in pixels, both sides.
        flip: mirror the crop.
        bgr: channel order of the crop.
    """

    data: bytes
    box: tuple[int, int, int, int]
    size: int
    flip: bool
    bgr: bool


class EncodedBatch:
    """N crops, encoded or as pixels, in three tensors that are cheap to hand to other processes and devices.

    Args:
        crops: each an :class:`EncodedCrop`, at least one, or pixels (3, S, S) uint8; all of one size and channel order.
    """

    def __init__(self, crops: list[EncodedCrop | np.ndarray]):
        parts, places = [], []
        for crop in crops:
            if isinstance(crop, EncodedCrop):
                parts.append(torch.frombuffer(bytearray(crop.data), dtype=torch.uint8))
                places.append([*crop.box, int(crop.flip)])
                self.size, self.bgr = crop.size, crop.bgr
            else:
                parts.append(torch.from_numpy(crop).reshape(-1))
                places.append([-1, -1, -1, -1, 0])
        self.data = torch.cat(parts)
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.places = torch.tensor(places)  # (N, 5): left, top, right, bottom, flip; -1 for pixels

    def __len__(self) -> int:
        return len(self.ends)

    def pin_memory(self) -> EncodedBatch:
        """Called by DataLoader where there is a GPU."""
        self.data = self.data.pin_memory()
        return self

    def decode(self, device: torch.device | str) -> tuple[torch.Tensor, list[int], dict[int, str]]:
        """Decodes, crops, resizes and mirrors on ``device``.

        Returns:
            (M, 3, S, S) uint8 there, their M numbers in the batch, and number -> reason for the damaged ones.
        """
        device = torch.device(device)
        parts = self.data.tensor_split(self.ends[:-1])
        places = self.places.tolist()
        encoded = [number for number, place in enumerate(places) if place[0] >= 0]
        decoded, damaged = _decode_all({number: parts[number] for number in encoded}, device)
        kept = [number for number in range(len(self)) if number not in damaged]
        images = torch.empty((len(kept), 3, self.size, self.size), dtype=torch.uint8, device=device)
        for image, number in zip(images, kept, strict=True):
            if number not in decoded:
                image.copy_(parts[number].view(3, self.size, self.size), non_blocking=True)
                continue
            left, top, right, bottom, flip = places[number]
            crop = decoded[number][None, :, top:bottom, left:right].float()
            crop = F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)[0]
            crop = crop.flip(2) if flip else crop
            crop = crop.flip(0) if self.bgr else crop
            image.copy_(crop.round_().clamp_(0, 255))
        return images, kept, damaged


def _decode_all(jpegs: dict[int, torch.Tensor], device: torch.device) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
    """Decodes JPEG bytes to (3, H, W) on the device; if any of them fails, one by one with the workers' decoder."""
    try:
        found = decode_jpeg(list(jpegs.values()), mode=ImageReadMode.RGB, device=device)
        return dict(zip(jpegs, found, strict=True)), {}
    except RuntimeError:
        pass
    decoded, damaged = {}, {}
    for number, data in jpegs.items():
        try:
            pixels = decode(open_image(data.numpy().tobytes()))
            decoded[number] = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(device)
        except DamagedImageError as error:
            damaged[number] = str(error)
    return decoded, damaged


def decode_batch(batch: dict, device: torch.device | str) -> dict:
    """Returns the batch with its images decoded on ``device``; one with decoded images comes back as it is.

    Images that turn out to be damaged are left out, and listed under "skipped".

    Raises:
        DamagedImageError: all of the images are damaged.
    """
    if not isinstance(batch["image"], EncodedBatch):
        return batch
    images, kept, damaged = batch["image"].decode(device)
    batch = batch | {"image": images}
    if damaged:
        if not kept:
            raise DamagedImageError("corrupt", f"all images of a batch, the first {batch['keys'][0]!r}")
        labeled = torch.isin(batch["image_index"], torch.tensor(kept))
        batch["labels"] = batch["labels"][labeled]
        batch["image_index"] = torch.searchsorted(torch.tensor(kept), batch["image_index"][labeled])
        batch["skipped"] = batch["skipped"] + [(batch["keys"][number], reason) for number, reason in damaged.items()]
        batch["keys"] = [batch["keys"][number] for number in kept]
    return batch
