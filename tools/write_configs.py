#!/usr/bin/env python3
"""Writes the configs that form a regular set: detectors on COCO and pretraining on the 17k vocabulary.

    tools/write_configs.py            # writes what differs or is missing
    tools/write_configs.py --check    # writes nothing; exits 1 and lists what differs, is missing or is left over

Base-*.yaml and miniworld_*.yaml are written by hand. configs/README.md explains the set.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Architecture(NamedTuple):
    """A backbone by its name in file names; weights that nobody published are None and have to be trained first."""

    name: str
    imagenet: str | None
    wsl: str | None
    pretraining_batch: int
    checkpoint_stages: bool = False  # recomputes activations, to train on a card with 80 GB


TORCHVISION_50 = "torchvision://ResNeXt50_32X4D_Weights.IMAGENET1K_V1"
TORCHVISION_101 = "torchvision://ResNeXt101_32X8D_Weights.IMAGENET1K_V1"
GLUON_101 = "timm://resnext101_32x4d.gluon_in1k"
CAFFE2_101 = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"

ARCHITECTURES = (
    Architecture("X_50_32x4d", TORCHVISION_50, None, 3072),
    Architecture("X_101_32x4d", GLUON_101, None, 3072),
    Architecture("X_101_32x8d", TORCHVISION_101, "wsl://resnext101_32x8d", 3072),
    Architecture("X_101_32x16d", None, "wsl://resnext101_32x16d", 8064),
    Architecture("X_101_32x32d", None, "wsl://resnext101_32x32d", 8064, checkpoint_stages=True),
    Architecture("X_101_32x48d", None, "wsl://resnext101_32x48d", 8064, checkpoint_stages=True),
)
# The one with a second ImageNet baseline, Faster R-CNN and a sweep of learning rates.
SWEPT = next(architecture for architecture in ARCHITECTURES if architecture.name == "X_101_32x8d")

SCHEDULES = {  # name -> (SOLVER.STEPS, SOLVER.MAX_ITER), Detectron2's; 1x is that of Base-RCNN-FPN.yaml
    "2x": ("(120000, 160000)", 180000),
    "3x": ("(210000, 250000)", 270000),
}
SWEPT_RATES = (0.02, 0.01, 0.005, 0.0025, 0.00125)  # at 16 images

ORIGINS = {  # weights -> what they are
    TORCHVISION_50: "torchvision's, trained on ImageNet-1k",
    TORCHVISION_101: "torchvision's, trained on ImageNet-1k",
    GLUON_101: "timm's from GluonCV, trained on ImageNet-1k",
    CAFFE2_101: "Detectron2's Caffe2 model, trained on ImageNet-1k in BGR",
}


def weights_of(architecture: Architecture, init: str) -> tuple[str, str]:
    """Returns MODEL.WEIGHTS and what they are, for the header."""
    name = architecture.name
    if init == "scratch":
        return '""', "none, random initialisation"
    if init == "imagenet_caffe2":
        return CAFFE2_101, ORIGINS[CAFFE2_101]
    if init == "imagenet":
        if architecture.imagenet:
            return architecture.imagenet, ORIGINS[architecture.imagenet]
        return f"output/{name}_imagenet/backbone.pth", "trained on ImageNet-1k alone; none are public, train them first"
    if architecture.wsl:
        return architecture.wsl, "public WSL weights, fine-tuned on ImageNet-1k; CC-BY-NC 4.0"
    config = f"configs/Hashtag-Pretraining/{name}_17k.yaml"
    return f"output/{name}_17k/backbone.pth", f"of {config}, run it first; none are public"


def detector_settings(architecture: Architecture, init: str, mask_on: bool) -> dict[str, Any]:
    """Returns what a detector adds to the base, with the 1x schedule."""
    model: dict[str, Any] = {} if mask_on else {"MASK_ON": False}
    model["WEIGHTS"] = weights_of(architecture, init)[0]
    if init == "imagenet_caffe2":
        model["PIXEL_MEAN"] = "[103.530, 116.280, 123.675]"
        model["PIXEL_STD"] = "[57.375, 57.120, 58.395]"
    model["BACKBONE"] = {"NAME": f"build_{builder_name(architecture)}_fpn_backbone"}
    if init == "scratch":
        model["BACKBONE"]["FREEZE_AT"] = "0  # nothing pretrained to keep"
        model["RESNETS"] = {"NORM": "SyncBN  # FrozenBN would keep random statistics"}
    model |= checkpointing(architecture)
    return {"MODEL": model} | ({"INPUT": {"FORMAT": "BGR"}} if init == "imagenet_caffe2" else {})


def builder_name(architecture: Architecture) -> str:
    """X_101_32x8d -> resnext101_32x8d."""
    return architecture.name.replace("X_", "resnext", 1)


def checkpointing(architecture: Architecture) -> dict[str, Any]:
    """Returns the part of MODEL that recomputes activations, where the architecture needs it."""
    # Quoted: without, yacs would read the tuple as one string.
    stages = '("res2", "res3", "res4", "res5")'
    return {"RESNEXT": {"CHECKPOINT_STAGES": stages}} if architecture.checkpoint_stages else {}


def lines(settings: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yields a nested dict as lines of YAML; texts are YAML already."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value}"


def leaf(path: str, base: str, about: str, settings: dict[str, Any]) -> tuple[str, str]:
    """Returns a path below configs/ and the text of the file."""
    header = f"# tools/train_net.py --config-file configs/{path} --num-gpus 8\n# {about}. Not yet run.\n"
    rows = {"_BASE_": base} | settings | {"OUTPUT_DIR": f"output/{Path(path).stem}"}
    return path, header + "".join(f"{line}\n" for line in lines(rows))


def detectors(
    folder: str, method: str, mask_on: bool, architecture: Architecture, inits: tuple[str, ...], longer: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yields the twins of one architecture: 1x leaves, and the longer ones that inherit from them."""
    for init in inits:
        about = f"Weights: {weights_of(architecture, init)[1]}"
        name = f"{method}_{architecture.name}_FPN_{{}}_{init}.yaml"
        settings = detector_settings(architecture, init, mask_on)
        yield leaf(f"{folder}/{name.format('1x')}", "../Base-RCNN-FPN.yaml", about, settings)
        for schedule in longer:
            steps, max_iter = SCHEDULES[schedule]
            solver = {"SOLVER": {"STEPS": steps, "MAX_ITER": max_iter}}
            yield leaf(f"{folder}/{name.format(schedule)}", name.format("1x"), about, solver)


