"""A job for each run of a sweep, on Slurm or by SkyPilot, with the files in launch/."""

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cpt_jax.core.config import fingerprint
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.recipe.recipe import Recipe
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner, command_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """One process with one GPU a job, unless `arguments` (of sbatch) say otherwise."""

    arguments: tuple[str, ...] = ()

    file = Path("launch/slurm.sbatch")

    def submit(self, name: str, settings: Mapping[str, str]) -> str:
        """The job's number, and behind a semicolon its cluster, where `arguments` name one."""
        small = ("--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1")
        words = ["sbatch", "--parsable", f"--job-name={name}", *small, *self.arguments, str(self.file)]
        return _answer(words, settings).strip()

    def waits_or_runs(self, job: str) -> bool:
        number, _, cluster = job.partition(";")
        which = f"--jobs={number}" if number.isdecimal() else f"--name={job}"
        there = [f"--clusters={cluster}"] if cluster else []
        words = ["squeue", "--noheader", "--format=%T", which, *there]
        # It fails for a number that it has forgotten, and where the controller does not answer.
        return bool(_answer(words, nothing="Invalid job id").strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyPilot:
    """One machine with one GPU a job, unless `arguments` (of sky jobs launch) say otherwise."""

    arguments: tuple[str, ...] = ()

    file = Path("launch/skypilot.yaml")

    def submit(self, name: str, settings: Mapping[str, str]) -> str:
        """The job's name."""
        given = [word for key, value in settings.items() for word in ("--env", f"{key}={value}")]
        small = ("--num-nodes", "1", "--gpus", "H100:1")
        _answer(
            [
                "sky",
                "jobs",
                "launch",
                "--yes",
                "--detach-run",
                "--name",
                name,
                *small,
                *self.arguments,
                *given,
                str(self.file),
            ]
        )
        return name

    def waits_or_runs(self, job: str) -> bool:
        # Without --all it lists the 50 newest.
        listed = _answer(["sky", "jobs", "queue", "--all", "--skip-finished"])
        # Where the jobs cannot be asked for it says so, and exits with 0.
        if "NAME" not in listed.split() and "No in-progress managed jobs" not in listed:
            raise UserError(f"sky jobs queue does not tell the jobs: {_one_line(listed)}: call the same command again")
        return any(job in line.split() for line in listed.splitlines())


Queue = Slurm | SkyPilot
QUEUES: dict[str, type[Queue]] = {"slurm": Slurm, "skypilot": SkyPilot}


def submit(directory: SweepDirectory, left: dict[str, Recipe], manner: Manner) -> None:
    """Submits a job for each run that has none, and notes which have ended.

    Raises:
      UserError: the queue's commands or launch file are not there, or it refuses a job.
    """
    queue = QUEUES[manner.queue or ""](arguments=manner.queue_arguments)
    if manner.queue == "skypilot" and not directory.in_store:
        raise UserError(
            f"--queue skypilot runs on machines that do not see {directory.location}: give --workdir s3://BUCKET/NAME, or gs://"
        )
    if not queue.file.exists():
        raise UserError(f"there is no {queue.file} here: call `cpt sweep --queue` from the repository's directory")
    for name in left:
        if directory.settle(name, manner.exports):
            continue
        if (job := directory.of(name).get("job")) and queue.waits_or_runs(job):
            say(f"sweep: run {name} is in the queue, job {job}")
            continue
        command, recipe, arguments = command_of(directory, name, manner)
        settings = {
            "RECIPE": recipe,
            "WORKDIR": directory.run_location(name),
            "COMMAND": command,
            "ARGUMENTS": shlex.join(arguments),
        }
        if not directory.in_store:
            settings["CPT_SHARED"] = str(directory.shared.directory)
        directory.begun_now(name)
        # By its name until there is a number: a queue may accept a job, and not come to say so.
        directory.record(name, status="queued", job=job_name(directory, name))
        job = queue.submit(job_name(directory, name), settings)
        directory.record(name, job=job)
        say(f"sweep: run {name} is submitted, job {job}")


def job_name(directory: SweepDirectory, name: str) -> str:
    """A run's name as queues take it, in few letters; and behind them what no other run of this or another sweep has."""
    place = str(directory.location) if directory.in_store else str(directory.path.resolve())
    letters = re.sub("[^a-zA-Z0-9]+", "-", name).strip("-").lower()
    return "-".join(["cpt", *([letters] if letters else []), fingerprint([place, name])[:8]])


def _answer(words: Sequence[str], settings: Mapping[str, str] | None = None, nothing: str | None = None) -> str:
    """What a command says on stdout; "" if it fails with `nothing` among its words."""
    try:
        done = subprocess.run(words, env=os.environ | dict(settings or {}), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not installed here: call `cpt sweep --queue` where jobs are submitted"
        ) from None
    if done.returncode:
        told = done.stderr or done.stdout
        if nothing is not None and nothing in told:
            return ""
        raise UserError(
            f"{shlex.join(words[:3])} ... failed: {_one_line(told)}: call the same command again once it works"
        )
    return done.stdout


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
