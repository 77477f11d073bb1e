"""A second vocabulary table, of which the layers have inputs (Gemma 4 E2B): it grows and trains with the first."""

import json
import shutil

import jax
import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from method_inputs import TOKENS, forward
from row_inputs import NEW, TEXTS
from safetensors.numpy import load_file, save_file

from cpt_jax.adapt import Embeddings, Full, LoRA
from cpt_jax.checkpoint.hf_write import TOKENIZER_FILES, save
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.tree import flatten, partition
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.model import load_model
from cpt_jax.recipe.rows import Growth, grow_model
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.program import Settings
from cpt_jax.training.step import Controls
from cpt_jax.vocab.init_rows import Distilled, Focus, Mean, Random, SubwordMean

TABLES = {"embed": "model.embed_tokens.weight", "layer_embed": "model.embed_tokens_per_layer.weight"}
UNREAD = "model.layers.5.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def base(grown, tmp_path_factory):
    """A tiny E2B as released: with keys of layers that take those of others."""
    directory = tmp_path_factory.mktemp("small")
    raw = config_json("gemma4_text", "inputs of layers, shared keys, double width")
    reference_model(raw | dict(vocab_size=320, vocab_size_per_layer_input=320), directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {UNREAD: np.ones((16, 32), np.float32)}, directory / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (grown[0] / name).exists():
            shutil.copyfile(grown[0] / name, directory / name)
    return directory


def trained_two_steps(model, method):
    """The model after two steps on new and old tokens."""
    trainable, frozen = partition(model.on_device(FLOAT32), method.trains)
    program = Settings(
        network=model.network,
        trains=frozenset(flatten(trainable)),
        names=("text",),
        optimizer=AdamW(learning_rate=1e-2, weight_decay=0.1),
        compute="float32",
        mesh=make_mesh(jax.devices()[:1]),
    ).program()
    tokens = np.random.default_rng(0).integers(300, 320 + NEW, (2, 33), dtype=np.int32)
    places = np.broadcast_to(np.arange(32, dtype=np.int32), (2, 32))
    batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], positions=places, segment_ids=np.ones_like(places))
    batch |= dict(domains=np.zeros_like(places), weights=np.ones((2, 32), np.float32))
    state = program.begin(trainable)
    for _ in range(2):
        state, _ = program.step(state, frozen, {}, batch, Controls(np.float32(1e-2)))
    return model.overlaid(jax.tree.map(np.asarray, state.trainable))


def test_it_grows_trains_and_goes_back_with_the_first(base, grown, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    grow_model(base, grown[1], SubwordMean(), 0, tmp_path / "grown")
    method = LoRA(rank=2, alpha=4.0)
    model = load_model(tmp_path / "grown", 320).adapted(method, 0)
    moved = trained_two_steps(model, method)
    for path, leaf in flatten(model.weights).items():
        same = np.array_equal(np.asarray(leaf), np.asarray(flatten(moved.weights)[path]))
        assert same == (not method.trains(path)), path
    for path in ("embed/new", "layer_embed/new"):
        assert (np.asarray(flatten(moved.weights)[path]) != np.asarray(flatten(model.weights)[path])).any(1).any()

    merged = moved.merged()
    save(tmp_path / "out", merged.config, merged.weights, merged.hf_config, grown[1], origin=base)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["vocab_size"] == written["vocab_size_per_layer_input"] == 320 + NEW
    before, after = (load_file(each / "model.safetensors") for each in (base, tmp_path / "out"))
    for name in (*TABLES.values(), UNREAD):
        np.testing.assert_array_equal(after[name][: len(before[name])], before[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = np.where(TOKENS > 40, TOKENS + 310, TOKENS)
    assert tokens.max() < 320 + NEW
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(moved, tokens=tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (Embeddings(), {"new"}),
        (Embeddings(rows="all"), {"base", "new"}),
        (LoRA(), {"new"}),
        (LoRA(new_rows=False), set()),
        (Full(), {"base", "new"}),
    ],
    ids=["new-rows", "all-rows", "lora", "lora-alone", "full"],
)
def test_what_trains_rows_trains_those_of_both(method, parts):
    for table in TABLES:
        assert {part for part in ("base", "new") if method.trains(f"{table}/{part}")} == parts
    # It belongs to the input, not to the head.
    assert Embeddings(tables="input").trains("layer_embed/new")
    assert not Embeddings(tables="output").trains("layer_embed/new")


def test_it_has_its_own_rows_of_every_kind(base, grown):
    growth = Growth(base, grown[1], texts=lambda: TEXTS)
    old = {table: load_file(base / "model.safetensors")[name] for table, name in TABLES.items()}
    rows = growth.rows(SubwordMean())
    assert {name: found.shape for name, found in rows.items()} == {"embed": (NEW, 32), "layer_embed": (NEW, 36)}
    for name, found in rows.items():
        for row, ids in zip(found, growth.pieces, strict=True):
            np.testing.assert_allclose(row, old[name][list(ids)].mean(0), rtol=1e-5, atol=1e-6)
    fitted = Distilled(steps=1, batch_size=1, sequence_length=32)
    for kind in (Mean(), Random(), Focus(width=20), fitted):
        found = growth.rows(kind)
        assert found.keys() == rows.keys()
        for name, each in found.items():
            assert each.shape == rows[name].shape
            assert np.isfinite(each).all()
    np.testing.assert_allclose(growth.rows(Mean())["layer_embed"][5], old["layer_embed"].mean(0), atol=1e-5)
