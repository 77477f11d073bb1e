"""Norms trained besides an adapter: PEFT keeps them whole, as modules_to_save."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cpt_jax.checkpoint.peft.modules import PREFIX, in_memory
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import family_for
from cpt_jax.models.families.schema import Place


def norm_places(config: DecoderConfig, hf_config: dict) -> dict[str, Place]:
    """The tensors of a model's norms."""
    family = family_for(hf_config)
    names = family.weight_names(config)
    return {in_memory(family, name): places[0] for name, places in names.items() if is_norm(places[0].path)}


def is_norm(path: str) -> bool:
    return path.rpartition("/")[0].endswith("norm")


def norms_part(
    config: DecoderConfig, hf_config: dict, flat: Mapping[str, Any], dtype: np.dtype
) -> tuple[list[str], dict[str, np.ndarray]]:
    """All norms: their entries in modules_to_save, and tensors."""
    places = norm_places(config, hf_config)
    modules = dict.fromkeys(name.split(".")[-2] for name in places)
    tensors = {PREFIX + name: np.asarray(flat[place.path][place.index or ...], dtype) for name, place in places.items()}
    return list(modules), tensors


def asked_norms(config: DecoderConfig, hf_config: dict, modules: Iterable[str]) -> tuple[dict[str, Place], set[str]]:
    """(tensors of the norms that modules_to_save asks for, which of its entries do).

    PEFT compares the ends of names, without regard to dots: "norm" asks for "input_layernorm" too.
    """
    places = norm_places(config, hf_config)
    asked = {entry: [name for name in places if name.rpartition(".")[0].endswith(entry)] for entry in modules}
    return {name: places[name] for names in asked.values() for name in names}, {
        e for e, found in asked.items() if found
    }


def with_norms(weights: Tree, norms: Mapping[Place, np.ndarray]) -> Tree:
    """The weights with these vectors in the place of theirs."""
    flat = flatten(weights)
    changed = {place.path: np.array(flat[place.path], np.float32) for place in norms}
    for place, values in norms.items():
        changed[place.path][place.index or ...] = values
    return unflatten(flat | changed)
