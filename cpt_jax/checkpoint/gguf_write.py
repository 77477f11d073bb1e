"""A Hugging Face model directory as a GGUF file, for llama.cpp, Ollama and LM Studio.

The architectures and tokenizers are those that `gguf` reads. llama.cpp's own converter knows a byte-level tokenizer by how it
splits a sample text, so that it refuses each extended one; here it is known by its pre-tokenizer.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cpt_jax.checkpoint.gguf import SCALINGS, model_config, read_gguf
from cpt_jax.checkpoint.gguf_architectures import ARCHITECTURES
from cpt_jax.checkpoint.gguf_tokenizer import write_tokenizer
from cpt_jax.checkpoint.gguf_tokenizer_write import refuse_other_tokens, tokenizer_pairs
from cpt_jax.checkpoint.gguf_weights import Counterpart, counterparts, permute
from cpt_jax.checkpoint.hf import load, widest
from cpt_jax.core.errors import UserError, nearest
from cpt_jax.core.lazy import LazyArray
from cpt_jax.core.place import Place
from cpt_jax.core.progress import progress, say
from cpt_jax.core.transpose import transposed
from cpt_jax.core.tree import flatten
from cpt_jax.models.config import DecoderConfig, LayerKind
from cpt_jax.models.families import FAMILIES, family_for
from cpt_jax.models.families.composite import PREFIXES, text_type
from cpt_jax.models.families.schema import read_whole
from cpt_jax.models.rope import Linear, Llama3, Scaling, Yarn
from cpt_jax.models.vocab_table import TABLES
from cpt_jax.vocab.tokenizer import Tokenizer

# How matrices are stored; vectors are float32, as in llama.cpp.
Kind = Literal["f32", "f16", "bf16", "q8_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# model_type in transformers -> GGUF architecture.
_WRITTEN = {each.model_type: name for name, each in ARCHITECTURES.items()} | {"mistral": "llama"}
# llama.cpp's number for a file that is mostly of a kind (llama.h, llama_ftype).
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def export_gguf(directory: Path, out: Path, kind: Kind | None = None) -> None:
    """Writes the model and its tokenizer to `out`, which gets its name when all of it was read back: the config and the
    tokens of every piece are those of the directory, or it is refused. One tensor is in memory at a time.

    Args:
      kind: None: as the files have them. Rows that are no multiple of 32 are float16 where the others are q8_0.

    Raises:
      UserError: a model or a tokenizer that GGUF, or this version, does not know; weights beyond float16; a full disk.
    """
    config, tree, hf_config = load(directory)
    architecture = _architecture(hf_config, config)
    tokenizer, known = Tokenizer(directory), ARCHITECTURES[architecture]
    window = config.layer_kinds[0].window
    if known.full_every is None and window is not None and window < config.max_position_embeddings:
        say(
            f"GGUF: llama.cpp has no window in a {architecture}: of a text of more than {window:,} tokens it sees all, where this model sees the last {window:,}"
        )
    pairs = _model_pairs(config, read_whole(hf_config).get_text_config(), architecture)
    pairs |= tokenizer_pairs(tokenizer, config.vocab_size)
    tensors = counterparts(config, FAMILIES[_text_type(hf_config)].weight_names(config), known)
    weights: dict[str, LazyArray] = flatten(tree)
    with Place(out.parent).written(out.name) as partial:
        with contextlib.closing(GGUFWriter(partial, architecture)) as writer:
            writer.add_name(out.stem)
            for key, value in pairs.items():
                _add(writer, key, value)
            _write_tensors(writer, kind or _kind_of(weights), tensors, weights, _divisors(config))
        _check(partial, config, tokenizer)


def _write_tensors(
    writer: GGUFWriter,
    kind: Kind,
    tensors: Mapping[str, Counterpart],
    weights: Mapping[str, LazyArray],
    divisors: np.ndarray | None,
) -> None:
    """The header, which announces all tensors, and these one by one."""
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kinds: dict[str, Kind] = {name: _stored_as(kind, name, tensor) for name, tensor in tensors.items()}
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for name, tensor in tensors.items():
        _announce(writer, name, tensor.stacked_shape, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    with progress("GGUF: written", len(tensors), "tensors") as shown:
        for name, tensor in tensors.items():
            writer.write_tensor_data(_stored(_values(tensor, weights), kinds[name], tensor.names[0]))
            shown.advance()


def _values(tensor: Counterpart, weights: Mapping[str, LazyArray]) -> np.ndarray:
    """A tensor as GGUF has it, in the type of the model's files; with an offset, float32."""
    place = tensor.place
    leaf = weights[f"{place.path}/base" if place.path in TABLES else place.path]
    layer = place.index[:1]
    indices = [(*layer, expert) for expert in range(len(tensor.names))] if len(place.index) > 1 else [layer]
    parts = [leaf[index] if index else np.asarray(leaf) for index in indices]
    if tensor.offset:
        parts = [part.astype(np.float32) + np.float32(tensor.offset) for part in parts]
    if place.transposed:
        parts = [transposed(part) for part in parts]
    if tensor.heads is not None:
        parts = [permute(part, tensor.heads) for part in parts]
    return np.stack(parts).reshape(tensor.stacked_shape)


