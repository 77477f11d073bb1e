"""The vocabulary as two tables: the base's rows and the new rows.

They are separate weights, so that "train only the new rows" is ordinary freezing: the old rows have no gradient, no
optimizer state and no weight decay. On export they become one table again.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpt_jax.models.cut_vocabulary import looked_up
from cpt_jax.models.linear import Weight
from cpt_jax.models.products import matmul, sum_type

# The decoder's tables: the input's, the head's, and that of the layers' own inputs.
TABLES = ("embed", "head", "layer_embed")
BASE_ROWS = tuple(f"{table}/base" for table in TABLES)
NEW_ROWS = tuple(f"{table}/new" for table in TABLES)


class VocabTable(nnx.Module):
    """Rows [V, D]: `base`, and `new` behind them where the vocabulary has grown; each may end in padding. D is `width`
    (default: that of the hidden states), and what is looked up is multiplied by `scale`."""

    def __init__(self, config, rngs: nnx.Rngs, *, width: int | None = None, scale: float | None = None) -> None:
        self.base_rows, self.new_rows = config.vocab_size, config.new_rows
        self.scale, self.softcap, self.large = scale, config.logit_softcap, width is not None

        def rows(count: int) -> Float[Array, "V D"]:
            return 0.02 * jax.random.normal(rngs.params(), (config.padded(count), width or config.hidden_size))

        self.base = Weight(rows(self.base_rows), logical_axes=("vocab", "embed"))
        if self.new_rows:
            self.new = Weight(rows(self.new_rows), logical_axes=("new_vocab", "embed"))

    def lookup(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """The tokens' rows, scaled as the model scales them, in the type that products with inputs of `dtype` are summed in."""
        wide = sum_type(dtype)
        old = jnp.minimum(tokens, self.base_rows - 1)
        rows = looked_up(self.base[...], old, 0, large=self.large).astype(wide)
        if self.new_rows:
            new = looked_up(self.new[...], jnp.maximum(tokens - self.base_rows, 0), 1).astype(wide)
            rows = jnp.where((tokens >= self.base_rows)[..., None], new, rows)
        return rows if self.scale is None else rows * jnp.asarray(self.scale, wide)

    def logits(self, hidden: Float[Array, "*rows D"], dtype: jnp.dtype) -> Float[Array, "*rows V"]:
        """One logit a token, float32, capped as the model caps them: rows that are padding have none."""
        logits = matmul(hidden, self.base[...].T, dtype)[..., : self.base_rows]
        if self.new_rows:
            logits = jnp.concatenate([logits, matmul(hidden, self.new[...].T, dtype)[..., : self.new_rows]], axis=-1)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
