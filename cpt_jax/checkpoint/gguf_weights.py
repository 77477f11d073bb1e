"""The tensors of a GGUF file as safetensors: renamed, dequantised and written piece by piece.

Names are those of llama.cpp (gguf-py/gguf/constants.py) and of transformers' modeling_llama.py, modeling_qwen2.py and
modeling_qwen3.py.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cpt_jax.core.errors import UserError

# Values that are dequantised at a time: 64 MiB in float32.
CHUNK_VALUES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What transformers calls a GGUF architecture, and where its tensors differ from the others'.

    `permuted`: llama.cpp reorders the rows of Q and K; `qkv_bias`: Q, K and V have a bias; `qk_norm`: heads of Q and K
    are normalised.
    """

    model_type: str
    class_name: str
    permuted: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", class_name="LlamaForCausalLM", permuted=True),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", qk_norm=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a GGUF file under its Hugging Face name; `heads`: how many the rows belong to, where they are
    permuted."""

    name: str
    shape: tuple[int, ...]
    source: Any
    heads: int | None = None

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Whole rows one after the other, dequantised, some `CHUNK_VALUES` at a time."""
        from gguf import GGMLQuantizationType as Kind
        from gguf.quants import dequantize

        data, kind = np.atleast_2d(self.source.data), self.source.tensor_type
        unit = self.shape[0] // self.heads if self.heads else 1
        rows = max(1, CHUNK_VALUES // (self.shape[-1] * unit)) * unit
        for start in range(0, len(data), rows):
            piece = data[start : start + rows]
            if kind == Kind.BF16 and dtype == ml_dtypes.bfloat16:
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


def permuted_heads(name: str, config: dict, architecture: Architecture) -> int | None:
    """How many heads the rows of a tensor of GGUF belong to, where they are permuted."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return heads.get(name.split(".")[-2]) if architecture.permuted else None


def places_of(config: dict, architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> Hugging Face name and shape, for every tensor of the model."""
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    block: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (width,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (query, width)),
        "attn_k.weight": ("self_attn.k_proj.weight", (key, width)),
        "attn_v.weight": ("self_attn.v_proj.weight", (key, width)),
        "attn_output.weight": ("self_attn.o_proj.weight", (width, query)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (width,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": ("mlp.down_proj.weight", (width, inner)),
    }
    if architecture.qkv_bias:
        for name, size in {"q": query, "k": key, "v": key}.items():
            block[f"attn_{name}.bias"] = (f"self_attn.{name}_proj.bias", (size,))
    if architecture.qk_norm:
        for name in ("q", "k"):
            block[f"attn_{name}_norm.weight"] = (f"self_attn.{name}_norm.weight", (head_dim,))
    names = {
        f"blk.{layer}.{name}": (f"model.layers.{layer}.{ours}", shape)
        for layer in range(config["num_hidden_layers"])
        for name, (ours, shape) in block.items()
    }
    names["token_embd.weight"] = ("model.embed_tokens.weight", (config["vocab_size"], width))
    names["output_norm.weight"] = ("model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        names["output.weight"] = ("lm_head.weight", (config["vocab_size"], width))
    return names


def weights_of(config: dict, architecture: Architecture, tensors: dict[str, Any]) -> list[Weight]:
    """The file's tensors in its order, checked against what the model has."""
    expected = places_of(config, architecture)
    weights = []
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name not in expected:
            raise UserError(
                f"the GGUF file holds a tensor {name!r} that a {config['model_type']} model does not have: use the model's Hugging Face directory instead"
            )
        ours, shape = expected[name]
        if (given := tuple(int(size) for size in reversed(tensor.shape))) != shape:
            raise UserError(
                f"the GGUF file's {name} has shape {list(given)}, its metadata ask for {list(shape)}: fetch it again"
            )
        _refuse_unknown_quantisation(tensor)
        weights.append(Weight(name=ours, shape=shape, source=tensor, heads=permuted_heads(name, config, architecture)))
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(
            f"the GGUF file lacks {len(missing)} tensors, {missing[0]!r} first: it is not a whole {config['model_type']} model"
        )
    return weights


def _refuse_unknown_quantisation(tensor: Any) -> None:
    from gguf.quants import dequantize

    try:
        dequantize(np.atleast_2d(tensor.data)[:1], tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"the GGUF file's {tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be dequantised: use a Q4_K_M, Q8_0 or F16 file"
        ) from error


def weight_dtype(weights: Sequence[Weight]) -> np.dtype:
    """The dtype to write: that of all matrices, when they have one and the vectors, which llama.cpp always writes in
    float32, fit into it exactly; else float32."""
    kinds = {weight.source.tensor_type.name for weight in weights if len(weight.shape) > 1}
    if kinds not in ({"F16"}, {"BF16"}):
        return np.dtype(np.float32)
    dtype = np.dtype(np.float16 if kinds == {"F16"} else ml_dtypes.bfloat16)
    for weight in weights:
        if len(weight.shape) == 1:
            (exact,) = weight.pieces(np.dtype(np.float32))
            with np.errstate(over="ignore"):
                if not np.array_equal(exact.astype(dtype).astype(np.float32), exact):
                    return np.dtype(np.float32)
    return dtype
