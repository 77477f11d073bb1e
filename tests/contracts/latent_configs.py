"""The configurations of families whose keys and values come from latents."""

from typing import Any

from contracts.config_parts import ROUTED, TIED, UNTIED, YARN

HEADS = dict(num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8)
QUERIES = HEADS | dict(q_lora_rank=20)
NO_QUERIES = HEADS | dict(q_lora_rank=None)
# Scores are scaled by it too.
SCALED_YARN = YARN | dict(mscale=0.7, mscale_all_dim=1.3)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[1.0, 2.5, 4.5])
LONGROPE |= dict(original_max_position_embeddings=16)
GROWTH = dict(llama_4_scaling_beta=0.7, rope_theta=1e4)

LATENT: dict[str, dict[str, dict[str, Any]]] = {
    "youtu": {
        # A row of padding transformers' from_pretrained would make zeros, whatever the files hold (5.24).
        "as released": TIED | QUERIES | dict(rope_theta=1.6e6, pad_token_id=None),
        "untied, whole queries, biases, yarn": UNTIED
        | NO_QUERIES
        | dict(attention_bias=True, rope_scaling=SCALED_YARN, v_head_dim=20),
        "halves rotated, biases, linear": TIED
        | QUERIES
        | dict(rope_interleave=False, attention_bias=True, rope_scaling=dict(type="linear", factor=2.0)),
    },
    "minicpm3": {
        "as released": TIED
        | QUERIES
        | dict(scale_emb=6, scale_depth=1.4, dim_model_base=12)
        | dict(rope_scaling=LONGROPE),
        "untied, whole queries, no factors, biases": UNTIED
        | NO_QUERIES
        | dict(scale_depth=None, dim_model_base=None, scale_emb=1, attention_bias=True, mlp_bias=True),
        "values as wide as usual, yarn": TIED | QUERIES | dict(v_head_dim=None, rope_scaling=SCALED_YARN),
    },
    "deepseek_v3": {
        # Groups as in V3; Kimi K2 and Moonlight have one.
        "as released": UNTIED
        | QUERIES
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=8, n_group=4, topk_group=2, rope_scaling=SCALED_YARN)
        | dict(moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc"),
        "one group, whole queries, biases": TIED
        | NO_QUERIES
        | ROUTED
        | dict(first_k_dense_replace=0, n_routed_experts=6, n_group=1, topk_group=1, attention_bias=True)
        | dict(n_shared_experts=2, norm_topk_prob=False),
        "dense, halves rotated": TIED | QUERIES | dict(first_k_dense_replace=3, rope_interleave=False),
    },
    "deepseek_v2": {
        # V2, and V2-Lite.
        "as released": UNTIED
        | QUERIES
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=8, n_group=4, topk_group=2, rope_scaling=SCALED_YARN)
        | dict(topk_method="group_limited_greedy", norm_topk_prob=False, n_shared_experts=2),
        "as released, small": UNTIED
        | NO_QUERIES
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=6, topk_method="greedy", norm_topk_prob=False)
        | dict(routed_scaling_factor=1.0),
        "dense, biases": TIED | QUERIES | dict(first_k_dense_replace=3, attention_bias=True),
    },
    "glm4_moe_lite": {
        "as released": UNTIED | QUERIES | ROUTED | dict(n_routed_experts=6, rope_theta=1e6, num_nextn_predict_layers=1),
        "groups, two dense, biases": TIED
        | NO_QUERIES
        | ROUTED
        | dict(mlp_layer_types=["dense", "dense", "sparse"], n_routed_experts=8, n_group=2, topk_group=1)
        | dict(attention_bias=True, rope_scaling=SCALED_YARN),
        "all sparse": UNTIED | QUERIES | ROUTED | dict(mlp_layer_types=["sparse"] * 3, n_routed_experts=4),
    },
    # Of the 40 tokens, those from the 16th and the 32nd on have larger queries.
    "mistral4": {
        "as released": UNTIED
        | QUERIES
        | ROUTED
        | dict(n_routed_experts=6, rope_parameters=YARN | GROWTH | dict(mscale=1.0, mscale_all_dim=1.0)),
        "groups, a dense layer, whole queries": TIED
        | NO_QUERIES
        | ROUTED
        | dict(first_k_dense_replace=1, n_routed_experts=8, n_group=4, topk_group=2, attention_bias=True)
        | dict(rope_parameters=YARN | GROWTH),
        "not renormalised, halves rotated": UNTIED
        | QUERIES
        | ROUTED
        | dict(n_routed_experts=4, norm_topk_prob=False, rope_interleave=False, num_hidden_layers=2)
        | dict(rope_parameters=YARN | GROWTH | dict(mscale_all_dim=0.8)),
    },
}
