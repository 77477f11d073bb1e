"""Many runs: what each contributes, read in one place."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.checkpoint.packed import with_unpacked
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.config import KIND
from cpt_jax.core.errors import UserError
from cpt_jax.core.place import Place
from cpt_jax.core.stores import Location, Store, glob_addresses, is_address, read_from, refusals_are_told
from cpt_jax.data.prepare import read_manifest
from cpt_jax.laws.points import Point
from cpt_jax.report.run_report import final_label, grid, is_reported, load_run
from cpt_jax.training.ending import ended_early
from cpt_jax.training.metrics import read_metrics
from cpt_jax.training.watch import RAISED, read_watch

# What a sweep's directory holds about its runs.
SWEEP = "sweep.json"
Curve = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What one run contributes: bits per byte of its base and of its result by domain, what it was trained on, and every
    setting of its recipe by its path. `tokens` were trained on; `replay` is the share of them that was replay, the recipe's
    or, where a stage came to another (`_shares`), what was read, and `planned` the recipe's; `divisions` are how the recipe divides each
    stage's new and its replayed tokens among their domains, empty where there are none; `parameters` are the base's, grown, `None` if it is not
    there; `losses` (nats a token, in training) and `watched` (bits per byte, held out) are curves over the tokens so far."""

    path: Location
    name: str
    settings: Mapping[str, Any]
    seed: int
    tokens: int
    parameters: int | None
    replay: float
    planned: float
    divisions: tuple[Mapping[str, float], ...]
    roles: Mapping[str, str]
    base: Mapping[str, float]
    final: Mapping[str, float]
    losses: Mapping[str, Curve]
    watched: Mapping[str, Curve]

    @property
    def point(self) -> Point:
        """The run as a point of a law."""
        return Point(
            losses=self.final,
            tokens=self.tokens,
            share=self.replay,
            planned=self.planned,
            size=self.parameters,
            seed=self.seed,
            name=self.name,
        )

    @property
    def base_point(self) -> Point:
        return Point(losses=self.base, tokens=0, share=0.0, size=self.parameters, name=f"base of {self.name}")


def read_run(location: Location) -> RunFacts:
    """The facts of a run's directory, also of one in a store.

    Raises:
      UserError: it is no run's directory, or its result was not evaluated yet.
    """
    with read_from(location, is_reported) as path:
        return _facts(location, path)


def _facts(location: Location, path: Path) -> RunFacts:
    config, entries = load_run(path)
    labels, cells = grid(entries)
    final, names = final_label(config), [domain["corpus"]["name"] for domain in config["domains"]]
    if any((final, name) not in cells for name in names):
        raise UserError(
            f"{path}: the run has not ended, its result ({final}) is not evaluated: run it again, it goes on"
        )
    roles = {domain["corpus"]["name"]: domain["role"] for domain in config["domains"]}
    losses, watched = _curves(path, config)
    trained = _trained_tokens(path, config)
    tokens = sum(trained)
    return RunFacts(
        path=location,
        name=path.resolve().name if path.resolve().parent.name == "runs" else config["name"],
        settings=dict(_flat(config)),
        seed=config.get("seed", 0),
        tokens=tokens,
        parameters=_parameters(f"{location}/base") or _parameters(config["base"]),
        replay=_replay(path, config, roles, trained) / tokens if tokens else 0.0,
        planned=_planned(path, config, roles),
        divisions=tuple(_divisions(path, config, roles)),
        roles=roles,
        base={name: cells[labels[0], name]["bits_per_byte"] for name in names},
        final={name: cells[final, name]["bits_per_byte"] for name in names},
        losses=losses,
        watched=watched,
    )


