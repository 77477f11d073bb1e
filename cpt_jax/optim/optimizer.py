"""The optimizers, over what trains: AdamW, Adafactor, Lion, Muon, with settings of their own for groups of weights."""

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.optim.groups import Group, group_of
from cpt_jax.optim.per_layer import per_layer
from cpt_jax.optim.skipping import skip_bad_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """What all optimizers share: learning rates by group, clipping, decay, and bad steps.

    New rows of the vocabulary get AdamW, whatever the others get. A row that is absent from a batch still gets a
    gradient from the softmax, some thousand times smaller than one that is present, and an optimizer that scales by
    the gradient's own size (Adam) or sign (Lion) would move every row by full steps, at random. `new_rows_epsilon`
    (against gradients of the mean loss) is what separates the two.

    `learning_rate` is multiplied by `new_rows_multiplier` for these rows, by `old_rows_multiplier` for the base's, and
    by `lora_b_multiplier` for LoRA's second factor, lr_B = ratio * lr_A (LoRA+: Hayou et al. 2024, arXiv 2402.12354).
    Decoupled weight decay is for matrices of the layers only, never for vectors or the vocabulary's rows; with
    `decay_adapters`, for LoRA's factors too.

    Gradients are clipped by their global norm over what trains. A step whose norm is not finite is skipped; with
    `skip_above`, also one whose norm is that many times the usual one. `max_skipped` in a row are too many.

    `moments`: the type that first moments (momentum) are kept in; second moments, which bfloat16 is too coarse for at
    b2 = 0.99, stay float32. There is no 8-bit kind (Dettmers et al. 2022, arXiv 2110.02861): neither optax nor another
    maintained library for JAX has one.
    """

    learning_rate: float
    weight_decay: float = 0.0
    decay_adapters: bool = False
    clip_norm: float = 1.0
    old_rows_multiplier: float = 1.0
    new_rows_multiplier: float = 1.0
    new_rows_epsilon: float = 5e-5
    lora_b_multiplier: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"
    skip_above: float | None = None
    max_skipped: int = 10

    def __post_init__(self) -> None:
        multipliers = ("old_rows_multiplier", "new_rows_multiplier", "lora_b_multiplier")
        for field in ("learning_rate", "clip_norm", "new_rows_epsilon", *multipliers):
            self._check(field, getattr(self, field) > 0, "a number above 0")
        self._check("weight_decay", self.weight_decay >= 0, "0 or more")
        self._check("moments", self.moments in ("float32", "bfloat16"), "float32 or bfloat16")
        self._check("skip_above", self.skip_above is None or self.skip_above > 1, "a multiple above 1, or None")
        self._check("max_skipped", self.max_skipped >= 1, "at least 1")

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"optimizer {field} is {getattr(self, field)}: give {expected}")

    def _check_decays(self, *fields: str) -> None:
        for field in fields:
            self._check(field, 0 <= getattr(self, field) < 1, "a number from 0 up to, not including, 1")

    def build(self, trainable: Tree) -> optax.GradientTransformation:
        """From gradients of a tree of trainable leaves to directions, which the learning rate is still to multiply.

        Its state keeps what belongs to a weight under the weight's path, behind names of groups.
        """
        leaves = flatten(trainable)
        groups: dict[str, Group] = {path: group_of(path) for path in leaves}
        # Sorted: every process must trace the same program.
        transforms: dict[Hashable, optax.GradientTransformation] = {
            group: self._of_group(group, {path: leaf for path, leaf in leaves.items() if groups[path] == group})
            for group in sorted(set(groups.values()))
        }
        clipped = optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.partition(transforms, unflatten(groups)))
        return skip_bad_steps(clipped, self.skip_above)

    def _of_group(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        decayed = group == "matrices" or (self.decay_adapters and group in ("lora_a", "lora_b"))
        multipliers = {
            "old_rows": self.old_rows_multiplier,
            "new_rows": self.new_rows_multiplier,
            "lora_b": self.lora_b_multiplier,
        }
        return optax.chain(
            self._scaling(group, leaves),
            optax.add_decayed_weights(self.weight_decay) if self.weight_decay and decayed else optax.identity(),
            optax.scale(multipliers.get(group, 1.0)),
        )

    def _scaling(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        """What an optimizer makes of a group's gradients, before decay and learning rate."""
        raise NotImplementedError

    def _adam(self, group: Group, b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
        epsilon = self.new_rows_epsilon if group == "new_rows" else epsilon
        return optax.scale_by_adam(b1, b2, epsilon, mu_dtype=self.moments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Grouped):
    """Steps by the gradient's mean over the root of its mean square (Loshchilov & Hutter 2019, arXiv 1711.05101).

    State: 8 bytes a weight, 6 with bfloat16 `moments`.
    """

    b1: float = 0.9
    b2: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decays("b1", "b2")
        self._check("epsilon", self.epsilon > 0, "a number above 0")

    def _scaling(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        return self._adam(group, self.b1, self.b2, self.epsilon)


# What the new rows get beside another optimizer.
_ROWS = AdamW(learning_rate=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Grouped):
    """Adam's second moment as the product of a matrix's row and column means (Shazeer & Stern 2018, arXiv 1804.04235).

    Matrices whose shorter side is at least `min_dim_size_to_factor` are factored, each layer's by itself; the second
    moment decays by 1 - step^-`decay_rate`. The root mean square of an update is kept to `clipping_threshold`. With
    `multiply_by_parameter_scale` the learning rate is relative to that of the weights. No `momentum` unless asked.

    State: 4 bytes a row and a column of factored matrices, 4 bytes a weight of others, and 4 (or 2) more a weight
    with momentum.
    """

    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim_size_to_factor: int = 128
    multiply_by_parameter_scale: bool = False
    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("decay_rate", 0 < self.decay_rate <= 1, "a number above 0, at most 1")
        self._check("clipping_threshold", self.clipping_threshold > 0, "a number above 0")
        self._check("min_dim_size_to_factor", self.min_dim_size_to_factor >= 1, "at least 1")
        if self.momentum is not None:
            self._check_decays("momentum")

    def _scaling(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        if group == "new_rows":
            return self._adam(group, _ROWS.b1, _ROWS.b2, _ROWS.epsilon)
        # optax factors over a leaf's two longest axes and takes root mean squares over all of it: layers, or experts,
        # would be mixed.
        parts = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor),
            optax.clip_by_block_rms(self.clipping_threshold),
        ]
        if self.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
        if self.momentum is not None:
            parts.append(optax.ema(self.momentum, debias=False, accumulator_dtype=self.moments))
        return per_layer(optax.chain(*parts), leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Grouped):
    """Steps by the sign of a mean of gradients (Chen et al. 2023, arXiv 2302.06675).

    Every weight moves by the whole learning rate, which is to be 3 to 10 times smaller than AdamW's, and the weight
    decay as much larger; new rows, which get AdamW, want `new_rows_multiplier` larger.

    State: 4 bytes a weight, 2 with bfloat16 `moments`.
    """

    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decays("b1", "b2")

    def _scaling(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        if group == "new_rows":
            return self._adam(group, _ROWS.b1, _ROWS.b2, _ROWS.epsilon)
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.moments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Grouped):
    """Steps by the momentum's nearest orthogonal matrix, found by Newton-Schulz iteration (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon), each layer's and expert's matrix by itself.

    All that is no matrix of a layer gets AdamW (`adam_b1`, `adam_b2`, `adam_epsilon`): the vocabulary's rows, vectors,
    and LoRA's factors (with frozen kernels, Muon is AdamW). Updates are scaled to a root mean square of
    `consistent_rms`, about AdamW's, so that both go by one learning rate and weight decay (Liu et al. 2025, arXiv
    2502.16982).

    State: 4 bytes a weight of the layers' matrices, 8 of others; 2 and 6 with bfloat16 `moments`.
    """

    beta: float = 0.95
    newton_schulz_steps: int = 5
    consistent_rms: float = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.99
    adam_epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decays("beta", "adam_b1", "adam_b2")
        self._check("newton_schulz_steps", self.newton_schulz_steps >= 1, "at least 1")
        for field in ("consistent_rms", "adam_epsilon"):
            self._check(field, getattr(self, field) > 0, "a number above 0")

    def _scaling(self, group: Group, leaves: dict[str, Any]) -> optax.GradientTransformation:
        if group != "matrices":
            return self._adam(group, self.adam_b1, self.adam_b2, self.adam_epsilon)

        def dimensions(tree: Any) -> Any:
            return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)

        orthogonal = optax.contrib.scale_by_muon(
            ns_steps=self.newton_schulz_steps,
            beta=self.beta,
            mu_dtype=self.moments,
            weight_dimension_numbers=dimensions,
        )

        def rescaled(matrix: Any, _weight: Any) -> Any:
            # With singular values of 1 its root mean square is one over the root of its longer side.
            return matrix * (self.consistent_rms * max(matrix.shape) ** 0.5)

        scaled = optax.stateless_with_tree_map(rescaled)
        return per_layer(optax.chain(orthogonal, scaled), leaves)


Optimizer = AdamW | Adafactor | Lion | Muon
# By the names that the command line has for them.
OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adafactor": Adafactor, "lion": Lion, "muon": Muon}
