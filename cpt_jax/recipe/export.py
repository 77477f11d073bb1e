"""The way out: a Hugging Face directory whose logits are those of the trained model, and samples."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.checkpoint.hf import save
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import say
from cpt_jax.models.decoder import apply, logits
from cpt_jax.models.generate import generate
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.recipe.recipe import Samples
from cpt_jax.vocab.tokenizer import Tokenizer

GATE = 1e-4
GATE_TOKENS = 128
FLOAT32, FLOAT64 = Precision(compute="float32"), Precision(compute="float64")


def text_logits(model: Model, tokens: Sequence[int], precision: Precision = FLOAT64) -> np.ndarray:
    """Logits [tokens, vocabulary], each position from those before it.

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
        return np.asarray(run(model.on_device(precision), jnp.asarray([list(tokens)], jnp.int32)))[0]


def export_model(model: Model, tokenizer: Path, texts: Sequence[str], out: Path) -> float:
    """Writes the model, adapters merged, and reloads it: refused (nothing is left) unless its logits on `texts` are
    the trained model's.

    Returns:
      The largest absolute difference of a logit.
    """
    say(f"export: writing {out}")
    reader = Tokenizer(tokenizer)
    checked = [[reader.start_id, *reader.encode(text)][:GATE_TOKENS] for text in texts]
    pending = out.with_name(out.name + ".unchecked")
    merged = model.merged()
    save(pending, merged.config, merged.weights, model.hf_config, tokenizer)
    reloaded = load_model(pending)
    difference = max(float(np.abs(text_logits(model, ids) - text_logits(reloaded, ids)).max()) for ids in checked)
    if not difference < GATE:
        raise UserError(
            f"export refused: its logits differ from the trained model's by {difference:.2g}, more than {GATE:g} (left in {pending})"
        )
    pending.replace(out)
    say(
        f"export: logits of the reloaded model differ by at most {difference:.2g} on {sum(map(len, checked))} tokens of held-out text"
    )
    return difference


def sample_page(model: Model, tokenizer: Tokenizer, samples: Samples) -> list[str]:
    """Each prompt with its greedy continuation."""
    merged = model.merged().unrolled(False)
    weights = merged.on_device(FLOAT32)
    texts = []
    for prompt in samples.prompts:
        ids = [tokenizer.start_id, *tokenizer.encode(prompt)]
        produced = generate(merged.network, weights, ids, new_tokens=samples.new_tokens, end_ids=(tokenizer.end_id,))
        texts.append(tokenizer.decode(ids[1:] + produced))
    return texts
