"""An optimizer's settings as JSON, as overrides, and those that cannot be."""

import dataclasses
import json

import pytest
from optimizer_inputs import OPTIMIZERS

from cpt_jax.adapt import Full
from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Adafactor, AdamW, Lion, Muon, Optimizer
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.find import apply_overrides
from cpt_jax.recipe.recipe import Domain, Recipe, Stage


def recipe(optimizer: Optimizer) -> Recipe:
    stage = Stage(
        name="all", method=Full(), mixture={"zh": 1.0}, tokens=1024, batch_size=2, sequence_length=64,
        optimizer=optimizer, schedule=Cosine(),
    )  # fmt: skip
    return Recipe(
        name="r", base="base", domains=(Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new"),), stages=(stage,)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_configuration_is_json_and_overrides_name_the_fields_of_the_optimizer_at_hand(name):
    changed = dataclasses.replace(OPTIMIZERS[name], skip_above=10.0, moments="bfloat16")
    assert from_json(Optimizer, json.loads(json.dumps(to_json(changed)))) == changed
    given = recipe(changed)
    assert from_json(Recipe, json.loads(json.dumps(to_json(given)))) == given
    own = {"adamw": "b1", "adafactor": "decay_rate", "lion": "b2", "muon": "beta"}[name]
    for field, text, value in ((own, "0.5", 0.5), ("skip_above", "None", None), ("lora_b_multiplier", "4", 4.0)):
        overridden = apply_overrides(given, [f"--stages.0.optimizer.{field}", text])
        assert overridden.stages[0].optimizer == dataclasses.replace(changed, **{field: value})
    other = "beta" if name != "muon" else "b1"
    with pytest.raises(UserError, match=other):
        apply_overrides(given, [f"--stages.0.optimizer.{other}", "0.5"])


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (AdamW, dict(learning_rate=0.0)),
        (AdamW, dict(clip_norm=0.0)),
        (AdamW, dict(b1=1.0)),
        (AdamW, dict(lora_b_multiplier=-1.0)),
        (AdamW, dict(moments="int8")),
        (AdamW, dict(skip_above=1.0)),
        (AdamW, dict(max_skipped=0)),
        (Adafactor, dict(decay_rate=0.0)),
        (Adafactor, dict(momentum=1.0)),
        (Adafactor, dict(min_dim_size_to_factor=0)),
        (Lion, dict(b2=-0.1)),
        (Muon, dict(newton_schulz_steps=0)),
        (Muon, dict(adam_epsilon=0.0)),
        (Muon, dict(weight_decay=-0.1)),
    ],
)
def test_a_setting_that_cannot_be_is_refused_where_it_is_made(make, changes):
    ((field, value),) = changes.items()
    with pytest.raises(UserError, match=f"{field} is {value}: give"):
        make(**(dict(learning_rate=1e-3) | changes))


@pytest.mark.parametrize("changes", [dict(decay=1.0), dict(decay=-0.1), dict(every=0)], ids=str)
def test_an_average_that_cannot_be_is_refused(changes):
    ((field, value),) = changes.items()
    with pytest.raises(UserError, match=f"EMA {field} is {value}: give"):
        EMA(**changes)
