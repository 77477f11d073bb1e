"""Killed at random instants, and moved from mesh to mesh: the same end, and the same documents in the same order.
`benchmarks.survival` does it for longer."""

import random
from collections import Counter

import pytest
from commands import without_torch

from benchmarks.under_fire import Fire, Place, kill_often, largest_difference, move_often
from cpt_jax.data.packing import OPEN_ROWS

STEPS = 120
# A run that is killed saves often, to be killed early; one that is not need not save.
OFTEN, RARELY = (["--checkpoint-seconds", seconds] for seconds in (0.05, 1e9))
# Of what is drawn, one of the first two kills is inside a write.
SEED = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Programs that were compiled are kept beside a run: all have them in common."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", without_torch())
        yield tmp_path_factory.mktemp("fire")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [(["--domains", 2], 3), (["--domains", 1, "--packing", "none"], 2)],
    ids=["mixed, packed", "neither"],
)
def test_sigkill_at_random_instants_changes_no_bit(place, options, kills):
    name, options = f"{kills}-kills", [*options, "--steps", STEPS]
    whole, killed = Fire(place / f"{name}-whole", [*options, *RARELY]), Fire(place / name, [*options, *OFTEN])
    whole.run(Place())
    met = kill_often(killed, kills, random.Random(SEED), 0.3)
    assert sum(met.values()) == kills
    assert killed.begun()[-1] > 1, "it is to go on from a checkpoint"
    Fire(killed.directory, [*options, *RARELY]).run(Place())
    assert killed.losses() == whole.losses()
    assert killed.weights() == whole.weights()
    assert killed.ledger() == whole.ledger()


@pytest.mark.slow
def test_over_changes_of_mesh_and_processes_the_documents_keep_their_order(place):
    places = [Place(1, 4, "fsdp=2,tensor=2"), Place(2, 1, "fsdp=2"), Place(1, 2, "tensor=2")]
    whole, moved = Fire(place / "whole", ["--steps", 60, *RARELY]), Fire(place / "moved", ["--steps", 60])
    whole.run(Place())
    move_often(moved, places, 12, random.Random(2))
    assert moved.ledger() == whole.ledger()
    assert len(moved.losses()) == 60
    assert largest_difference(moved.losses(), whole.losses()) < 1e-5
    assert exactly_once_an_epoch(moved.ledger())


def exactly_once_an_epoch(ledger) -> bool:
    """At any time all pieces of a domain were used equally often, but for those that the epoch has not come to, which
    were once less, and those of the rows that are packed together, which come in another order."""
    rows = [row for step in ledger for row in step]
    most = {}
    for end in range(OPEN_ROWS, len(rows) + 1, OPEN_ROWS):
        for domain in (0, 1):
            counts = Counter(piece for row in rows[:end] for number, piece in row if number == domain)
            every = {piece for row in rows for number, piece in row if number == domain}
            most[domain] = max(counts.values())
            # Of one epoch and the next there are two numbers; a group at a border may hold a third.
            numbers = sorted(counts[piece] for piece in every)
            if most[domain] - numbers[0] > 2 or sum(number < most[domain] - 1 for number in numbers) > 4 * OPEN_ROWS:
                return False
    # The larger domain is in its second epoch at least.
    return most[0] > 1
