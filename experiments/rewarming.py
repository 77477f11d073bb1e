"""How should the learning rate begin, and end?

Question: the small base was trained to a tenth of its peak of 3e-3. Continued on Chinese statutes with 5% of English, is the rate to stay where pre-training left it, to rise to a
third of that peak, or to the peak? And does the schedule matter?

Expectation: as Ibrahim et al. (arXiv 2403.08763): without re-warming less is forgotten and less learned (German 1.21 instead of 1.11 at 405M), a higher peak learns more and forgets more; the schedule's form
matters little as long as it ends low.

Result: as expected for the peak; schedules that stay high longer learn more and forget more.

`cpt sweep experiments.rewarming:chinese`: three seeds.
"""

from cpt_jax.optim.schedules import Constant, Cosine, Infinite, Linear, WarmupStableDecay
from cpt_jax.recipe.recipe import Recipe
from experiments.small_base import BUDGET, adapted

SEEDS = (0, 1, 2)
PEAK = BUDGET.learning_rate
WAYS = {
    "stay": (PEAK / 10, Constant(warmup=0.0)),
    "third": (PEAK / 3, Cosine(warmup=0.05, final=0.1)),
    "third-at-once": (PEAK / 3, Cosine(warmup=0.0, final=0.1)),
    "peak": (PEAK, Cosine(warmup=0.05, final=1 / 30)),
    "third-linear": (PEAK / 3, Linear(warmup=0.05, final=0.1)),
    "third-stable": (PEAK / 3, WarmupStableDecay(warmup=0.05)),
    "third-infinite": (PEAK / 3, Infinite(warmup=0.05)),
}


def chinese() -> list[Recipe]:
    return [
        adapted(f"{name}-{seed}", "chinese", 0.05, seed=seed, learning_rate=rate, schedule=schedule)
        for name, (rate, schedule) in WAYS.items()
        for seed in SEEDS
    ]
