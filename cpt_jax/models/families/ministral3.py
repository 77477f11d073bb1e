"""Ministral 3, text: Mistral with YaRN, whose queries grow with their position."""

import dataclasses
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import mistral
from cpt_jax.models.families.schema import Names, config_of, read
from cpt_jax.models.rope import QueryGrowth

MODEL_TYPES = ("ministral3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, mistral.UNSUPPORTED)
    return with_growth(config_of(hf), hf)


def with_growth(config: DecoderConfig, hf: Any) -> DecoderConfig:
    """With queries that grow with their position."""
    (kind,) = config.layer_kinds
    assert kind.rope is not None
    rope = dataclasses.replace(kind.rope, query_growth=_growth(hf.model_type, hf.rope_parameters))
    return dataclasses.replace(config, layer_kinds=(dataclasses.replace(kind, rope=rope),))


def _growth(model_type: str, parameters: dict[str, Any]) -> QueryGrowth:
    """Without these numbers transformers' model fails."""
    for field in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if not isinstance(value := parameters.get(field), int | float):
            raise UserError(
                f"config.json's rope_parameters have {field}={value!r}: give the number that a {model_type}'s queries grow by"
            )
    return QueryGrowth(
        beta=float(parameters["llama_4_scaling_beta"]),
        original_length=int(parameters["original_max_position_embeddings"]),
    )


def weight_names(config: DecoderConfig) -> Names:
    return mistral.weight_names(config)
