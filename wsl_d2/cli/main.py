"""`wsl-d2 VERB ...`: finds the verb, runs it, and turns what a user can mend into one line and an exit status.

0: done. 2: a mistake that the user can mend. 75: saved, and to be started again, as after SIGTERM. 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings

from wsl_d2.cli import (
    compare,
    data,
    duplicates,
    gain,
    hashtags,
    predict,
    pretrain,
    probe,
    records,
    study,
    train,
    weights,
)
from wsl_d2.cli.verb import Parser, Verb
from wsl_d2.engine.signals import INTERRUPTED_EXIT_CODE, Stopped, stop_at_once
from wsl_d2.errors import NO_DETECTRON2, FaultsError, UserError
from wsl_d2.version import __version__

_DESCRIPTION = """Weakly supervised pretraining on hashtagged photos, and what it is worth for detection.

  wsl-d2 hashtags vocabulary --vocabulary 1.5k --output vocabulary.json
  wsl-d2 data make posts.parquet --images 'photos/{key}.jpg' --vocabulary vocabulary.json --output datasets/mine/train
"""

# group -> (what it is about, verb -> Verb), or verb -> Verb
VERBS: dict[str, Verb | tuple[str, dict[str, Verb]]] = {
    "hashtags": ("hashtags, vocabularies, counts", hashtags.VERBS),
    "data": ("datasets: making, checking, looking", data.VERBS),
    "pretrain": pretrain.PRETRAIN,
    "train": train.TRAIN,
    "weights": ("weight files: public ones by name, conversion", weights.VERBS),
    "gain": gain.GAIN,
    "compare": compare.COMPARE,
    "predict": predict.PREDICT,
    "probe": probe.PROBE,
    "duplicates": duplicates.DUPLICATES,
    "study": study.STUDY,
    "records": records.RECORDS,
    "demo": study.DEMO_VERB,
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; needs no heavy import."""
    parser = Parser(prog="wsl-d2", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"wsl_d2 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    for name, entry in VERBS.items():
        if isinstance(entry, Verb):
            _add(commands, name, entry)
            continue
        about, verbs = entry
        group = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        group_commands = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
        for inner, verb in verbs.items():
            _add(group_commands, inner, verb)
    return parser


def _add(commands, name: str, verb: Verb) -> None:
    summary = verb.summary[0].lower() + verb.summary[1:]
    parser = commands.add_parser(name, help=summary, description=(verb.run.__doc__ or "").strip())
    verb.arguments(parser)
    parser.set_defaults(verb=verb, prog=parser.prog, parser=parser)


# Warnings of libraries about each other, of which a user of this command can change nothing.
_NOISE = (
    ".torch.jit.script. is deprecated",  # by detectron2's and torchvision's modules
    "torch.meshgrid: in an upcoming release",  # by detectron2's anchors
    ".*torch.cuda.amp.*is deprecated",  # by detectron2's trainers
    "pkg_resources is deprecated",  # by tensorboard and fvcore
    ".*'pin_memory' argument is set as true but no accelerator",  # by torch's loader, of detectron2's setting
    "The multilingual functions are not available",  # by nltk, of nouns that are not asked for
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # tells of CUDA_HOME where no GPU is
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # of a terminal that knows ASCII alone
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    args = None
    try:
        args = build_parser().parse_args(arguments)
        args.command_line = sys.argv[1:] if arguments is None else arguments
        if getattr(args, "cluster_parameter", None) and not args.cluster:
            raise UserError("--cluster-parameter is for --cluster; give both, or none.")
        if args.verb.starts_runs:
            stop_at_once(note="")
        return args.verb.run(args) or 0
    except FaultsError as error:
        return [_tell(args, line) for line in error.lines][-1]
    except UserError as error:
        return _tell(args, str(error))
    except (KeyboardInterrupt, Stopped) as end:
        if isinstance(end, Stopped) and args and not args.verb.starts_runs:  # a training has told it
            raise
        kept = args.verb.kept if args else "nothing was changed"
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(f"\n{args.prog if args else 'wsl-d2'}: stopped; {kept}.", file=sys.stderr)
        return end.code if isinstance(end, Stopped) else INTERRUPTED_EXIT_CODE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if args is None or package in ("", "wsl_d2"):
            raise
        install = f"{package} is not installed; run: pip install 'wsl-d2[{args.verb.extra}]'"
        return _tell(args, NO_DETECTRON2 if package == "detectron2" else install)
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            return _tell(args, f"{error.strerror or error}")
        return _tell(args, f"{error.filename2 or error.filename}: {error.strerror}")  # of a renaming, where to


def _tell(args: argparse.Namespace | None, message: str) -> int:
    print(f"{args.prog if args else 'wsl-d2'}: {' '.join(message.split())}", file=sys.stderr)
    return 2
