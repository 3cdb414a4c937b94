"""Every configuration key that wsl_d2 adds to Detectron2's, with its unit, choices and default; reading of configs."""

import difflib
import os
from pathlib import Path

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from wsl_d2.errors import ConfigError


def add_wsl_config(cfg: CN) -> None:
    """Adds wsl_d2's keys to ``cfg`` in place; call it before ``cfg.merge_from_file``.

    No key of Detectron2 is renamed, duplicated or given another default.

    Args:
        cfg: a node made by ``detectron2.config.get_cfg()``.
    """
    # ---- Datasets to register before the run; folders are relative to $DETECTRON2_DATASETS ("datasets").
    cfg.DATASETS.HASHTAG_FOLDERS = []  # rows of [name, folder of shards with manifest.json, or its URL for fsspec]
    cfg.DATASETS.COCO_FOLDERS = []  # rows of [name, annotation json, image folder]

    # ---- Hashtag images: crop and resampling
    cfg.INPUT.RANDOM_RESIZED_CROP = CN()
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 224  # pixels, both sides; also the center crop of testing
    cfg.INPUT.RANDOM_RESIZED_CROP.SCALE = (0.08, 1.0)  # fraction of the image's area
    cfg.INPUT.RANDOM_RESIZED_CROP.RATIO = (3.0 / 4.0, 4.0 / 3.0)  # width / height
    cfg.INPUT.TEST_RESIZE_SHORT_SIDE = 256  # pixels; the center crop is taken after it
    # How JPEG becomes a crop: "exact" is torchvision's result bit for bit; "fast" scales training images in the
    # DCT domain (tests as "exact"); "device" has plain JPEG of training decoded and cropped on MODEL.DEVICE, by
    # nvJPEG on a GPU.
    cfg.INPUT.DECODING = "fast"
    cfg.DATALOADER.RESAMPLING = CN()
    cfg.DATALOADER.RESAMPLING.MODE = "sqrt"  # "natural", "sqrt" or "uniform"
    cfg.DATALOADER.RESAMPLING.THRESHOLD = 1e-3  # hashtag frequency (a fraction of images) below which images repeat
    # Shards whose images are mixed with each other; the shards' own order is random in each epoch. 0 mixes all images,
    # which under resampling takes 16 bytes of memory an image; a window takes next to none and reads in sequence.
    cfg.DATALOADER.SHUFFLE_WINDOW_SHARDS = 0
    # Equal parts of a batch that read different shards. With as many as there are machines, each of them reads its own
    # part of the dataset. The order depends on this number, and with more than one on SOLVER.IMS_PER_BATCH.
    cfg.DATALOADER.READ_STREAMS = 1
    cfg.DATALOADER.SHARD_CACHE_GB = 100.0  # shard cache of each machine, $WSL_D2_CACHE/shards, for stores
    cfg.DATALOADER.READ_ATTEMPTS = 6  # to copy a shard from a store before giving up
    cfg.DATALOADER.PREFETCH_BATCHES = 2  # batches (micro-batches, if SOLVER has them) that each worker prefetches
    cfg.DATALOADER.TIMEOUT_SECONDS = 900  # without a batch from the workers before a run ends with an error; 0: never
    # A run stops when more than this fraction of the images it drew could not be decoded (8 are always allowed).
    cfg.DATALOADER.MAX_DAMAGED_FRACTION = 1e-3
    cfg.TEST.FAST_EVAL = True  # COCO evaluation by faster-coco-eval where it is installed; the same numbers
    # Linear probes at every evaluation of a pretraining, each of the numbers that `wsl-d2 probe` gives of the backbone:
    # rows of [training set, test set], names in DATASETS.HASHTAG_FOLDERS, one label an image. A few thousand images
    # take seconds; `wsl-d2 data view` makes a subset of a larger set.
    cfg.TEST.PROBE = []
    cfg.TEST.PROBE_SHOTS = ()  # also with so many training images a class, five draws each
    cfg.TEST.IMS_PER_BATCH = 64  # images per process when evaluating a HashtagClassifier

    # ---- Model
    cfg.MODEL.HASHTAG_CLASSIFIER = CN()
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 0  # 0: the size of the training dataset's vocabulary
    cfg.MODEL.HASHTAG_CLASSIFIER.LOSS = "softmax"  # "softmax" (targets 1/k) or "sigmoid" (per hashtag)
    cfg.MODEL.HASHTAG_CLASSIFIER.HEAD_INIT_STD = 0.01
    cfg.MODEL.RESNEXT = CN()
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = True  # gamma = 0 in the last BN of each block (arXiv 1706.02677)
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = ()  # generic builders only: blocks of res2..res5 in place of RESNETS.DEPTH's
    # Stages ("res2".."res5") that keep only the inputs of their blocks for the backward pass and compute the rest
    # again: less memory, about a third more time, the same numbers.
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = ()
    cfg.MODEL.COMPILE = CN()
    cfg.MODEL.COMPILE.ENABLED = False  # torch.compile for the backbone of a hashtag classifier
    cfg.MODEL.COMPILE.BACKEND = "inductor"  # of torch.compile

    # ---- Solver, counted in images so that a recipe holds for every batch size
    cfg.SOLVER.LR_PER_256_IMAGES = 0.0  # > 0: BASE_LR becomes this * IMS_PER_BATCH / 256
    cfg.SOLVER.TOTAL_IMAGES = 0  # > 0: MAX_ITER becomes ceil(this / IMS_PER_BATCH); excludes TOTAL_EPOCHS
    cfg.SOLVER.TOTAL_EPOCHS = 0.0  # > 0: the same from epochs of the resampled training set
    cfg.SOLVER.WARMUP_IMAGES = 0  # > 0: WARMUP_ITERS becomes ceil(this / IMS_PER_BATCH)
    cfg.SOLVER.NUM_LR_HALVINGS = 0  # > 0: that many evenly spaced STEPS with GAMMA 0.5
    # Images per forward pass: the ghost batch size, the paper's images per GPU. A process accumulates the gradients of
    # as many micro-batches as it needs, so that a run computes the same on fewer processes. 0: IMS_PER_BATCH divided
    # by the number of processes; a resumed run keeps the size that it began with.
    cfg.SOLVER.IMS_PER_MICRO_BATCH = 0
    cfg.SOLVER.AMP.DTYPE = "bfloat16"  # "bfloat16" or "float16" (with loss scaling) when SOLVER.AMP.ENABLED
    cfg.SOLVER.LOG_PERIOD = 20  # iterations between two metric records; the loss recorded is their mean
    # A step whose loss or gradient is not finite in any process is skipped by all; more than this many end the run.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    cfg.SOLVER.CHECKPOINT_MILESTONES = ()  # iterations after which a checkpoint is saved and kept for good
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 3  # most recent checkpoints kept, besides model_final
    cfg.SOLVER.CHECKPOINT_IN_BACKGROUND = True  # write checkpoints, from a copy in memory, while training goes on
    cfg.SOLVER.EMA_DECAY = 0.0  # > 0: also keep, evaluate and export this moving average of the weights
    cfg.SOLVER.ZERO_STAGE_1 = False  # optimizer-state sharding (ZeRO-1): each process keeps a part of the momentum
    cfg.SOLVER.GRADIENT_COMPRESSION = ""  # "", "bfloat16" or "float16": type in which gradients are reduced
    # Collective timeout: a run ends with an error that names the processes that did not answer for so long.
    cfg.SOLVER.PROCESS_TIMEOUT_SECONDS = 1800
    # Peak dense TFLOP/s of one device, for the recorded utilization (MFU). 0: from a table of common GPUs.
    cfg.SOLVER.PEAK_TFLOPS = 0.0
    cfg.WANDB = CN()
    cfg.WANDB.PROJECT = ""  # of Weights & Biases, to which metrics are sent, too; needs `pip install wandb`


