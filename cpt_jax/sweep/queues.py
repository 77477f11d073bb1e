"""A job for each run of a sweep, on Slurm or by SkyPilot, with the files in launch/."""

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

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
        """The job's number."""
        small = ("--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1")
        words = ["sbatch", "--parsable", f"--job-name={name}", *small, *self.arguments, str(self.file)]
        return _answer(words, settings).strip().partition(";")[0]

    def waits_or_runs(self, job: str, name: str) -> bool:
        # squeue fails for a number that it has forgotten.
        return bool(_answer(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], refused="").strip())


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

    def waits_or_runs(self, job: str, name: str) -> bool:
        listed = _answer(["sky", "jobs", "queue", "--skip-finished"], refused="")
        return any(name in line.split() for line in listed.splitlines())


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
        title = "cpt-" + re.sub("[^a-zA-Z0-9]+", "-", name).strip("-").lower()
        if (job := directory.of(name).get("job")) and queue.waits_or_runs(job, title):
            say(f"sweep: run {name} is in the queue, job {job}")
            continue
        command, recipe, arguments = command_of(directory, name, manner)
        settings = {
            "RECIPE": recipe,
            "WORKDIR": directory.run_location(name),
            "COMMAND": command,
            "ARGUMENTS": shlex.join(arguments),
        }
        job = queue.submit(title, settings)
        directory.record(name, status="queued", job=job)
        say(f"sweep: run {name} is submitted, job {job}")


def _answer(words: Sequence[str], settings: Mapping[str, str] | None = None, refused: str | None = None) -> str:
    """What a command says on stdout; `refused` if it fails, where that is no error."""
    try:
        done = subprocess.run(words, env=os.environ | dict(settings or {}), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not installed here: call `cpt sweep --queue` where jobs are submitted"
        ) from None
    if done.returncode:
        if refused is not None:
            return refused
        raise UserError(f"{shlex.join(words[:3])} ... was refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout
