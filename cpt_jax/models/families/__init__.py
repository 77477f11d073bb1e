"""Families: what a released model's config and weight names mean. One file a family."""

from types import ModuleType

from cpt_jax.core.errors import UserError, nearest
from cpt_jax.models.families import llama

FAMILIES: dict[str, ModuleType] = {"llama": llama}


def family_for(hf_config: dict) -> ModuleType:
    """The family of a HF config.json.

    Raises:
      UserError: its model_type is none of ours.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {nearest(model_type, FAMILIES)} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
