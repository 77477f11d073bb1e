"""A run's report: of the recipe's own stages and domains, of what was exported, and with every sample."""

import json
import math

import pytest

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.report.plots import _smooth
from cpt_jax.report.run_report import write_report
from cpt_jax.report.samples_page import Sample, read_samples, samples_page

STEP = {"step": 1, "nats/zh": 2.0, "learning_rate": 1e-3, "seconds": 1.0}


@pytest.fixture
def run(tmp_path):
    """Of a recipe that had another stage first, and another domain."""

    def domain(name, role):
        return {"corpus": {"name": name}, "role": role}

    config = {
        "kind": "Recipe",
        "name": "a run",
        "base": "hub/base",
        "domains": [domain("zh", "new"), domain("en", "replay")],
        "stages": [{"name": "lora"}],
        "export": {"interpolate_base": 0.0},
    }
    values = {"base": (2.0, 1.0), "lora": (1.25, 1.1), "export": (1.5, 1.05)}
    entries = [
        {"stage": stage, "weights": "last", "domain": name, "bits_per_byte": value, "bytes": 100}
        for stage, row in values.items()
        for name, value in zip(("zh", "en"), row, strict=True)
    ]
    for stage, tokens in (("1-lora", 111), ("1-rows", 222), ("2-lora", 333)):
        (tmp_path / "stages" / stage).mkdir(parents=True)
        (tmp_path / "stages" / stage / "metrics.jsonl").write_text(json.dumps(STEP | {"tokens": tokens}) + "\n")
    (tmp_path / "stages" / "2-lora" / "ended.json").write_text(json.dumps({"step": 1, "why": "an old watch"}))
    for name in ("zh", "old"):
        (tmp_path / "data" / name).mkdir(parents=True)
        manifest = {"name": f"text of {name}", "records": 1, "bytes": 1, "tokens": 1, "skipped": {}}
        (tmp_path / "data" / name / "manifest.json").write_text(json.dumps(manifest))

    def write(*, mixed: float = 0.0) -> None:
        shown = [entry for entry in entries if mixed or entry["stage"] != "export"]
        (tmp_path / "config.json").write_text(json.dumps(config | {"export": {"interpolate_base": mixed}}))
        (tmp_path / "eval.json").write_text(json.dumps(shown))

    write()
    return tmp_path, write


def test_what_an_earlier_recipe_left_is_not_told(run):
    path, _ = run
    page = write_report(path).read_text()
    assert "<td>111</td>" in page
    for old in ("<td>222</td>", "<td>333</td>", "rows", "an old watch", "text of old"):
        assert old not in page
    assert "text of zh" in page


def test_the_answer_is_of_what_was_exported(run):
    path, write = run
    assert "from 2.000 to <b>1.250" in write_report(path).read_text()
    write(mixed=0.5)
    assert "from 2.000 to <b>1.500" in write_report(path).read_text()


def test_samples_come_back_whatever_they_hold(run):
    texts = ["# Title\n\n## Part\nof it", "```text\ncode\n```", "a ```` b\n````\n\n**after**", "", "line\r\n<b>"]
    samples = [Sample(text, text + " before\n", text + " after") for text in texts]
    read = read_samples(samples_page(samples))
    assert [(before, after) for _, before, after in read] == [(before, after) for _, before, after in samples]
    assert read[0].prompt == "# Title ## Part of it"
    path, _ = run
    (path / "samples.md").write_text(samples_page(samples))
    assert write_report(path).read_text().count("<span class=note>after</span>") == len(texts)


def test_a_model_that_has_diverged_has_a_report_too(run):
    path, _ = run
    (path / "stages/1-lora").mkdir(exist_ok=True)
    steps = [{"nats/zh": 2.0}, {"nats/zh": None, "loss": None, "gradient_norm": None}, {"nats/zh": 2.0}]
    lines = [STEP | {"step": number, "tokens": 1} | each for number, each in enumerate(steps, 1)]
    (path / "stages/1-lora/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watched = {"step": 3, "tokens": 3, "bits_per_byte": {"en": None}, "action": None}
    (path / "stages/1-lora/watch.jsonl").write_text(json.dumps(watched) + "\n")
    entries = json.loads((path / "eval.json").read_text())
    for entry in entries:
        if entry["stage"] == "lora":
            entry["bits_per_byte"] = {"zh": math.nan, "en": math.inf}[entry["domain"]]
    write_json_atomic(path / "eval.json", entries)
    page = write_report(path).read_text()
    assert "from 2.000 to <b>nan bits per byte" in page
    assert "nothing was forgotten" not in page
    assert "2.000 ★" in page
    assert "What it forgot on the way" in page


def test_a_step_that_is_no_number_is_no_part_of_the_running_mean():
    assert _smooth([math.nan, 2.0, math.nan, 4.0], span=3)[1:] == [2.0, 2.0, 3.0]
