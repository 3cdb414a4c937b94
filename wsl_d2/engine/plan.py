"""The plan of a run: everything that is opened or computed before training, once in a process.

The config says what is wanted; the plan holds what follows from it: the open dataset, the order of its images, the
ghost batch size, the schedule in iterations, the resume fingerprint. `open_plan` makes it; trainer, loaders, dry run
and records read it, and none of them opens a dataset.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from wsl_d2.data.order.sampler import HashtagSampler
from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.loaders import build_sampler, get_hashtag_dataset, training_dataset
from wsl_d2.data.read.mapper import HashtagMapper
from wsl_d2.engine.fingerprint import resume_fingerprint
from wsl_d2.engine.parallel import ghost_batch_size
from wsl_d2.engine.schedule import resolve_schedule
from wsl_d2.errors import ConfigError
from wsl_d2.modeling import is_hashtag_classifier
from wsl_d2.transfer.features import ProbeData, ProbeError, open_probe_data
from wsl_d2.transfer.linear_probe import HELD_OUT_FRACTION, few_shot_rows, split_held_out


@dataclass
class RunPlan:
    """The config of a run, resolved, and its datasets.

    Attributes:
        cfg: frozen, with the keys filled in that follow from the data.
        fingerprint: see :func:`wsl_d2.engine.fingerprint.resume_fingerprint`.
        dataset, sampler: in pretraining, the training set and the order of its images; None for a detector.
        test_sets: in pretraining, name -> dataset.
        probes: the rows of TEST.PROBE, name of the training set -> datasets.
    """

    cfg: CfgNode
    fingerprint: dict[str, str] = field(default_factory=dict)
    dataset: HashtagDataset | None = None
    sampler: HashtagSampler | None = None
    test_sets: dict[str, HashtagDataset] = field(default_factory=dict)
    probes: dict[str, ProbeData] = field(default_factory=dict)

    @property
    def is_pretraining(self) -> bool:
        """Whether the run trains a hashtag classifier rather than a detector."""
        return self.dataset is not None

    def describe_length(self) -> str:
        """Returns a pretraining's length in images, iterations and epochs."""
        assert self.sampler is not None
        solver, epoch = self.cfg.SOLVER, self.sampler.epoch_length
        images = solver.MAX_ITER * solver.IMS_PER_BATCH
        return (
            f"{images:,} images in {solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH}: "
            f"{images / epoch:.2f} epochs of {epoch:,} draws ({self.cfg.DATALOADER.RESAMPLING.MODE} resampling of "
            f"{self.sampler.num_images:,} images); peak learning rate {solver.BASE_LR:g}"
        )


def open_plan(cfg: CfgNode, resume: bool = False) -> RunPlan:
    """Opens the datasets of a config and resolves the keys that depend on them; called by all processes together.

    Args:
        cfg: with its datasets registered, not frozen; schedule, number of classes and ghost batch size are filled in.
        resume: whether a run in OUTPUT_DIR is continued, which keeps its ghost batch size.

    Raises:
        ConfigError: two keys, or a key and a dataset, contradict each other.
        ShardError: a dataset cannot be used.
    """
    if not is_hashtag_classifier(cfg):
        if cfg.TEST.PROBE:
            raise ConfigError(f"TEST.PROBE is of pretraining; a {cfg.MODEL.META_ARCHITECTURE} needs it to be [].")
        cfg.freeze()
        return RunPlan(cfg, resume_fingerprint(cfg))
    with _first_process_of_a_machine_first():
        dataset = training_dataset(cfg)
        test_sets = {name: get_hashtag_dataset(name) for name in cfg.DATASETS.TEST}
        probes = _open_probes(cfg)
    for name, test_set in test_sets.items():
        test_set.mapper = HashtagMapper.from_config(cfg, is_train=False)
        _check_same_vocabulary(cfg, dataset, name, test_set)
    classifier = cfg.MODEL.HASHTAG_CLASSIFIER
    if classifier.NUM_CLASSES not in (0, dataset.num_labels):
        raise ConfigError(
            f"MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES is {classifier.NUM_CLASSES}, but the vocabulary of "
            f"{cfg.DATASETS.TRAIN[0]} ({dataset.folder}) has {dataset.num_labels} labels; set it to 0 to follow the "
            "vocabulary."
        )
    classifier.NUM_CLASSES = dataset.num_labels
    if comm.get_local_rank() == 0:  # once on every machine
        for one in (dataset, *test_sets.values()):
            one.check_shards()
    cfg.SOLVER.IMS_PER_MICRO_BATCH = ghost_batch_size(cfg, _saved_ghost_batch_size(cfg) if resume else None)
    sampler = build_sampler(cfg, dataset)
    resolve_schedule(cfg, sampler.epoch_length)
    cfg.freeze()
    facts = {
        "ghost batch size": cfg.SOLVER.IMS_PER_MICRO_BATCH,
        "vocabulary": dataset.vocabulary_checksum,
        "hashtags column": dataset.manifest["hashtags_column"],
        "number of images": len(dataset),
        "SHA-256 of the shards": dataset.shards_sha256,
        "SHA-256 of the labels": dataset.labels_sha256,
    }
    return RunPlan(cfg, resume_fingerprint(cfg, facts), dataset, sampler, test_sets, probes)


def _open_probes(cfg: CfgNode) -> dict[str, ProbeData]:
    """Opens the datasets of TEST.PROBE, and draws from them what the probes will, so that nothing is left to fail."""
    probes: dict[str, ProbeData] = {}
    for row in cfg.TEST.PROBE:
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise ConfigError(f"a row of TEST.PROBE is [training set, test set], got {row!r}.")
        if row[0] in probes:
            raise ConfigError(f"TEST.PROBE has the training set {row[0]} twice; metrics are named by it. Leave one.")
        try:
            probes[row[0]] = data = open_probe_data(cfg, *row)
            split_held_out(data.train_labels, HELD_OUT_FRACTION, 0)
            for shots in cfg.TEST.PROBE_SHOTS:
                few_shot_rows(data.train_labels, shots, 0)
        except ProbeError as error:
            raise ConfigError(f"TEST.PROBE: {error}") from error
    return probes


@contextlib.contextmanager
def _first_process_of_a_machine_first():
    """Lets one process of a machine fill the cache of a store before the others read it."""
    is_first = comm.get_local_rank() == 0
    if not is_first:
        comm.synchronize()
    try:
        yield
    finally:
        if is_first:
            comm.synchronize()


def _saved_ghost_batch_size(cfg: CfgNode) -> int | None:
    """The ghost batch size of the run in OUTPUT_DIR, None if there is none."""
    saved = None
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
            saved = int(yaml.safe_load(file)["SOLVER"]["IMS_PER_MICRO_BATCH"])
    comm.synchronize()  # before the first process writes the file again
    return saved


def _check_same_vocabulary(cfg: CfgNode, dataset: HashtagDataset, name: str, other: HashtagDataset) -> None:
    if other.vocabulary_checksum != dataset.vocabulary_checksum:
        raise ConfigError(
            f"DATASETS.TEST {name} ({other.folder}) has vocabulary {other.manifest['vocabulary']!r} "
            f"{other.vocabulary_checksum[:12]}, but DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]} ({dataset.folder}) "
            f"has {dataset.manifest['vocabulary']!r} {dataset.vocabulary_checksum[:12]}; labels would not agree. "
            "Prepare both with the same vocabulary.json."
        )
