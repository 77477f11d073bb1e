"""As family_configs, of models with experts whose layers all mix tokens by attention."""

from typing import Any

from contracts.config_parts import ALTERNATING, EXPERTS, LLAMA3, MULTIPLIERS, ROUTED, TIED, UNTIED, YARN

GPT_OSS = dict(num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=6)

EXPERT_MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "granitemoe": {
        "as released": TIED | EXPERTS | MULTIPLIERS | dict(num_local_experts=6),
        "untied, biases": UNTIED | EXPERTS | dict(num_local_experts=3, attention_bias=True, num_experts_per_tok=1),
        "yarn": TIED | EXPERTS | dict(num_local_experts=4, rope_scaling=YARN, num_key_value_heads=1),
    },
    "granitemoeshared": {
        "as released": TIED | EXPERTS | MULTIPLIERS | dict(num_local_experts=6, shared_intermediate_size=20),
        "untied, biases": UNTIED
        | EXPERTS
        | dict(num_local_experts=3, attention_bias=True, num_experts_per_tok=1, shared_intermediate_size=64),
        "no shared feed-forward": UNTIED | EXPERTS | dict(num_local_experts=4),
    },
    "hunyuan_v1_moe": {
        "as released": UNTIED
        | dict(num_experts=6, moe_topk=[3, 3, 3], head_dim=16)
        | dict(rope_scaling=dict(type="dynamic", alpha=1000.0, factor=1.0)),
        "tied, biases, one of three": TIED | dict(num_experts=3, moe_topk=1, attention_bias=True, head_dim=8),
        "linear": UNTIED
        | dict(num_experts=4, moe_topk=2, num_key_value_heads=1, head_dim=10)
        | dict(rope_scaling=dict(type="linear", factor=2.0)),
    },
    "solar_open": {
        "as released": UNTIED
        | ROUTED
        | dict(n_routed_experts=6, head_dim=16, rope_scaling=YARN, first_k_dense_replace=0, partial_rotary_factor=1.0),
        "groups, biases, two shared": TIED
        | ROUTED
        | dict(n_routed_experts=8, n_group=4, topk_group=2, n_shared_experts=2, attention_bias=True, head_dim=8),
        "linear, not renormalised": UNTIED
        | ROUTED
        | dict(n_routed_experts=4, head_dim=8, norm_topk_prob=False, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "minimax_m2": {
        "as released": UNTIED
        | dict(num_local_experts=6, num_experts_per_tok=3, head_dim=16, rotary_dim=8, rope_theta=5e6),
        "tied, all rotated": TIED | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        "yarn, one of four": UNTIED
        | dict(num_local_experts=4, num_experts_per_tok=1, head_dim=8, rope_scaling=YARN, num_key_value_heads=1),
    },
    "dots1": {
        "as released": UNTIED
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=6, n_shared_experts=2, num_key_value_heads=4, head_dim=16),
        "windows, groups, biases": TIED
        | ROUTED
        | dict(first_k_dense_replace=2, n_routed_experts=8, n_group=2, topk_group=1, n_shared_experts=1, head_dim=8)
        | dict(attention_bias=True, sliding_window=6, max_window_layers=1, norm_topk_prob=False),
        "none dense, yarn": UNTIED
        | ROUTED
        | dict(n_routed_experts=4, n_shared_experts=1, head_dim=8, sliding_window=None, rope_scaling=YARN),
    },
    "ernie4_5_moe": {
        "as released": TIED
        | dict(moe_intermediate_size=16, moe_num_experts=6, moe_k=3, moe_num_shared_experts=2)
        | dict(moe_layer_start_index=1, moe_layer_end_index=2, rope_theta=5e5),
        "untied, two dense, no shared expert": UNTIED
        | dict(moe_intermediate_size=24, moe_num_experts=4, moe_k=2, moe_num_shared_experts=0)
        | dict(moe_layer_start_index=2, num_key_value_heads=1),
        "none dense, yarn": UNTIED
        | dict(moe_intermediate_size=12, moe_num_experts=4, moe_k=1, moe_num_shared_experts=1)
        | dict(moe_layer_start_index=0, router_aux_loss_coef=0.0, rope_scaling=YARN),
    },
    "exaone_moe": {
        "as released": UNTIED
        | ROUTED
        | dict(sliding_window=6, sliding_window_pattern="LLLG", num_hidden_layers=4, num_experts=6, head_dim=16)
        | dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], rope_theta=1e6)
        | dict(mlp_layer_types=["dense"] + ["sparse"] * 3),
        "by number, groups": TIED
        | ROUTED
        | dict(sliding_window=9, layer_types=ALTERNATING, first_k_dense_replace=2, num_experts=8, n_group=4)
        | dict(topk_group=2, num_shared_experts=2, head_dim=8),
        "none dense, llama3": UNTIED
        | ROUTED
        | dict(sliding_window=6, layer_types=ALTERNATING, first_k_dense_replace=0, num_experts=4, head_dim=8)
        | dict(rope_scaling=LLAMA3),
    },
    "gpt_oss": {
        # Of the fields beside, transformers looks at none.
        "as released": UNTIED
        | GPT_OSS
        | dict(rope_scaling=YARN | dict(truncate=False), rope_theta=150_000.0, swiglu_limit=7.0)
        | dict(router_aux_loss_coef=0.9, output_router_logits=False, initial_context_length=16, experts_per_token=2),
        "cut off, tied, no window, another activation": TIED
        | GPT_OSS
        | dict(swiglu_limit=0.4, swiglu_alpha=1.1, layer_types=["full_attention"] * 3, hidden_act="gelu")
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), num_experts_per_tok=1),
        "no biases of attention, one key head": UNTIED
        | GPT_OSS
        | dict(attention_bias=False, num_key_value_heads=1, num_local_experts=3, intermediate_size=20),
    },
    "qwen2_moe": {
        "as released": UNTIED
        | EXPERTS
        | dict(num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_key_value_heads=4),
        "renormalised, tied, no biases": TIED
        | EXPERTS
        | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=12, norm_topk_prob=True)
        | dict(num_experts_per_tok=3, qkv_bias=False, rope_scaling=YARN),
        # In every other one of the lower layers.
        "window, head dimension, activation": UNTIED
        | EXPERTS
        | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, head_dim=16)
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=2, hidden_act="gelu_pytorch_tanh"),
    },
    "qwen3_moe": {
        "renormalised": UNTIED
        | EXPERTS
        | dict(num_experts=6, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True),
        "not renormalised, tied": TIED | EXPERTS | dict(num_experts=4, moe_intermediate_size=16, head_dim=8),
        "window, biases, yarn": UNTIED
        | EXPERTS
        | dict(num_experts=8, moe_intermediate_size=16, head_dim=8, num_experts_per_tok=3, attention_bias=True)
        | dict(use_sliding_window=True, sliding_window=6, rope_scaling=YARN),
    },
    "olmoe": {
        "as released": UNTIED | EXPERTS | dict(num_key_value_heads=4, num_experts=6),
        "tied, renormalised, biases": TIED
        | EXPERTS
        | dict(num_experts=4, norm_topk_prob=True, num_experts_per_tok=3, attention_bias=True),
        "linear": UNTIED
        | EXPERTS
        | dict(num_experts=4, num_experts_per_tok=1, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "mixtral": {
        "untied": UNTIED | EXPERTS | dict(num_local_experts=4),
        "tied, one of three": TIED | EXPERTS | dict(num_local_experts=3, num_experts_per_tok=1),
        "window, head dimension": UNTIED | EXPERTS | dict(num_local_experts=5, sliding_window=6, head_dim=16),
    },
    "glm4_moe": {
        # 4.5 Air; 4.5, 4.6 and 4.7 have norms of queries and keys, and three dense layers.
        "as released": UNTIED
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=6, attention_bias=True, head_dim=16, rope_theta=1e6)
        | dict(partial_rotary_factor=0.5, num_nextn_predict_layers=1),
        "groups, norms of heads, two dense": TIED
        | ROUTED
        | dict(first_k_dense_replace=2, n_routed_experts=8, n_group=4, topk_group=2, use_qk_norm=True, head_dim=16)
        | dict(n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=3, partial_rotary_factor=0.25),
        "none dense, yarn": UNTIED
        | ROUTED
        | dict(first_k_dense_replace=0, n_routed_experts=4, head_dim=8, rope_scaling=YARN),
    },
}
