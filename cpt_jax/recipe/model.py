"""The model of a run: the base's weights as read from its files, with what each stage trained laid over them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from cpt_jax.adapt import Expand, Method, expanded_hf_config
from cpt_jax.checkpoint.hf import load
from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray, Slices, rows_of
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import Network, abstract_decoder, initial_weights
from cpt_jax.models.kernels.choice import AttentionChoice, Work, kernel_for
from cpt_jax.models.layer_groups import join_layers, split_layers, with_copies
from cpt_jax.models.linear import LoRAConfig, merge_lora, with_magnitudes
from cpt_jax.models.remat import Remat
from cpt_jax.models.vocab_table import BASE_ROWS, NEW_ROWS, TABLES
from cpt_jax.sharding import hardware
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder's weights on the host, in the files' types (what was trained: float32), and what it takes to run and
    save them."""

    config: DecoderConfig
    weights: Tree
    hf_config: dict
    lora: LoRAConfig | None = None

    @property
    def network(self) -> Network:
        return abstract_decoder(self.config, self.lora)

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in flatten(self.weights).values())

    def overlaid(self, trained: Tree) -> "Model":
        """This model with the trained leaves in the place of its own."""
        return dataclasses.replace(self, weights=unflatten(flatten(self.weights) | flatten(trained)))

    def merged(self) -> "Model":
        """This model as it is exported: its adapters added into the kernels, its layers one stack."""
        groups = self.config.layer_groups
        if self.lora is None and not groups:
            return self
        weights = self.weights if self.lora is None else merge_lora(self.weights, self.lora)
        config = dataclasses.replace(self.config, layer_groups=())
        return dataclasses.replace(self, config=config, weights=join_layers(weights, groups), lora=None)

    def interpolated(self, base: "Model", share: float) -> "Model":
        """(1 - share) * this + share * base in every weight that the base has, adapters merged; new rows stay."""
        merged = self.merged()
        if merged.config.num_layers != base.config.num_layers:
            raise UserError("interpolate_base needs a base with as many layers: give 0 after a stage that adds blocks")
        old, mixed = flatten(base.weights), flatten(merged.weights)
        for path, leaf in mixed.items():
            if path not in NEW_ROWS:
                mixed[path] = _between(leaf, old[path], share)
        return dataclasses.replace(merged, weights=unflatten(mixed))

    def rounded(self, dtype: Any) -> "Model":
        """This model with its weights rounded to a file's type."""
        flat = {path: _rounded(leaf, dtype) for path, leaf in flatten(self.weights).items()}
        return dataclasses.replace(self, weights=unflatten(flat))

    def adapted(self, method: Method, seed: int | None) -> "Model":
        """This model as a stage with `method` begins: earlier adapters merged, new ones attached, which change
        nothing yet. Without a seed they are zeros, for what was trained to be laid over them."""
        model, lora = self.merged(), method.lora_config()
        config, weights, hf_config = method.layout(model.config), model.weights, model.hf_config
        if isinstance(method, Expand):
            weights = with_copies(weights, model.config, method.order(model.config.num_layers))
            hf_config = expanded_hf_config(hf_config, config)
        weights = split_layers(weights, config)
        if lora is not None:
            network = abstract_decoder(config, lora)
            if seed is None:
                factors = {p: np.zeros(x.shape, x.dtype) for p, x in flatten(network.shapes).items() if _is_factor(p)}
            else:
                drawn = initial_weights(network, jax.random.key(seed), _is_factor)
                factors = flatten(jax.tree.map(np.asarray, drawn))
            weights = with_magnitudes(unflatten(flatten(weights) | factors), lora)
        return dataclasses.replace(model, config=config, weights=weights, hf_config=hf_config, lora=lora)

    def for_training(
        self, backend: str, remat: Remat | None = None, layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    ) -> "Model":
        """This model as it is compiled for training.

        Args:
          remat: what the backward pass recomputes.
          layer_loop: "auto" compiles layers one by one on CPUs and GPUs, on TPUs as a loop.
        """
        loop = layer_loop if layer_loop != "auto" else "scan" if backend == "tpu" else "unroll"
        return dataclasses.replace(self, config=dataclasses.replace(self.config, layer_loop=loop, remat=remat))

    def looped(self) -> "Model":
        """This model compiled as a loop over its layers, which is quickly done, for rows of any kind."""
        config = dataclasses.replace(self.config, layer_loop="scan", remat=None, documents=None, attention="auto")
        return dataclasses.replace(self, config=config)

    def attending(
        self, asked: AttentionChoice, length: int, dtype: Any, documents: int | None = None, context: int = 1
    ) -> "Model":
        """This model with the attention kernel that is asked for, or for "auto" the best for rows of `length` tokens, of
        at most so many documents, cut into `context` parts.

        Raises:
          UserError: the kernel cannot do it.
        """
        config = self.config
        work = Work(
            backend=hardware.backend(),
            capability=hardware.compute_capability(),
            length=length,
            head_dim=max(max(config.heads_of(kind)[:2]) for kind in config.layer_kinds),
            windows=tuple(kind.window for kind in config.layer_kinds),
            softcap=config.attention_softcap,
            dtype=dtype,
            context=context,
            sinks=config.attention_sinks,
        )
        return dataclasses.replace(
            self, config=dataclasses.replace(config, attention=kernel_for(asked, work), documents=documents)
        )

    def padded(self, multiple: int) -> "Model":
        """This model with each vocabulary table padded with zeros to a multiple of so many rows."""
        config = dataclasses.replace(self.config, row_multiple=multiple)
        flat = flatten(self.weights)
        for path, leaf in flat.items():
            if path in BASE_ROWS + NEW_ROWS:
                rows = config.table_rows[path.split("/")[1]]
                flat[path] = rows_of(leaf, 0, rows, config.padded(rows))
        return dataclasses.replace(self, config=config, weights=unflatten(flat))

    def on_mesh(self, precision: Precision, mesh: Mesh) -> Tree:
        """The weights as arrays of the computation's types, each leaf where the rules put it."""
        flat, where = flatten(self.weights), flatten(shardings(self.network.logical_axes, self.network.shapes, mesh))
        return unflatten({path: place(leaf, precision.dtype_of(path), where[path]) for path, leaf in flat.items()})

    def on_device(self, precision: Precision) -> Tree:
        """The weights as arrays of the computation's types, on the first device."""
        flat, device = flatten(self.weights), SingleDeviceSharding(jax.local_devices()[0])
        return unflatten({path: place(leaf, precision.dtype_of(path), device) for path, leaf in flat.items()})


