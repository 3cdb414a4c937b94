"""Decoding and loading of hashtag images: per core, and end to end through DataLoader workers.

The JPEGs are made on the spot from photographs that the scikit-image and scikit-learn wheels carry: random parts of
80 to 100% of a photograph, scaled to 500 x 375 and 1080 x 1080 pixels with noise of 3 gray levels in place of the
detail that scaling up lacks, quality 85 to 95, 4:2:0. Times per core are CPU seconds of this process, so that other
programs disturb little; contestants take turns, and the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from wsl_d2.data.read.decode import open_image
from wsl_d2.data.read.mapper import HashtagMapper, sample_crop
from wsl_d2.data.read.shrink import Shrinking, shrink

SIZES = ((500, 375), (1080, 1080))
CROP = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STORED = Shrinking(400, 90)
OURS = "wsl_d2 fast"
REFERENCE = "torchvision ImageFolder (Pillow, float)"
V2 = "torchvision v2 on decode_jpeg (uint8)"
OPENCV = "opencv (INTER_AREA)"
PEERS = {
    "cv2": "opencv-python-headless",
    "timm": "timm",
    "webdataset": "webdataset",
    "nvidia.dali": "nvidia-dali-cuda120",
}
_EPOCHS = 3  # of a loader that ends, so that its workers are as busy at the end of a measurement as others'
SYNSETS = ["n02084071", "n02121620", "n01503061", "n02958343"]  # dog, cat, bird, car
HASHTAGS = ["#dog", "#cat", "#bird", "#car"]


def installed(module: str) -> bool:
    """Whether a peer can be imported; if not, says once how to get it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        print(f"  not measured: {module} (pip install {PEERS[module]})")
    return found


def photographs() -> list[Image.Image]:
    """Photographs that come with scikit-image and scikit-learn."""
    try:
        import skimage
        import sklearn
    except ModuleNotFoundError as error:
        sys.exit(f"benchmark.py data: {error}; pip install scikit-image scikit-learn for their photographs")
    wheels = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
    paths = [wheels[0] / name for name in (*names, "hubble_deep_field.jpg")]
    paths += [wheels[1] / name for name in ("china.jpg", "flower.jpg")]
    return [Image.open(path).convert("RGB") for path in paths]


def make_jpegs(size: tuple[int, int], count: int, seed: int = 0) -> list[bytes]:
    """``count`` JPEGs of ``size`` (width, height), as the module's docstring tells."""
    rng = np.random.default_rng(seed)
    sources = photographs()
    jpegs = []
    for i in range(count):
        photo = sources[i % len(sources)]
        part = rng.uniform(0.8, 1.0)
        width = min(photo.width, photo.height * size[0] / size[1]) * part
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box=box)).astype(float)
        pixels += rng.normal(0, 3, (size[1], size[0], 1))
        buffer = io.BytesIO()
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
        image.save(buffer, "JPEG", quality=int(rng.integers(85, 96)), subsampling=2)
        jpegs.append(buffer.getvalue())
    return jpegs


def take_turns(contestants: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Runs every contestant once a round, after one round to warm up; returns its median in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if round_:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def wsl_crop(decoding: str) -> Callable[[bytes], np.ndarray]:
    """This project's training crop, with its generator made anew for every image as in training."""
    mapper = HashtagMapper(True, size=CROP, decoding=decoding)
    position = 0

    def crop(data: bytes) -> np.ndarray:
        nonlocal position
        position += 1
        return mapper(data, np.random.Generator(np.random.Philox(key=[0, position])))

    return crop


def pillow(data: bytes) -> Image.Image:
    """As torchvision's ImageFolder loads an image."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def reference_transform() -> transforms.Compose:
    """torchvision's training transforms of ImageNet."""
    crop = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def peer_crops() -> dict[str, Callable[[bytes], object]]:
    """JPEG bytes -> training crop, by every peer that is installed."""
    reference = reference_transform()
    crop = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    bytes_out = transforms.Compose([*crop, transforms.PILToTensor()])
    tensors = v2.Compose([v2.RandomResizedCrop(CROP, antialias=True), v2.RandomHorizontalFlip()])

    def tensor(data: bytes) -> torch.Tensor:
        return tensors(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))

    peers: dict[str, Callable[[bytes], object]] = {
        REFERENCE: lambda data: reference(pillow(data)),
        "torchvision ImageFolder (Pillow, uint8)": lambda data: bytes_out(pillow(data)),
        V2: tensor,
    }
    if installed("timm"):
        from timm.data import create_transform

        timm = create_transform(
            CROP, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear", hflip=0.5
        )
        peers["timm's transforms (Pillow, uint8)"] = lambda data: timm(pillow(data))
    if installed("cv2"):
        peers[OPENCV] = opencv_crop("INTER_AREA")
        peers["opencv (INTER_LINEAR, aliased)"] = opencv_crop("INTER_LINEAR")
    return peers


