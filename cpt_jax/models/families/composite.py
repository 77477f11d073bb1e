"""Models that see or hear as well as read. Their text model is a decoder of ours; what else they have goes along as it
is: text alone never passes through it.
"""

import dataclasses
from collections.abc import Collection
from types import ModuleType
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import schema

_PLAIN = "model."
_EMBEDDING = "embed_tokens.weight"
# Of the language model as most files name it, whatever transformers calls it.
_FILES = "language_model.model."
_HEAD = "lm_head.weight"
# model_type -> where transformers' modules have the text model.
PREFIXES = {
    "gemma3": "model.language_model.",
    "gemma4": "model.language_model.",
    "gemma4_unified": "model.language_model.",
    "idefics3": "model.text_model.",
    "internvl": "model.language_model.",
    "llava": "model.language_model.",
    "llava_next": "model.language_model.",
    "mistral3": "model.language_model.",
    "qwen2_5_vl": "model.language_model.",
    "qwen2_vl": "model.language_model.",
    "qwen3_5": "model.language_model.",
    "qwen3_5_moe": "model.language_model.",
    "qwen3_vl": "model.language_model.",
    "smolvlm": "model.text_model.",
}
# Whose transformers' model caps its logits as its text model does.
_CAPPED = ("gemma4", "gemma4_unified")
# Text models that transformers lists among those that see, and not among those of text.
_LISTED_AS_SEEING = ("mistral4",)
# Text models that are a family's own, but for positions of images. Those of text are the same on all three axes, so that
# their rotation is the plain one.
SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


@dataclasses.dataclass(frozen=True)
class Composite:
    """The family of a text model that lies within another, `prefix` being its place among transformers' modules."""

    text: ModuleType
    prefix: str

    def config_from_hf(self, raw: dict) -> DecoderConfig:
        config = self.text.config_from_hf(_whole_text_config(raw))
        capped = config.logit_softcap is not None and raw["model_type"] not in _CAPPED
        if config.logit_scale is not None or capped:
            raise UserError(
                f"the text model of this {raw['model_type']} scales or caps its logits, which transformers' {raw['model_type']} does not do: it is not supported"
            )
        return config

    def weight_names(self, config: DecoderConfig) -> schema.Names:
        """By the names of transformers' modules, which are those of adapters too; files may have others."""
        return self._names(self.prefix, config)

    def names_in(self, tensors: Collection[str], config: DecoderConfig) -> schema.Names:
        """By the names of a directory's files that hold these tensors."""
        return self._names(self._prefix_in(tensors), config)

    def _prefix_in(self, tensors: Collection[str]) -> str:
        """Where the files that hold these tensors have the text model."""
        found = (prefix for prefix in (self.prefix, _FILES, _PLAIN) if prefix + _EMBEDDING in tensors)
        return next(found, self.prefix)

    def beside(self, tensors: Collection[str], config: DecoderConfig) -> list[str]:
        """The tensors that are not the text model's, and those that it has and nobody reads."""
        prefix = self._prefix_in(tensors)
        unread = tuple(prefix + name.removeprefix(_PLAIN) for name in beginnings_beside(self.text, config))
        others = [name for name in tensors if not (name.startswith(prefix) or name.endswith(_HEAD))]
        return others + [name for name in tensors if name.startswith(prefix) and name.startswith(unread)]

    def _names(self, prefix: str, config: DecoderConfig) -> schema.Names:
        head = f"language_model.{_HEAD}" if prefix == _FILES else _HEAD
        return {
            head if name == _HEAD else prefix + name.removeprefix(_PLAIN): places
            for name, places in self.text.weight_names(config).items()
        }


def beginnings_beside(family: ModuleType, config: DecoderConfig) -> tuple[str, ...]:
    """How the tensors of a family's files begin that go along as they are."""
    return getattr(family, "BESIDE", ()) + (family.unread(config) if hasattr(family, "unread") else ())


def auto_class(raw: dict) -> str:
    """transformers' class that loads a model of this config.json."""
    sees = raw.get("model_type") in (*PREFIXES, *_LISTED_AS_SEEING)
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


def text_fields(raw: dict) -> dict:
    """The part of a config.json that describes the text model: all of it, unless the model is a composite one."""
    return raw.get("text_config", raw) if raw.get("model_type") in PREFIXES else raw


def with_text_fields(raw: dict, fields: dict[str, Any]) -> dict:
    """A config.json of another text model."""
    if (text := text_fields(raw)) is raw:
        return raw | fields
    return raw | {"text_config": text | fields}


def rope_parameters(raw: dict) -> dict[str, Any]:
    """What transformers reads of the text model's rotation; by type of layer, where these have their own."""
    whole = schema.read_whole(raw)
    text = whole.text_config if raw["model_type"] in PREFIXES else whole
    return dict(getattr(text, "rope_parameters", None) or {})


def text_type(raw: dict) -> str:
    """The family of a composite model's text model."""
    found = str(_whole_text_config(raw)["model_type"])
    return SAME_AS.get(found, found)


def _whole_text_config(raw: dict) -> dict:
    """The text model's config.json, with what its makers left to transformers' defaults."""
    if not isinstance(raw.get("text_config", {}), dict):
        raise UserError(f"config.json holds text_config={raw['text_config']!r}, not an object: fetch the model again")
    whole = schema.read_whole(raw)
    text = whole.text_config.to_dict()
    # transformers ties the head by the outer field.
    return text | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
