"""The configurations of families whose keys and values come from latents."""

from typing import Any

from contracts.config_parts import TIED, UNTIED, YARN

HEADS = dict(num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8)
QUERIES = HEADS | dict(q_lora_rank=20)
NO_QUERIES = HEADS | dict(q_lora_rank=None)
# Scores are scaled by it too.
SCALED_YARN = YARN | dict(mscale=0.7, mscale_all_dim=1.3)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[1.0, 2.5, 4.5])
LONGROPE |= dict(original_max_position_embeddings=16)
DENSE = dict(first_k_dense_replace=3)

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
        "dense": UNTIED | QUERIES | DENSE | dict(rope_scaling=SCALED_YARN),
        "tied": TIED | NO_QUERIES | DENSE | dict(attention_bias=True),
        "halves": TIED | QUERIES | DENSE | dict(rope_interleave=False),
    },
}
