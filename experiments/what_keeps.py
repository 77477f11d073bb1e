"""Replay, or something else, to keep what the base knew?

Question: at equal compute, what do moving averages of the weights, a mean teacher, an anchor to the base, L2 to the base, LoRA and averaging with the base keep
of English while the small base learns Chinese statutes, beside replay of 5 and 25%?

Expectation: replay wins at every gain in Chinese; averaging with the base is near it for nothing (arXiv 2501.05559 finds it comparable to a replay buffer); LoRA learns
less and forgets less (arXiv 2405.09673); an anchor keeps much but costs a third of the tokens; the mean teacher of a moving average follows the model into forgetting.

Result: replay wins; L2 to the base comes nearest without old text; moving averages change nothing; averaging with the base and the anchor are far behind, against what was expected.

Equal compute: the same model FLOPs in training (`training.flops`). A teacher's forward pass makes a token 1.33 times as dear, LoRA some 0.7 times; tokens are
fewer or more accordingly. Moving averages come free with every run, averaging with the base is done after training.

`cpt sweep experiments.what_keeps:chinese --exports` (the averages with the base are exports): three seeds.
"""

import dataclasses
from typing import Any

from cpt_jax.adapt import Full, LoRA
from cpt_jax.recipe.recipe import Export, Recipe
from cpt_jax.training.retention import Anchor, L2ToStart, MeanTeacher
from experiments.small_base import BASE, BUDGET, SEQUENCE, adapted

SEEDS = (0, 1, 2)
# (name, share of replay, what else)
WAYS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("nothing", 0.0, {}),
    ("lower-rate", 0.0, {"learning_rate": 3e-4}),
    ("replay-5", 0.05, {}),
    ("replay-25", 0.25, {}),
    ("mean-teacher", 0.0, {"retention": (MeanTeacher(weight=1.0),)}),
    ("anchor", 0.0, {"retention": (Anchor(weight=1.0),)}),
    ("anchor-0.2", 0.0, {"retention": (Anchor(weight=0.2),)}),
    ("l2", 0.0, {"retention": (L2ToStart(weight=1e-3),)}),
    # With a little old text: held to the base on that text alone, or to its weights besides. Not run yet.
    ("anchor-replay-5", 0.05, {"retention": (Anchor(weight=1.0, domains=("english",)),)}),
    ("l2-replay-5", 0.05, {"retention": (L2ToStart(weight=1e-3),)}),
    ("lora-16", 0.0, {"method": LoRA(rank=16, alpha=32), "learning_rate": 2e-3}),
    ("lora-16-replay-5", 0.05, {"method": LoRA(rank=16, alpha=32), "learning_rate": 2e-3}),
)
# Shares of the base in the average.
AVERAGED = (0.25, 0.5, 0.75)


def flops(method: Any, teacher: Any = None) -> float:
    """Model FLOPs a token."""
    from cpt_jax.checkpoint.hf import read_config
    from cpt_jax.models.decoder import abstract_decoder
    from cpt_jax.models.families import family_for
    from cpt_jax.training.flops import token_flops

    config = read_config(BASE)
    network = abstract_decoder(family_for(config).config_from_hf(config), method.lora_config())
    return token_flops(network, method.trains, SEQUENCE, teacher=teacher).total


def _tokens(settings: dict[str, Any]) -> int:
    """As many as cost what the plain run's cost."""
    taught = {MeanTeacher: "average", Anchor: "start"}
    teacher = next((taught[type(part)] for part in settings.get("retention", ()) if type(part) in taught), None)
    return round(BUDGET.tokens * flops(Full()) / flops(settings.get("method", Full()), teacher))


def chinese() -> list[Recipe]:
    runs = []
    for seed in SEEDS:
        for name, replay, settings in WAYS:
            runs.append(adapted(f"{name}-{seed}", "chinese", replay, seed=seed, tokens=_tokens(settings), **settings))
        for share in AVERAGED:
            plain = adapted(f"averaged-{share:g}-{seed}", "chinese", 0.0, seed=seed)
            runs.append(dataclasses.replace(plain, export=Export(interpolate_base=share)))
    return runs
