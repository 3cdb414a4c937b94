#!/usr/bin/env python3
"""Finds near-duplicates between pretraining and evaluation images, also rescaled, cropped, mirrored, recoloured ones.

tools/find_duplicates.py --pretraining datasets/yfcc/train --evaluation datasets/imagenet/val --output duplicates/
tools/find_duplicates.py --pretraining datasets/yfcc/train --coco annotations/instances_val2017.json \\
    --evaluation datasets/coco/val2017 --output duplicates/
tools/find_duplicates.py --judged duplicates/pairs.csv --correct correct.json

Writes pairs.csv and contact_sheet.png. Write "no" into the last column of pairs.csv for pairs that are none, and give
it back with --judged: with --correct, a JSON object of evaluation key -> whether it was right, the accuracy is printed
that counts every duplicated image as wrong, a lower bound. After an interruption the same command goes on.
--config-file and --weights add the nearest neighbours of a backbone's features to the perceptual hash.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from wsl_d2.data import HashtagDataset, ShardError
from wsl_d2.duplicates.duplicates import (
    DuplicateError,
    DuplicateFinder,
    contact_sheet,
    images_of_coco,
    images_of_dataset,
    images_of_folder,
    lower_bound_accuracy,
    read_pairs,
    search,
)

_SHOWN = 100  # pairs on the contact sheet


def backbone_extractor(config_file: str, weights: str):
    """Returns an extractor of features like R-MAC's: maxima of res5 over the image and its halves, each of norm 1."""
    import torch
    from detectron2.modeling import build_model

    from wsl_d2.checkpoint import check_pixel_statistics, load_backbone
    from wsl_d2.engine.main import load_config

    cfg = load_config(config_file, [])
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 1
    model = build_model(cfg).eval()
    load_backbone(model, weights)
    check_pixel_statistics(cfg, weights)
    size = cfg.INPUT.RANDOM_RESIZED_CROP.SIZE
    step = -1 if cfg.INPUT.FORMAT == "BGR" else 1

    def extract(pictures):
        batch = np.stack(
            [np.asarray(picture.convert("RGB").resize((size, size)))[:, :, ::step] for picture in pictures]
        )
        with torch.inference_mode():
            images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
            maps = model.backbone(model._preprocess({"image": images}))["res5"]
            middle_r, middle_c = max(1, maps.shape[2] // 2), max(1, maps.shape[3] // 2)
            regions = [maps, maps[:, :, :middle_r], maps[:, :, -middle_r:], maps[..., :middle_c], maps[..., -middle_c:]]
            pooled = [torch.nn.functional.normalize(region.amax(dim=(2, 3))) for region in regions]
            return sum(pooled).cpu().numpy()

    return extract


def images(folder: Path, coco: Path | None):
    """The images of a folder of shards, of a COCO annotation file, or of a folder of image files."""
    if coco:
        return images_of_coco(coco, folder)
    return images_of_dataset(folder) if (folder / "manifest.json").is_file() else images_of_folder(folder)


def report_lower_bound(judged: Path, correct: Path) -> None:
    pairs = read_pairs(judged)
    plain, bound, number = lower_bound_accuracy(json.loads(correct.read_text()), pairs)
    print(f"accuracy {plain:.2f}; at least {bound:.2f} with the {number} duplicated images counted as wrong")


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pretraining", type=Path, help="folder of shards, or of image files")
    parser.add_argument("--evaluation", type=Path, help="folder of shards, or of image files")
    parser.add_argument("--coco", type=Path, help="annotation file that lists the evaluation images")
    parser.add_argument("--output", type=Path, help="folder of results")
    parser.add_argument("--config-file", help="of a HashtagClassifier, for deep features")
    parser.add_argument("--weights", help="of its backbone")
    parser.add_argument("--min-score", type=float, default=0.85, help="correlation from which a pair is a duplicate")
    parser.add_argument("--judged", type=Path, help="pairs.csv with judgements")
    parser.add_argument("--correct", type=Path, help="JSON of evaluation key -> true or false")
    args = parser.parse_args(arguments)
    try:
        if args.judged and args.correct:
            report_lower_bound(args.judged, args.correct)
            return
        if not (args.pretraining and args.evaluation and args.output):
            parser.error("give --pretraining, --evaluation and --output, or --judged and --correct")
        if bool(args.config_file) != bool(args.weights):
            parser.error("give --config-file and --weights together")
        extractor = backbone_extractor(args.config_file, args.weights) if args.weights else None
        finder = DuplicateFinder(images(args.evaluation, args.coco), extractor, min_score=args.min_score)
        is_dataset = (args.pretraining / "manifest.json").is_file()
        total = len(HashtagDataset(args.pretraining)) if is_dataset else None
        pairs = search(finder, images(args.pretraining, None), args.output, total)
        shown = pairs[:_SHOWN]
        wanted = {pair.evaluation for pair in shown}, {pair.pretraining for pair in shown}
        left = {key: data for key, data in images(args.evaluation, args.coco) if key in wanted[0]}
        right = {key: data for key, data in images(args.pretraining, None) if key in wanted[1]}
        contact_sheet(shown, left, right, args.output / "contact_sheet.png")
    except (DuplicateError, ShardError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here.")
    number = len({pair.evaluation for pair in pairs})
    print(f"{len(pairs)} pairs; {number} of {len(finder.keys)} evaluation images have a duplicate")
    if finder.damaged:
        print(f"{len(finder.damaged)} evaluation images cannot be decoded, the first {finder.damaged[0]!r}")
    print(f"written: {args.output / 'pairs.csv'}, {args.output / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
