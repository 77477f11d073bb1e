"""The way out: a Hugging Face directory whose logits are those of the trained model, and samples."""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from cpt_jax.checkpoint.hf_write import save
from cpt_jax.checkpoint.peft import load_adapter, save_adapter
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32, FLOAT64, Precision
from cpt_jax.core.progress import say
from cpt_jax.models.decoder import apply, logits
from cpt_jax.models.generate import generate
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.recipe.recipe import Export, Samples
from cpt_jax.vocab.tokenizer import Tokenizer

GATE = 1e-4
GATE_TOKENS = 128


def text_logits(
    model: Model, texts: Sequence[Sequence[int]], precision: Precision = FLOAT64
) -> list[Float[np.ndarray, "tokens V"]]:
    """Logits of each text's tokens, each position from those before it; the weights are read once.

    In float64 they show a difference of weights alone. In float32, transformers' own logits of SmolLM2 are up to
    8e-5 away from its float64 ones.
    """
    network = model.network

    @jax.jit
    def run(weights, inputs):
        positions = jnp.arange(inputs.shape[1])[None]
        hidden = apply(network, weights, inputs, positions, jnp.ones_like(inputs), compute_dtype=precision.compute)
        return logits(network, weights, hidden, compute_dtype=precision.compute)

    with jax.enable_x64(precision == FLOAT64):
        weights = model.on_device(precision)
        return [np.asarray(run(weights, jnp.asarray([list(tokens)], jnp.int32)))[0] for tokens in texts]


def export_model(
    model: Model, tokenizer: Path, texts: Sequence[str], out: Path, export: Export, *, origin: Path
) -> float:
    """Writes the model, adapters merged, and reloads it: refused (nothing is left) unless its logits on `texts` are
    the trained model's.

    Args:
      origin: the base; what the text model does not train goes along (see `save`).

    Returns:
      The largest absolute difference of a logit.
    """
    say(f"export: writing {out}")
    pending, dtype = out.with_name(out.name + ".unchecked"), numpy_type(export.dtype)
    merged = model.merged().rounded(dtype)
    save(
        pending,
        merged.config,
        merged.weights,
        model.hf_config,
        tokenizer,
        origin=origin,
        dtype=dtype,
        shard_bytes=int(export.shard_gb * 1e9),
    )
    difference, tokens = logit_difference(merged, load_model(pending), Tokenizer(tokenizer), texts)
    _let_out(pending, out, difference)
    say(f"export: logits of the reloaded model differ by at most {difference:.2g} on {tokens} tokens of held-out text")
    return difference


def export_adapter(
    model: Model,
    base: Model,
    trained: Iterable[str],
    base_place: str,
    tokenizer: Path,
    texts: Sequence[str],
    out: Path,
) -> float:
    """Writes what the last stage trained as a PEFT adapter over the extended base, and reloads it, as `export_model`.

    Args:
      model: with its adapters.
      base: the extended base; `base_place`: where PEFT finds it, a directory or a hub id.
      trained: the paths at which the two differ.
    """
    say(f"export: writing {out}")
    pending = out.with_name(out.name + ".unchecked")
    held = save_adapter(
        pending,
        model.config,
        model.weights,
        model.hf_config,
        model.lora,
        base=base_place,
        trained=trained,
        tokenizer_directory=tokenizer,
    )
    adapter = load_adapter(pending, base.config, base.hf_config)
    reloaded = dataclasses.replace(base, weights=adapter.over(base.config, base.weights), lora=adapter.lora)
    difference, tokens = logit_difference(model.merged(), reloaded, Tokenizer(tokenizer), texts)
    _let_out(pending, out, difference)
    tables = "".join(f"; of {table} {'the new rows' if kind == 'rows' else 'all rows'}" for table, kind in held.items())
    say(
        f"export: an adapter over {base_place}{tables}; logits differ by at most {difference:.2g} on {tokens} tokens of held-out text"
    )
    return difference


def numpy_type(name: str) -> np.dtype:
    """Of an exported weight, by its name in `Export`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _let_out(pending: Path, out: Path, difference: float) -> None:
    if not difference < GATE:
        shutil.rmtree(pending)
        raise UserError(
            f"export refused: its logits differ from the trained model's by {difference:.2g}, more than {GATE:g}"
        )
    # There is one where a run was killed between this and the note that the station is done.
    shutil.rmtree(out, ignore_errors=True)
    pending.replace(out)


def logit_difference(first: Model, second: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[float, int]:
    """(largest absolute difference of a logit, tokens compared), in float64, of the beginnings of texts."""
    checked = [[tokenizer.start_id, *tokenizer.encode(text)][:GATE_TOKENS] for text in texts]
    pairs = zip(text_logits(first, checked), text_logits(second, checked), strict=True)
    return float(max(np.abs(mine - other).max() for mine, other in pairs)), sum(map(len, checked))


def sample_page(model: Model, tokenizer: Tokenizer, samples: Samples) -> list[str]:
    """Each prompt with its greedy continuation."""
    merged = model.merged().looped()
    weights = merged.on_device(FLOAT32)
    prompts = [[tokenizer.start_id, *written.ids] for written in tokenizer.encode_marked(list(samples.prompts))]
    produced = generate(merged.network, weights, prompts, new_tokens=samples.new_tokens, end_ids=(tokenizer.end_id,))
    return [tokenizer.decode(ids[1:] + new) for ids, new in zip(prompts, produced, strict=True)]