def opencv_crop(interpolation: str) -> Callable[[bytes], np.ndarray]:
    """Whole decoding by opencv, and its resize."""
    import cv2

    cv2.setNumThreads(1)
    flag, rng = getattr(cv2, interpolation), np.random.default_rng(0)

    def crop(data: bytes) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        left, top, right, bottom = sample_crop(rng, pixels.shape[1], pixels.shape[0], (0.08, 1.0), (3 / 4, 4 / 3))
        small = cv2.resize(pixels[top:bottom, left:right], (CROP, CROP), interpolation=flag)
        return np.ascontiguousarray((small[:, ::-1] if rng.random() < 0.5 else small).transpose(2, 0, 1))

    return crop


def dali_crop(encoded):
    """The training crop of a batch of JPEGs, as a node of DALI's graph."""
    from nvidia.dali import fn, types

    pixels = fn.decoders.image_random_crop(
        encoded, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
    )
    pixels = fn.resize(pixels, size=(CROP, CROP), interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.transpose(fn.flip(pixels, horizontal=fn.random.coin_flip()), perm=[2, 0, 1])


def dali_pipeline(jpegs: list[bytes]) -> Callable[[], None]:
    """DALI's processor path, which also decodes no more than the crop; one thread, as many images as given."""
    from nvidia.dali import fn, pipeline_def

    arrays = [np.frombuffer(data, np.uint8) for data in jpegs]

    @pipeline_def(batch_size=len(arrays), num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1)
    def pipeline():
        return dali_crop(fn.external_source(source=lambda: arrays, batch=True))

    built = pipeline()
    built.build()
    return lambda: built.run()


def bounds() -> dict[str, Callable[[bytes], object]]:
    """What libjpeg-turbo itself needs: nothing that reads every coefficient can be faster than shrinking to 1/8."""
    import simplejpeg

    return {
        "limit: libjpeg-turbo, whole image": simplejpeg.decode_jpeg,
        "limit: libjpeg-turbo, >= 224 pixels": lambda data: simplejpeg.decode_jpeg(
            data, min_width=CROP, min_height=CROP
        ),
        "limit: libjpeg-turbo, 1/8": lambda data: simplejpeg.decode_jpeg(data, min_width=1, min_height=1, min_factor=8),
    }


def over(crop: Callable[[bytes], object], jpegs: list[bytes]) -> Callable[[], None]:
    """Binds a crop to the images it is timed on."""

    def run() -> None:
        for data in jpegs:
            crop(data)

    return run


def pixel_difference(jpegs: list[bytes]) -> str:
    """How far "fast" is from "exact", from the same boxes."""
    exact, fast = (HashtagMapper(True, size=CROP, decoding=name) for name in ("exact", "fast"))
    differences = [
        np.abs(fast(data, np.random.default_rng(i)).astype(int) - exact(data, np.random.default_rng(i)))
        for i, data in enumerate(jpegs)
    ]
    share = np.mean([(difference > 8).mean() for difference in differences])
    return f"{np.mean(differences):.2f} of 255 on average, {share:.2%} of values by over 8"


def measure_decoding(count: int, rounds: int) -> None:
    """Prints milliseconds of CPU per image, and ratios to torchvision's reference and to the limit."""
    torch.set_num_threads(1)
    print("JPEG bytes -> 224 x 224 training crop, one core")
    peers = peer_crops()
    with_dali = installed("nvidia.dali")
    for size in SIZES:
        jpegs = make_jpegs(size, count)
        kilobytes = statistics.mean(map(len, jpegs)) / 1000
        print(f"\n{size[0]} x {size[1]}: {count} JPEGs of {kilobytes:.0f} kB on average, {rounds} rounds")
        crops = {f"wsl_d2 {name}": wsl_crop(name) for name in ("fast", "exact")} | peers | bounds()
        contestants = {name: over(crop, jpegs) for name, crop in crops.items()}
        if min(size) > STORED.short_side:
            stored = [shrink(open_image(data), STORED) for data in jpegs]
            share = sum(map(len, stored)) / sum(map(len, jpegs))
            print(f"stored with --short-side {STORED.short_side} --quality {STORED.quality}: {share:.0%} of the bytes")
            contestants["wsl_d2 fast, stored so"] = over(wsl_crop("fast"), stored)
        if with_dali:
            contestants["DALI (processor, crop while decoding)"] = dali_pipeline(jpegs)
        seconds = take_turns(contestants, rounds, time.process_time)
        print(f"  {'':42} {'ms an image':>11} {'ours is faster by':>18} {'against ImageFolder':>20}")
        for name, value in seconds.items():
            ours, reference = value / seconds[OURS], seconds[REFERENCE] / value
            print(f"  {name:42} {1000 * value / count:11.3f} {ours:17.2f}x {reference:19.2f}x")
        print(f"  difference of fast from exact: {pixel_difference(jpegs)}")


def write_folders(folder: Path, jpegs: list[bytes]) -> None:
    """Writes the same images as shards and as torchvision's ImageFolder."""
    from wsl_d2.data import finish_dataset, index_shard, write_shard
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    vocabulary = Vocabulary.build("benchmark", load_wordnet(), synsets=SYNSETS)
    shards = folder / "shards"
    shards.mkdir()
    vocabulary.save(shards / "vocabulary.json")
    samples = [(f"{i:06d}", data, {"hashtags": [HASHTAGS[i % 4]]}) for i, data in enumerate(jpegs)]
    for number, start in enumerate(range(0, len(samples), 256)):
        path = shards / f"shard-{number:06d}.tar"
        write_shard(path, samples[start : start + 256])
        index_shard(path, vocabulary)
    finish_dataset(shards, vocabulary)
    for key, data, metadata in samples:
        path = folder / "images" / metadata["hashtags"][0][1:] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def wsl_loader(folder: Path, decoding: str, workers: int, batch_size: int):
    """This project's training loader over the shards, built from a config as in training."""
    from detectron2.config import get_cfg

    from wsl_d2 import add_wsl_config
    from wsl_d2.data import register_hashtag_dataset
    from wsl_d2.data.read.loaders import build_hashtag_train_loader
    from wsl_d2.engine.plan import open_plan

    register_hashtag_dataset(str(folder), folder)
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "HashtagClassifier"
    cfg.DATASETS.TRAIN = (str(folder),)
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.INPUT.FORMAT, cfg.INPUT.DECODING = "RGB", decoding
    cfg.SOLVER.IMS_PER_BATCH = batch_size
    plan = open_plan(cfg)
    return build_hashtag_train_loader(plan.cfg, plan.dataset, plan.sampler)


def loaders(folder: Path, num_images: int, workers: int, batch_size: int) -> dict[str, Callable[[], object]]:
    """Each makes batches of the folder's images without end, or for several times as long as is measured."""
    options = {"batch_size": batch_size, "num_workers": workers, "drop_last": True}
    images = datasets.ImageFolder(folder / "images", reference_transform())
    images.samples *= _EPOCHS
    crops = peer_crops()
    found: dict[str, Callable[[], object]] = {
        "wsl_d2 shards, fast": lambda: wsl_loader(folder / "shards", "fast", workers, batch_size),
        "wsl_d2 shards, exact": lambda: wsl_loader(folder / "shards", "exact", workers, batch_size),
        REFERENCE: lambda: DataLoader(images, shuffle=True, **options),
    }
    best = {name: crop for name, crop in crops.items() if name in (V2, OPENCV)}
    for name, crop in best.items():
        of_bytes = datasets.ImageFolder(folder / "images", crop, loader=lambda path: Path(path).read_bytes())
        of_bytes.samples *= _EPOCHS
        found[f"ImageFolder of bytes, {name}"] = lambda of_bytes=of_bytes: DataLoader(of_bytes, shuffle=True, **options)
    if installed("timm"):
        from timm.data import create_dataset, create_loader

        timm_images = create_dataset("", folder / "images")
        timm_images.reader.samples *= _EPOCHS
        found["timm's loader"] = lambda: create_loader(
            timm_images,
            (3, CROP, CROP),
            batch_size,
            is_training=True,
            no_aug=False,
            color_jitter=None,
            num_workers=workers,
            interpolation="bilinear",
            device=torch.device("cpu"),
            pin_memory=False,
        )
    if installed("webdataset"):
        tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
        reference = reference_transform()
        for name, crop in {"Pillow, float": lambda data: reference(pillow(data)), **best}.items():
            found[f"webdataset, {name}"] = lambda crop=crop: web_loader(tars, crop, batch_size, workers)
    if installed("nvidia.dali"):
        paths = sorted(str(path) for path in (folder / "images").glob("*/*.jpg"))
        found[f"DALI (processor, {workers} threads)"] = lambda: dali_loader(paths, batch_size, workers)
    return found


def web_loader(tars: list[str], crop: Callable[[bytes], object], batch_size: int, workers: int):
    """webdataset's loader with a crop of JPEG bytes; what is in the JSON is decoded as well."""
    import webdataset

    def sample(data: bytes, metadata: bytes) -> tuple:
        return torch.as_tensor(crop(data)), json.loads(metadata)["hashtags"]

    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False, workersplitter=None).repeat()
    dataset = dataset.shuffle(500).to_tuple("jpg", "json").map(lambda row: sample(*row))
    return webdataset.WebLoader(dataset.batched(batch_size), batch_size=None, num_workers=workers)


