"""For each model_type, config.json files of tiny models that between them have all that the family can do."""

from typing import Any

from contracts.config_parts import ALTERNATING, LAYER_NORM, LLAMA3, MULTIPLIERS, PROPORTIONAL, TIED, UNTIED, YARN
from contracts.expert_configs import EXPERT_MODELS
from contracts.hybrid_configs import HYBRIDS
from contracts.latent_configs import LATENT

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
GROWTH = dict(llama_4_scaling_beta=0.7)
# Shorter than the sequences of the tests (40 tokens): the long factors, or the larger theta, come into play.
SHORT = dict(max_position_embeddings=24)
PHI3 = dict(hidden_size=32, original_max_position_embeddings=16, max_position_embeddings=64)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 3.0, 4.5])
GEMMA_4_UNIFIED = dict(head_dim=8, global_head_dim=16)
GEMMA_4 = GEMMA_4_UNIFIED | dict(hidden_size_per_layer_input=0)
GEMMA_4_SMALL = GEMMA_4_UNIFIED | dict(hidden_size_per_layer_input=6, vocab_size_per_layer_input=64, sliding_window=6)
GEMMA_4_SMALL |= dict(num_hidden_layers=6, num_key_value_heads=1, num_kv_shared_layers=2, use_double_wide_mlp=True)
GEMMA_4_SMALL |= dict(layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"] * 2)
GEMMA_4_SMALL |= dict(final_logit_softcapping=4.0)

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "tied, odd head dimension": TIED | dict(head_dim=10),
        "untied, no grouping, biases": UNTIED | dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
        "one key head, llama3": TIED | dict(num_key_value_heads=1, rope_scaling=LLAMA3, rope_theta=500_000.0),
        # The window is none of a Llama's.
        "linear": UNTIED | dict(sliding_window=7, rope_scaling=dict(type="linear", factor=4.0)),
        "dynamic": TIED | SHORT | dict(rope_scaling=dict(type="dynamic", factor=2.0)),
        "yarn": TIED | dict(rope_scaling=YARN),
    },
    "mistral": {
        "window": UNTIED | dict(sliding_window=7),
        "no window, head dimension": UNTIED | dict(sliding_window=None, head_dim=16),
        "tied, window, yarn": TIED | dict(sliding_window=12, rope_scaling=YARN),
    },
    # Of the 40 tokens, those from the 16th and the 32nd on have larger queries.
    "ministral3": {
        "as released": UNTIED
        | dict(head_dim=16, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0, rope_theta=1e6) | GROWTH),
        "tied, window": TIED | dict(sliding_window=9, rope_parameters=YARN | dict(rope_theta=1e4) | GROWTH),
        "no yarn": TIED
        | dict(rope_parameters=dict(rope_type="default", original_max_position_embeddings=16, rope_theta=1e4) | GROWTH),
    },
    "ministral": {
        "some windows": UNTIED | dict(head_dim=16, sliding_window=6, layer_types=ALTERNATING, rope_theta=1e6),
        "all windows, yarn": TIED | dict(head_dim=8, sliding_window=7, rope_scaling=YARN),
        "no window": TIED | dict(head_dim=8, sliding_window=6, layer_types=["full_attention"] * 3),
    },
    "qwen2": {
        "tied": TIED,
        "untied, window above": UNTIED | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "window not used, yarn": TIED | dict(use_sliding_window=False, sliding_window=6, rope_scaling=YARN),
    },
    "qwen3": {
        "tied, head dimension": TIED | dict(head_dim=16),
        "untied, biases": UNTIED | dict(head_dim=8, attention_bias=True),
        "window above": TIED
        | dict(head_dim=10, use_sliding_window=True, sliding_window=6, max_window_layers=2, rope_theta=1e6),
    },
    "gemma": {
        # Gemma's "gelu" means its approximation by tanh.
        "as released": TIED | dict(head_dim=16, hidden_act="gelu"),
        "untied, biases": UNTIED | dict(head_dim=8, attention_bias=True, num_key_value_heads=1),
        "linear": TIED | dict(head_dim=10, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "gemma2": {
        "as released": TIED | dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=6),
        "untied, other caps": UNTIED
        | dict(head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        "no caps, biases": TIED
        | dict(head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True)
        | dict(sliding_window=5, layer_types=["full_attention"] * 3),
    },
    "gemma3_text": {
        "as released": TIED
        | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=6, sliding_window_pattern=3)
        | dict(rope_theta=1e6, rope_local_base_freq=10_000.0),
        "linear": TIED
        | dict(head_dim=8, sliding_window=6, layer_types=ALTERNATING, rope_theta=1e6)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
        "untied, capped, nested rope": UNTIED
        | dict(head_dim=8, final_logit_softcapping=4.0, sliding_window=6, layer_types=ALTERNATING)
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="default", rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            )
        ),
    },
    "gemma4_text": {
        "as released": TIED
        | GEMMA_4
        | dict(num_hidden_layers=6, sliding_window=6, attention_k_eq_v=True, num_global_key_value_heads=1)
        | dict(final_logit_softcapping=4.0, use_bidirectional_attention="vision"),
        "untied, values of their own, not periodic, linear": UNTIED
        | GEMMA_4
        | dict(num_hidden_layers=4, sliding_window=9, num_key_value_heads=1, attention_bias=True)
        | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"])
        | dict(
            rope_parameters=dict(
                full_attention=PROPORTIONAL | dict(factor=2.0),
                sliding_attention=dict(rope_type="linear", rope_theta=1e4, factor=4.0),
            )
        ),
        "all see all": TIED | GEMMA_4 | dict(layer_types=["full_attention"] * 3, attention_k_eq_v=True),
        "as transformers writes it": TIED
        | GEMMA_4
        | dict(layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=6)
        | dict(per_layer_config={"1": dict(head_dim=12), "2": dict(head_dim=12)}),
        # As E2B, whose last layers share keys and values.
        "inputs of layers, shared keys, double width": TIED | GEMMA_4_SMALL,
        # As 26B-A4B.
        "experts beside the feed-forward": TIED
        | GEMMA_4
        | dict(num_hidden_layers=2, sliding_window=6, attention_k_eq_v=True, enable_moe_block=True)
        | dict(layer_types=["sliding_attention", "full_attention"])
        | dict(num_experts=4, top_k_experts=2, moe_intermediate_size=20),
        "untied, inputs of layers": UNTIED
        | GEMMA_4_UNIFIED
        | dict(hidden_size_per_layer_input=5, vocab_size_per_layer_input=64)
        | dict(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        # Without inputs transformers cannot compute it.
        "shared keys, not periodic, values are keys, biases": TIED
        | GEMMA_4_SMALL
        | dict(sliding_window=5, num_kv_shared_layers=3, attention_k_eq_v=True, use_double_wide_mlp=False)
        | dict(
            attention_bias=True, layer_types=[*ALTERNATING, "full_attention", "sliding_attention", "full_attention"]
        ),
    },
    "gemma4_unified_text": {
        "as released": TIED
        | GEMMA_4_UNIFIED
        | dict(num_hidden_layers=6, sliding_window=6, attention_k_eq_v=True, num_global_key_value_heads=1)
        | dict(final_logit_softcapping=4.0),
        "untied, values of their own, the same heads": UNTIED
        | GEMMA_4_UNIFIED
        | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], global_head_dim=8),
        "biases": TIED
        | GEMMA_4_UNIFIED
        | dict(layer_types=["sliding_attention", "full_attention", "full_attention"], attention_bias=True)
        | dict(attention_k_eq_v=True, sliding_window=5),
    },
    "internlm3": {
        "as released": UNTIED
        | dict(head_dim=8, rope_scaling=dict(rope_type="dynamic", factor=6.0), qkv_bias=False, bias=False),
        "tied, biases": TIED | dict(head_dim=10, qkv_bias=True, bias=True),
        "one key head, as transformers writes it": UNTIED
        | dict(num_key_value_heads=1, head_dim=8, attention_bias=True, mlp_bias=True, rope_scaling=YARN),
    },
    "cwm": {
        "as released": UNTIED | dict(head_dim=16, num_hidden_layers=4, sliding_window=6, rope_scaling=LLAMA3),
        "tied, biases, other windows": TIED
        | dict(head_dim=8, mlp_bias=True, layer_types=ALTERNATING, sliding_window=9)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
        "all see all": UNTIED | dict(head_dim=8, layer_types=["full_attention"] * 3, num_key_value_heads=1),
    },
    "helium": {
        "as released": UNTIED | dict(head_dim=8, num_key_value_heads=4, rms_norm_eps=1e-8),
        "tied, biases": TIED | dict(head_dim=8, attention_bias=True, mlp_bias=True),
        "one key head, linear": TIED
        | dict(head_dim=8, num_key_value_heads=1, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "stablelm": {
        "as released, 2": UNTIED | LAYER_NORM | dict(num_key_value_heads=4, use_qkv_bias=True),
        "side by side, most of each head": TIED
        | dict(layer_norm_eps=1e-3, use_parallel_residual=True, partial_rotary_factor=0.75),
        "whole heads, yarn": UNTIED | LAYER_NORM | dict(partial_rotary_factor=1.0, rope_scaling=YARN),
    },
    "apertus": {
        "as released": UNTIED | dict(rope_scaling=LLAMA3, rope_theta=12e6),
        "tied, biases, one key head": TIED | dict(attention_bias=True, num_key_value_heads=1),
        "another activation": TIED | dict(hidden_act="relu2", rope_scaling=YARN),
    },
    "olmo2": {
        "untied": UNTIED,
        "tied, no grouping": TIED | dict(num_key_value_heads=4, rope_theta=500_000.0),
        "biases, linear": UNTIED | dict(attention_bias=True, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "olmo3": {
        "as released": UNTIED
        | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=6)
        | dict(rope_theta=500_000.0, rope_scaling=YARN | dict(attention_factor=1.2079)),
        "tied, all windowed, biases": TIED | dict(num_key_value_heads=4, sliding_window=9, attention_bias=True),
        "nested rope": UNTIED
        | dict(layer_types=ALTERNATING, sliding_window=6)
        | dict(
            rope_parameters=dict(
                full_attention=YARN | dict(rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            )
        ),
    },
    "phi3": {
        "window": UNTIED | dict(sliding_window=9),
        "partial, tied": TIED | dict(partial_rotary_factor=0.5),
        "longrope, longer": UNTIED | PHI3 | dict(rope_scaling=LONGROPE),
        "longrope, shorter": UNTIED | PHI3 | dict(original_max_position_embeddings=48, rope_scaling=LONGROPE),
    },
    "granite": {
        "as released": TIED | MULTIPLIERS,
        "untied, biases, yarn": UNTIED
        | MULTIPLIERS
        | dict(logits_scaling=0.3, attention_bias=True, mlp_bias=True, rope_scaling=YARN),
        "no multipliers": TIED | dict(rope_theta=1e6),
    },
    "cohere2": {
        # Three windowed layers and one that does not rotate.
        "as released": TIED
        | LAYER_NORM
        | dict(num_hidden_layers=4, sliding_window=6, rope_theta=5e4, logit_scale=0.25),
        "untied, biases, yarn": UNTIED
        | LAYER_NORM
        | dict(layer_types=ALTERNATING, sliding_window=9, attention_bias=True, logit_scale=2.0, rope_scaling=YARN),
        "all see all": TIED | LAYER_NORM | dict(layer_types=["full_attention"] * 3, sliding_window=6),
    },
    "cohere": {
        "as released": TIED | LAYER_NORM | dict(logit_scale=0.8, rope_theta=4e6),
        "untied, biases": UNTIED | LAYER_NORM | dict(num_key_value_heads=4, attention_bias=True),
        "linear": TIED | LAYER_NORM | dict(rope_scaling=dict(type="linear", factor=2.0)),
    },
    "glm4": {
        "as released": UNTIED | dict(head_dim=16, attention_bias=True, partial_rotary_factor=0.5),
        "tied, no biases, default part": TIED | dict(head_dim=12, attention_bias=False),
        "most of each head, linear": UNTIED
        | dict(head_dim=8, partial_rotary_factor=0.75, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "seed_oss": {
        "as released": UNTIED | dict(head_dim=16, rope_theta=1e7),
        "tied, other biases": TIED | dict(head_dim=8, attention_bias=False, attention_out_bias=True, mlp_bias=True),
        "tied, every bias, yarn": TIED
        | dict(head_dim=8, attention_bias=True, attention_out_bias=True, mlp_bias=True, rope_scaling=YARN),
    },
    "arcee": {
        "as released": UNTIED | dict(head_dim=16, rope_scaling=YARN | dict(mscale=1.0)),
        "tied, biases": TIED | dict(attention_bias=True, mlp_bias=True),
        "llama3, silu": TIED | dict(num_key_value_heads=1, hidden_act="silu", rope_scaling=LLAMA3),
    },
    "starcoder2": {
        "as released": TIED | dict(sliding_window=9, norm_epsilon=1e-5),
        "untied, no biases": UNTIED | dict(use_bias=False, hidden_act="gelu", num_key_value_heads=1),
        "yarn": TIED | dict(rope_scaling=YARN),
    },
    "hunyuan_v1_dense": {
        "as released": TIED
        | dict(head_dim=16, rope_scaling=dict(type="dynamic", alpha=1000.0, factor=1.0, beta_fast=32, beta_slow=1)),
        "untied, biases": UNTIED | dict(attention_bias=True, head_dim=8, num_key_value_heads=1),
        "dynamic": TIED | SHORT | dict(head_dim=8, rope_scaling=dict(type="dynamic", factor=2.0)),
    },
    "ernie4_5": {
        "as released": TIED | dict(head_dim=16, rope_theta=5e5),
        "untied, biases": UNTIED | dict(head_dim=8, use_bias=True, num_key_value_heads=1),
        "linear": UNTIED | dict(head_dim=12, rope_scaling=dict(type="linear", factor=4.0)),
    },
    "exaone4": {
        "as released, large": UNTIED
        | dict(sliding_window=6, layer_types=ALTERNATING, sliding_window_pattern="LLLG", rope_scaling=LLAMA3)
        | dict(head_dim=16),
        "as released, small": TIED | dict(sliding_window=None, layer_types=["full_attention"] * 3, rope_scaling=LLAMA3),
        "by interval": UNTIED | dict(sliding_window=9, sliding_window_pattern=3),
    },
    "gpt_neox": {
        "as released": UNTIED | dict(rotary_pct=0.25),
        "one after the other, odd heads": UNTIED
        | dict(use_parallel_residual=False, hidden_size=44, rotary_pct=0.4, hidden_act="gelu_pytorch_tanh"),
        "tied, no biases, linear": TIED
        | dict(
            attention_bias=False, rotary_pct=1.0, hidden_act="gelu_fast", rope_scaling=dict(type="linear", factor=2.0)
        ),
    },
    "smollm3": {
        "as released": TIED | dict(no_rope_layers=[1, 1, 0], rope_theta=5e6),
        "by interval, biases, yarn": UNTIED
        | dict(no_rope_layer_interval=2, attention_bias=True, mlp_bias=True, rope_scaling=YARN),
        # The list may be longer than the model is deep.
        "windows, head dimension": TIED
        | dict(no_rope_layers=[0, 1, 1, 0, 1], layer_types=ALTERNATING, head_dim=16)
        | dict(use_sliding_window=True, sliding_window=6),
    },
} | EXPERT_MODELS
CONFIGS |= HYBRIDS | LATENT


def config_json(model_type: str, name: str) -> dict[str, Any]:
    """The whole config.json."""
    return SIZES | dict(model_type=model_type) | CONFIGS[model_type][name]
