"""Prepares a mini-world folder: renders what is missing, in parallel, in the formats of the real data.

Layout of the folder::

    params.json                 the options it was made with; another set of options is refused
    hashtags/{train,val}/       shards, indexes, vocabulary.json, manifest.json, as by `wsl-d2 data index`
    clean/{train,val}/          the same with one true hashtag an image
    detection/{train,val}/      JPEGs; detection/annotations/instances_{train,val}.json in COCO's format
    contact_sheet.png  ATTRIBUTION.txt  sprites.npz
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .coco import annotate, coco_document
from .concepts import ZIPF_EXPONENT, clean_concepts, detection_concepts, hashtag_synsets, load_concepts
from .contact_sheet import draw_contact_sheet
from .render import Renderer
from .scene import SETS
from .sprites import ART_STYLES, Sprites, attribution, load_sprites, read_sprites, write_sprites

RECIPE = 2  # raise it whenever the same options would give other pictures
DETECTION_CHUNK = 25  # images rendered by one task


class OptionsError(ValueError):
    """The options are impossible, or not those that the folder was made with."""


class LabelError(ValueError):
    """The labels in the shards are not those that the hashtags mean."""


@dataclass(frozen=True)
class WorldOptions:
    """What decides every byte of a world. Sizes are in pixels; one field each for the tool's options."""

    seed: int = 0
    num_hashtag_images: int = 32000
    num_hashtag_val_images: int = 1000
    num_clean_images: int = 1536  # 64 per class
    num_clean_val_images: int = 2_400  # 100 per class
    num_train: int = 400
    num_val: int = 250
    image_size: int = 48
    detection_size: int = 128
    shard_size: int = 1000  # images
    held_out_styles: tuple[str, ...] = field(default=())
    dominance: float | None = None  # share of the hashtag photos for training that few posters post; None: no posters
    frequency_exponent: float = ZIPF_EXPONENT  # of the concepts' frequencies in hashtag photos

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = {"seed": 0, "image_size": 16, "detection_size": 32}.get(name, 1)
            if name not in ("held_out_styles", "dominance", "frequency_exponent") and not low <= value < 2**32:
                raise OptionsError(f"{name} is {value}; it must be at least {low} and below 2**32.")
        if self.dominance is not None and not 0 <= self.dominance <= 1:
            raise OptionsError(f"dominance is {self.dominance}; it is a share of the photos, 0 to 1.")
        if not 0 <= self.frequency_exponent <= 5:
            raise OptionsError(f"frequency_exponent is {self.frequency_exponent}; it is a number from 0 to 5.")
        object.__setattr__(self, "held_out_styles", tuple(sorted(set(self.held_out_styles))))
        if unknown := set(self.held_out_styles) - ART_STYLES.keys():
            raise OptionsError(f"held_out_styles: no art style {sorted(unknown)}; there are {', '.join(ART_STYLES)}.")
        for concept in load_concepts():
            if not concept.icons.keys() - set(self.held_out_styles):
                raise OptionsError(
                    f"held_out_styles {', '.join(self.held_out_styles)} leave no artwork of {concept.name!r} "
                    "for pretraining; hold out fewer."
                )
            if self.held_out_styles and concept.detection and not concept.icons.keys() & set(self.held_out_styles):
                raise OptionsError(
                    f"held_out_styles {', '.join(self.held_out_styles)} have no artwork of the detection "
                    f"class {concept.name!r}; hold out one of {', '.join(concept.icons)} as well."
                )

    def num_images(self, set_name: str) -> int:
        """Returns the number of pictures in one of :data:`SETS`."""
        numbers = (
            self.num_hashtag_images,
            self.num_hashtag_val_images,
            self.num_clean_images,
            self.num_clean_val_images,
            self.num_train,
            self.num_val,
        )
        return numbers[SETS.index(set_name)]

    def styles(self, set_name: str) -> tuple[str, ...]:
        """Returns the art styles that a set shows: all of them, unless some are held out for detection."""
        if not self.held_out_styles:
            return tuple(ART_STYLES)
        held_out_here = set_name.startswith("detection/")
        return tuple(style for style in ART_STYLES if (style in self.held_out_styles) == held_out_here)