def dali_loader(paths: list[str], batch_size: int, workers: int) -> Iterator:
    """DALI's own reader and threads."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, seed=0)
    def pipeline():
        encoded, _ = fn.readers.file(files=paths, random_shuffle=True)
        return dali_crop(encoded)

    built = pipeline()
    built.build()
    while True:
        yield built.run()


def measure_loading(count: int, rounds: int, workers: int, batch_size: int = 32) -> None:
    """Prints images per second of wall clock, and CPU time of all processes per image, once the workers are busy."""
    print(f"\nend to end through {workers} workers, batches of {batch_size}; images/s need {workers} idle cores")
    for size in SIZES:
        folder = Path(tempfile.mkdtemp(prefix="wsl_d2_benchmark_"))
        try:
            write_folders(folder, make_jpegs(size, count))
            print(f"{size[0]} x {size[1]}: {count} images, {rounds} rounds")
            found: dict[str, list[tuple[float, float]]] = {}
            contestants = loaders(folder, count, workers, batch_size)
            for _ in range(rounds):
                for name, make in contestants.items():
                    found.setdefault(name, []).append(seconds_per_image(make(), count, workers, batch_size))
        finally:
            shutil.rmtree(folder)
        wall, cpu = ({name: statistics.median(row[n] for row in rows) for name, rows in found.items()} for n in (0, 1))
        ours = "wsl_d2 shards, fast"
        print(f"  {'':60} {'images/s':>8} {'CPU ms':>7}   ours is faster by: wall    CPU   against ImageFolder: CPU")
        for name in found:
            print(
                f"  {name:60} {1 / wall[name]:8.0f} {1000 * cpu[name]:7.2f} {wall[name] / wall[ours]:24.2f}x "
                f"{cpu[name] / cpu[ours]:5.2f}x {cpu[REFERENCE] / cpu[name]:24.2f}x"
            )


def seconds_per_image(loader, count: int, workers: int, batch_size: int) -> tuple[float, float]:
    """Wall clock and CPU of an image, without the batches that the workers make before they wait for the first one."""
    iterator = iter(loader)
    ahead = 1 + workers
    for _ in range(ahead):
        next(iterator)
    start = np.array([time.perf_counter(), cpu_seconds()])
    num_batches = count // batch_size - ahead
    for _ in range(num_batches):
        next(iterator)
    wall, cpu = (np.array([time.perf_counter(), cpu_seconds()]) - start) / (num_batches * batch_size)
    return wall, cpu


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has started."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__)
    parser.add_argument("--images", type=int, default=48, help="JPEGs of each size for the times per core")
    parser.add_argument("--loader-images", type=int, default=512, help="images of each size for the loaders; 0: none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.images:
        measure_decoding(options.images, options.rounds)
    if options.loader_images:
        measure_loading(options.loader_images, max(5, options.rounds - 2), options.workers)
