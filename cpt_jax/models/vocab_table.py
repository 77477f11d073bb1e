"""The vocabulary as two tables: the base's rows and the new rows.

They are separate weights, so that "train only the new rows" is ordinary freezing: the old rows have no gradient, no
optimizer state and no weight decay. On export they become one table again.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpt_jax.models.linear import Weight
from cpt_jax.models.products import matmul, sum_type


class VocabTable(nnx.Module):
    """Rows [V, D]: `base`, and `new` behind them where the vocabulary has grown."""

    def __init__(self, base_rows: int, new_rows: int, width: int, rngs: nnx.Rngs) -> None:
        self.base_rows, self.new_rows = base_rows, new_rows
        self.base = Weight(0.02 * jax.random.normal(rngs.params(), (base_rows, width)), logical_axes=("vocab", "embed"))
        if new_rows:
            new = 0.02 * jax.random.normal(rngs.params(), (new_rows, width))
            self.new = Weight(new, logical_axes=("new_vocab", "embed"))

    def lookup(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """The tokens' rows, in the type that products with inputs of `dtype` are summed in."""
        wide = sum_type(dtype)
        rows = self.base[...].at[jnp.minimum(tokens, self.base_rows - 1)].get(mode="promise_in_bounds").astype(wide)
        if not self.new_rows:
            return rows
        new = self.new[...].at[jnp.maximum(tokens - self.base_rows, 0)].get(mode="promise_in_bounds").astype(wide)
        return jnp.where((tokens >= self.base_rows)[..., None], new, rows)

    def logits(self, hidden: Float[Array, "*rows D"], dtype: jnp.dtype) -> Float[Array, "*rows V"]:
        """One logit a row of both tables, float32."""
        logits = matmul(hidden, self.base[...].T, dtype)
        if not self.new_rows:
            return logits
        return jnp.concatenate([logits, matmul(hidden, self.new[...].T, dtype)], axis=-1)
