"""Blocks added to the model, which alone train (LLaMA Pro: Wu et al. 2024, arXiv 2401.02415)."""

import dataclasses
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import Composite, text_fields, with_text_fields
from cpt_jax.models.linear import CONSTANTS, LoRAConfig
from cpt_jax.models.vocab_table import NEW_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expand:
    """Copies of `blocks` blocks, at equal distances, each behind its original; their output projections (or the norms
    behind these, where a model has them) begin at zero, so that the model's logits are unchanged. The copies train, and
    besides the new rows, where there are any; the model stays that much deeper."""

    blocks: int
    new_rows: bool = True

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"Expand: blocks is {self.blocks}: give at least 1")

    def lora_config(self) -> LoRAConfig | None:
        return None

    def order(self, num_layers: int) -> tuple[tuple[int, bool], ...]:
        """The layers of the deeper model: (which of the given layers, whether it is the added copy)."""
        copied = set(self._copied(num_layers))
        return tuple((n, copy) for n in range(num_layers) for copy in (False, True) if not copy or n in copied)

    def _copied(self, num_layers: int) -> list[int]:
        if self.blocks > num_layers:
            raise UserError(f"Expand: blocks is {self.blocks}, but the model has {num_layers} layers to copy")
        return [(number + 1) * num_layers // self.blocks - 1 for number in range(self.blocks)]

    def layout(self, config: DecoderConfig) -> DecoderConfig:
        if config.sharing_layers or config.layer_input_size is not None:
            raise UserError(
                "Expand: this model's layers take keys and values of others, or have columns of a second vocabulary, which copies would not have: train with LoRA or Full"
            )
        pattern, groups, first = config.layer_pattern, [], 0
        for number, copied in enumerate(self._copied(config.num_layers)):
            groups += [(f"kept_{number}", copied + 1 - first), (f"added_{number}", 1)]
            first = copied + 1
        order = self.order(config.num_layers)
        dense = sum(layer < config.dense_layers for layer, _ in order)
        return dataclasses.replace(
            config,
            num_layers=len(order),
            dense_layers=dense,
            layer_pattern=None if pattern is None else tuple(pattern[layer] for layer, _ in order),
            layer_groups=tuple(groups),
        )

    def trains(self, path: str) -> bool:
        added = path.startswith("layers/added_") and not path.endswith(CONSTANTS)
        return added or (self.new_rows and path in NEW_ROWS)


def usual_blocks(layers: int) -> int:
    """LLaMA Pro adds 8 blocks to 32."""
    return max(1, layers // 4)


def expanded_hf_config(hf_config: dict, config: DecoderConfig) -> dict:
    """The config.json of the deeper model, each copy of its original's kind.

    Raises:
      UserError: config.json cannot say which kind each layer is.
    """
    fields: dict[str, Any] = {"num_hidden_layers": config.num_layers}
    kinds = config.kind_of_layer
    if config.layer_pattern is not None or text_fields(hf_config).get("layer_types"):
        fields["layer_types"] = [kind.layer_type for kind in kinds]
    family = family_for(hf_config)
    text = family.text if isinstance(family, Composite) else family
    if hasattr(text, "layer_fields"):
        fields |= text.layer_fields(config)
    grown = with_text_fields(hf_config, fields)
    read = family_for(grown).config_from_hf(grown)
    for field in ("num_layers", "dense_layers", "layer_kinds", "layer_pattern"):
        if getattr(read, field) != getattr(config, field):
            raise UserError(f"Expand: the config.json of {hf_config['model_type']} cannot describe the deeper model")
    return grown
