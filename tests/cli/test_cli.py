"""What is typed: one line where it is wrong, and nothing of the user's is replaced."""

import argparse
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from inputs import chinese, english, write_jsonl

from cpt_jax.cli import main
from cpt_jax.cli.arguments import whole_number
from cpt_jax.cli.parser import parser
from cpt_jax.recipe.find import find_recipe
from cpt_jax.recipe.stations import Workdir
from cpt_jax.training.retention import Anchor

ADAPT = ("adapt", "--base", "{model}", "--new", "zh=zh.jsonl", "--replay", "en=en.jsonl", "--workdir", "run")
NEW = ("adapt", "--base", "{model}", "--workdir", "run", "--new")
PREPARE = ("data", "prepare", "--tokenizer", "{model}", "--out", "data", "--input")
LAW = ("law", "runs", "--old", "en", "--new", "zh")
PLAN = ("plan", "--model", "{model}", "--hardware", "cpu-2")
WRONG = {
    "no name": ((*NEW, "zh.jsonl"), "is not NAME=SPEC, as in zh=law.jsonl; see `cpt adapt --help`"),
    "no whole number": ((*ADAPT, "--tokens", "many"), "'many' is no whole number, as in 1000000 or 1e6"),
    "a value with a dash": (("law", "t.csv", "--old", "en", "--new", "zh", "--budget", "-1%"), "--flag=-value"),
    "no such flag": (("doctor", "run", "--fix"), "unrecognized arguments: --fix"),
    "a flag nearly right": ((*ADAPT, "--replay_share", "0.5"), "did you mean --replay-share?"),
    "a name twice": ((*ADAPT, "--watch", "zh=en.jsonl"), "corpus 'zh' is given twice"),
    "prepared twice": ((*PREPARE, "zh=zh.jsonl", "zh=en.jsonl"), "corpus 'zh' is given twice"),
    "a directory as corpus": ((*NEW, "zh=texts"), "is a directory: name its files, as in zh='texts/**/*.jsonl'"),
    "next to no text": ((*NEW, "zh=short.jsonl"), "give more text, or --tokens"),
    "a watch that never looks": ((*ADAPT, "--watch-every", "0"), "--watch-every is 0: give at least 1 step"),
    "no budget to act on": ((*ADAPT, "--on-forgetting", "stop"), "give --forgetting-budget, as in 0.02"),
    "a model as workdir": ((*ADAPT[:-1], "kept"), "holds a config.json that is no run's"),
    "a model replaced": (
        ("model", "extend", "--model", "{model}", "--tokenizer", "{model}", "--out", "kept"),
        "exists",
    ),
    "a directory replaced": (("model", "import-gguf", "--gguf", "x.gguf", "--out", "kept"), "kept exists"),
    "a file as directory": ((*PREPARE, "zh=zh.jsonl", "--out", "zh.jsonl"), "zh.jsonl"),
    "no page over one run": (("report", "kept", "--out", "page.html"), "--out is of the page over several runs"),
    "nothing to read": (("eval", "--model", "{model}", "--data", "zh=zh.jsonl", "--max-bytes", "0"), "give at least 1"),
    "all held out": ((*ADAPT, "--domains.1.heldout.share", "1.0"), "all is held out (heldout.share 1)"),
    "a watchdog of less than nothing": ((*ADAPT, "--hang-seconds", "-5"), "--hang-seconds is -5: give seconds, or 0"),
    "a sweep for a run": (("doctor", "sweep"), "sweep is a sweep: examine its runs, one by one (sweep/runs/NAME)"),
    "replay of nothing": (
        (*NEW, "zh=zh.jsonl", "--replay-until", "0.5"),
        "--replay-until 0.5 needs something to replay",
    ),
    "a watchdog of no number": ((*ADAPT, "--hang-seconds", "nan"), "--hang-seconds is nan: give seconds, or 0"),
    "a seed below 0": ((*ADAPT, "--seed", "-1"), "seed is -1: give 0 to 429496729"),
    "a seed of more than 32 bits": ((*ADAPT, "--seed", str(2**32)), "seed is 4294967296: give 0 to 429496729"),
    "never saved": ((*ADAPT, "--stages.0.checkpoint_seconds", "nan"), "checkpoint_seconds is nan: give 0"),
    "a z-loss of no number": ((*ADAPT, "--stages.0.z_loss", "nan"), "z_loss is nan: give 0 or more"),
    "evaluation of no tokens": (
        (*ADAPT, "--evaluation.sequence_length", "0"),
        "evaluation.sequence_length is 0: give a number of at least 1",
    ),
    "evaluation of no rows": (
        (*ADAPT, "--evaluation.batch_size", "0"),
        "evaluation.batch_size is 0: give a number of at least 1",
    ),
    "samples of nothing": ((*ADAPT, "--samples.new_tokens", "-1"), "new_tokens is -1: give at least 1"),
    "files of no size": ((*ADAPT, "--export.shard_gb", "nan"), "shard_gb is nan: give more than 0"),
    "a law of less than nothing": ((*LAW, "--tokens", "-5"), "--tokens is -5: give a number above 0"),
    "a law of no number": ((*LAW, "--size", "nan"), "--size is nan: give a number above 0"),
    "a plan of no tokens": ((*PLAN, "--sequence", "0"), "--sequence is 0: give at least 1"),
    "a plan of no rows": ((*PLAN, "--batch", "0"), "--batch is 0: give at least 1"),
    "a plan in no parts": ((*PLAN, "--accumulate", "0"), "--accumulate is 0: give at least 1"),
    "a plan of rows less": ((*PLAN, "--new-tokens", "-1"), "--new-tokens is -1: give at least 1"),
    "a plan that is paid for": ((*PLAN, "--price", "-1"), "--price is -1: give what a chip's hour costs"),
    "a search that compiles nothing": ((*PLAN, "--search", "--compile", "0"), "--compile is 0: give at least 1"),
    "rows less": (
        ("model", "inspect", "--model", "{model}", "--new-tokens", "-5"),
        "--new-tokens is -5: give 0 or more",
    ),
    "weights of no pattern": (
        ("model", "inspect", "--model", "{model}", "--method", "by-path"),
        "give patterns, as in 'layers/mlp/*'",
    ),
    "rows by no seed": (
        ("model", "extend", "--model", "{model}", "--tokenizer", "{model}", "--out", "grown", "--seed", "-1"),
        "--seed is -1: give 0 or more",
    ),
    "no room": (("generate", "--model", "{model}", "--prompt", "the", "--new-tokens", "999"), "shorten the prompt"),
}


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "zh.jsonl", chinese(40))
    write_jsonl(tmp_path / "en.jsonl", english(40))
    write_jsonl(tmp_path / "short.jsonl", ["法"])
    (tmp_path / "texts").mkdir()
    (tmp_path / "sweep/runs/one").mkdir(parents=True)
    shutil.copytree(tiny_model, tmp_path / "kept")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_in_one_line(place, tiny_model, capsys, arguments, message):
    before = {path: path.read_bytes() for path in (place / "kept").iterdir()}
    with pytest.raises(SystemExit) as stop:
        main([argument.format(model=tiny_model) for argument in arguments])
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert stop.value.code == 2
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not any("usage:" in line for line in lines)
    assert told.out == ""
    assert {path: path.read_bytes() for path in (place / "kept").iterdir()} == before


