"""Which experts a token goes through, and with which weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_experts import EXPERTS

from cpt_jax.adapt import ByPath, Full
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.router import RouterConfig

LOGITS = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(0, 0.3, 12).astype(np.float32)


def chosen_one_by_one(scores, bias, groups, chosen_groups, per_token):
    """Of one token, as DeepSeek-V3's report has it."""
    wanted = scores + bias
    size = len(wanted) // groups
    best = [sorted(wanted[n * size : (n + 1) * size])[-2:] for n in range(groups)]
    kept = sorted(range(groups), key=lambda group: -sum(best[group]))[:chosen_groups]
    among = [expert for group in kept for expert in range(group * size, (group + 1) * size)]
    return sorted(among, key=lambda expert: -wanted[expert])[:per_token]


@pytest.mark.parametrize(("groups", "chosen_groups"), [(1, 1), (4, 2), (3, 3)])
def test_a_bias_and_groups_decide_the_choice_and_scores_the_weights(groups, chosen_groups):
    router = RouterConfig(
        scores="sigmoid", correction_bias=True, groups=groups, chosen_groups=chosen_groups, scale=2.5, epsilon=0.5
    )
    scores = router.scores_of(jnp.asarray(LOGITS))
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-LOGITS)), rtol=1e-5)
    plain, numbers = router.choice(scores, jnp.asarray(BIAS), 3, False)
    normed, _ = router.choice(scores, jnp.asarray(BIAS), 3, True)
    for token in range(len(LOGITS)):
        of_token = np.asarray(scores[token])
        expected = chosen_one_by_one(of_token, BIAS, groups, chosen_groups, 3)
        assert numbers[token].tolist() == expected
        np.testing.assert_allclose(plain[token], 2.5 * of_token[expected], rtol=1e-5)
        np.testing.assert_allclose(
            normed[token], 2.5 * of_token[expected] / (of_token[expected].sum() + 0.5), rtol=1e-5
        )
    without, _ = router.choice(scores, jnp.zeros(12), 3, False)
    assert (np.asarray(without) != np.asarray(plain)).any()


def test_no_gradient_reaches_the_bias_and_what_is_balanced_are_shares():
    router = RouterConfig(scores="sigmoid", correction_bias=True)

    def weighed(logits, bias):
        shares, _ = router.choice(router.scores_of(logits), bias, 3, True)
        return (shares * jnp.arange(3.0)[None]).sum()

    of_logits, of_bias = jax.grad(weighed, argnums=(0, 1))(jnp.asarray(LOGITS), jnp.asarray(BIAS))
    assert of_logits.any()
    assert not of_bias.any()
    for each in (router, RouterConfig()):
        shares = each.probabilities(each.scores_of(jnp.asarray(LOGITS)))
        np.testing.assert_allclose(shares.sum(-1), 1.0, rtol=1e-5)


def test_a_correction_bias_never_trains_and_stays_float32():
    path = "layers/mlp/correction_bias"
    assert not Full().trains(path)
    assert not ByPath(patterns=("layers/mlp/*",)).trains(path)
    assert Full().trains("layers/mlp/router")
    assert Precision(compute="bfloat16").dtype_of(path) == jnp.float32


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (dict(groups=2, chosen_groups=3), "topk_group 3 is not between 1 and n_group 2"),
        (dict(groups=5), "n_group is 5: 12 experts are no groups of the same size"),
        (dict(groups=12), "n_group is 12: 12 experts are no groups of the same size, of 2 at least"),
        (dict(groups=6, chosen_groups=1), "num_experts_per_tok 3 is more than the 2 experts of topk_group=1 groups"),
    ],
)
def test_groups_hold_what_is_chosen(router, said):
    with pytest.raises(UserError, match=said):
        ExpertsConfig(count=12, per_token=3, renormalise=True, balance_coefficient=0.0, router=RouterConfig(**router))
    assert EXPERTS.router == RouterConfig()
