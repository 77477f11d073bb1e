"""How a config.json says what its layers differ in: windows and rotations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import LayerKind, Mixer
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.rope import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Rope, Scaling, Yarn
from cpt_jax.models.side_by_side import SideBySideConfig


def rope_of(parameters: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """The rotation that `rope_parameters` describe (of the whole model, or of one type of layer).

    Raises:
      UserError: a type that is not supported, a field that is missing or no number.
    """
    kind, factor = parameters.get("rope_type", "default"), parameters.get("factor")
    original = int(parameters.get("original_max_position_embeddings") or context)
    scaling: Scaling | None = None
    share = 1.0 if (given := parameters.get("partial_rotary_factor")) is None else given
    try:
        dim = int(head_dim * share)
        match kind:
            case "default":
                pass
            case "linear":
                scaling = Linear(factor=float(parameters["factor"]))
            case "dynamic":
                scaling = DynamicNTK(factor=float(parameters["factor"]), original_length=context)
            case "llama3":
                scaling = Llama3(
                    factor=float(parameters["factor"]),
                    low_frequency_factor=float(parameters["low_freq_factor"]),
                    high_frequency_factor=float(parameters["high_freq_factor"]),
                    original_length=original,
                )
            case "yarn":
                factor = float(factor or context / original)
                scaling = Yarn(
                    factor=factor,
                    original_length=original,
                    attention_factor=_yarn_attention(parameters, factor),
                    beta_fast=float(parameters.get("beta_fast") or 32),
                    beta_slow=float(parameters.get("beta_slow") or 1),
                    truncate=bool(parameters.get("truncate", True)),
                )
            case "longrope":
                factor = float(factor or context / original)
                scaling = LongRoPE(
                    short_factor=tuple(map(float, parameters["short_factor"])),
                    long_factor=tuple(map(float, parameters["long_factor"])),
                    original_length=original,
                    attention_factor=_longrope_attention(parameters, factor, original),
                )
            case "proportional":
                dim, scaling = head_dim, Proportional(pairs=int(share * head_dim // 2), factor=float(factor or 1))
            case _:
                raise UserError(
                    f"config.json asks for RoPE of type {kind!r}, which is not supported (linear, dynamic, llama3, yarn, longrope, proportional are)"
                )
        return Rope(theta=float(parameters["rope_theta"]), dim=dim, scaling=scaling)
    except KeyError as error:
        raise UserError(f"config.json asks for RoPE of type {kind!r} without {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json's RoPE of type {kind!r} has a field that is no number: {error}") from error


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN scales what a rotation stretched by `factor` flattens."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    whole, part = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if whole and part:
        return yarn_magnitude(factor, whole) / yarn_magnitude(factor, part)
    return yarn_magnitude(factor)


def _longrope_attention(parameters: Mapping[str, Any], factor: float, original: int) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def kinds_of(
    read: Any, head_dim: int, rotated: Sequence[bool] | None, partly_rotated: bool, mixers: Mapping[str, Mixer]
) -> dict[str, Any]:
    """`layer_kinds` and `layer_pattern` of a config as transformers reads it.

    What its class has no field for (a Llama's window, left over from the model that it was made of), its model does not
    look at, though it is an attribute too.

    Args:
      rotated: which layers turn queries and keys (None: all).
      partly_rotated: a part of each head may be turned, whatever the class's defaults.
      mixers: by the layers' type, what mixes tokens where that is not attention.

    Raises:
      UserError: a rotation of a part of each head, in a family that turns whole heads.
    """
    known = type(read)()
    window, types = (
        getattr(read, name) if hasattr(known, name) else None for name in ("sliding_window", "layer_types")
    )
    context, parameters = read.max_position_embeddings, getattr(read, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, Mapping))):
        part, known_to = each.get("partial_rotary_factor"), partly_rotated or each.get("rope_type") == "proportional"
        if part not in (None, 1) and not known_to and "partial_rotary_factor" not in known.rope_parameters:
            raise UserError(
                f"config.json has partial_rotary_factor={part}, which is not supported for model_type {read.model_type}"
            )
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(types or ()) - windows.keys() - mixers.keys()):
        supported = ", ".join((*windows, *mixers))
        raise UserError(f"config.json has layer_types of kind {unknown[0]!r}; supported: {supported}")

    def kind_of(layer: int) -> LayerKind:
        kind = None if types is None else types[layer]
        mixer = mixers.get("full_attention" if kind is None else kind)
        if mixer is not None and not isinstance(mixer, GlobalAttention | LatentAttentionConfig | SideBySideConfig):
            return LayerKind(rope=None, mixer=mixer)
        dim = mixer.head_dim if isinstance(mixer, GlobalAttention) else head_dim
        turns = rotated is None or rotated[layer]
        return LayerKind(
            window=window if kind is None else windows.get(kind),
            rope=rope_of(parameters.get(kind, parameters), dim, context) if turns else None,
            mixer=mixer,
        )

    layers = [kind_of(layer) for layer in range(read.num_hidden_layers)]
    kinds = tuple(dict.fromkeys(layers))
    return {"layer_kinds": kinds, "layer_pattern": tuple(map(kinds.index, layers)) if len(kinds) > 1 else None}
