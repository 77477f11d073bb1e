"""Configuration, trees and files."""

import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest

from cpt_jax.adapt import Embeddings, LoRA
from cpt_jax.core.config import differences, fingerprint, from_json, override, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import Plan, clock, number_of, progress
from cpt_jax.core.storage import atomic_directory, numbers, write_json_atomic, write_text_atomic
from cpt_jax.core.tree import combine, flatten, match, partition, unflatten
from cpt_jax.data.mixture import Ramp
from cpt_jax.data.sources import Corpus
from cpt_jax.models.remat import Remat
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW, Lion
from cpt_jax.recipe.recipe import Domain, Recipe, Stage, Vocabulary


def recipe() -> Recipe:
    stage = Stage(
        name="first",
        method=Embeddings(),
        mixture={"zh": 1.0},
        tokens=1000,
        batch_size=2,
        sequence_length=64,
        optimizer=AdamW(learning_rate=1e-3),
        ema=EMA(decay=0.9),
    )
    second = dataclasses.replace(stage, name="second", method=LoRA(rank=4, alpha=8, targets=("q", "v")), ema=None)
    domains = (Domain(corpus=Corpus(name="zh", spec="a.jsonl"), role="new"),)
    return Recipe(name="r", base="model", domains=domains, stages=(stage, second), vocabulary=Vocabulary())


def test_a_recipe_comes_back_from_its_json():
    assert from_json(Recipe, to_json(recipe())) == recipe()


def test_overrides_reach_everywhere_and_keep_types():
    changed = override(recipe(), ("stages.1.optimizer.learning_rate", "2e-3"))
    assert changed.stages[1].optimizer.learning_rate == 2e-3
    assert changed.stages[0] == recipe().stages[0]
    assert override(recipe(), ("stages.0.tokens", "2048")).stages[0].tokens == 2048
    assert override(recipe(), ("stages.0.tokens", "1e6")).stages[0].tokens == 1_000_000
    assert override(recipe(), ("name", "12")).name == "12"


def test_what_is_computed_again_is_a_word():
    for word in ("all", "products", "attention_out,mlp_up"):
        changed = override(recipe(), ("stages.0.remat", word))
        assert changed.stages[0].remat == Remat.parse(word)
        assert override(changed, ("stages.0.remat", "offload:mlp_up")).stages[0].remat == Remat(offload=("mlp_up",))
        assert override(changed, ("stages.0.remat.products", "true")).stages[0].remat == dataclasses.replace(
            Remat.parse(word), products=True
        )
        assert override(changed, ("stages.0.remat", "none")) == recipe()
    whole = override(recipe(), ("stages.0.remat", '{"kind": "Remat", "products": true}'))
    assert whole.stages[0].remat == Remat(products=True)


def test_an_object_replaces_a_group():
    domains = (*recipe().domains, Domain(corpus=Corpus(name="en", spec="b.jsonl"), role="replay"))
    both = dataclasses.replace(recipe(), domains=domains)
    mixed = override(both, ("stages.0.mixture", '{"en": 0.25, "zh": 0.75}'))
    assert mixed.stages[0].mixture == {"en": 0.25, "zh": 0.75}
    assert override(mixed, ("stages.0.mixture", '{"zh": 1}')) == both
    # Another kind, and what is not given is as by default, not as it was.
    averaged = override(recipe(), ("stages.0.ema.every", "2"))
    assert override(averaged, ("stages.0.ema", '{"kind": "EMA", "decay": 0.9}')) == recipe()
    lion = override(recipe(), ("stages.0.optimizer", '{"kind": "Lion", "learning_rate": 1e-4}')).stages[0].optimizer
    assert lion == Lion(learning_rate=1e-4)


@pytest.mark.parametrize("nothing", ["null", "none", "None"])
def test_what_is_optional_is_taken_away(nothing):
    without = override(recipe(), ("stages.0.ema", nothing))
    assert without.stages[0].ema is None
    assert override(without, ("stages.0.ema", '{"kind": "EMA", "decay": 0.9}')).stages[0] == recipe().stages[0]
    assert override(without, ("stages.0.ema", nothing)) == without
    given = override(recipe(), ("domains.0.corpus.group_field", "url"))
    assert override(given, ("domains.0.corpus.group_field", nothing)) == recipe()
    assert override(recipe(), ("name", nothing)).name == nothing
    second_alone = dataclasses.replace(recipe(), stages=recipe().stages[1:])
    assert override(second_alone, ("vocabulary", nothing)).vocabulary is None
    limited = override(recipe(), ("stages.1.max_epochs", '{"zh": 4}'))
    assert override(limited, ("stages.1.max_epochs", nothing)) == recipe()
    with pytest.raises(UserError, match=r"decay, every, on_host\), or the whole as JSON, or null"):
        override(recipe(), ("stages.0.ema", "0.9"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.1.optimizer.lerning_rate", "1", "did you mean 'learning_rate'"),
        ("stages.7.tokens", "1", "entries 0 to 1"),
        ("stages.0.tokens", "many", "'many'"),
        ("stages.0.tokens", "1.5", "1.5"),
        ("stages.0", "1", "names a group"),
        ("stages.0", "null", "or the whole as JSON"),
        ("stages.0.kind", "Other", 'the kind of stages.0, Stage, changes with the whole: give {"kind"'),
        ("stages.0.mixture", '{"zh": 0.5}', "the shares sum to 0.5, not to 1"),
        ("stages.0.mixture", "{'zh': 1}", r'is "{\'zh\': 1}": give {"NAME": ..., ...} or {"kind"'),
        ("stages.0.optimizer", '{"kind": "Adam"}', "is 'Adam': give one of AdamW"),
        ("stages.0.remat", "mlp", "remat names the activation 'mlp'; there are: queries, .* products"),
        ("stages.0.ema", "0.9", "names a group"),
        ("stages.1.ema", "0.9", 'is 0.9: give {"kind": "EMA", ...}, or null'),
        ("precision.compute", "float8", "one of float32, bfloat16"),
        ("evaluation.sequence_length", "0", "evaluation.sequence_length is 0: give a number of at least 1"),
        ("evaluation.batch_size", "0", "evaluation.batch_size is 0"),
        # An average that never moves is the base.
        ("stages.0.ema.every", "9", "moves after every 9 steps, and the stage has 8: lower ema.every"),
    ],
)
def test_wrong_overrides_are_told(path, value, message):
    with pytest.raises(UserError, match=message):
        override(recipe(), (path, value))