def sweep(init: str) -> Iterator[tuple[str, str]]:
    """Yields the learning-rate sweep of one 1x Mask R-CNN."""
    name = f"mask_rcnn_{SWEPT.name}_FPN_1x_{init}"
    about = f"Weights: {weights_of(SWEPT, init)[1]}"
    for rate in SWEPT_RATES:
        path = f"COCO-InstanceSegmentation/lr_sweep/{name}_lr{rate}.yaml"
        yield leaf(path, f"../{name}.yaml", about, {"SOLVER": {"BASE_LR": rate}})


def pretraining(architecture: Architecture) -> tuple[str, str]:
    """Returns the pretraining of one architecture on the 17k vocabulary."""
    name = f"build_{builder_name(architecture)}_backbone"
    settings = {
        "MODEL": {"BACKBONE": {"NAME": name}} | checkpointing(architecture),
        "SOLVER": {"IMS_PER_BATCH": architecture.pretraining_batch},
    }
    about = "Weights: none, random initialisation. Data: $DETECTRON2_DATASETS/hashtags_17k/{train,val}"
    path = f"Hashtag-Pretraining/{architecture.name}_17k.yaml"
    return leaf(path, "../Base-Hashtag-Pretraining-17k.yaml", about, settings)


def all_leaves() -> dict[str, str]:
    """Returns path below configs/ -> text, of every generated config."""
    mask = ("COCO-InstanceSegmentation", "mask_rcnn", True)
    found: list[tuple[str, str]] = []
    for architecture in ARCHITECTURES:
        inits = ("imagenet", "wsl", "scratch")
        found += detectors(*mask, architecture, inits, ("2x", "3x"))
        found.append(pretraining(architecture))
    found += detectors(*mask, SWEPT, ("imagenet_caffe2",), ("2x", "3x"))
    inits = ("imagenet", "imagenet_caffe2", "wsl", "scratch")
    found += detectors("COCO-Detection", "faster_rcnn", False, SWEPT, inits, ("3x",))
    for init in ("imagenet", "wsl"):
        found += sweep(init)
    return dict(found)


def compare(configs: Path) -> dict[str, str]:
    """Returns path -> "missing", "differs" or "left over", of whatever is not as this tool would write it."""
    leaves = all_leaves()
    found = {}
    for path, text in leaves.items():
        file = configs / path
        if not file.is_file():
            found[path] = "missing"
        elif file.read_text(encoding="utf-8") != text:
            found[path] = "differs"
    for folder in sorted({Path(path).parent for path in leaves}):
        for file in sorted((configs / folder).glob("*.yaml")):
            path = (folder / file.name).as_posix()
            if path not in leaves and not file.name.startswith(("Base-", "miniworld_")):
                found[path] = "left over"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if there is something to do")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the configs (default: %(default)s)")
    args = parser.parse_args()

    leaves = all_leaves()
    todo = compare(args.configs)
    if args.check and todo:
        sys.exit("\n".join(f"{state}: {args.configs / path}" for path, state in todo.items()))
    for path, state in todo.items():
        file = args.configs / path
        if state == "left over":  # somebody's own, perhaps
            print(f"left over, remove it by hand: {file}")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(leaves[path], encoding="utf-8")
    written = sum(state != "left over" for state in todo.values())
    print(f"{len(leaves)} generated configs, {written} written")


if __name__ == "__main__":
    main()
