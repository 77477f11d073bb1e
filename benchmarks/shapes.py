"""The models that speed is measured on, as HF directories."""

from pathlib import Path

import numpy as np

GGUF = Path(".cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf")
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
SHAPES = {
    # 31M weights, half of them in the vocabulary's table.
    "30m": _LLAMA
    | {
        "vocab_size": 32_768,
        "hidden_size": 448,
        "intermediate_size": 1216,
        "num_hidden_layers": 7,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 64,
    },
    # SmolLM2-135M, for where its weights are not at hand.
    "135m": _LLAMA
    | {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    # Llama 3.2 1B.
    "1b": _LLAMA
    | {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}
MODELS = ("smollm2", *SHAPES)


def write_random(directory: Path, hf_config: dict) -> None:
    """A model of a shape, with random numbers, in bfloat16."""
    from cpt_jax.checkpoint.hf_write import save
    from cpt_jax.core.lazy import LazyArray
    from cpt_jax.core.tree import flatten, unflatten
    from cpt_jax.models.decoder import abstract_decoder
    from cpt_jax.models.families import family_for

    config = family_for(hf_config).config_from_hf(hf_config)
    generator = np.random.default_rng(0)

    def read(slices, dtype):
        return (0.02 * generator.standard_normal([s.stop - s.start for s in slices], np.float32)).astype(dtype)

    shapes = flatten(abstract_decoder(config).shapes)
    weights = unflatten({path: LazyArray(leaf.shape, np.float32, read) for path, leaf in shapes.items()})
    save(directory, config, weights, hf_config, directory, dtype="bfloat16", shard_bytes=1_500_000_000)


def model_directory(name: str) -> Path:
    """The model of a name, made when it is first asked for: the real SmolLM2-135M, or random numbers of a shape."""
    directory = Path(".cache/models") / (GGUF.stem if name == "smollm2" else f"random-{name}")
    if not (directory / "config.json").exists():
        if name == "smollm2":
            from cpt_jax.checkpoint.gguf import import_gguf

            import_gguf(GGUF, directory)
        else:
            write_random(directory, SHAPES[name])
    return directory


def peak_resident() -> int:
    """Bytes that this process had at most (`ru_maxrss` would begin with its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
