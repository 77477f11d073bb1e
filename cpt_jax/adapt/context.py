"""A longer context: what the base's config.json says of positions is changed, and no weight is."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig, LayerKind
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import rope_parameters, text_fields, with_text_fields
from cpt_jax.models.families.layer_kinds import rope_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Pairs that turn slowly are slowed by the factor of the lengths, quick ones kept, and attention is sharpened (Peng et
    al. 2023, arXiv 2309.00071)."""

    def parameters(self, theta: float, old: int, new: int) -> dict[str, Any]:
        del theta
        return {"rope_type": "yarn", "factor": new / old, "original_max_position_embeddings": old}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theta:
    """A larger base of the rotation, with which all pairs but the quickest turn more slowly (Xiong et al. 2023, arXiv
    2309.16039).

    By default theta ** (log(new / 2 pi) / log(old / 2 pi)) of the two lengths (Liu et al. 2023, arXiv 2310.05209): a pair
    that did not turn once within the old length turns no further within the new one than it has been seen to.
    """

    theta: float | None = None

    def parameters(self, theta: float, old: int, new: int) -> dict[str, Any]:
        turns = [math.log(length / (2 * math.pi)) for length in (old, new)]
        # A whole number, in float32: GGUF holds no other.
        least = float(np.float32(math.ceil(theta ** (turns[1] / turns[0]))))
        chosen = least if self.theta is None else self.theta
        if not theta <= chosen < math.inf:
            raise UserError(f"context.rope.theta is {chosen:g}, the base's {theta:g}: give more")
        return {"rope_theta": chosen}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """All positions divided by the factor of the lengths (Chen et al. 2023, arXiv 2306.15595)."""

    def parameters(self, theta: float, old: int, new: int) -> dict[str, Any]:
        del theta
        return {"rope_type": "linear", "factor": new / old}


Positions = Yarn | Theta | Linear
POSITIONS: dict[str, type[Positions]] = {"yarn": Yarn, "theta": Theta, "linear": Linear}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The base is to read `length` tokens, more than it was made for; `rope`: how its positions are stretched."""

    length: int
    rope: Positions = Yarn()

    def over(self, hf_config: dict) -> dict:
        """The config.json of a base that reads so long texts, as transformers 5 writes it and 4 reads it.

        Raises:
          UserError: the base reads as much, stretches positions already, or its positions cannot be stretched so.
        """
        config = family_for(hf_config).config_from_hf(hf_config)
        stretched = self._stretched_kinds(config, str(hf_config["model_type"]))
        given = rope_parameters(hf_config)
        by_layer = any(isinstance(each, Mapping) for each in given.values())
        # Layers with a window, where they have a rotation of their own, see nothing that is further away than before.
        one = dict(given["full_attention"] if by_layer else given)
        theta = next(kind.rope.theta for kind in stretched if kind.rope is not None)
        one |= {"rope_theta": theta} | self.rope.parameters(theta, config.context_length, self.length)
        text = text_fields(hf_config)
        fields: dict[str, Any] = {
            "max_position_embeddings": self.length,
            "rope_parameters": given | {"full_attention": one} if by_layer else one,
            # Of transformers 4.
            "rotary_emb_base" if text.get("model_type") == "gpt_neox" else "rope_theta": one["rope_theta"],
        }
        if one["rope_type"] != "default" or text.get("rope_scaling"):
            fields["rope_scaling"] = {name: value for name, value in one.items() if name != "rope_theta"}
        changed = with_text_fields(hf_config, fields)
        self._check(changed, config, stretched if by_layer else config.layer_kinds, one)
        return changed

    def _stretched_kinds(self, config: DecoderConfig, model_type: str) -> list[LayerKind]:
        """The kinds of layers that a longer context is for."""
        if self.length <= config.context_length:
            raise UserError(
                f"context.length is {self.length:,}, and the base reads {config.context_length:,} tokens: give more, or no context"
            )
        if found := next((rope.scaling for rope in config.ropes if rope.scaling is not None), None):
            raise UserError(
                f"context: the base's positions turn by {type(found).__name__}, and only plain rotary ones are stretched: give another base, or change its config.json by hand"
            )
        whole = [k for k in config.layer_kinds if k.rope and (k.window is None or k.window >= self.length)]
        if not whole:
            raise UserError(
                f"context: no layer of this {model_type} both sees all tokens and turns by their positions: there is nothing to stretch, set max_position_embeddings in its config.json"
            )
        return whole

    def _check(self, changed: dict, config: DecoderConfig, kinds: Any, parameters: dict[str, Any]) -> None:
        """Refuses a config.json that transformers does not read as it is meant."""

        def meant(kind: LayerKind) -> LayerKind:
            if kind.rope is None or kind not in kinds:
                return kind
            rope = rope_of(parameters | {"partial_rotary_factor": None}, kind.rope.dim, self.length)
            return dataclasses.replace(kind, rope=rope)

        try:
            read = family_for(changed).config_from_hf(changed)
        except UserError:
            read = None
        if read is None or read.layer_kinds != tuple(map(meant, config.layer_kinds)):
            raise UserError(
                f"context: transformers' {changed['model_type']} cannot be told of {type(self.rope).__name__}: give context.rope another kind (Yarn, Theta or Linear)"
            )
