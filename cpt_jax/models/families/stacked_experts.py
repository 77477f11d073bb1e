"""The experts of a layer as files may hold them: one by one, or all in two stacks, as transformers 5 has them in memory."""

import dataclasses
import re
from collections.abc import Collection

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import Names, Rows

_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def with_stacks(names: Names, tensors: Collection[str], config: DecoderConfig, always: bool = False) -> Names:
    """Names of experts one by one, with stacks in the place of those that are among `tensors` as stacks (of all, if
    `always`): gate_up_proj [E, 2 inner, D] and down_proj [E, D, inner]."""
    inner, found = config.expert_size, dict[str, tuple]()
    kinds = {
        "gate_proj": ("gate_up_proj", Rows(2 * inner, 0, inner)),
        "up_proj": ("gate_up_proj", Rows(2 * inner, inner, 2 * inner)),
        "down_proj": ("down_proj", None),
    }
    for name, places in names.items():
        if (match := _ONE.fullmatch(name)) is not None:
            stack, rows = kinds[match[3]]
            if always or (whole := f"{match[1]}.{stack}") in tensors:
                whole = f"{match[1]}.{stack}"
                name, before = whole, found.get(whole, ())
                places = (*before, *(dataclasses.replace(p, rows=rows, member=int(match[2])) for p in places))
        found[name] = places
    return found