def find_runs(paths: Sequence[Location]) -> tuple[list[RunFacts], list[str]]:
    """The runs among directories of runs and directories of sweeps (their runs lie in runs/), and why others of a sweep,
    and those that have diverged, are left out, a line each.

    Raises:
      UserError: a directory is neither, or no run has ended with figures.
    """
    found, left_out = [], []
    for path in paths:
        if not is_sweep(path):
            found.append(read_run(path))
            continue
        runs = {str(run).rpartition("/")[2]: run for run in _runs_of(path)}
        names = list(runs) if (own := _experiment(path)) is None else own
        left_out += [f"{runs[name]}: the sweep's experiment does not have it" for name in runs if name not in names]
        for run in (runs[name] for name in names if name in runs):
            try:
                found.append(read_run(run))
            except UserError as error:
                left_out.append(str(error))
    if not found:
        raise UserError(f"no run in {', '.join(map(str, paths))} has ended yet: run the sweep again, it goes on")
    measured = [run for run in found if all(map(math.isfinite, run.final.values()))]
    left_out += [
        f"{run.path}: it has diverged, its bits per byte are no number" for run in found if run not in measured
    ]
    if not measured:
        raise UserError(f"{left_out[-1]}: lower the learning rate")
    return measured, left_out


def is_sweep(location: Location) -> bool:
    """Whether a directory holds runs, and is none itself."""
    with refusals_are_told(str(location)):
        return Place(location).read("config.json") is None and bool(_runs_of(location))


def _experiment(sweep: Location) -> list[str] | None:
    """The names of a sweep's runs, in its order; None: nobody says which are its own."""
    with refusals_are_told(str(sweep)):
        content = Place(sweep).read(SWEEP)
    return None if content is None else [run["name"] for run in json.loads(content)["runs"]]


def _runs_of(sweep: Location) -> list[Location]:
    if is_address(sweep):
        names = {name.split("/")[1] for name in Store(str(sweep)).names("runs")}
        return [f"{sweep}/runs/{name}" for name in sorted(names, key=_in_order)]
    names = {child.name for child in Path(sweep).glob("runs/*") if child.is_dir()}
    return [Path(sweep) / "runs" / name for name in sorted(names, key=_in_order)]


def _in_order(name: str) -> list[str | int]:
    """Sorts names with numbers in them by the numbers: replay-5% comes before replay-10%."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _parameters(directory: str) -> int | None:
    """What the headers of a model's files have, without their weights."""
    pattern = f"{directory}/*.safetensors"
    files = glob_addresses(pattern) if is_address(pattern) else sorted(Path(directory).glob("*.safetensors"))
    held = {name: file for file in map(SafetensorsFile, files) for name in file.tensors}
    return sum(math.prod(file.tensors[name].shape) for name, file in with_unpacked(held).items()) or None


