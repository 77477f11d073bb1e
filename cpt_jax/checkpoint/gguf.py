"""A GGUF file as a Hugging Face model directory: dequantised, without torch.

Follows the GGUF specification (ggml-org/ggml, docs/gguf.md); the `gguf` package reads and dequantises.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.checkpoint.gguf_architectures import ARCHITECTURES, Architecture
from cpt_jax.checkpoint.gguf_tokenizer import special_ids, write_tokenizer
from cpt_jax.checkpoint.gguf_weights import counterparts, weight_dtype, weights_of
from cpt_jax.checkpoint.safetensors_write import write_weights
from cpt_jax.core.errors import UserError, nearest
from cpt_jax.core.storage import atomic_directory, write_json_atomic
from cpt_jax.models.families import family_for

SHARD_BYTES = 2_000_000_000
# The released values of Llama 3.1 and 3.3, and of 3.2: the file holds only what they come to.
LLAMA3_SCALINGS = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)
# What of "rope.scaling." transformers calls how, by type.
SCALINGS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
}


class Metadata(dict[str, Any]):
    """The key-value pairs of a GGUF file.

    Raises:
      UserError: a pair is asked for that is not there.
    """

    def __missing__(self, key: str) -> Any:
        raise UserError(f"the GGUF file lacks {key!r}: convert the model again with a newer llama.cpp")

    def of_architecture(self, name: str, default: Any = None) -> Any:
        """The value of "ARCHITECTURE.name"; it has to be there when there is no default."""
        key = f"{self['general.architecture']}.{name}"
        value = self[key] if default is None else self.get(key, default)
        if isinstance(value, list):
            raise UserError(
                f"the GGUF file's {key!r} differs from layer to layer, which is not supported: use a model whose layers are alike"
            )
        return value


def import_gguf(file: Path, out: Path, *, weights: bool = True) -> None:
    """Writes `out/` with config.json, weights (if they are wanted) as safetensors, the tokenizer's files and
    generation_config.json.

    Weights are float32; those of a file that is float16 or bfloat16 throughout stay so. One piece of one tensor is in
    memory at a time.

    Raises:
      UserError: no whole GGUF file, an architecture, a tensor, a quantisation, scaled RoPE or a tokenizer that is not
      supported, or a full disk.
    """
    metadata, tensors = read_gguf(Path(file))
    config = model_config(metadata, tensors)
    family, architecture = family_for(config), ARCHITECTURES[metadata["general.architecture"]]
    decoder = family.config_from_hf(config)
    expected = counterparts(decoder, family.weight_names(decoder), architecture)
    found = weights_of(expected, config["model_type"], tensors)
    dtype = weight_dtype(found)
    with atomic_directory(Path(out)) as directory:
        if weights:
            write_weights(directory, [(weight, dtype) for weight in found], SHARD_BYTES)
        write_json_atomic(directory / "config.json", config | {"dtype": dtype.name})
        write_tokenizer(metadata, config["max_position_embeddings"], directory)
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        end, turn = config["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")
        # What ends a turn, where that is not what ends a text.
        if turn not in (None, end) and turn < len(metadata["tokenizer.ggml.tokens"]):
            generation["eos_token_id"] = turn if end is None else [end, turn]
        write_json_atomic(directory / "generation_config.json", generation)


def read_gguf(file: Path) -> tuple[Metadata, dict[str, Any]]:
    """The key-value pairs, and the tensors by name, their values still on disk."""
    from gguf import GGUFEndian, GGUFReader

    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        reader = GGUFReader(file)
        metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UserError(
                f"{file} holds a quantisation that this gguf package does not know ({error}): upgrade it, or use a Q4_K_M, Q8_0 or F16 file"
            ) from error
        raise UserError(f"{file} is no whole GGUF file ({error}): fetch it again") from error
    if reader.endianess == GGUFEndian.BIG:
        raise UserError(f"{file} is big-endian: run `gguf-convert-endian {file.name} little` first")
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"{file} is one of {metadata['split.count']} parts: join them with `llama-gguf-split --merge` first"
        )
    if (architecture := str(metadata["general.architecture"])) not in ARCHITECTURES:
        raise UserError(
            f"{file} is of architecture {nearest(architecture, ARCHITECTURES)}; supported: {', '.join(ARCHITECTURES)}"
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def model_config(metadata: Metadata, tensors: dict[str, Any]) -> dict:
    """config.json as transformers has it, but for the dtype."""
    architecture, given = ARCHITECTURES[metadata["general.architecture"]], metadata.of_architecture
    if (experts := given("expert_count", 0)) and "num_experts" not in architecture.fields:
        raise UserError(f"the GGUF file is a mixture of {experts} experts, which is not supported: use a dense model")
    heads, width = given("attention.head_count"), given("embedding_length")
    head_dim = given("attention.key_length", given("rope.dimension_count", width // heads))
    ids = special_ids(metadata)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": width,
        "intermediate_size": given("feed_forward_length"),
        "num_hidden_layers": given("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": given("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": given("context_length"),
        "rms_norm_eps": _decimal(given("attention.layer_norm_rms_epsilon")),
        **_rope(metadata, head_dim, tensors.get("rope_freqs.weight")),
        "hidden_act": architecture.activation,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }
    config |= {**architecture.fixed, **_fields(metadata, architecture), **_windows(metadata, architecture)}
    if architecture.wide_layers is not None:
        wide = config["num_hidden_layers"] == architecture.wide_layers
        config["query_pre_attn_scalar"] = width // heads if wide else head_dim
    return config


def _decimal(value: Any) -> Any:
    """What was meant by a float32: the shortest number that it is the nearest to."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _fields(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """What only some architectures say; what a file does not say has transformers' default."""
    prefix = f"{metadata['general.architecture']}."
    given = {name: metadata.get(prefix + key) for name, key in architecture.fields.items()}
    return {name: _decimal(value) for name, value in given.items() if value is not None}


