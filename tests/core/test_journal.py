"""A run's events, as they are left by a process that was cut off."""

from cpt_jax.core.journal import Journal
from cpt_jax.core.storage import read_objects


def test_an_event_that_was_cut_off_takes_no_later_one_with_it(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.write("run", started=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"at": 2, "event": "beg')
    journal.write("done", station="tokenizer")
    journal.write("done", station="base")
    found = read_objects(tmp_path / "events.jsonl")
    assert [(event["event"], event.get("station")) for event in found] == [
        ("run", None),
        ("done", "tokenizer"),
        ("done", "base"),
    ]