def get_config_file(name: str) -> str:
    """Returns the path of a config of this package, such as "Hashtag-Pretraining/X_101_32x8d_17k.yaml".

    Raises:
        ConfigError: there is no such file; names the nearest ones.
    """
    package = Path(__file__).resolve().parent
    # Installed, configs/ lies in the package; in a clone, beside it.
    root = next((root for root in (package / "configs", package.parent / "configs") if root.is_dir()), package)
    if (root / name).is_file():
        return str(root / name)
    known = [path.relative_to(root).as_posix() for path in root.rglob("*.yaml")]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(f"{name} does not exist; the nearest of wsl_d2's own: {', '.join(close) or 'none'}.")


def find_config_file(path: str) -> str:
    """Returns a path as it is, or, where no file is there, that of this package's config of that name.

    Args:
        path: also "" for none, and "configs/..." as in this package's documentation.

    Raises:
        ConfigError: neither exists; names the nearest of this package.
    """
    return path if not path or os.path.isfile(path) else get_config_file(path.removeprefix("configs/"))


def load_config(config_file: str, opts: list[str]) -> CN:
    """Returns Detectron2's and wsl_d2's keys with a file and command-line overrides merged, not frozen.

    Args:
        config_file: see :func:`find_config_file`.
        opts: KEY VALUE ...

    Raises:
        ConfigError: the file does not exist, or names a key that does not exist or has another type; ``opts`` are no
            pairs.
    """
    if options := [word for word in opts if word.startswith("--")]:
        raise ConfigError(f"{options[0].partition('=')[0]} comes after KEY VALUE pairs; give all options before them.")
    if len(opts) % 2:
        raise ConfigError(
            f"a KEY VALUE pair is incomplete: {opts[-1]} is the last of {len(opts)} words; give pairs such as SEED 1."
        )
    cfg = get_cfg()
    add_wsl_config(cfg)
    config_file = find_config_file(config_file)
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"{config_file}: no YAML that is safe to read: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{config_file}: _BASE_ leads back to a file that it began from.") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{config_file}, or its _BASE_: no mapping of config keys, such as SOLVER.BASE_LR."
        ) from error
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{config_file}: {_explain(error, cfg)}") from error
    try:
        cfg.merge_from_list(_whole_numbers_as_floats(cfg, opts))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"command line: {_explain(error, cfg)}") from error
    return cfg


