"""What `cpt adapt` does where a step has no room: the batch in parts, then layers computed again."""

import dataclasses
import itertools

import pytest
from inputs import hf_config, tiny_config
from plan.test_plan import SIZES

from cpt_jax.adapt import Full, LoRA
from cpt_jax.core.errors import UserError
from cpt_jax.data.sources import Corpus
from cpt_jax.models.remat import Remat
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.plan.fit import FILLED, fitted
from cpt_jax.plan.paper import on_paper
from cpt_jax.plan.stage import planned_stages
from cpt_jax.recipe.recipe import Domain, Recipe, Stage
from cpt_jax.sharding.mesh import MeshShape

CONFIG = hf_config(tiny_config(**SIZES | dict(new_rows=0)))
ON_EIGHT = MeshShape(replica=2, tensor=2)


def recipe(method, **changes) -> Recipe:
    shape = dict(batch_size=16, sequence_length=256, tokens=10_000, mixture={"text": 1.0})
    stage = Stage(name="stage", method=method, optimizer=AdamW(learning_rate=1e-3), **shape | changes)
    domain = Domain(corpus=Corpus(name="text", spec="text.jsonl"), role="new")
    return Recipe(name="fit", base="base", domains=(domain,), stages=(stage,))


def size(recipe: Recipe) -> float:
    (planned,) = planned_stages(recipe, CONFIG)
    return on_paper(planned, ON_EIGHT.over(8), "cpu").total


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=8), Full()], ids=["lora", "full"])
def test_a_step_is_cut_no_further_than_it_must(method):
    # Four rows at once on the mesh: 16 rows in 1, 2 or 4 parts.
    options = [recipe(method, accumulate=parts) for parts in (1, 2, 4)]
    options += [
        recipe(method, accumulate=4, remat=remat)
        for remat in (Remat(products=True, keep=("attention_out",)), Remat(keep=("attention_out",)), Remat())
    ]
    assert [size(one) > size(two) for one, two in itertools.pairwise(options)] == [True] * 5
    for option in options:
        memory = int(size(option) / FILLED) + 1
        found, said = fitted(recipe(method), CONFIG, memory, ON_EIGHT)
        assert found == option
        assert "likely" not in said
        if option != options[-1]:
            assert fitted(recipe(method), CONFIG, memory - 2, ON_EIGHT)[0] != option
    found, said = fitted(recipe(method), CONFIG, 1000, ON_EIGHT)
    assert found == options[-1]
    assert "likely too much" in said


def test_what_a_stage_says_for_itself_stays():
    for changes in (dict(accumulate=2), dict(remat=Remat())):
        given = recipe(Full(), **changes)
        assert fitted(given, CONFIG, 1000, ON_EIGHT)[0] == given
    # Nor is a batch cut that no mesh can take; the run tells.
    given = recipe(Full(), batch_size=6)
    assert fitted(given, CONFIG, 10**9, ON_EIGHT)[0] == given
    with pytest.raises(UserError, match="does not cover 8 devices"):
        fitted(given, CONFIG, 10**9, MeshShape(replica=3))


def test_kernels_of_few_bits_leave_more_room():
    given = recipe(LoRA(rank=4, alpha=8))
    few = dataclasses.replace(given, precision=dataclasses.replace(given.precision, frozen_kernels="nf4"))
    memory = int(size(given) / FILLED) - 2
    assert fitted(given, CONFIG, memory, ON_EIGHT)[0] != given
    assert fitted(few, CONFIG, memory, ON_EIGHT)[0] == few
