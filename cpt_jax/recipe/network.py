"""The model of a run: the base's weights as read from its files, with what each stage trained laid over them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.adapt import Method
from cpt_jax.checkpoint.hf import load
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import combine, flatten, partition, unflatten
from cpt_jax.models.decoder import DecoderConfig, Network, abstract_decoder
from cpt_jax.models.linear import LoRAConfig, merge_lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder's weights on the host, float32 or as in the file, and what is needed to run and to save them."""

    config: DecoderConfig
    weights: dict
    hf_config: dict
    lora: LoRAConfig | None = None

    @property
    def network(self) -> Network:
        return abstract_decoder(self.config, self.lora)

    def overlaid(self, trained: dict, lora: LoRAConfig | None) -> "Model":
        """This model with the trained leaves in the place of its own (and the adapters, which it had not, added)."""
        flat = flatten(self.weights) | flatten(trained)
        return dataclasses.replace(self, weights=unflatten(flat), lora=lora or self.lora)

    def merged(self) -> "Model":
        """This model with its adapters added into the kernels."""
        if self.lora is None:
            return self
        return dataclasses.replace(self, weights=merge_lora(self.weights, self.lora), lora=None)

    def on_device(self, precision: Precision) -> dict:
        """The weights as arrays of the compute dtype (vectors stay float32)."""
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), precision.dtype_of(leaf)), self.weights)


def load_model(directory: Path, base_rows: int | None = None) -> Model:
    """Reads a HF directory; rows of the vocabulary from `base_rows` on become the new rows' own leaf."""
    config, weights, hf_config = load(directory)
    if base_rows is not None and base_rows < config.vocab_size:
        flat = flatten(weights)
        for table in ("embed", "head"):
            if f"{table}/base" in flat:
                whole = flat[f"{table}/base"]
                flat[f"{table}/base"], flat[f"{table}/new"] = whole[:base_rows], whole[base_rows:]
        weights = unflatten(flat)
        config = dataclasses.replace(config, vocab_size=base_rows, new_rows=config.vocab_size - base_rows)
    return Model(config=config, weights=weights, hf_config=hf_config)


def begin_stage(model: Model, method: Method, seed: int) -> tuple[Model, dict, dict]:
    """The model with the stage's adapters attached, and its weights split into (trainable float32, frozen)."""
    lora = method.lora_config()
    if model.lora is not None and model.lora != lora:
        model = model.merged()
    if lora is not None and model.lora is None:
        from cpt_jax.models.linear import initial_adapters

        adapters = initial_adapters(abstract_decoder(model.config, lora), jax.random.key(seed))
        model = model.overlaid(adapters, lora)
    trainable, frozen = partition(model.weights, method.trains)
    return model, trainable, frozen


__all__ = ["Model", "begin_stage", "combine", "load_model"]
