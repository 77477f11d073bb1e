"""GPT-NeoX and Pythia: LayerNorm, biases, attention and an ungated feed-forward side by side, a partial rotation, and
queries, keys and values of each head in one tensor."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import (
    Names,
    Place,
    Rows,
    attention_biases,
    config_of,
    fused,
    linear,
    norm_name,
    read,
)

MODEL_TYPES = ("gpt_neox",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        num_kv_heads=hf.num_attention_heads,
        norm="layer",
        norm_epsilon=float(hf.layer_norm_eps),
        parallel_residual=bool(hf.use_parallel_residual),
        **attention_biases(hf),
        mlp_bias=True,
        gated=False,
    )


def weight_names(config: DecoderConfig) -> Names:
    names: Names = {"gpt_neox.embed_in.weight": (Place("embed"),)}
    names |= norm_name(config, "gpt_neox.final_layer_norm", "final_norm")
    if not config.tie_word_embeddings:
        names["embed_out.weight"] = (Place("head"),)
    head = config.head_dim
    qkv = {f"layers/attention/{name}": Rows(3 * head, i * head, (i + 1) * head) for i, name in enumerate("qkv")}
    for layer in range(config.num_layers):
        prefix = f"gpt_neox.layers.{layer}"
        names |= fused(f"{prefix}.attention.query_key_value", qkv, layer, config.qkv_bias)
        names |= linear(f"{prefix}.attention.dense", "layers/attention/o", layer, config.attention_out_bias)
        names |= linear(f"{prefix}.mlp.dense_h_to_4h", "layers/mlp/up", layer, True)
        names |= linear(f"{prefix}.mlp.dense_4h_to_h", "layers/mlp/down", layer, True)
        names |= norm_name(config, f"{prefix}.input_layernorm", "layers/attention_norm", (layer,))
        names |= norm_name(config, f"{prefix}.post_attention_layernorm", "layers/mlp_norm", (layer,))
    return names