def test_changes_are_checked_together_in_any_order():
    averaged = override(recipe(), ("stages.1.ema", '{"kind": "EMA", "decay": 0.9}'), ("export.weights", "ema"))
    for changes in itertools.permutations([("stages.1.ema", "none"), ("export.weights", "last")]):
        assert override(averaged, *changes) == recipe()
    with pytest.raises(UserError, match="the last stage keeps none"):
        override(averaged, ("stages.1.ema", "none"))
    # Of an object that one of them gives, another may change a field, also one that was not given.
    given = override(recipe(), ("stages.1.ema", '{"kind": "EMA", "decay": 0.9}'), ("stages.1.ema.every", "2"))
    assert given.stages[1].ema == EMA(decay=0.9, every=2)
    # Shares that add up to 1 together only.
    mixed = dataclasses.replace(recipe().stages[1], mixture=Ramp(start={"zh": 1.0}, end={"zh": 0.5, "en": 0.5}))
    both = override(mixed, ("mixture.end.zh", "0.9"), ("mixture.end.en", "0.1"))
    assert both.mixture == Ramp(start={"zh": 1.0}, end={"zh": 0.9, "en": 0.1})


def test_differences_name_place_and_values():
    changed = dataclasses.replace(recipe(), seed=5)
    assert differences(to_json(recipe()), to_json(changed)) == ["seed: 0 in the work directory, 5 given"]
    assert differences(to_json(recipe()), to_json(recipe())) == []
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert (
        fingerprint([{"alpha": 8}, True]) == fingerprint([{"alpha": 8.0}, True]) != fingerprint([{"alpha": 8.5}, True])
    )


def test_what_is_no_finite_number_is_null_in_json_files(tmp_path):
    write_json_atomic(tmp_path / "a.json", [{"zh": math.nan, "en": (1.5, math.inf)}])
    assert json.loads((tmp_path / "a.json").read_text()) == [{"zh": None, "en": [1.5, None]}]
    assert math.isnan(numbers({"zh": None})["zh"])
    # Of a recipe it is a setting, which a run's config.json holds.
    never = override(recipe(), ("stages.0.checkpoint_seconds", "inf"))
    write_json_atomic(tmp_path / "config.json", to_json(never))
    saved = from_json(Recipe, json.loads((tmp_path / "config.json").read_text()))
    assert saved == never != recipe()
    assert override(saved, ("stages.0.checkpoint_seconds", "60")) == recipe()


def test_one_thing_is_told_as_one():
    told = [number_of(count, "document") for count in (0, 1, 2345)]
    assert told == ["0 documents", "1 document", "2,345 documents"]


def test_partition_and_combine_are_inverse():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    yes, no = partition(tree, lambda path: path.endswith("x"))
    assert yes == {"a": {"x": 1}}
    assert combine(yes, no) == tree
    assert unflatten(flatten(tree)) == tree
    with pytest.raises(ValueError, match="a/x"):
        combine(yes, tree)


