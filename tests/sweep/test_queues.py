"""A run has one job of its own on a queue, whatever it is called and whatever the queue says when it is asked."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.data.sources import Corpus
from cpt_jax.recipe.recipe import Domain, Recipe
from cpt_jax.sweep import queues
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner

LAUNCH = Path(__file__).parents[2] / "launch"
LISTED = "ID TASK NAME REQUESTED STATUS\n1 - {name} 1x[H100:1] RUNNING"


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Writes a command, which notes its arguments, a line a call, in the file that is returned; names the launch files."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(queues.Slurm, "file", LAUNCH / "slurm.sbatch")
    monkeypatch.setattr(queues.SkyPilot, "file", LAUNCH / "skypilot.yaml")
    (tmp_path / "bin").mkdir()

    def write(name: str, *lines: str) -> Path:
        calls, path = tmp_path / f"{name}.txt", tmp_path / "bin" / name
        path.write_text("\n".join(["#!/bin/bash", f'echo "$*" >> "{calls}"', *lines, ""]))
        path.chmod(0o755)
        return calls

    return write


def directory(place: object, *names: str) -> SweepDirectory:
    domain = Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new")
    recipes = {name: Recipe(name=name, base="b", domains=(domain,), stages=()) for name in names}
    return SweepDirectory(place, "e", recipes)  # type: ignore[arg-type]


def submit(swept: SweepDirectory, **manner) -> None:
    queues.submit(swept, swept.recipes, Manner(**manner))


def test_names_of_jobs_differ_where_those_of_runs_do(tmp_path, monkeypatch):
    runs = ["法律-1", "新闻-1", "-1", "A", "a", "a.", "rate=1e-3", "rate=1e3", "rate-1e-3", "法律"]
    with directory(tmp_path / "one", *runs) as one, directory(tmp_path / "two", *runs) as two:
        names = [queues.job_name(swept, run) for swept in (one, two) for run in runs]
        monkeypatch.chdir(tmp_path)
        assert queues.job_name(SweepDirectory(Path("one"), "e", one.recipes, claim=False), "A") in names
    assert len(set(names)) == len(names)
    # What SkyPilot takes.
    for name in names:
        assert name.replace("-", "").isalnum()
        assert name.isascii()
        assert "--" not in name


# As Slurm 22.05 says it when its controller does not answer, and when it has forgotten a job.
@pytest.mark.parametrize("error", ["Socket timed out on send/recv operation", "Unable to contact slurm controller"])
def test_a_slurm_that_does_not_answer_gets_no_second_job(program, tmp_path, error):
    submitted = program("sbatch", f"wc -l < {tmp_path}/sbatch.txt")
    program("squeue", f"echo 'slurm_load_jobs error: {error}' >&2; exit 1")
    with directory(tmp_path / "sweep", "a") as swept:
        submit(swept, queue="slurm")
        with pytest.raises(UserError, match=f"squeue .* failed: .*{error}: call the same command again"):
            submit(swept, queue="slurm")
        assert len(submitted.read_text().splitlines()) == 1
        program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
        submit(swept, queue="slurm")
        assert swept.of("a")["job"] == "2"


def test_a_job_that_slurm_accepted_without_saying_so_is_found_by_its_name(program, tmp_path):
    """As Slurm 22.05 does where its controller takes up a request that sbatch has given up."""
    submitted = program("sbatch", "echo 'Batch job submission failed: Socket timed out' >&2; exit 1")
    with directory(tmp_path / "sweep", "a", "b") as swept:
        names = [queues.job_name(swept, run) for run in ("a", "b")]
        with pytest.raises(UserError, match=r"sbatch .* failed: .*Socket timed out"):
            submit(swept, queue="slurm")
        program("squeue", f"case $* in *--name={names[0]}*) echo PENDING ;; esac")
        program("sbatch", "echo 5")
        submit(swept, queue="slurm")
        assert [line.split()[1] for line in submitted.read_text().splitlines()] == [
            f"--job-name={name}" for name in names
        ]
        # It came to nothing.
        program("squeue")
        submit(swept, queue="slurm")
        assert len(submitted.read_text().splitlines()) == 4


def test_a_job_on_another_cluster_is_looked_for_there(program, tmp_path):
    submitted = program("sbatch", "echo '7;gpu'")
    asked = program("squeue", "echo PENDING")
    with directory(tmp_path / "sweep", "a") as swept:
        for _ in range(2):
            submit(swept, queue="slurm", queue_arguments=("--clusters=gpu",))
    assert len(submitted.read_text().splitlines()) == 1
    assert asked.read_text().split()[-2:] == ["--jobs=7", "--clusters=gpu"]


# SkyPilot 0.14 exits with 0 in the first two cases.
@pytest.mark.parametrize(
    "answer",
    [
        "echo 'Failed to query managed jobs due to connection issues. Try again later.'",
        "echo 'Failed to connect to jobs controller, please try again later.'",
        "echo 'the API server is not there' >&2; exit 1",
    ],
)
def test_a_skypilot_that_does_not_answer_gets_no_second_job(program, answer):
    with directory(f"memory://queues/{abs(hash(answer))}", "a") as swept:
        calls = program("sky", f'[ "$2" = launch ] || {{ {answer}; }}')

        def launched() -> int:
            return sum(line.startswith("jobs launch") for line in calls.read_text().splitlines())

        submit(swept, queue="skypilot")
        with pytest.raises(UserError, match="call the same command again"):
            submit(swept, queue="skypilot")
        assert launched() == 1
        program("sky", f"echo '{LISTED.format(name=swept.of('a')['job'])}'")
        submit(swept, queue="skypilot")
        assert launched() == 1
        # Another run's.
        program("sky", f"echo '{LISTED.format(name='cpt-a')}'")
        submit(swept, queue="skypilot")
        assert launched() == 2
        program("sky", "echo 'No in-progress managed jobs.'")
        submit(swept, queue="skypilot")
        assert launched() == 3
        # By itself it lists the newest 50.
        assert "jobs queue --all --skip-finished" in calls.read_text()


def test_a_job_of_slurm_finds_paths_with_spaces(program, tmp_path):
    run = program("srun", 'printf "<%s>" "$@" >> "$0.txt"')
    program("sbatch", f"bash {LAUNCH}/slurm.sbatch; echo 1")
    place = tmp_path / "my runs"
    with directory(place, "a b") as swept:
        submit(swept, queue="slurm", update=True)
    assert run.exists()
    words = (tmp_path / "bin" / "srun.txt").read_text()
    assert words == (
        f"<.venv/bin/cpt><train><{place}/recipes/a b.json><--workdir><{place}/runs/a b><--distributed><--shared><{place}/shared><--update>"
    )
    # By hand, without a sweep.
    told = {"RECIPE": "law", "WORKDIR": "runs/law", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", str(LAUNCH / "slurm.sbatch")], env=told, check=True)
    assert run.read_text().splitlines()[-1] == ".venv/bin/cpt run law --workdir runs/law --distributed"
