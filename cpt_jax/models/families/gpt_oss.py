"""gpt-oss: heads with sinks, windows in every other layer, and experts with biases, whose gates and ups are cut off and
lie column by column in turn."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ClampedSwiGLU, ExpertsConfig
from cpt_jax.models.families.schema import (
    NORMS,
    Names,
    Place,
    Rows,
    attention_biases,
    attention_names,
    config_of,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("gpt_oss",)
PARTS = (Rows(2, 0, 1), Rows(2, 1, 2))


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {}, quantised="mxfp4")
    experts = ExpertsConfig(
        count=hf.num_local_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=True,
        # As transformers counts it. Released files have a coefficient of 0.9, which nothing was trained with, and this off.
        balance_coefficient=float(hf.router_aux_loss_coef) if hf.output_router_logits else 0.0,
        bias=True,
        swiglu=ClampedSwiGLU(alpha=float(hf.swiglu_alpha), limit=float(hf.swiglu_limit)),
    )
    # What config.json says of an activation is not looked at.
    return config_of(hf, experts=experts, attention_sinks=True, activation="silu", **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        names |= attention_names(config, layer) | norm_names(config, layer, NORMS)
        names |= {
            f"{prefix}.self_attn.sinks": (Place("layers/attention/sinks", (layer,)),),
            f"{prefix}.mlp.router.weight": (Place("layers/mlp/router", (layer,), True),),
            f"{prefix}.mlp.router.bias": (Place("layers/mlp/router_bias", (layer,)),),
        }
        names |= _experts_names(config, layer, f"{prefix}.mlp.experts")
    return names


def _experts_names(config: DecoderConfig, layer: int, prefix: str) -> Names:
    """Stacks [E, inputs, outputs] and [E, outputs]."""
    assert config.experts is not None
    kernels: dict[str, list[Place]] = {"gate_up_proj": [], "down_proj": []}
    biases: dict[str, list[Place]] = {"gate_up_proj_bias": [], "down_proj_bias": []}
    for expert in range(config.experts.count):
        index = (layer, expert)
        for name, rows in zip(("gate", "up"), PARTS, strict=True):
            kernels["gate_up_proj"].append(Place(f"layers/mlp/{name}/kernel", index, member=expert, columns=rows))
            biases["gate_up_proj_bias"].append(Place(f"layers/mlp/{name}/bias", index, rows=rows, member=expert))
        kernels["down_proj"].append(Place("layers/mlp/down/kernel", index, member=expert))
        biases["down_proj_bias"].append(Place("layers/mlp/down/bias", index, member=expert))
    return {f"{prefix}.{name}": tuple(places) for name, places in (kernels | biases).items()}