TINY = {
    "num_hashtag_images": 64,
    "num_hashtag_val_images": 16,
    "num_clean_images": 48,
    "num_clean_val_images": 24,
    "num_train": 12,
    "num_val": 8,
    "shard_size": 32,
}


@dataclass(frozen=True)
class _Task:
    """Pictures start to stop - 1 of a set, made by one call of :func:`_render`."""

    set_name: str
    start: int
    stop: int


def prepare_miniworld(output: str | Path, options: WorldOptions, num_workers: int = 1, progress: bool = True) -> None:
    """Makes a mini-world, or whatever an interrupted call left unmade.

    Args:
        output: the folder; created if need be.
        options: the same options give the same bytes with any number of workers.
        num_workers: processes that render.
        progress: show a progress bar on stderr.

    Raises:
        OptionsError: the folder was made with other options.
        SpriteError: the artwork cannot be had.
        wsl_d2.hashtags.WordNetError: WordNet 3.0 was not found.
    """
    output = Path(output)
    if num_workers < 1:
        raise OptionsError(f"num_workers is {num_workers}; it must be at least 1.")
    kept_sprites = output / "sprites.npz"
    sprites = read_sprites(kept_sprites) if kept_sprites.is_file() else load_sprites()
    _check_params(output, options, sprites)
    if not kept_sprites.is_file():
        write_sprites(kept_sprites, sprites)
    _write_text(output / "ATTRIBUTION.txt", attribution())
    vocabularies = _write_vocabularies(output)

    tasks = [task for set_name in SETS for task in _missing_tasks(output, options, set_name)]
    if tasks:
        (output / "contact_sheet.png").unlink(missing_ok=True)
    annotations: dict[str, dict[int, Any]] = {}
    total = sum(task.stop - task.start for task in tasks)
    with tqdm(total=total, unit="image", desc="mini-world", disable=not progress or not tasks) as bar:
        for task, result in _run(tasks, sprites, options, num_workers):
            if task.set_name.startswith("detection/"):
                _write_detection_images(output, task, result)
                numbers = range(task.start, task.stop)
                annotations.setdefault(task.set_name, {}).update(
                    (number, objects) for number, (_, objects) in zip(numbers, result, strict=True)
                )
            else:
                _write_shard(output, options, task, result, vocabularies[task.set_name.split("/")[0]])
            bar.update(task.stop - task.start)

    for set_name in SETS:
        if set_name.startswith("detection/"):
            if set_name in annotations:
                document = coco_document(annotations[set_name], options.detection_size, options.seed)
                _write_text(annotation_path(output, set_name), json.dumps(document))
        else:
            _finish(output / set_name, vocabularies[set_name.split("/")[0]])
    if not (output / "contact_sheet.png").is_file():
        draw_contact_sheet(output)


def annotation_path(output: Path, set_name: str) -> Path:
    """Returns the COCO JSON of a detection set: ``detection/annotations/instances_train.json``."""
    return output / "detection" / "annotations" / f"instances_{set_name.split('/')[1]}.json"


def image_path(output: Path, set_name: str, number: int) -> Path:
    """Returns a detection image's path; COCO ids count from 1, file names carry the id."""
    return output / set_name / f"{number + 1:06d}.jpg"


def _shard_path(output: Path, options: WorldOptions, task: _Task) -> Path:
    return output / task.set_name / f"shard-{task.start // options.shard_size:06d}.tar"


