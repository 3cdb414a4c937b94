"""Decoding on the training device, here the CPU; on a GPU with `-m gpu`."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import jpeg, write_hashtag_folder
from training_runs import losses, merged_records, train

from wsl_d2.data.read.device_decode import EncodedBatch, EncodedCrop, decode_batch
from wsl_d2.data.read.loaders import collate
from wsl_d2.data.read.mapper import HashtagMapper


def photo(width: int, height: int, seed: int = 0, **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, **({"format": "JPEG", "quality": 92, "subsampling": 0} | options))
    return buffer.getvalue()


def sample(image, number: int = 0) -> dict:
    labels = np.array([number % 3, 3])
    return {"image": image, "labels": labels, "key": f"k{number}", "skipped": []}


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_crops_are_the_exact_ones(device, image_format):
    files = [photo(200 + 31 * n, 150 + 7 * n, n) for n in range(8)] + [photo(120, 90, format="PNG", quality=None)]
    exact, later = (
        HashtagMapper(True, size=48, decoding=name, image_format=image_format) for name in ("exact", "device")
    )
    expected = torch.stack([torch.from_numpy(exact(f, np.random.default_rng(n))) for n, f in enumerate(files)])
    crops = [later(data, np.random.default_rng(number)) for number, data in enumerate(files)]
    assert [isinstance(crop, EncodedCrop) for crop in crops] == [True] * 8 + [False]
    batch = decode_batch(collate([sample(crop, number) for number, crop in enumerate(crops)]), device)
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (9, 3, 48, 48)
    difference = (batch["image"].cpu().int() - expected.int()).abs()
    assert difference.max() <= (2 if device == "cpu" else 8)


def test_decoded_batches_come_back_as_they_are():
    batch = collate([sample(np.zeros((3, 4, 4), np.uint8))])
    assert decode_batch(batch, "cpu") is batch


def test_a_damaged_image_is_left_out_and_listed():
    crops = [EncodedCrop(photo(60, 50, n), (0, 0, 60, 50), 16, False, False) for n in range(3)]
    crops[1].data = crops[1].data[:300] + b"\xff\xd9"  # its end is there, the picture is not
    batch = decode_batch(collate([sample(crop, number) for number, crop in enumerate(crops)]), "cpu")
    assert batch["keys"] == ["k0", "k2"] and batch["image"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 3, 2, 3] and batch["image_index"].tolist() == [0, 0, 1, 1]
    assert [key for key, _ in batch["skipped"]] == ["k1"] and batch["skipped"][0][1].startswith("bad header")


def test_turned_and_cut_images_are_left_to_the_worker():
    mapper = HashtagMapper(True, size=16, decoding="device")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert isinstance(mapper(photo(60, 50, exif=exif), np.random.default_rng(0)), np.ndarray)
    with pytest.raises(ValueError, match="truncated"):
        mapper(photo(60, 50)[:-30], np.random.default_rng(0))


def test_a_batch_is_three_tensors():
    crops = [EncodedCrop(jpeg(n), (0, 0, 40, 32), 16, False, False) for n in range(4)]
    batch = EncodedBatch(crops)
    assert len(batch) == 4 and batch.data.numel() == sum(len(jpeg(n)) for n in range(4))
    assert batch.places.shape == (4, 5) and batch.ends[-1] == batch.data.numel()


def test_training_decodes_on_its_device(datasets, toy_vocabulary, tmp_path):
    options = {"SOLVER__TOTAL_IMAGES": 96, "DATALOADER__NUM_WORKERS": 1}
    train(datasets, tmp_path / "exact", INPUT__DECODING="exact", **options)
    train(datasets, tmp_path / "device", INPUT__DECODING="device", **options)
    exact, device = losses(tmp_path / "exact"), losses(tmp_path / "device")
    assert device[0] == pytest.approx(exact[0], rel=0.02)
    write_hashtag_folder(datasets / "one_cut", toy_vocabulary, damaged={3})
    folders = "[['toy_train', 'one_cut'], ['toy_val', 'toy/val']]"
    train(datasets, tmp_path / "cut", INPUT__DECODING="device", DATASETS__HASHTAG_FOLDERS=folders, **options)
    assert merged_records(tmp_path / "cut")["skipped_images"] >= 2
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text().splitlines()[-1])