def _text_type(hf_config: dict) -> str:
    """The family of the model, or of the text model of one that also sees."""
    model_type = str(hf_config.get("model_type"))
    return text_type(hf_config) if model_type in PREFIXES else model_type


def _architecture(hf_config: dict, config: DecoderConfig) -> str:
    model_type = _text_type(hf_config)
    if model_type not in _WRITTEN:
        raise UserError(
            f"a model of type {nearest(model_type, _WRITTEN)} cannot be written as GGUF; those that can: {', '.join(_WRITTEN)}. "
            "llama.cpp's convert_hf_to_gguf.py knows others"
        )
    architecture = _WRITTEN[model_type]
    known = ARCHITECTURES[architecture]
    biased = config.attention_out_bias or config.mlp_bias or config.qkv_bias != known.qkv_bias
    if biased or config.activation != known.activation:
        raise UserError(
            f"config.json has biases or an activation that a {architecture} of llama.cpp's does not have: use convert_hf_to_gguf.py"
        )
    if known.tied not in (None, config.tie_word_embeddings):
        raise UserError(
            f"config.json has tie_word_embeddings={config.tie_word_embeddings}, which a {architecture} of llama.cpp's cannot have"
        )
    if architecture == "olmo2" and config.head_dim * config.num_heads != config.hidden_size:
        raise UserError(
            f"config.json has {config.num_heads} heads of {config.head_dim} numbers, which a {architecture} of llama.cpp's "
            f"with hidden_size {config.hidden_size} cannot have"
        )
    if len({kind.window for kind in config.layer_kinds}) > 1 and known.full_every is None:
        raise UserError("config.json has layers with a window and layers without, which GGUF cannot say of this model")
    return architecture


def _kind_of(weights: Mapping[str, LazyArray]) -> Kind:
    kinds: dict[np.dtype, Kind] = {np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
    return kinds.get(widest(leaf.dtype for leaf in weights.values()), "f32")


def _main_kind(config: DecoderConfig) -> LayerKind:
    """Of the layers that rotate, those that see all, if there are any: what GGUF says of the whole model's rotation."""
    return min((kind for kind in config.layer_kinds if kind.rope is not None), key=lambda kind: kind.window is not None)


def _model_pairs(config: DecoderConfig, hf: Any, architecture: str) -> dict[str, Any]:
    """What GGUF says of a model; `hf`: its config as transformers reads it."""
    known, kind = ARCHITECTURES[architecture], _main_kind(config)
    assert kind.rope is not None
    pairs: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": hf.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": kind.rope.dim,
        "rope.freq_base": float(kind.rope.theta),
    }
    if (windowed := next((each for each in config.layer_kinds if each.window is not None), None)) is not None:
        pairs["attention.sliding_window"] = windowed.window
        if (every := known.full_every) is not None:
            pattern = [each.window is not None for each in config.kind_of_layer]
            if pattern != [bool((layer + 1) % every) for layer in range(config.num_layers)]:
                pairs["attention.sliding_window_pattern"] = pattern
    if windowed is not None and windowed.rope is not None and "rope_local_base_freq" in known.fields:
        pairs["rope.freq_base_swa"] = float(windowed.rope.theta)
    given = {key: getattr(hf, name, None) for name, key in known.fields.items()}
    # llama.cpp takes no whole number where it reads others.
    pairs |= {k: value if k.startswith("expert") else float(value) for k, value in given.items() if value is not None}
    scaling = _scaling(kind.rope.scaling, architecture)
    pairs |= {f"rope.scaling.{name}": value for name, value in scaling.items()}
    return {f"{architecture}.{name}": value for name, value in pairs.items()}


