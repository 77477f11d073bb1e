"""Families: what a released model's config and weight names mean. One file a family."""

from types import ModuleType

from cpt_jax.core.errors import UserError, nearest
from cpt_jax.models.families import (
    apertus,
    arcee,
    cohere,
    cohere2,
    composite,
    cwm,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    exaone_moe,
    falcon_h1,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    lfm2,
    lfm2_moe,
    lfm3,
    llama,
    minicpm3,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    solar_open,
    stablelm,
    starcoder2,
    youtu,
)
from cpt_jax.models.families.composite import Composite

_FILES = (
    apertus,
    arcee,
    cohere,
    cohere2,
    cwm,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    exaone_moe,
    falcon_h1,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    lfm2,
    lfm2_moe,
    lfm3,
    llama,
    minicpm3,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    solar_open,
    stablelm,
    starcoder2,
    youtu,
)
# By config.json's model_type. A family has `config_from_hf(raw)` and `weight_names(config)`, by the names of files;
# MODULES and EXPERTS, where transformers' modules and its experts' are called otherwise; NOT_ADAPTED, which modules PEFT
# refuses; BESIDE (or `unread(config)`), how tensors begin that go along as they are; STACKED, where its experts always
# lie in stacks; and PARTS, which of a stack's outputs are gates and which ups, where these do not lie behind those.
FAMILIES: dict[str, ModuleType] = {model_type: file for file in _FILES for model_type in file.MODEL_TYPES}


def family_for(hf_config: dict) -> ModuleType | Composite:
    """The family of a HF config.json.

    Raises:
      UserError: its model_type, or that of its text model, is none of ours, or it is no object.
    """
    if not isinstance(hf_config, dict):
        raise UserError(f"config.json holds a {type(hf_config).__name__}, not an object: fetch the model again")
    model_type = str(hf_config.get("model_type"))
    if model_type in composite.PREFIXES:
        text_type = composite.text_type(hf_config)
        if text_type not in FAMILIES:
            raise UserError(
                f"the text model of this {model_type}, {text_type}, is not supported; supported: {', '.join(sorted(FAMILIES))}"
            )
        return Composite(FAMILIES[text_type], composite.PREFIXES[model_type])
    if model_type not in FAMILIES:
        code = " (its own code, auto_map, is never executed)" if "auto_map" in hf_config else ""
        supported = sorted([*FAMILIES, *composite.PREFIXES])
        raise UserError(
            f"model_type {nearest(model_type, supported)} is not supported{code}; supported: {', '.join(supported)}"
        )
    return FAMILIES[model_type]
