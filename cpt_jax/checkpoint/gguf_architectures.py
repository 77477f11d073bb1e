"""The architectures of GGUF files, beside what transformers calls them.

Names and keys are llama.cpp's (gguf-py/gguf/constants.py), what its code takes for granted is in its src/models/.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
_QWEN_WINDOW = {"use_sliding_window": False}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A GGUF architecture as transformers calls it, and where it differs from the others.

    `fields`: of config.json, what the file says of it besides sizes, by its keys. `fixed`: of config.json, what
    llama.cpp takes for granted. `permuted`: llama.cpp reorders the rows of Q and K, so that it rotates neighbours;
    `qkv_bias`: Q, K and V have a bias; `rope_freqs`: the frequencies' divisors of Llama 3 are read; `tied`: whether the
    head is the embedding (None: it may be). `full_every`: every so many layers one sees all, the others a window, unless
    the file says otherwise; `window`: theirs, where it does not say it. `wide_layers`: the model of so many layers scales its attention by hidden_size over its
    heads, not by head_dim.
    """

    model_type: str
    class_name: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    permuted: bool = False
    qkv_bias: bool = False
    rope_freqs: bool = False
    tied: bool | None = None
    full_every: int | None = None
    window: int = 0
    wide_layers: int | None = None

    @property
    def activation(self) -> str:
        return self.fixed.get("hidden_activation", "silu")


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        fixed={"attention_bias": False, "mlp_bias": False},
        permuted=True,
        rope_freqs=True,
    ),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", fixed=_QWEN_WINDOW, qkv_bias=True),
    "qwen3": Architecture(
        model_type="qwen3", class_name="Qwen3ForCausalLM", fixed=_QWEN_WINDOW | {"attention_bias": False}
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        fields=_EXPERTS,
        fixed=_QWEN_WINDOW | {"attention_bias": False, "norm_topk_prob": True},
    ),
    "gemma": Architecture(model_type="gemma", class_name="GemmaForCausalLM", fixed=_GEMMA, tied=True),
    "gemma2": Architecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        fields={name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
        fixed=_GEMMA,
        tied=True,
        full_every=2,
        window=4096,
        wide_layers=46,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        fields={"final_logit_softcapping": "final_logit_softcapping", "rope_local_base_freq": "rope.freq_base_swa"},
        fixed=_GEMMA,
        full_every=6,
        wide_layers=62,
    ),
    "smollm3": Architecture(model_type="smollm3", class_name="SmolLM3ForCausalLM", permuted=True),
    "olmo2": Architecture(model_type="olmo2", class_name="Olmo2ForCausalLM", tied=False),
    "granite": Architecture(
        model_type="granite", class_name="GraniteForCausalLM", fields=_MULTIPLIERS, permuted=True, rope_freqs=True
    ),
}
