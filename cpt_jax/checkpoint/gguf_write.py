"""A Hugging Face model directory as a GGUF file, for llama.cpp, Ollama and LM Studio.

The architectures and tokenizers are those that `gguf` reads. llama.cpp's own converter knows a byte-level tokenizer by how it
splits a sample text, so that it refuses each extended one; here it is known by its pre-tokenizer.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cpt_jax.checkpoint.gguf import SCALINGS, model_config, read_gguf
from cpt_jax.checkpoint.gguf_tokenizer import write_tokenizer
from cpt_jax.checkpoint.gguf_tokenizer_write import refuse_other_tokens, tokenizer_pairs
from cpt_jax.checkpoint.gguf_weights import ARCHITECTURES, Architecture, permute, permuted_heads, places_of
from cpt_jax.checkpoint.hf import read_config, tensors_of, widest
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError, nearest
from cpt_jax.core.place import Place
from cpt_jax.core.progress import progress
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import family_for
from cpt_jax.models.rope import Linear, Llama3, Yarn
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
    hf_config, tokenizer = read_config(directory), Tokenizer(directory)
    architecture, config = _architecture(hf_config)
    files = tensors_of(directory)
    pairs = _model_pairs(config, architecture) | tokenizer_pairs(tokenizer, config.vocab_size)
    fields, known = _fields(config), ARCHITECTURES[architecture]
    if missing := [name for name, _ in places_of(fields, known).values() if name not in files]:
        raise UserError(f"{directory} lacks {len(missing)} tensors, {missing[0]!r} first: give a whole model directory")
    with Place(out.parent).written(out.name) as partial:
        with contextlib.closing(GGUFWriter(partial, architecture)) as writer:
            writer.add_name(out.stem)
            for key, value in pairs.items():
                _add(writer, key, value)
            _write_tensors(writer, kind or _kind_of(files), files, fields, known, _divisors(config))
        _check(partial, config, tokenizer)


def _write_tensors(
    writer: GGUFWriter,
    kind: Kind,
    files: Mapping[str, SafetensorsFile],
    fields: dict[str, Any],
    known: Architecture,
    divisors: np.ndarray | None,
) -> None:
    """The header, which announces all tensors, and these one by one."""
    places = places_of(fields, known)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kinds: dict[str, Kind] = {name: _stored_as(kind, shape) for name, (_, shape) in places.items()}
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for name, (_, shape) in places.items():
        _announce(writer, name, shape, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    with progress("GGUF: written", len(places), "tensors") as shown:
        for name, (ours, _) in places.items():
            values = files[ours].read(ours)
            if (heads := permuted_heads(name, fields, known)) is not None:
                values = permute(values, heads)
            writer.write_tensor_data(_stored(values, kinds[name], ours))
            shown.advance()


def _architecture(hf_config: dict) -> tuple[str, DecoderConfig]:
    model_type = str(hf_config.get("model_type"))
    if model_type not in _WRITTEN:
        raise UserError(
            f"a model of type {nearest(model_type, _WRITTEN)} cannot be written as GGUF; those that can: {', '.join(_WRITTEN)}. "
            "llama.cpp's convert_hf_to_gguf.py knows others"
        )
    architecture, config = _WRITTEN[model_type], family_for(hf_config).config_from_hf(hf_config)
    known = ARCHITECTURES[architecture]
    if config.attention_out_bias or config.mlp_bias or config.qkv_bias != known.qkv_bias or config.activation != "silu":
        raise UserError(
            f"config.json has biases or an activation that a {architecture} of llama.cpp's does not have: use convert_hf_to_gguf.py"
        )
    if len(config.layer_kinds) > 1:
        raise UserError("config.json has layers with a window and layers without, which GGUF cannot say of this model")
    return architecture, config


def _kind_of(files: Mapping[str, SafetensorsFile]) -> Kind:
    kinds: dict[np.dtype, Kind] = {np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
    return kinds.get(widest(file.tensors[name].dtype for name, file in files.items()), "f32")


def _fields(config: DecoderConfig) -> dict[str, Any]:
    """What `places_of` has to know, as transformers calls it."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _model_pairs(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    (kind,) = config.layer_kinds
    assert kind.rope is not None
    pairs: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": kind.rope.dim,
        "rope.freq_base": float(kind.rope.theta),
    }
    if kind.window is not None:
        pairs["attention.sliding_window"] = kind.window
    match kind.rope.scaling:
        case None | Llama3():
            scaling = {}
        case Linear(factor=factor):
            scaling = {"type": "linear", "factor": float(factor)}
        case Yarn() as yarn:
            named = {
                "factor": float(yarn.factor),
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": float(yarn.beta_fast),
                "beta_slow": float(yarn.beta_slow),
            }
            scaling = {"type": "yarn"} | {theirs: named[ours] for theirs, ours in SCALINGS["yarn"].items()}
        case other:
            raise UserError(
                f"rope_scaling of type {type(other).__name__} cannot be written as GGUF: llama.cpp has none"
            )
    pairs |= {f"rope.scaling.{name}": value for name, value in scaling.items()}
    return {f"{architecture}.{name}": value for name, value in pairs.items()}


def _divisors(config: DecoderConfig) -> np.ndarray | None:
    """What Llama 3 divides its frequencies by [head_dim / 2], which llama.cpp has as a tensor."""
    rope = config.layer_kinds[0].rope
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


def _stored_as(kind: Kind, shape: tuple[int, ...]) -> Kind:
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


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
    again = family_for(read).config_from_hf(read)
    if again != config:
        differing = [name for name in vars(config) if getattr(again, name) != getattr(config, name)]
        raise UserError(
            f"GGUF cannot say this model's {differing[0]} ({getattr(config, differing[0])}; it reads as "
            f"{getattr(again, differing[0])}): use llama.cpp's convert_hf_to_gguf.py"
        )
    with tempfile.TemporaryDirectory(prefix="cpt-") as directory:
        write_tokenizer(metadata, config.max_position_embeddings, Path(directory))
        refuse_other_tokens(tokenizer, Tokenizer(Path(directory)))