def check_devices(cfg: CN, num_processes: int = 1) -> None:
    """Refuses a device that is not there.

    Args:
        cfg: reads MODEL.DEVICE.
        num_processes: of this machine, each with a GPU of its own.

    Raises:
        ConfigError: there is no GPU, or there are fewer than processes.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but no GPU can be used; add `MODEL.DEVICE cpu` to the command."
        )
    if num_processes > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus is {num_processes}, but this machine has {torch.cuda.device_count()} GPUs.")


def _whole_numbers_as_floats(cfg: CN, opts: list[str]) -> list[str]:
    """Lets `SOLVER.BASE_LR 1` stand for 1.0, which yacs refuses."""
    changed = list(opts)
    for place, (key, value) in enumerate(zip(opts[::2], opts[1::2], strict=False)):
        node: object = cfg
        for part in key.split("."):
            node = node.get(part) if isinstance(node, CN) else None
        if isinstance(node, float) and value.lstrip("+-").isdecimal():
            changed[2 * place + 1] = f"{value}.0"
    return changed


def _explain(error: Exception, cfg: CN) -> str:
    """Turns yacs' message into one that also names the nearest existing key."""
    message = str(error.args[0]) if error.args and not isinstance(error, UnicodeError) else str(error)
    key = message.rsplit(": ", 1)[-1].strip()
    close = difflib.get_close_matches(key, _keys(cfg), n=1)
    if not message.startswith("Non-existent"):
        return message
    return f"unknown config key {key}." + (f" Did you mean {close[0]}?" if close else "")


def _keys(node: CN, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CN):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