def test_a_pattern_that_matches_nothing_is_an_error():
    assert match(["layers/*/kernel"], ["layers/q/kernel", "embed/base"]) == {"layers/q/kernel"}
    with pytest.raises(UserError, match="embed/base"):
        match(["head/*"], ["embed/base"])


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "kept"

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="the disk is full while writing"):
        write_text_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_an_old_directory_is_removed_after_the_new_one_is_there(tmp_path, monkeypatch):
    out, removed = tmp_path / "out", shutil.rmtree

    def replaced(content: str) -> None:
        with atomic_directory(out) as directory:
            (directory / "file").write_text(content)

    def interrupted(path, *arguments, **settings):
        """Ctrl-C while a large one is removed."""
        is_large = Path(path).exists() and not str(path).endswith(".partial")
        removed(path, *arguments, **settings)
        if is_large:
            raise KeyboardInterrupt

    def cannot_be_moved(path, target):
        if str(path).endswith(".partial"):
            raise KeyboardInterrupt
        return path.rename(target)

    replaced("first")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        replaced("second")
    assert (out / "file").read_text() == "second"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", cannot_be_moved)
        replaced("third")
    assert (out / "file").read_text() == "second"
    # Of one that was killed in between.
    out.rename(tmp_path / "out.replaced")
    replaced("fourth")
    assert (out / "file").read_text() == "fourth"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_who_write_a_file_at_once_each_writes_it_whole(tmp_path, monkeypatch):
    (tmp_path / "file.partial").write_text("what a killed process has left, longer than the file")
    second = threading.Thread(target=write_text_atomic, args=(tmp_path / "file", "second"))
    synced = os.fsync

    def meanwhile(file: int) -> None:
        synced(file)
        if not second.ident:
            second.start()
            second.join(0.5)

    monkeypatch.setattr("os.fsync", meanwhile)
    write_text_atomic(tmp_path / "file", "first")
    second.join()
    assert (tmp_path / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_that_is_no_utf8_is_written_and_told_apart(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9.jsonl", b"caf\xe8.jsonl", "café.jsonl".encode())]
    write_json_atomic(tmp_path / "file.json", names)
    assert json.loads((tmp_path / "file.json").read_text()) == names
    write_text_atomic(tmp_path / "file.txt", names[0])
    assert (tmp_path / "file.txt").read_text() == r"caf\udce9.jsonl"
    assert len({fingerprint(name) for name in names}) == 3


LONGEST = "é" * 100


@pytest.mark.parametrize("name", ["", ".", "..", "../../escaped", "/tmp/escaped", "a/b", "a\0b", LONGEST + "n"])
def test_what_files_cannot_be_named_after_is_told(name):
    document = to_json(recipe())
    for where in (document, document["stages"][0]):
        before, where["name"] = where["name"], name
        with pytest.raises(UserError, match=r"(recipe|stage) name .*: give one of at most 200 bytes without '/'"):
            from_json(Recipe, document)
        where["name"] = before
    with pytest.raises(UserError, match="corpus name"):
        Domain(corpus=Corpus(name=name, spec="a.jsonl"), role="new")


@pytest.mark.parametrize("name", ["25% replay", "rate=1e-3", "法律-1", "a.b", LONGEST])
def test_other_names_are_taken(name):
    stage = dataclasses.replace(recipe().stages[0], name=name)
    assert dataclasses.replace(recipe(), name=name, stages=(stage,)).name == name


def test_a_real_full_disk_is_told(tmp_path):
    from cpt_jax.core.storage import disk_full_is_told

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with (
        pytest.raises(UserError, match="disk is full"),
        disk_full_is_told(tmp_path),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x")
        file.flush()


def test_a_full_disk_under_prepared_data_is_told(tmp_path):
    # riegeli, which writes ArrayRecord, has an error of its own, with the system's words in it.
    from array_record.python.array_record_module import ArrayRecordWriter

    from cpt_jax.core.storage import disk_full_is_told

    with pytest.raises(UserError, match="disk is full"), disk_full_is_told(tmp_path):
        writer = ArrayRecordWriter("/dev/full", "group_size:1,uncompressed")
        for _ in range(200):
            writer.write(bytes(10_000))
        writer.close()


def test_the_plan_corrects_its_guess(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    plan = Plan({"a": 100.0, "b": 300.0}, seconds_per_unit=1.0)
    assert plan.seconds_left() == 400
    plan.begin("a")
    now[0] = 200.0
    plan.end("a")
    assert 550 < plan.seconds_left() < 650
    assert plan.seconds_left("b", current_left=10.0) == 10
    plan.skip("b")
    assert plan.seconds_left() == 0
    # A small part that mostly compiled says little about what is left.
    plan = Plan({"a": 1.0, "b": 1e6}, seconds_per_unit=1e-5)
    plan.begin("a")
    now[0] += 2.0
    plan.end("a")
    assert plan.seconds_left() < 20
    assert (clock(59.6), clock(125), clock(7300)) == ("1 min 00 s", "2 min 05 s", "2 h 01 min")


def test_a_narrow_terminal_shows_how_long_it_takes(monkeypatch):
    # By a terminal of 80 columns: the name, the steps and the time left are there, figures as far as there is room.
    import io
    import sys

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("TTY_INTERACTIVE", "1")):
        monkeypatch.setenv(name, value)
    figures = {f"loss domain{n}": 6.872 for n in range(3)} | {"tokens_per_second": 12345.0}
    with progress("stage-embeddings", 20, "steps", Plan({"stage-embeddings": 1.0}, 1.0)) as shown:
        shown.advance(10, **figures)
        shown.advance(10, **figures)
    last = [line for line in terminal.getvalue().split("\r") if "20/20" in line][-1]
    assert "stage-embeddings" in last
    assert "20/20 steps, 0 s left, whole run 0 s left, loss domain0" in last