def _trained_tokens(run: Path, config: dict) -> list[int]:
    """Of each stage, in whole steps; fewer than its recipe says where a watch or the text has ended it."""
    found = []
    for number, stage in enumerate(config["stages"], 1):
        ended, step = ended_early(_stage(run, number, stage)), stage["batch_size"] * stage["sequence_length"]
        found.append(step * (-(-stage["tokens"] // step) if ended is None else ended[0]))
    return found


def _stage(run: Path, number: int, stage: Mapping[str, Any]) -> Path:
    return run / "stages" / f"{number}-{stage['name']}"


def _replay(run: Path, config: dict, roles: Mapping[str, str], trained: Sequence[int]) -> float:
    return sum(
        tokens * share
        for number, (stage, tokens) in enumerate(zip(config["stages"], trained, strict=True), 1)
        for name, share in _shares(run, _stage(run, number, stage), stage).items()
        if roles[name] == "replay"
    )


def _planned(run: Path, config: dict, roles: Mapping[str, str]) -> float:
    stages = [(stage["tokens"], mean_shares(stage["mixture"], run)) for stage in config["stages"]]
    replay = sum(
        tokens * share for tokens, shares in stages for name, share in shares.items() if roles[name] == "replay"
    )
    return replay / max(1, sum(tokens for tokens, _ in stages))


def _divisions(run: Path, config: dict, roles: Mapping[str, str]) -> Iterator[dict[str, float]]:
    for stage in config["stages"]:
        for role in ("new", "replay"):
            shares = {name: share for name, share in mean_shares(stage["mixture"], run).items() if roles[name] == role}
            whole = sum(shares.values())
            yield {name: share / whole for name, share in shares.items() if share} if whole else {}


def _shares(run: Path, directory: Path, stage: Mapping[str, Any]) -> dict[str, float]:
    """Each domain's share of what a stage trained on: its mixture's, or, where a watch raised some, a domain's text may
    have run out, or the end came early, what was counted."""
    raised = any((line.get("action") or "").startswith(RAISED) for line in read_watch(directory))
    if raised or stage.get("max_epochs") or ended_early(directory) is not None:
        read: dict[str, float] = {}
        for line in read_metrics(directory):
            for key, count in line.items():
                if key.startswith("read/"):
                    read[key.removeprefix("read/")] = read.get(key.removeprefix("read/"), 0) + count
        if read:
            return {name: count / sum(read.values()) for name, count in read.items()}
        if raised:
            raise UserError(
                f"{run}: its watch raised the replay, and its metrics.jsonl does not count what was read (read/DOMAIN): "
                "leave the run out"
            )
    return mean_shares(stage["mixture"], run)


def mean_shares(mixture: Mapping[str, Any], run: Path) -> dict[str, float]:
    """Each domain's share over a whole stage, of a mixture as config.json has it: of a schedule, the mean."""
    match mixture.get(KIND):
        case None:
            return dict(mixture)
        case "Ramp":  # Along a line and along half a cosine, the mean is the middle.
            ends = (mean_shares(mixture["start"], run), mean_shares(mixture["end"], run))
            return {name: sum(end.get(name, 0.0) for end in ends) / 2 for name in {**ends[0], **ends[1]}}
        case "Phases":
            means: dict[str, float] = {}
            for part in mixture["parts"]:
                for name, share in mean_shares(part["mixture"], run).items():
                    means[name] = means.get(name, 0.0) + part["share"] * share
            return means
        case "Temperature":
            sizes = {name: read_manifest(run / "data" / name).tokens for name in mixture["domains"]}
            powers = {name: tokens ** (1 / mixture["temperature"]) for name, tokens in sizes.items()}
            return {name: power / sum(powers.values()) for name, power in powers.items()}
        case kind:
            raise UserError(f"{run}: the shares of a mixture {kind!r} are not known here: leave the run out")


def _curves(run: Path, config: dict) -> tuple[dict[str, Curve], dict[str, Curve]]:
    losses: dict[str, Curve] = {}
    watched: dict[str, Curve] = {}
    before = 0
    for number, stage in enumerate(config["stages"], 1):
        directory = _stage(run, number, stage)
        seen, at_step = before, {}
        for line in read_metrics(directory):
            seen += int(line["tokens"])
            at_step[int(line["step"])] = seen
            for key, value in line.items():
                if key.startswith("nats/"):
                    losses.setdefault(key.removeprefix("nats/"), []).append((seen, value))
        for line in read_watch(directory):
            for name, value in line["bits_per_byte"].items():
                watched.setdefault(name, []).append((at_step.get(line["step"], before + line["tokens"]), value))
        before = seen
    return losses, watched


def _flat(config: Any, where: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by dotted path; a dataclass's kind stands at its own path."""
    if isinstance(config, dict | list):
        items = config.items() if isinstance(config, dict) else ((str(n), value) for n, value in enumerate(config))
        for key, value in items:
            if key == KIND:
                yield where or KIND, value
            else:
                yield from _flat(value, f"{where}.{key}" if where else key)
    else:
        yield where, config


def common_domains(runs: Sequence[RunFacts]) -> dict[str, str]:
    """The domains that all runs measured, with their role in the first of them.

    Raises:
      UserError: there is none.
    """
    common = {name: role for name, role in runs[0].roles.items() if all(name in run.final for run in runs)}
    if not common:
        apart = next((run for run in runs if not set(run.final) & set(runs[0].final)), runs[-1])
        raise UserError(
            f"the runs have no domain in common ({runs[0].name}: {', '.join(runs[0].final)}; {apart.name}: {', '.join(apart.final)}): "
            "give runs that measured the same text"
        )
    return common
