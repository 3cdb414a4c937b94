"""What a verb of the command line is, and what many of them share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsl_d2.engine.arguments import setting
from wsl_d2.errors import UserError, suggest

if TYPE_CHECKING:
    from wsl_d2.data.runner import Workers


@dataclass(frozen=True)
class Verb:
    """One verb.

    Args:
        run: does it, with heavy imports inside; its docstring is the help, with an example. It returns the exit status,
            None for 0.
        arguments: adds its arguments to a parser.
        kept: what is there after Ctrl-C.
        extra: extras of the package (pyproject.toml) that install what it imports, as pip takes them.
        starts_runs: whether it starts trainings of its own, which are to save when a signal such as SIGTERM ends it.
    """

    run: Callable[[argparse.Namespace], int | None]
    arguments: Callable[[argparse.ArgumentParser], None]
    kept: str = "nothing was changed"
    extra: str = "pretrain"
    starts_runs: bool = False

    @property
    def summary(self) -> str:
        """The first line of its help."""
        return (self.run.__doc__ or "").strip().splitlines()[0].rstrip(".")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps line breaks, and shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, "", (), [], argparse.SUPPRESS) or default is False or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._given: list[str] = []

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parses all words; those that no parser knows are an error of the verb's own parser."""
        namespace, unknown = self.parse_known_args(args, namespace)
        parser = vars(namespace).pop("parser", self)  # of the verb, by whoever adds it
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += suggest(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str):
        for option in [word.partition("=")[0] for word in self._given if word.startswith("--")]:
            if option not in self._option_string_actions and (near := suggest(option, self._option_string_actions)):
                message += f"{'' if option in message else f'; unknown option {option}'}{near}"
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds --workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=positive, default=cores, metavar="N", help="processes; all cores if not given"
    )


def add_runner(parser: argparse.ArgumentParser) -> None:
    """Adds --workers, and where they run."""
    add_workers(parser)
    parser.add_argument(
        "--runner",
        choices=("local", "slurm"),
        default="local",
        help="processes of this machine, or jobs of a SLURM cluster, as many at a time as --workers says",
    )
    parser.add_argument(
        "--runner-parameter",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the jobs, as submitit names it, such as slurm_partition=cpu, mem_gb=8 or timeout_min=600; may be "
        "repeated",
    )


def runner_of(args: argparse.Namespace, output: str | Path) -> Workers:
    """Returns what the options of :func:`add_runner` choose.

    Args:
        output: of the command; what belongs to jobs lies beside it while they run. That of a URL lies here.
    """
    if args.runner == "local":
        if args.runner_parameter:
            raise UserError("--runner-parameter is for --runner slurm; give both, or none.")
        return args.workers
    from wsl_d2.data.runner import Cluster

    place = Path(str(output).rstrip("/").rpartition("/")[2] if "://" in str(output) else output)
    folder = place.with_name(f"{place.name}.jobs").absolute()
    return Cluster(args.workers, folder, args.runner, dict(args.runner_parameter))


def place(text: str) -> str:
    """Parses a path or a URL; a "~" that the shell left is the home."""
    if not text:
        raise argparse.ArgumentTypeError('a path is empty; this folder is "."')
    return text if "://" in text else os.path.expanduser(text)


def local_path(text: str) -> Path:
    """Parses a path of this machine, for what is not in a store."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URL; give a local path, and copy what is there")
    return Path(place(text))


def read_user_text(path: Path) -> str:
    """Returns the text of a file that a person wrote: UTF-8, with or without a byte-order mark, line ends as "\\n".

    Raises:
        UserError: it is no such text.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start + 1}); save it as UTF-8.") from error


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def share(part: int, whole: int) -> str:
    """Returns a number and its percentage of another."""
    return f"{part:,}" + (f" ({100 * part / whole:.1f}%)" if whole else "")
