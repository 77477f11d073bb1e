"""`cpt sweep`: its flags, and what it does with them."""

import argparse
import sys
from typing import Any

from cpt_jax.cli.arguments import trackers_of
from cpt_jax.core.stores import location

HELP = "Runs a recipe with the values that --vary gives, or an experiment; called again, it continues where it stopped. --FIELD VALUE, as of `cpt run`, is for all runs."


def _number_or(*words: str) -> Any:
    def read(text: str) -> int | str:
        if text in words:
            return text
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {' nor '.join(words)}")
        return int(text)

    return read


def sweep_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `sweep`."""
    sub.add_argument(
        "experiment",
        help="with --vary a recipe, as `cpt run` takes it; else a function that returns recipes: module:function, or one of experiments/",
    )
    sub.add_argument(
        "--vary",
        action="append",
        nargs="+",
        default=[],
        metavar=("FIELD", "VALUE"),
        help="a field of the recipe and its values, a run each, or replay-share and shares of all replayed text; given again, all combinations",
    )
    sub.add_argument("--workdir", type=location, help="a directory (default: runs/NAME)")
    sub.add_argument(
        "--together",
        type=_number_or("auto", "never"),
        default="auto",
        metavar="auto|never|N",
        help="runs that differ only in numbers as one program, at most N (default auto: as many as there is memory for, on a CPU one by one)",
    )
    sub.add_argument(
        "--at-once",
        type=_number_or("auto"),
        default=1,
        metavar="auto|N",
        help="N runs at a time, each in a process of its own (auto: by memory and cores; default 1)",
    )
    sub.add_argument("--queue", choices=("slurm", "skypilot"), help="submit a job for each run")
    sub.add_argument(
        "--queue-arguments",
        default="",
        metavar="ARGUMENTS",
        help='of sbatch or sky, as in "--gpus-per-node=1 --time=2:00:00"',
    )
    trackers_of(sub)
    sub.add_argument("--exports", action="store_true", help="with each run's export, samples and report")
    sub.add_argument("--update", action="store_true", help="go on with changed recipes; what they do not touch is kept")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done")
    sub.add_argument("--json", type=location, help="also write the figures to this file")


def sweep(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import shlex

    from cpt_jax.sweep.sweep import Manner, sweep

    names = ("together", "at_once", "queue", "exports", "update")
    manner = Manner(
        queue_arguments=tuple(shlex.split(arguments.queue_arguments)),
        track=tuple(arguments.track),
        **{name: getattr(arguments, name) for name in names},
    )
    good = sweep(
        arguments.experiment,
        arguments.workdir,
        manner,
        vary=arguments.vary,
        overrides=overrides,
        dry_run=arguments.dry_run,
        json_path=arguments.json,
    )
    if not good:
        sys.exit(1)