def _missing_tasks(output: Path, options: WorldOptions, set_name: str) -> Iterator[_Task]:
    total = options.num_images(set_name)
    if set_name.startswith("detection/"):
        images = [image_path(output, set_name, number) for number in range(total)]
        # Annotations come from rendering, so a set lacking anything is rendered again, to the same images.
        if not annotation_path(output, set_name).is_file() or not all(path.is_file() for path in images):
            for start in range(0, total, DETECTION_CHUNK):
                yield _Task(set_name, start, min(start + DETECTION_CHUNK, total))
        return
    for start in range(0, total, options.shard_size):
        task = _Task(set_name, start, min(start + options.shard_size, total))
        shard = _shard_path(output, options, task)
        if not all(shard.with_suffix(ending).is_file() for ending in (".tar", ".index.npz", ".labels.npz")):
            yield task


_renderers: dict[tuple[str, ...], Renderer] = {}
_state: list[tuple[Sprites, WorldOptions]] = []


def _start_worker(sprites: Sprites, options: WorldOptions) -> None:
    """Sets up a process for :func:`_render`. Ctrl-C is the parent's to handle."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _renderers.clear()
    _state[:] = [(sprites, options)]


def _render(task: _Task) -> list:
    """Renders a task's pictures: [(JPEG, metadata)], or [(JPEG, annotations)] for detection."""
    sprites, options = _state[0]
    styles = options.styles(task.set_name)
    if styles not in _renderers:
        _renderers[styles] = Renderer(sprites, styles, options.seed, options.frequency_exponent)
    renderer = _renderers[styles]
    numbers = range(task.start, task.stop)
    if task.set_name.startswith("hashtags/"):
        dominance = options.dominance if task.set_name == "hashtags/train" else None
        return [renderer.hashtag_photo(task.set_name, number, options.image_size, dominance) for number in numbers]
    if task.set_name.startswith("clean/"):
        return [renderer.clean_photo(task.set_name, number, options.image_size) for number in numbers]
    photos = (renderer.detection_photo(task.set_name, number, options.detection_size) for number in numbers)
    return [(jpeg, annotate(objects)) for jpeg, objects in photos]