def _between(leaf: Any, base: Any, share: float) -> LazyArray:
    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        old, new = (np.asarray(each[slices], np.float32) for each in (base, leaf))
        return (np.float32(1 - share) * new + np.float32(share) * old).astype(dtype, copy=False)

    return LazyArray(leaf.shape, np.float32, read)


def _is_factor(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def _rounded(leaf: Any, dtype: Any) -> LazyArray:
    def read(slices: Slices, wanted: np.dtype) -> np.ndarray:
        return np.asarray(leaf[slices]).astype(dtype, copy=False).astype(wanted, copy=False)

    return LazyArray(leaf.shape, dtype, read)


def load_model(directory: Path, base_rows: int | None = None) -> Model:
    """Reads a HF directory; rows of the vocabulary from `base_rows` on become the new rows' own leaf."""
    config, weights, hf_config = load(directory)
    if base_rows is not None and base_rows < config.vocab_size:
        flat = flatten(weights)
        for table in TABLES:
            if (whole := flat.pop(f"{table}/base", None)) is not None:
                new_rows = config.vocab_size - base_rows
                flat[f"{table}/base"] = rows_of(whole, 0, base_rows, base_rows)
                flat[f"{table}/new"] = rows_of(whole, base_rows, config.vocab_size, new_rows)
        weights = unflatten(flat)
        config = dataclasses.replace(config, vocab_size=base_rows, new_rows=config.vocab_size - base_rows)
    return Model(config=config, weights=weights, hf_config=hf_config)