def _scaling(scaling: Scaling | None, architecture: str) -> dict[str, Any]:
    """What of "rope.scaling." says how positions are stretched."""
    match scaling:
        case None:
            return {}
        case Llama3() if ARCHITECTURES[architecture].rope_freqs:
            return {}
        case Linear(factor=factor):
            return {"type": "linear", "factor": float(factor)}
        case Yarn() as yarn:
            named = {
                "factor": float(yarn.factor),
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": float(yarn.beta_fast),
                "beta_slow": float(yarn.beta_slow),
            }
            return {"type": "yarn"} | {theirs: named[ours] for theirs, ours in SCALINGS["yarn"].items()}
        case other:
            raise UserError(
                f"rope_scaling of type {type(other).__name__} cannot be written as GGUF: a {architecture} of llama.cpp's has none"
            )


def _divisors(config: DecoderConfig) -> np.ndarray | None:
    """What Llama 3 divides its frequencies by [head_dim / 2], which llama.cpp has as a tensor."""
    rope = _main_kind(config).rope
    if rope is None or not isinstance(rope.scaling, Llama3):
        return None
    plain = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    return (plain / rope.frequencies()).astype(np.float32)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _stored_as(kind: Kind, name: str, tensor: Counterpart) -> Kind:
    # llama.cpp's converter leaves routers in float32 too.
    if len(tensor.shape) == 1 or "ffn_gate_inp" in name:
        return "f32"
    return "f16" if kind == "q8_0" and tensor.shape[-1] % 32 else kind


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    raw = GGMLQuantizationType[kind.upper()]
    values, size = GGML_QUANT_SIZES[raw]
    in_bytes = (*shape[:-1], shape[-1] // values * size)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw)


def _stored(values: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """Bytes [..., of a row], uint8."""
    if kind == "q8_0":
        return quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType.Q8_0)
    dtype = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[kind]
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype)
    if kind == "f16" and not np.isfinite(stored).all():
        raise UserError(f"{name} holds {np.abs(values).max():g}, beyond float16: give --type bf16, or f32")
    return stored.view(np.uint8)


def _check(file: Path, config: DecoderConfig, tokenizer: Tokenizer) -> None:
    """What is read back is what was meant."""
    metadata, tensors = read_gguf(file)
    read = model_config(metadata, tensors)
    meant, found = _said(config), _said(family_for(read).config_from_hf(read))
    if differing := [name for name in meant if found[name] != meant[name]]:
        name = differing[0]
        raise UserError(
            f"GGUF cannot say this model's {name} ({getattr(config, name)}; it reads as {found[name]}): "
            "use llama.cpp's convert_hf_to_gguf.py"
        )
    with tempfile.TemporaryDirectory(prefix="cpt-") as directory:
        write_tokenizer(metadata, config.max_position_embeddings, Path(directory))
        refuse_other_tokens(tokenizer, Tokenizer(Path(directory)))


def _said(config: DecoderConfig) -> dict[str, Any]:
    """What GGUF can say of a configuration: numbers in float32, nothing that only training looks at."""
    said = {name: np.float32(value) if isinstance(value, float) else value for name, value in vars(config).items()}
    if config.experts is not None:
        said["experts"] = dataclasses.replace(config.experts, balance_coefficient=0.0)
    return said