def test_a_dry_run_tells_the_choices_and_writes_the_recipe_alone(place, tiny_model, capsys):
    given = [argument.format(model=tiny_model) for argument in ADAPT]
    main([*given, "--dry-run", "--tokens", "4096"])
    told = capsys.readouterr()
    assert "replay       25% of the tokens" in told.err
    assert "cpt sweep run/config.json --vary FIELD VALUE VALUE" in told.out
    first = find_recipe("run/config.json")
    assert sum(stage.tokens for stage in first.stages) == 4096
    # Nothing was done: other choices take its place, and it is a run that can be begun.
    main([*given, "--dry-run", "--tokens", "8192", "--anchor", "0.5"])
    second = find_recipe("run/config.json")
    assert sum(stage.tokens for stage in second.stages) == 8192
    assert second.stages[-1].retention == (Anchor(weight=0.5, domains=("en",)),)
    assert {path.name for path in (place / "run").iterdir()} == {"config.json", "sample.json", ".base.json", ".lock"}
    with Workdir(Path("run"), second) as claimed:
        assert not claimed.seconds
        for name in ("one", "two"):
            claimed.station(name, [], [], lambda: None)
    events = [json.loads(line)["event"] for line in Path("run/events.jsonl").read_text().splitlines()]
    assert events == ["run", "begin", "done", "begin", "done"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "fsdp=3"), "fsdp 3 x expert 1 x context 1 x tensor 1 does not cover 8 devices"),
        (("--stages.0.sequence_length", "100000"), "sequence_length 100000 is longer than the model's context of"),
    ],
)
def test_a_dry_run_tells_what_could_not_be_run(place, tiny_model, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([argument.format(model=tiny_model) for argument in (*ADAPT, "--dry-run", *words)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        (("dora",), ("/lora_a", "/lora_b", "/magnitude")),
        (("expand",), ("layers/added_0/",)),
        (("by-path", "--targets", "final_norm/scale", "layers/mlp/*"), ("layers/mlp/", "final_norm/scale")),
    ],
)
def test_what_a_method_would_train_is_shown(place, tiny_model, method, trains):
    main(["model", "inspect", "--model", str(tiny_model), "--json", "a.json", "--method", *method])
    rows = json.loads((place / "a.json").read_text())["weights"]
    trained = [row["weight"] for row in rows if row["trains"]]
    assert trained
    assert all(any(mark in name for name in trained) for mark in trains)
    assert all(any(mark in name for mark in trains) for name in trained)
    # Of blocks that are added, too: they are copies of what is in the files.
    assert all(row["dtype"] for row in rows if "kernel" in row["weight"].split("/")[-1:])


def test_output_that_is_read_no_further_ends_the_command_without_a_word(tiny_model, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main(["model", "inspect", "--model", str(tiny_model)])
    assert (ended.value.code, capsys.readouterr().err) == (1, "")


def test_whole_numbers_as_people_write_them():
    assert [whole_number(text) for text in ("1000", "1e6", "1,000,000")] == [1000, 1_000_000, 1_000_000]


def commands_of(page: Path) -> list[str]:
    """The indented lines of a page that call `cpt`; without what stands for more (...), with the first of a|b, and a number
    for N and I."""
    lines = re.findall(r"^    cpt ([^\n#]+)", page.read_text(), re.MULTILINE)
    lines = [re.sub(r"[\[\]]|(?<=\w)\|\S+", "", line).replace(" ...", "") for line in lines]
    return [re.sub(r" [NI]\b", " 1", line) for line in lines]


PAGES = [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if commands_of(path)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_pages_name_flags_that_there_are(page, capsys):
    for line in commands_of(page):
        words = shlex.split(line)
        try:
            arguments, rest = parser().parse_known_args(words)
        except SystemExit:
            # An example that leaves something out still shows the rest rightly.
            assert "arguments are required" in capsys.readouterr().err, line
            continue
        fields = [word for word in rest if word.startswith("--") and "." not in word]
        assert arguments.command == "lm-eval" or not fields, f"{page}: {line}: {fields}"


def flags_of(commands: argparse.ArgumentParser, name: str = "cpt") -> Iterator[tuple[str, argparse.Action]]:
    """All flags, of all commands, with the command."""
    for action in commands._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from flags_of(sub, f"{name} {word}")
        else:
            yield name, action


def test_a_flag_that_is_given_again_takes_nothing_away():
    """What takes several words takes more of them when it is given again: no corpus is left out in silence."""
    several = [(command, action) for command, action in flags_of(parser()) if action.nargs == "+"]
    forgetful = {
        (command, *a.option_strings)
        for command, a in several
        if a.option_strings and type(a).__name__ not in ("_AppendAction", "_ExtendAction")
    }
    # Its default would stay in front of what is given.
    assert forgetful == {("cpt tokenizer report", "--sizes")}
    given = ["adapt", "--base", "b", "--workdir", "w", "--new", "zh=a", "--new", "py=b", "--replay", "en=c", "d=e"]
    arguments = parser().parse_args([*given, "--chat", "zh", "--chat", "en"])
    assert arguments.new == [("zh", "a"), ("py", "b")]
    assert arguments.replay == [("en", "c"), ("d", "e")]
    assert arguments.chat == ["zh", "en"]
    assert parser().parse_args(given).chat == []