def _windows(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """Which layers see a window only."""
    given, model_type = metadata.of_architecture, architecture.model_type
    window = given("attention.sliding_window", architecture.window)
    if (every := architecture.full_every) is not None:
        # The one key whose value may be a list.
        every = metadata.get(f"{metadata['general.architecture']}.attention.sliding_window_pattern", every)
        layers = range(given("block_count"))
        windowed = every if isinstance(every, list) else [bool((layer + 1) % every) for layer in layers]
        kinds = ["sliding_attention" if window and each else "full_attention" for each in windowed]
        return {"layer_types": kinds} | ({"sliding_window": window} if window else {})
    if not window:
        return {}
    if model_type == "llama":
        # What Llama with a window is called in transformers.
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if "use_sliding_window" in architecture.fixed:
        return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    raise UserError(
        f"the GGUF file has a sliding window of {window}, which is not supported for {metadata['general.architecture']}: use the model's Hugging Face directory instead"
    )


def _rope(metadata: Metadata, head_dim: int, freqs: Any) -> dict:
    """rope_theta and, where positions are scaled, rope_scaling; `freqs`: the tensor rope_freqs.weight or None."""
    given = metadata.of_architecture
    if (rotated := given("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(f"the GGUF file rotates {rotated} of {head_dim} dimensions of a head, which is not supported")
    theta = float(given("rope.freq_base", 10_000.0))
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    factor = scaling.setdefault("factor", given("rope.scale_linear", 1.0))
    scaling.pop("finetuned", None)
    # llama.cpp takes a factor without a type for "linear".
    kind = scaling.pop("type", "linear")
    if kind == "linear":
        scaling.pop("original_context_length", None)
    if freqs is not None:
        return {"rope_theta": theta, "rope_scaling": _llama3_scaling(freqs, theta, head_dim)}
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_theta": theta}
    if unknown := [kind] if kind not in SCALINGS else sorted(scaling.keys() - SCALINGS[kind]):
        raise UserError(
            f"the GGUF file scales RoPE by {unknown[0]!r}, which is not supported; supported: {', '.join(SCALINGS)}, and rope_freqs of Llama 3. Use the model's Hugging Face directory instead"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind} | {SCALINGS[kind][k]: v for k, v in scaling.items()},
    }


def _llama3_scaling(freqs: Any, theta: float, head_dim: int) -> dict:
    """The settings of Llama 3's scaled RoPE that give the divisors of frequencies which the file holds.

    As in transformers' modeling_rope_utils: frequencies are kept, divided by the factor, or in between.
    """
    from gguf.quants import dequantize

    divisors = dequantize(freqs.data, freqs.tensor_type)
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    for scaling in LLAMA3_SCALINGS:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - kept) / scaling["factor"] + kept)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3):
            return dict(scaling)
    raise UserError(
        f"the GGUF file's rope_freqs.weight ({divisors.min():g} to {divisors.max():g}) is not that of Llama 3.1, 3.2 or 3.3: use the model's Hugging Face directory instead"
    )
