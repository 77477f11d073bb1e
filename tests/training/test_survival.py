"""Killed at random instants, and moved from mesh to mesh: the same end, and the same documents in the same order.
`benchmarks.survival` does it for longer."""

import random
from collections import Counter

import pytest

from benchmarks.survival import Fire, Place, kill_often, largest_difference, move_often
from cpt_jax.data.packing import OPEN_ROWS

STEPS = 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [(["--domains", 2], 3), (["--domains", 1, "--packing", "none"], 2)],
    ids=["mixed, packed", "neither"],
)
def test_sigkill_at_random_instants_changes_no_bit(tmp_path, options, kills):
    options = [*options, "--steps", STEPS]
    whole, killed = Fire(tmp_path / "whole", options), Fire(tmp_path / "killed", options)
    whole.run(Place())
    met = kill_often(killed, kills, random.Random(1), 0.3)
    assert sum(met.values()) == kills
    killed.run(Place())
    assert killed.losses() == whole.losses()
    assert killed.weights() == whole.weights()
    assert killed.ledger() == whole.ledger()


@pytest.mark.slow
def test_over_changes_of_mesh_and_processes_the_documents_keep_their_order(tmp_path):
    places = [Place(1, 8, "fsdp=4,tensor=2"), Place(2, 1, "fsdp=2"), Place(1, 2, "tensor=2")]
    whole, moved = Fire(tmp_path / "whole", ["--steps", 60]), Fire(tmp_path / "moved", ["--steps", 60])
    whole.run(Place())
    move_often(moved, places, 12, random.Random(2))
    assert moved.ledger() == whole.ledger()
    assert len(moved.losses()) == 60
    assert largest_difference(moved.losses(), whole.losses()) < 1e-5
    assert exactly_once_an_epoch(moved.ledger())


def exactly_once_an_epoch(ledger) -> bool:
    """Rows are packed in groups that are emptied before the next begins: behind each, all pieces of a domain were used
    equally often, but for those that the epoch has not come to, which were once less."""
    rows = [row for step in ledger for row in step]
    for end in range(OPEN_ROWS, len(rows) + 1, OPEN_ROWS):
        for domain in (0, 1):
            counts = Counter(piece for row in rows[:end] for number, piece in row if number == domain)
            every = {piece for row in rows for number, piece in row if number == domain}
            if max(counts.values()) - min(counts[piece] for piece in every) > 1:
                return False
    return max(counts.values()) > 1
