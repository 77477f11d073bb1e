"""How much replay?

Question: the small base (12.8M parameters, English) reads 2M more tokens, of which a share is English again and the rest Chinese statutes (far) or Python (near).
What does English cost in bits per byte at the end, and what does the new domain?

Expectation: the shape that Ibrahim et al. (arXiv 2403.08763) saw at 405M, English to German: of the forgetting without replay, 1% of replay removes 52%, 5% 71%, 10% 79%,
25% 88%, 50% 95%, at almost no cost for the new language until 10%. Less is forgotten with code, which documentation has some of.

Result: Chinese: 1% removes 65% of the forgetting, 5% 73%, 10% 80%, 25% 88%, 50% 94%; the cost in Chinese is 0.7, 1.7, 3.4, 8 and 19%. Code forgets less, and replay removes less of it: 33, 52, 62, 77, 88%
(experiments/README.md).

`cpt sweep experiments.replay_share:chinese` and `:code`: six shares, three seeds (other batches), the same number of tokens in all. `:smollm2`: the same texts and tokens for a released model of
ten times the size, with the same settings; what it was trained on is not known, and English stands for it. For an accelerator; so far 0, 1 and 5%, one seed each: 1% takes back more than was forgotten, since the
documentation is new to it too.
"""

import dataclasses

from configs.quickstart_inputs import DIRECTORY as QUICKSTART
from cpt_jax.recipe.recipe import Recipe
from experiments.small_base import adapted

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
SEEDS = (0, 1, 2)


def _runs(new: str) -> list[Recipe]:
    return [adapted(f"{new}-{share:.0%}-{seed}", new, share, seed=seed) for seed in SEEDS for share in SHARES]


def chinese() -> list[Recipe]:
    return _runs("chinese")


def code() -> list[Recipe]:
    return _runs("code")


def smollm2() -> list[Recipe]:
    base = str(QUICKSTART / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return [dataclasses.replace(run, base=base, name=f"smollm2-{run.name}") for run in chinese()]
