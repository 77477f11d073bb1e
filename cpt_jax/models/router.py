"""The router of a mixture of experts: which experts a token goes through, and how much each of them counts."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Experts are chosen, and weighted, by their `scores`: a softmax over all of them, or a sigmoid of each.

    With a `correction_bias` they are chosen by score + bias, which does not weigh them: it is how such models balance
    their load (Wang et al. 2024, arXiv 2408.15664), and it does not train here. With several `groups` only the experts of
    `chosen_groups` can be chosen, those whose `best_of_group` best add up to most (2 in DeepSeek-V3, arXiv 2412.19437; 1
    in V2, arXiv 2405.04434). `epsilon` is added to
    the sum by which weights are renormalised; `scale` multiplies them in the end.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    best_of_group: int = 2
    epsilon: float = 0.0
    scale: float = 1.0

    def check(self, count: int, per_token: int) -> None:
        """Whether it can choose so many of so many experts.

        Raises:
          UserError: it cannot.
        """
        if not 1 <= self.chosen_groups <= self.groups:
            raise UserError(f"topk_group {self.chosen_groups} is not between 1 and n_group {self.groups}")
        if self.groups == 1:
            return
        size = count // self.groups
        if count % self.groups or size < self.best_of_group:
            raise UserError(
                f"n_group is {self.groups}: {count} experts are no groups of the same size, of {self.best_of_group} at least"
            )
        if per_token > size * self.chosen_groups:
            raise UserError(
                f"num_experts_per_tok {per_token} is more than the {size * self.chosen_groups} experts of topk_group={self.chosen_groups} groups"
            )

    def scores_of(self, logits: Float[Array, "N E"]) -> Float[Array, "N E"]:
        return jax.nn.softmax(logits, axis=-1) if self.scores == "softmax" else jax.nn.sigmoid(logits)

    def probabilities(self, scores: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """Scores that sum to 1, by which the load is balanced (DeepSeek-V3, equation 19)."""
        return scores if self.scores == "softmax" else scores / scores.sum(-1, keepdims=True)

    def choice(
        self, scores: Float[Array, "N E"], bias: Float[Array, "E"] | None, per_token: int, renormalise: bool
    ) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
        """(weights, numbers) of each token's experts."""
        wanted = jax.lax.stop_gradient(scores)
        if bias is not None:
            wanted += bias.astype(scores.dtype)[None]
        if self.groups > 1:
            grouped = wanted.reshape(wanted.shape[0], self.groups, -1)
            best = jax.lax.top_k(grouped, self.best_of_group)[0].sum(-1)
            _, kept = jax.lax.top_k(best, self.chosen_groups)
            among = jax.nn.one_hot(kept, self.groups, dtype=bool).any(1)
            wanted = jnp.where(among[..., None], grouped, -jnp.inf).reshape(wanted.shape)
        _, chosen = jax.lax.top_k(wanted, per_token)
        shares = jnp.take_along_axis(scores, chosen, axis=-1)
        if renormalise:
            shares /= shares.sum(-1, keepdims=True) + self.epsilon
        return shares * self.scale, chosen