def _run(tasks: list[_Task], sprites: Sprites, options: WorldOptions, num_workers: int) -> Iterator[tuple[_Task, list]]:
    """Yields each task with its result, in any order."""
    if num_workers == 1 or len(tasks) < 2:
        _start_worker(sprites, options)
        for task in tasks:
            yield task, _render(task)
        return
    # "spawn": the parent has torch loaded, which does not survive a fork safely. Workers do not import it.
    pool = ProcessPoolExecutor(
        min(num_workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(sprites, options),
    )
    try:
        futures = {pool.submit(_render, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:  # also after Ctrl-C: finish what is being rendered (a second or two), start nothing more
        pool.shutdown(wait=True, cancel_futures=True)


def _write_vocabularies(output: Path) -> dict[str, Any]:
    """Builds the vocabularies of the two hashtagged sets once and puts one into each folder of shards."""
    from wsl_d2.hashtags import (
        Vocabulary,
        load_wordnet,
    )  # here: workers that import this module need none of it

    concepts = load_concepts()
    wanted: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
        "hashtags": ("miniworld", hashtag_synsets),
        "clean": ("miniworld-clean", lambda: [concepts[i].tag.synset for i in clean_concepts()]),
    }
    vocabularies = {}
    for kind, (name, synsets) in wanted.items():
        paths = [output / set_name / "vocabulary.json" for set_name in SETS if set_name.startswith(f"{kind}/")]
        if all(path.is_file() for path in paths):
            vocabularies[kind] = Vocabulary.load(paths[0])
            continue
        vocabulary = Vocabulary.build(name, load_wordnet(), synsets=list(synsets()))
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            vocabulary.save(path)
        vocabularies[kind] = vocabulary
    return vocabularies


def _write_shard(output: Path, options: WorldOptions, task: _Task, result: list, vocabulary: Any) -> None:
    from wsl_d2.data.format.manifest import index_shard, write_shard

    prefix = task.set_name.replace("/", "-")
    path = _shard_path(output, options, task)
    (path.parent / "manifest.json").unlink(missing_ok=True)  # the set is not whole; it is written again at the end
    keys = (f"{prefix}-{number:06d}" for number in range(task.start, task.stop))
    write_shard(path, ((key, jpeg, metadata) for key, (jpeg, metadata) in zip(keys, result, strict=True)))
    labels = index_shard(path, vocabulary)
    _check_labels(path, vocabulary, labels, [metadata for _, metadata in result])


def _check_labels(path: Path, vocabulary: Any, labels: Any, posts: list[dict]) -> None:
    """Stops where a photo is labeled otherwise than its hashtags are meant: the mapping is not what trains.

    Raises:
        LabelError: names the first such photo.
    """
    found: list[list[str]] = [[] for _ in posts]
    for place, row in enumerate(labels.rows.tolist()):
        own = labels.labels[labels.indptr[place] : labels.indptr[place + 1]]
        found[row] = [vocabulary.synsets[label] for label in own.tolist()]
    wrong = [(post, synsets) for post, synsets in zip(posts, found, strict=True) if synsets != post["meant"]]
    if wrong:
        post, synsets = wrong[0]
        path.with_suffix(".labels.npz").unlink()
        raise LabelError(
            f"{path}: {len(wrong)} of {len(posts)} photos are labeled otherwise than their hashtags are meant, the "
            f"first with {' '.join(post['hashtags'])} as {synsets} instead of {post['meant']}."
        )


def _finish(folder: Path, vocabulary: Any) -> None:
    from wsl_d2.data.format.manifest import finish_dataset

    if not (folder / "manifest.json").is_file():
        finish_dataset(folder, vocabulary)


def _write_detection_images(output: Path, task: _Task, result: list) -> None:
    for number, (jpeg, _) in zip(range(task.start, task.stop), result, strict=True):
        path = image_path(output, task.set_name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_bytes(path, jpeg)


def _check_params(output: Path, options: WorldOptions, sprites: Sprites) -> None:
    """Records the options in a new folder, or compares them with the recorded ones."""
    params = {"recipe": RECIPE, **asdict(options), "sprites": sprites.digest()}
    params["held_out_styles"] = list(options.held_out_styles)
    path = output / "params.json"
    if not path.is_file():
        if output.is_dir() and (found := sorted(p.name for p in output.iterdir())):
            if set(found) - {".gitignore", "sprites.npz"} and not all(".partial-" in name for name in found):
                raise OptionsError(
                    f"{output} is not empty and no mini-world (it has {', '.join(found[:5])}, but no "
                    "params.json); choose another folder."
                )
        output.mkdir(parents=True, exist_ok=True)
        _write_text(output / ".gitignore", "*\n")
        _write_text(path, json.dumps(params, indent=1))
        return
    try:
        # An option that came later had its default.
        found_params = asdict(WorldOptions()) | json.loads(path.read_bytes())
    except ValueError as error:
        raise OptionsError(f"{path}: not valid JSON ({error}); delete the folder and prepare it again.") from error
    different = [
        f"{name} is {found_params.get(name)!r} there and {params.get(name)!r} now"
        for name in dict.fromkeys([*params, *found_params])
        if found_params.get(name) != params.get(name)
    ]
    if different:
        raise OptionsError(
            f"{output} was made with other options: {'; '.join(different)}. Use those options again, choose "
            "another folder, or delete this one."
        )


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def world_summary(output: str | Path) -> str:
    """Returns a few lines saying what a finished world holds."""
    output = Path(output)
    lines = []
    for set_name in SETS:
        if set_name.startswith("detection/"):
            document = json.loads(annotation_path(output, set_name).read_bytes())
            lines.append(
                f"{set_name}: {len(document['images'])} images, {len(document['annotations'])} objects of "
                f"{len(detection_concepts())} classes"
            )
        else:
            manifest = json.loads((output / set_name / "manifest.json").read_bytes())
            lines.append(
                f"{set_name}: {manifest['num_images']} images in {len(manifest['shards'])} shards, "
                f"{manifest['num_labels']} labels, {manifest['bytes'] / 1e6:.1f} MB"
            )
    return "\n".join(lines)
