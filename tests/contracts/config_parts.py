"""What configurations of several families are made of."""

TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
MULTIPLIERS = dict(embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.22, logits_scaling=5.0)
LAYER_NORM, NORM_EPS = dict(layer_norm_eps=1e-5), dict(norm_eps=1e-5)
PROPORTIONAL = dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.5)
LOCAL_ROPE = dict(rope_type="default", rope_theta=1e4)
ROUTED = dict(num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=2.5, norm_topk_prob=True)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.01)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
