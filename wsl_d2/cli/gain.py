"""The verb gain."""

from __future__ import annotations

import argparse
import re

from wsl_d2.cli.study import add_running, run_study
from wsl_d2.cli.verb import Verb, local_path, positive


def budget(text: str) -> float:
    """Parses "1x"."""
    if not re.fullmatch(r"\d+(\.\d+)?x", text) or float(text[:-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of the 1x schedule, such as 1x, 3x or 0.5x")
    return float(text[:-1])


def weights(text: str) -> tuple[str, str]:
    """Parses NAME=WEIGHTS, or WEIGHTS, whose name is "wsl" for wsl://..., and else "" where it has none of its own."""
    if match := re.fullmatch(r"([\w.-]+)=(.+)", text):
        return match[1], match[2]
    return text.partition("://")[0] if "://" in text else text if text == "scratch" else "", text


def rates(text: str) -> tuple[float, ...]:
    """Parses "0.02,0.01"."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0 < rate < 1e3 for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of learning rates such as 0.02,0.01,0.005")
    return found


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=local_path, required=True, help="annotations in COCO's format to train on")
    parser.add_argument(
        "--val", type=local_path, required=True, help="annotations of the images that AP is measured on"
    )
    parser.add_argument("--images", type=local_path, help="folder of all images")
    parser.add_argument("--train-images", type=local_path, help="folder of the training images, if it is another")
    parser.add_argument("--val-images", type=local_path, help="folder of the others, if it is another")
    metavar = "[NAME=]WEIGHTS"
    takes = "as MODEL.WEIGHTS takes them (wsl://..., torchvision://..., timm://..., a file), or scratch"
    parser.add_argument("--candidate", type=weights, required=True, metavar=metavar, help=takes)
    parser.add_argument(
        "--baseline", type=weights, required=True, metavar=metavar, help="those that the gain is counted from"
    )
    parser.add_argument("--output", type=local_path, required=True, help="folder of all results")
    parser.add_argument("--seeds", type=positive, default=3, help="trainings of each side; 1 says nothing about others")
    parser.add_argument(
        "--budget",
        type=budget,
        default="1x",
        help="length of a training: 1x, 2x, 3x, ... of what suits the size of the data",
    )
    parser.add_argument("--iterations", type=positive, help="the length in steps instead")
    parser.add_argument("--batch-size", type=positive, help="images a step; the config's if left out")
    parser.add_argument("--short-side", type=positive, help="pixels of resized images; the config's if left out")
    parser.add_argument(
        "--mask", choices=("auto", "on", "off"), default="auto", help="train masks; auto: if all objects have one"
    )
    parser.add_argument("--architecture", help="of the backbone; that of the weights if left out")
    parser.add_argument("--config-file", default="Base-RCNN-FPN.yaml", metavar="FILE", help="detector of both sides")
    parser.add_argument(
        "--learning-rates",
        type=rates,
        default=(),
        help="rates to try, as 0.02,0.01; each side gets its best; 4 if left out",
    )
    parser.add_argument("--seed-sd", type=float, help="AP between trainings to assume, for a side with one alone")
    parser.add_argument("--num-gpus", type=int, help="of each run; all of this machine if left out, 0 for the CPU")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a config key of both sides"
    )
    add_running(parser)


def gain(args: argparse.Namespace) -> None:
    """What one pretraining gives over another on your detection data: trains both alike, and compares.

    wsl-d2 gain --train train.json --val val.json --images photos/ --candidate wsl://resnext101_32x8d \\
        --baseline torchvision://ResNeXt101_32X8D_Weights.IMAGENET1K_V1 --output output/gain --plan

    Both sides get the same detector, data and schedule; each gets the learning rate that is best for it, tried on a
    part of the training images. Then it trains each --seeds times, and writes a page with the gain and its interval.
    The same command goes on after an interruption, and with more --seeds. --plan shows what would run, and stops.
    """
    import torch

    from wsl_d2.errors import ConfigError
    from wsl_d2.study.gain import Question, choose_rates, prepare
    from wsl_d2.study.study import StudyError

    folders = [args.train_images or args.images, args.val_images or args.images]
    if None in folders:
        raise ConfigError("give --images, or both --train-images and --val-images.")
    args.axis = []
    question = Question(
        train=args.train,
        val=args.val,
        train_images=folders[0],
        val_images=folders[1],
        baseline=(args.baseline[0] or "baseline", args.baseline[1]),
        candidate=(args.candidate[0] or "candidate", args.candidate[1]),
        config_file=args.config_file,
        architecture=args.architecture,
        budget=args.budget,
        iterations=args.iterations,
        batch_size=args.batch_size,
        short_side=args.short_side,
        mask=args.mask,
        rates=args.learning_rates,
        num_gpus=torch.cuda.device_count() if args.num_gpus is None else args.num_gpus,
        overrides=tuple(text for pair in args.set for text in pair),
    )
    study = prepare(question, args.output, args.plan)
    print("\n".join(study.lines), flush=True)
    chosen = dict.fromkeys(question.sides, study.rates[0])
    if len(study.rates) > 1:
        run_study(study.write_sweep(), study.output / "sweep", args)
        try:
            chosen, lines = choose_rates(study.read_sweep(), question.sides, study.rates)
            print("\n".join(lines), flush=True)
        except StudyError:
            if not args.plan:
                raise
    run_study(study.write_study(chosen, args.seeds, args.seed_sd), study.output, args)


GAIN = Verb(gain, _arguments, "finished runs are kept, and the same command goes on", extra="all", starts_runs=True)
