"""The configurations of families some or all of whose layers mix tokens by other means than attention."""

import math
from typing import Any

from contracts.config_parts import (
    EXPERTS,
    LOCAL_ROPE,
    MULTIPLIERS,
    NORM_EPS,
    PROPORTIONAL,
    ROUTED,
    TIED,
    UNTIED,
    YARN,
)

DELTA_NET = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
QWEN_3_5_ROPE = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[1, 1, 0])
MAMBA_2 = dict(mamba_n_heads=4, mamba_d_state=16, mamba_d_head=16, mamba_n_groups=1)
GRANITE_4 = MULTIPLIERS | MAMBA_2 | dict(position_embedding_type="nope", shared_intermediate_size=40)
FALCON_H1 = dict(mamba_n_heads=6, mamba_d_state=16, mamba_d_head=8, mamba_d_ssm=48, mamba_n_groups=1)
FALCON_H1 |= dict(embedding_multiplier=5.0, lm_head_multiplier=0.4, mlp_multipliers=[0.9, 0.6], key_multiplier=0.5)
FALCON_H1 |= dict(attention_in_multiplier=1.2, attention_out_multiplier=0.9, ssm_in_multiplier=1.3)
FALCON_H1 |= dict(ssm_out_multiplier=0.7, ssm_multipliers=[0.8, 0.9, 1.3, 1.1, 0.7])
NEMOTRON_H = dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, conv_kernel=3, head_dim=8)
NEMOTRON_H |= dict(layer_norm_epsilon=1e-5)
HYBRID_EXPERTS = DELTA_NET | EXPERTS | dict(num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40)
NOT_PERIODIC = dict(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"], linear_num_value_heads=2)
NOT_PERIODIC |= dict(linear_conv_kernel_dim=3, linear_value_head_dim=12, head_dim=8, norm_topk_prob=False)
THREE_OF_FOUR = dict(num_hidden_layers=4, full_attention_interval=2, head_dim=8, num_experts=4, num_experts_per_tok=3)
THREE_OF_FOUR |= dict(linear_num_key_heads=1)

HYBRIDS: dict[str, dict[str, dict[str, Any]]] = {
    # Tiny and Small have experts, Micro has none.
    "granitemoehybrid": {
        "as released": TIED
        | GRANITE_4
        | EXPERTS
        | dict(num_hidden_layers=4, layer_types=["mamba", "attention"] * 2, num_local_experts=4),
        "without experts, not periodic, groups, steps within limits": UNTIED
        | GRANITE_4
        | dict(num_local_experts=0, layer_types=["attention", "mamba", "mamba"], mamba_n_groups=2)
        | dict(time_step_limit=[0.5, 1.5], mamba_d_conv=3, position_embedding_type="rope", attention_bias=True),
        "biases of projections": TIED
        | GRANITE_4
        | EXPERTS
        | dict(num_local_experts=3, layer_types=["mamba", "mamba", "attention"], time_step_limit=[0.0, math.inf])
        | dict(mamba_proj_bias=True, mamba_conv_bias=False, mamba_d_head="auto"),
    },
    "falcon_h1": {
        "as released": UNTIED | FALCON_H1 | dict(num_hidden_layers=2, head_dim=8, rope_theta=1e11),
        "tied, norm behind the gate, biases": TIED
        | FALCON_H1
        | dict(num_hidden_layers=2, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=2)
        | dict(projectors_bias=True, attention_bias=True, mlp_bias=True, mamba_proj_bias=True),
        "norm before the gate, no factors": TIED
        | MAMBA_2
        | dict(num_hidden_layers=2, mamba_d_ssm=None, mamba_rms_norm=True, mamba_n_groups=2, rope_scaling=YARN),
    },
    # 8B, 47B, 56B, and Nano 2.
    "nemotron_h": {
        "as released": UNTIED | NEMOTRON_H | dict(num_hidden_layers=5, hybrid_override_pattern="M-M*-"),
        "biases, periodic": TIED
        | NEMOTRON_H
        | dict(num_hidden_layers=6, layers_block_type=["mamba", "attention", "mlp"] * 2, head_dim=12)
        | dict(use_bias=True, mlp_bias=True, use_conv_bias=False, mlp_hidden_act="silu"),
        # Nemotron 3 Nano.
        "experts": UNTIED
        | NEMOTRON_H
        | ROUTED
        | dict(num_hidden_layers=6, hybrid_override_pattern="ME*EME", n_routed_experts=6)
        | dict(moe_shared_expert_intermediate_size=24, n_shared_experts=1),
        "experts and feed-forwards, groups, biases": TIED
        | NEMOTRON_H
        | ROUTED
        | dict(num_hidden_layers=5, hybrid_override_pattern="ME-E*", n_routed_experts=8, n_group=4, topk_group=2)
        | dict(moe_shared_expert_intermediate_size=40, norm_topk_prob=False, mlp_bias=True, mlp_hidden_act="silu"),
        "steps clipped": TIED
        | NEMOTRON_H
        | dict(num_hidden_layers=2, hybrid_override_pattern="*M", time_step_min=1.0, n_groups=1),
    },
    # In released models three of four layers have linear attention.
    "qwen3_5_text": {
        "as released": UNTIED | DELTA_NET | dict(num_hidden_layers=4, head_dim=16, rope_parameters=QWEN_3_5_ROPE),
        "not periodic, one value head a key head": TIED
        | DELTA_NET
        | dict(layer_types=["full_attention", "linear_attention", "full_attention"], linear_num_value_heads=2)
        | dict(linear_conv_kernel_dim=3, linear_value_head_dim=12, head_dim=8, partial_rotary_factor=0.5),
        "by interval": TIED | DELTA_NET | dict(num_hidden_layers=4, full_attention_interval=2, head_dim=8),
    },
    "qwen3_5_moe_text": {
        # Three of four in released models, which the dense ones have here.
        "one of two": UNTIED
        | HYBRID_EXPERTS
        | dict(num_hidden_layers=2, full_attention_interval=2, head_dim=16, rope_parameters=QWEN_3_5_ROPE)
        | dict(linear_key_head_dim=8, linear_value_head_dim=8),
        # That field means nothing here.
        "not periodic, one value head a key head": TIED | HYBRID_EXPERTS | NOT_PERIODIC,
        "by interval, three of four": TIED | HYBRID_EXPERTS | THREE_OF_FOUR,
    },
    "qwen3_next": {
        "as released": UNTIED
        | HYBRID_EXPERTS
        | dict(num_hidden_layers=4, head_dim=16, rope_theta=1e7, partial_rotary_factor=0.25, norm_topk_prob=True),
        "not periodic, one value head a key head, not renormalised": TIED | HYBRID_EXPERTS | NOT_PERIODIC,
        "by interval, three of four": TIED
        | HYBRID_EXPERTS
        | THREE_OF_FOUR
        | dict(linear_key_head_dim=8, partial_rotary_factor=0.5),
    },
    "lfm2": {
        "as released": TIED
        | NORM_EPS
        | dict(num_hidden_layers=6, block_auto_adjust_ff_dim=True, block_multiple_of=16, block_ffn_dim_multiplier=1.0)
        | dict(layer_types=["conv", "conv", "full_attention"] * 2, rope_theta=1e6),
        "untied, biases, not periodic": UNTIED
        | NORM_EPS
        | dict(conv_bias=True, conv_L_cache=4, block_auto_adjust_ff_dim=False, full_attn_idxs=[1]),
        "multiplied width": TIED
        | NORM_EPS
        | dict(block_ffn_dim_multiplier=1.5, block_multiple_of=8, full_attn_idxs=[0, 2], num_key_value_heads=1),
    },
    "lfm2_moe": {
        "as released": TIED
        | NORM_EPS
        | ROUTED
        | dict(num_hidden_layers=4, layer_types=["conv", "conv", "full_attention", "conv"], num_experts=6)
        | dict(num_dense_layers=2, routed_scaling_factor=1.0),
        "untied, biases of convolutions, not renormalised": UNTIED
        | NORM_EPS
        | ROUTED
        | dict(layer_types=["full_attention", "conv", "full_attention"], num_experts=4, num_experts_per_tok=3)
        | dict(num_dense_layers=1, conv_bias=True, conv_L_cache=4, norm_topk_prob=False),
        "no bias, none dense": TIED
        | NORM_EPS
        | ROUTED
        | dict(layer_types=["conv", "full_attention", "conv"], num_experts=4, num_dense_layers=0)
        | dict(use_expert_bias=False, num_key_value_heads=1),
    },
    # In released models a layer that sees all comes after a convolution, a windowed one before it.
    "lfm3": {
        "as released": TIED
        | NORM_EPS
        | dict(num_hidden_layers=8, head_dim=16, sliding_window=6)
        | dict(rope_parameters=dict(full_attention=PROPORTIONAL, sliding_attention=LOCAL_ROPE)),
        "untied, biases, not periodic": UNTIED
        | NORM_EPS
        | dict(conv_bias=True, conv_L_cache=3, attention_bias=True, head_dim=8, sliding_window=9)
        | dict(layer_types=["full_attention", "conv", "sliding_attention"], use_attention_gate=False)
        | dict(rope_parameters=dict(full_attention=PROPORTIONAL | dict(factor=4.0), sliding_attention=LOCAL_ROPE)),
        "no sandwich, yarn": TIED
        | NORM_EPS
        | dict(use_sandwich_norm=False, num_key_value_heads=1, head_dim=8)
        | dict(layer_types=["conv", "full_attention", "full_attention"])
        | dict(rope_parameters=dict(full_attention=YARN | dict(rope_theta=1e5))),
    },
}
