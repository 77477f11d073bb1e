"""Where a run's wall time went, over restarts."""

import json

import pytest

from cpt_jax.report.goodput import CAUSES, goodput, goodput_section

EVENTS = [
    {"at": 102, "event": "run", "started": 100},
    {"at": 103, "event": "begin", "station": "evaluate-base-last"},
    {"at": 107, "event": "done", "station": "evaluate-base-last"},
    {"at": 107, "event": "begin", "station": "stage-lora"},
    {"at": 110, "event": "training", "station": "stage-lora", "first": 1, "lost_seconds": 0, "compile_seconds": 0},
    # Killed at 140 after four steps, of which two were saved; started again at 200.
    {"at": 203, "event": "run", "started": 200},
    {"at": 203, "event": "begin", "station": "stage-lora"},
    {"at": 205, "event": "training", "station": "stage-lora", "first": 3, "lost_seconds": 8, "compile_seconds": 0},
    {"at": 226, "event": "trained", "station": "stage-lora", "checkpoint_seconds": 1},
    {"at": 226, "event": "done", "station": "stage-lora"},
    {"at": 226, "event": "begin", "station": "export"},
    {"at": 230, "event": "done", "station": "export"},
]
STEPS = [
    {"compute_seconds": 3, "compile_seconds": 6, "data_seconds": 0, "checkpoint_seconds": 0},
    {"compute_seconds": 4, "compile_seconds": 0, "data_seconds": 1, "checkpoint_seconds": 2},
    {"compute_seconds": 3, "compile_seconds": 7, "data_seconds": 0, "checkpoint_seconds": 0},
    {"compute_seconds": 4, "compile_seconds": 0, "data_seconds": 6, "checkpoint_seconds": 0},
]


def test_every_second_has_a_cause(tmp_path):
    lines = [*map(json.dumps, EVENTS), '{"at": 231, "eve']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    metrics = tmp_path / "stages" / "1-lora" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    seconds = goodput(tmp_path)
    assert list(seconds) == list(CAUSES)
    assert sum(seconds.values()) == pytest.approx(230 - 100)
    rest = seconds.pop("not running, or cut off")
    assert seconds == {
        "training": 14,
        "start": 3 + 3 + 3 + 2,
        "compilation": 13,
        "data": 7,
        "checkpoints": 3,
        "evaluation": 4,
        "vocabulary, preparation, export": 4,
        "steps computed again": 8,
    }
    assert rest == pytest.approx(130 - 14 - 11 - 13 - 7 - 3 - 4 - 4 - 8)
    section = goodput_section(tmp_path)
    assert "Goodput: 11% of 2 min 10 s trained" in section
    assert all(cause in section for cause in CAUSES)


def test_a_run_that_goes_on_in_another_group_counts_no_second_twice(tmp_path):
    """Runs that are trained together are grouped anew when the first of them has ended."""
    training = {"event": "training", "station": "stage-lora", "lost_seconds": 0, "compile_seconds": 0}
    events = [
        EVENTS[0],
        {"at": 102, "event": "begin", "station": "stage-lora"},
        {"at": 105, **training},
        {"at": 125, "event": "trained", "station": "stage-lora", "checkpoint_seconds": 0},
        {"at": 127, **training},
        {"at": 137, "event": "trained", "station": "stage-lora", "checkpoint_seconds": 0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert goodput(tmp_path)["start"] == 2 + 3 + 2


def test_a_line_that_a_full_disk_has_cut_off_is_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    metrics = tmp_path / "stages" / "1-lora" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps(STEPS[0]) + "\n" + json.dumps(STEPS[1])[:20])
    assert goodput(tmp_path)["training"] == 3


def test_a_start_that_finds_all_done_is_not_the_run_s(tmp_path):
    lines = [*map(json.dumps, EVENTS)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    before = goodput(tmp_path)
    # Days later: `cpt export`, and the same command again.
    later = [{"at": 200_003, "event": "run", "started": 200_000}, {"at": 300_003, "event": "run", "started": 300_000}]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, *map(json.dumps, later)]) + "\n")
    assert goodput(tmp_path) == before


def test_without_events_there_is_no_section(tmp_path):
    assert goodput_section(tmp_path) == ""
