"""A sweep's directory: runs/NAME/ are run directories, shared/ holds what they have in common, sweep.json says what
became of each."""

import fcntl
import json
import os
import traceback
from pathlib import Path
from typing import IO, Any

from cpt_jax.core.config import differences, fingerprint, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.progress import clock, say
from cpt_jax.core.storage import json_bytes, numbers, objects_in, write_json_atomic, write_text_atomic
from cpt_jax.core.stores import Location, Store, is_address, location, state_of
from cpt_jax.data.catalogues import is_catalogued
from cpt_jax.data.chat_template import read_template
from cpt_jax.data.cleaning import evaluation_state
from cpt_jax.data.sources import corpus_state, files_of
from cpt_jax.recipe.mirror import MARKS
from cpt_jax.recipe.recipe import Recipe, saved_form
from cpt_jax.recipe.shared import SharedStations
from cpt_jax.recipe.stations import identity
from cpt_jax.report.many import SWEEP
from cpt_jax.report.many_report import write_runs_report
from cpt_jax.report.run_report import evaluations_in, final_label, stage_label
from cpt_jax.report.tables import text_table


class SweepDirectory:
    """The directory of one experiment, locked by this process if it is claimed. In a store, only sweep.json and the
    runs are there.

    Raises:
      UserError: another sweep is running in it, it holds something else, or it belongs to another experiment.
    """

    def __init__(self, location: Location, experiment: str, recipes: dict[str, Recipe], *, claim: bool = True) -> None:
        self.location, self.experiment, self.recipes = location, experiment, recipes
        self._store = Store(str(location)) if is_address(location) else None
        self._lock: IO[str] | None = None
        self.path = Path(str(location))
        self.shared = SharedStations(self.path / "shared")
        self._records: dict[str, dict[str, Any]] = self._found()
        if claim:
            self._claim()
            # Another sweep may have gone on until this one had the lock.
            self._records = self._found()
            self.write()

    def _found(self) -> dict[str, dict[str, Any]]:
        text = self._read(SWEEP)
        if text is None:
            names = [] if self._store or not self.path.exists() else os.listdir(self.path)
            if [name for name in names if name != ".lock"]:
                raise UserError(f"{self.path} is not empty and holds no sweep (no {SWEEP}): choose another --workdir")
            return {}
        content = json.loads(text)
        if content["experiment"] != self.experiment:
            raise UserError(
                f"{self.location} belongs to the experiment {content['experiment']!r}, not {self.experiment!r}: choose another --workdir"
            )
        figures = ("base", "final")
        return {
            record["name"]: record | {name: numbers(record[name]) for name in figures if name in record}
            for record in content["runs"]
        }

    def _read(self, name: str) -> str | None:
        if self._store is not None:
            content = self._store.read(name)
            return None if content is None else content.decode()
        return (self.path / name).read_text() if (self.path / name).exists() else None

    def _claim(self) -> None:
        if self._store is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise UserError(
                    f"another sweep, or a run that one has begun, is at work in {self.path}: wait for it, or choose another --workdir"
                ) from None

    def __enter__(self) -> "SweepDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def locks(self) -> tuple[int, ...]:
        """File descriptors that hold the directory as long as a process has them."""
        return () if self._lock is None else (self._lock.fileno(),)

    @property
    def in_store(self) -> bool:
        return self._store is not None

    def run(self, name: str) -> Path:
        """A run's directory."""
        return self.path / "runs" / name

    def run_location(self, name: str) -> str:
        """The same, as `cpt run --workdir` takes it."""
        return f"{self.location}/runs/{name}"

    # What became of the runs

    def content(self) -> dict[str, Any]:
        """What sweep.json holds: the runs in the experiment's order, each with its bits per byte by domain, the base's and
        the final ones. `seconds` are of the machine: of runs that went together, each has its share."""
        runs = [{"name": name, "status": "waiting"} | self._records.get(name, {}) for name in self.recipes]
        return {"experiment": self.experiment, "runs": runs}

    def write(self) -> None:
        self._write(SWEEP, self.content())

    def _write(self, name: str, content: Any) -> None:
        if self._store is not None:
            self._store.write(name, json_bytes(content))
        else:
            write_json_atomic(self.path / name, content)

    def write_recipe(self, name: str) -> str:
        """A run's recipe as a file, for a process of its own; where it is, as `cpt run` takes it."""
        file = f"recipes/{name}.json"
        self._write(file, saved_form(self.recipes[name]))
        return f"{self.location}/{file}"

    def record(self, name: str, **fields: Any) -> None:
        self._records[name] = {"name": name} | self._records.get(name, {}) | fields
        self.write()

    def of(self, name: str) -> dict[str, Any]:
        """What is recorded of a run."""
        return self._records.get(name, {})

    def begun_now(self, name: str) -> None:
        """A run begins: what it will have come to is of its inputs as they are now, whatever becomes of them meanwhile."""
        try:
            inputs = self._inputs(name)
        except UserError:
            # The run itself says so.
            return
        self.record(name, **self._forgotten(name, inputs), inputs=inputs)

    def _forgotten(self, name: str, inputs: str) -> dict[str, Any]:
        """What is to be recorded of a run that has been done with other inputs: it would be shown as this one's."""
        record = self.of(name)
        other = record.get("status") == "done" and record.get("inputs") != inputs
        return {"status": "waiting", "base": {}, "final": {}} if other else {}

    def done_now(self, name: str, seconds: float, exports: bool) -> None:
        """A run that has begun is at its end, after so many seconds of this machine."""
        self.record(
            name,
            status="done",
            error=None,
            seconds=round(self.of(name).get("seconds", 0.0) + seconds, 1),
            together=self._together(name),
            exports=exports,
            **self.scores(name),
        )
        say(f"sweep: run {name} is done")

    def failed_now(self, name: str, error: Exception | str) -> None:
        told = isinstance(error, UserError | str)
        message = str(error) if told else f"{type(error).__name__}: {error}"
        error_line = message.splitlines()[0] if message else type(error).__name__
        # What an earlier recipe of this name has come to is not this one's.
        self.record(name, status="failed", error=error_line, final={})
        say(f"sweep: run {name} failed: {self.of(name)['error']}")
        if isinstance(error, Exception) and not told:
            write_text_atomic(self.log(name), "".join(traceback.format_exception(error)))

    def log(self, name: str) -> Path:
        """Where a failure, or a process, says more."""
        return self.path / "logs" / f"{name}.log"

    def is_done(self, name: str, exports: bool) -> bool:
        """Whether a run has been done with the same recipe, texts and base, and its result is there."""
        record = self.of(name)
        if record.get("status") != "done" or (exports and not record.get("exports")):
            return False
        stages = self.recipes[name].stages
        last = (
            f"runs/{name}/stages/{len(stages)}-{stages[-1].name}/metrics.jsonl" if stages else f"runs/{name}/eval.json"
        )
        there = all(self._read(file) is not None for file in (f"runs/{name}/eval.json", last))
        return there and record.get("inputs") == self._inputs(name)

    def left(self, exports: bool) -> dict[str, Recipe]:
        """The runs that are still to do. What one has come to with another recipe, text or base is forgotten: it would
        be shown as this one's until that is done."""
        left = {name: recipe for name, recipe in self.recipes.items() if not self.is_done(name, exports)}
        for name in left:
            if self.of(name).get("status") == "done" and (other := self._forgotten(name, self._inputs(name))):
                self.record(name, **other)
        return left

    def _inputs(self, name: str) -> str:
        """Tells whether a run would be another one now."""
        recipe = self.recipes[name]
        corpora = [
            state_of(str(file)) if is_address(file) else identity(Path(file))
            for domain in recipe.domains
            for file in files_of(domain.corpus)
        ]
        base = Path(recipe.base).expanduser()
        given = [saved_form(recipe), corpora, identity(base) if base.exists() else recipe.base]
        # Without any of these it is what it was before they were looked at.
        read: list[Any] = [corpus_state(each.corpus) for each in recipe.domains if is_catalogued(each.corpus.spec)]
        read += [state for domain in recipe.domains for state in evaluation_state(domain.cleaning)]
        if recipe.chat_template is not None:
            read.append(read_template(Path(recipe.chat_template)))
        if recipe.vocabulary is not None:
            read += map(identity, recipe.vocabulary.files)
        return fingerprint([*given, *read])

    def settle(self, name: str, exports: bool) -> bool:
        """Whether a run that another process was given is at its end now; notes it if so."""
        if self.of(name).get("status") != "queued":
            return False
        recipe, stages = self.recipes[name], self.recipes[name].stages
        without = "extended-last" if recipe.changes_base else "base-last"
        last = f"{stages[-1].name}-{'ema' if stages[-1].ema else 'last'}" if stages else without
        behind = [f"evaluate-{last}", *(["samples"] if exports else [])]
        marks = [json.loads(self._read(f"runs/{name}/{MARKS}/{station}.json") or "{}") for station in behind]
        config = json.loads(self._read(f"runs/{name}/config.json") or "{}")
        if not all(mark.get("done") for mark in marks) or differences(config, to_json(recipe)):
            return False
        if self.of(name).get("inputs") != self._inputs(name):
            return False
        self.done_now(name, 0.0, exports)
        return True

    def _together(self, name: str) -> int:
        """How many runs were one program as this one trained last: fewer than were to be, where memory was short."""
        events = objects_in(self._read(f"runs/{name}/{JOURNAL}") or "")
        return next((each.get("together", 1) for each in reversed(events) if each["event"] == "training"), 1)

    def scores(self, name: str) -> dict[str, dict[str, float]]:
        """Bits per byte by domain: the base's, and the final ones."""
        recipe = self.recipes[name]
        entries = evaluations_in(self._read(f"runs/{name}/eval.json") or "[]")
        kinds = {"base": "base", "final": final_label(to_json(recipe))}
        return {
            kind: {e["domain"]: e["bits_per_byte"] for e in entries if stage_label(e) == label}
            for kind, label in kinds.items()
        }

    def failed(self) -> dict[str, str]:
        return {
            name: record["error"]
            for name in self.recipes
            if (record := self._records.get(name, {})).get("status") == "failed"
        }

    def table(self) -> str:
        """The runs with their final bits per byte by domain, and what their base had."""
        records = self.content()["runs"]
        domains = list(dict.fromkeys(domain.name for recipe in self.recipes.values() for domain in recipe.domains))
        rows, statuses = [["bits per byte", *domains, "time"]], [""]
        for record in records:
            base, final = record.get("base", {}), record.get("final", {})
            cells = [
                f"{final[name]:.3f} ({final[name] / base[name] - 1:+.1%})" if name in final and name in base else "-"
                for name in domains
            ]
            status = record["status"] if record["status"] != "failed" else f"failed: {record['error']}"
            if record["status"] == "done" and record["together"] > 1:
                status = f"done, {record['together']} together"
            rows.append([record["name"], *cells, clock(record["seconds"]) if "seconds" in record else "-"])
            statuses.append(status)
        bases = {tuple(record["base"].items()) for record in records if record.get("base")}
        if len(bases) == 1:
            base = dict(bases.pop())
            rows.insert(1, ["base", *(f"{base[name]:.3f}" if name in base else "-" for name in domains), ""])
            statuses.insert(1, "")
        # Behind the table: a failure's message is as long as it is.
        lines = zip(text_table(rows).splitlines(), statuses, strict=True)
        return "\n".join(f"{line}  {status}".rstrip() for line, status in lines)

    def report(self) -> Location | None:
        """The page over all runs that are done; None: none is."""
        names = [name for name in self.recipes if self.of(name).get("status") == "done"]
        runs = [location(self.run_location(name)) for name in names]
        return write_runs_report(runs, location(f"{self.location}/report.html")) if runs else None
