"""The tensors of a GGUF file as safetensors: renamed, dequantised and written piece by piece.

Names are those of llama.cpp (gguf-py/gguf/constants.py), by our own paths, which each family has for its tensors.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cpt_jax.checkpoint.gguf_architectures import Architecture
from cpt_jax.checkpoint.hf import tensor_shapes
from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import Names, Place

# Values that are dequantised at a time: 64 MiB in float32.
CHUNK_VALUES = 1 << 24
# Our paths -> llama.cpp's names.
_PARTS = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_out_norm": "post_ffw_norm",
    "attention/q": "attn_q",
    "attention/k": "attn_k",
    "attention/v": "attn_v",
    "attention/o": "attn_output",
    "attention/q_norm": "attn_q_norm",
    "attention/k_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "mlp/router": "ffn_gate_inp",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counterpart:
    """What a tensor of a GGUF file is here: `place` is ours, of the first expert where it stacks them; `names` are
    Hugging Face's, one for each expert. `shape`: of each. `heads`: how many its rows belong to, where they are
    permuted. `offset`: what llama.cpp stores on top, the 1 of norms of 1 + scale."""

    place: Place
    names: list[str]
    shape: tuple[int, ...]
    heads: int | None
    offset: float

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The GGUF tensor's own."""
        return (len(self.names), *self.shape) if len(self.place.index) > 1 else self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of Hugging Face's, and where the file has its values."""

    name: str
    shape: tuple[int, ...]
    data: np.ndarray
    kind: Any
    heads: int | None
    offset: float

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Whole rows one after the other, dequantised, some `CHUNK_VALUES` at a time."""
        from gguf import GGMLQuantizationType as Kind
        from gguf.quants import dequantize

        data, kind = np.atleast_2d(self.data), self.kind
        unit = self.shape[0] // self.heads if self.heads else 1
        rows = max(1, CHUNK_VALUES // (self.shape[-1] * unit)) * unit
        for start in range(0, len(data), rows):
            piece = data[start : start + rows]
            if self.offset:
                piece = (dequantize(piece, kind) - np.float32(self.offset)).astype(dtype)
            elif kind == Kind.BF16 and dtype == ml_dtypes.bfloat16:
                piece = piece.view(dtype)
            elif not (kind == Kind.F16 and dtype == np.float16):
                piece = dequantize(piece, kind).astype(dtype, copy=False)
            yield unpermute(piece, len(piece) // unit) if self.heads else piece


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of Q and K rows [heads * head_dim, D], which rotates neighbouring pairs instead
    of halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows [heads * head_dim, D]."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def counterparts(config: DecoderConfig, names: Names, architecture: Architecture) -> dict[str, Counterpart]:
    """Of every tensor of the model, by its GGUF name; `names`: the family's, expert by expert."""
    heads = {"layers/attention/q/kernel": config.num_heads, "layers/attention/k/kernel": config.num_kv_heads}
    shapes, found = tensor_shapes(config, names), dict[str, Counterpart]()
    for ours, (place,) in names.items():
        if (name := _gguf_name(place)) in found:
            found[name].names.append(ours)
            continue
        found[name] = Counterpart(
            place=place,
            names=[ours],
            shape=shapes[ours],
            heads=heads.get(place.path) if architecture.permuted else None,
            offset=config.norm_offset if place.path.endswith("norm/scale") else 0.0,
        )
    return found


def _gguf_name(place: Place) -> str:
    part = place.path.removeprefix("layers/")
    for end in ("/kernel", "/bias", "/scale"):
        part = part.removesuffix(end)
    layer = f"blk.{place.index[0]}." if place.index else ""
    experts = "_exps" if len(place.index) > 1 else ""
    return f"{layer}{_PARTS[part]}{experts}.{'bias' if place.path.endswith('/bias') else 'weight'}"


def weights_of(expected: dict[str, Counterpart], model_type: str, tensors: dict[str, Any]) -> list[Weight]:
    """The file's tensors in its order, checked against what the model has."""
    weights = []
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name not in expected:
            raise UserError(
                f"the GGUF file holds a tensor {name!r} that a {model_type} model does not have: use the model's Hugging Face directory instead"
            )
        found, data = expected[name], tensor.data
        if (given := tuple(int(size) for size in reversed(tensor.shape))) != found.stacked_shape:
            raise UserError(
                f"the GGUF file's {name} has shape {list(given)}, its metadata ask for {list(found.stacked_shape)}: fetch it again"
            )
        _refuse_unknown_quantisation(tensor)
        for ours, part in zip(found.names, data if len(found.place.index) > 1 else [data], strict=True):
            weights.append(
                Weight(
                    name=ours,
                    shape=found.shape,
                    data=part,
                    kind=tensor.tensor_type,
                    heads=found.heads,
                    offset=found.offset,
                )
            )
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(
            f"the GGUF file lacks {len(missing)} tensors, {missing[0]!r} first: it is not a whole {model_type} model"
        )
    return weights


def _refuse_unknown_quantisation(tensor: Any) -> None:
    from gguf.quants import dequantize

    try:
        dequantize(np.atleast_2d(tensor.data)[..., :1, :], tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"the GGUF file's {tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be dequantised: use a Q4_K_M, Q8_0 or F16 file"
        ) from error


def weight_dtype(weights: Sequence[Weight]) -> np.dtype:
    """The dtype to write: that of all matrices, when they have one and what llama.cpp always writes in float32 (vectors
    and routers) fits into it exactly; else float32."""
    kinds = {weight.kind.name for weight in weights if len(weight.shape) > 1} - {"F32"}
    if kinds not in ({"F16"}, {"BF16"}):
        return np.dtype(np.float32)
    dtype = np.dtype(np.float16 if kinds == {"F16"} else ml_dtypes.bfloat16)
    for weight in weights:
        if weight.kind.name not in kinds:
            for exact in weight.pieces(np.dtype(np.float32)):
                with np.errstate(over="ignore"):
                    if not np.array_equal(exact.astype(dtype).astype(np.float32), exact):
                        return np.dtype(np.float32)
    return dtype
