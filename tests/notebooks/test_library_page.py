"""docs/library.md is a program that does what it says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from inputs import chinese, english, write_jsonl

from cpt_jax.cli import main
from cpt_jax.core.tree import combine
from cpt_jax.recipe.model import load_model
from cpt_jax.training.retention import Held

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


@pytest.fixture(scope="module")
def program(tiny_model, tmp_path_factory):
    """What the page's blocks leave behind, run one after the other on a tiny model, and what they print."""
    place, shown = tmp_path_factory.mktemp("library"), []
    texts = {"zh": chinese(200), "en": english(150)}
    corpora = [f"{name}={write_jsonl(place / f'{name}.jsonl', found)}" for name, found in texts.items()]
    main(["data", "prepare", "--tokenizer", str(tiny_model), "--input", *corpora, "--out", str(place / "data")])
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    sizes = f"MODEL, DATA, STEPS, ROWS, LENGTH = {str(tiny_model)!r}, 'data', 20, 8, 64"
    code, changed = re.subn(r"^MODEL, .*$", sizes, code, flags=re.MULTILINE)
    assert changed == 1
    names = {"__name__": "library", "print": lambda *values: shown.append(values)}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        exec(compile(code, str(PAGE), "exec"), names)
    return names, shown, place / "result"


def test_it_trains_and_what_it_saves_is_the_average(program):
    names, shown, result = program
    base = shown[0]
    losses = [line for line in shown if line[0] in (10, 20)]
    assert [line[0] for line in losses] == [10, 20, 10, 20]
    last, average = (line[0] for line in shown[4:6])
    assert last[1] < average[1] < base[0][1]
    saved = load_model(result)
    again = names["scored"](saved.network, saved.on_mesh(names["precision"], names["mesh"]))
    np.testing.assert_allclose(again, average, atol=2e-3)


def test_its_loss_learns_from_the_tokens_furthest_above_the_reference(program):
    names, _, _ = program
    model, base, reference = names["model"], names["base"], names["base_weights"]
    weights = combine(names["state"].trainable, names["frozen"])
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(8, 65), dtype=np.int32)
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (8, 64))
    # The last eight of each row are not to be learnt.
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "domains": positions % 2}
    rows |= {"segment_ids": np.ones_like(positions), "weights": (positions < 56).astype(np.float32)}
    batch = jax.tree.map(jax.numpy.asarray, rows)
    held = Held(np.float32(0), {}, reference)
    with jax.set_mesh(names["mesh"]):
        total, metrics = jax.jit(names["selective"])(weights, batch, jax.random.key(0), held)
        nats = jax.jit(names["nats"], static_argnums=0)
        after, before = nats(model.network, weights, batch), nats(base.network, reference, batch)
    learnt = np.asarray(batch["weights"]) > 0
    excess, costs = np.asarray(after - before)[learnt], np.asarray(after)[learnt]
    kept = np.argsort(-excess)[: round(0.6 * len(excess))]
    assert abs(float(metrics["tokens"].sum()) - len(kept)) <= 1
    assert float(total) == pytest.approx(costs[kept].sum(), rel=1e-2)
