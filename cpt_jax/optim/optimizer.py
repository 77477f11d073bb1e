"""AdamW over what trains, with settings of its own for the new rows of the vocabulary."""

import dataclasses

import optax

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), gradients clipped by their global norm over what trains.

    New rows are special. A row that is absent from a batch still gets a gradient from the softmax, some thousand
    times smaller than one that is present, and Adam would scale both to full steps: every step would move every row,
    at random. `new_rows_epsilon` (against gradients of the mean loss) is what separates the two. Their learning rate is
    `new_rows_multiplier` times the others'. Weight decay is for matrices of the layers only, never for vectors,
    adapters or the vocabulary's rows.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    new_rows_multiplier: float = 1.0
    new_rows_epsilon: float = 5e-5

    def __post_init__(self) -> None:
        for field in ("learning_rate", "epsilon", "clip_norm", "new_rows_multiplier", "new_rows_epsilon"):
            if not getattr(self, field) > 0:
                raise UserError(f"optimizer {field} is {getattr(self, field)}: give a number above 0")
        if self.weight_decay < 0:
            raise UserError(f"optimizer weight_decay is {self.weight_decay}: give 0 or more")

    def build(self, schedule: optax.Schedule, trainable: Tree) -> optax.GradientTransformation:
        """The transformation for a tree of trainable leaves; `schedule` gives the learning rate by step."""
        groups = unflatten(
            {path: "new_rows" if path in ("embed/new", "head/new") else "rest" for path in flatten(trainable)}
        )
        decayed = unflatten(
            {path: path.startswith("layers/") and path.endswith("/kernel") for path in flatten(trainable)}
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.partition(
                {
                    "rest": optax.scale_by_adam(self.b1, self.b2, self.epsilon),
                    "new_rows": optax.chain(
                        optax.scale_by_adam(self.b1, self.b2, self.new_rows_epsilon),
                        optax.scale(self.new_rows_multiplier),
                    ),
                },
                groups,
            ),
            optax.add_decayed_weights(self.weight_decay, mask=decayed) if self.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )
