"""What holds a model to what it knew, besides replayed text: a mean teacher, the base as an anchor, and L2 to the
start."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.decoder import Network, abstract_decoder
from cpt_jax.models.linear import ADAPTER_LEAVES, KERNEL_NORM

# Leaves that only a network with adapters has.
_OF_ADAPTERS = (*ADAPTER_LEAVES, KERNEL_NORM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Taught:
    weight: float = 1.0
    domains: tuple[str, ...] | None = None
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"{type(self).__name__}.weight is {self.weight}: give more than 0")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"{type(self).__name__}.warmup is {self.warmup}: give a share of the steps from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanTeacher(_Taught):
    """`weight` times KL(teacher || student), the teacher being the moving average of the weights (Tarvainen & Valpola
    2017, arXiv 1703.01780).

    Over the tokens of `domains` (None: of all); the weight rises linearly over the first `warmup` of the steps. The
    stage needs an EMA.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchor(_Taught):
    """`weight` times KL(base || model) over the base's vocabulary, the base being the model as the stage begins
    (learning without forgetting: Li & Hoiem 2016, arXiv 1606.09282).

    With LoRA that is the same weights with the adapters off, and no second copy; of other weights that train, a copy
    is kept. Over the tokens of `domains` (None: of all), after a warm-up as `MeanTeacher`'s.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2ToStart:
    """`weight` / 2 times the squared distance of what trains to what it was when the stage began, adapters apart
    (L2-SP: Li et al. 2018, arXiv 1802.01483)."""

    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"L2ToStart.weight is {self.weight}: give more than 0")


Retention = MeanTeacher | Anchor | L2ToStart


def check_retention(retention: Sequence[Retention], mixture: Sequence[str], has_ema: bool) -> None:
    """Raises a UserError where the parts do not go together, or name a domain that the stage does not mix."""
    kinds = [type(part) for part in retention]
    if len(set(kinds)) != len(kinds) or {MeanTeacher, Anchor} <= set(kinds):
        raise UserError("retention: give one teacher (MeanTeacher or Anchor) and one L2ToStart at most")
    for part in retention:
        if isinstance(part, MeanTeacher) and not has_ema:
            raise UserError("retention by a MeanTeacher needs the stage's EMA: give it one")
        for name in getattr(part, "domains", None) or ():
            if name not in mixture:
                raise UserError(f"retention names the domain {name!r}; the stage mixes {', '.join(mixture)}")


class Held(NamedTuple):
    """What the loss is given besides the weights: how much the teacher counts, the moving average, and the start of
    what trains, adapters apart (each empty where nothing needs it)."""

    teacher_weight: Float[Array, ""] | np.float32
    average: Tree
    start: Tree


def start_of(trainable: Tree, retention: Sequence[Retention]) -> Tree:
    """The copy of what trains that the parts need."""
    if not any(isinstance(part, Anchor | L2ToStart) for part in retention):
        return {}
    kept = {path: leaf for path, leaf in flatten(trainable).items() if not path.endswith(_OF_ADAPTERS)}
    return jax.tree.map(jnp.copy, unflatten(kept))


def teacher_of(part: MeanTeacher | Anchor, network: Network, weights: Tree, held: Held) -> tuple[Network, Tree]:
    """The teacher's network and weights, which have no gradient."""
    flat = flatten(jax.lax.stop_gradient(weights))
    if isinstance(part, MeanTeacher):
        return network, unflatten(flat | flatten(held.average))
    plain = {path: leaf for path, leaf in flat.items() if not path.endswith(_OF_ADAPTERS)}
    return abstract_decoder(network.config), unflatten(plain | flatten(held.start))


def teacher_weights(
    part: MeanTeacher | Anchor,
    weights: Float[Array, "B S"],
    domains: Int[Array, "B S"],
    names: Sequence[str],
    teacher_weight: Float[Array, ""] | np.float32,
) -> Float[Array, "B S"]:
    """How much each token is held to the teacher: `teacher_weight`, where its domain is."""
    if part.domains is not None:
        weights = weights * jnp.isin(domains, jnp.array([names.index(name) for name in part.domains]))
    return teacher_weight * weights


def teacher_weight(retention: Sequence[Retention], step: int, steps: int) -> float:
    """How much the teacher counts in the step with number `step` (from 0) of `steps`: 0 without one."""
    for part in retention:
        if isinstance(part, MeanTeacher | Anchor):
            return part.weight * min(1.0, (step + 1) / max(1, round(part.warmup * steps)))
    return 0.0


def without_weights(retention: Sequence[Retention]) -> tuple[Retention, ...]:
    """The parts as far as they are compiled: what `teacher_weight` computes is left out."""
    return tuple(
        dataclasses.replace(part, weight=1.0, warmup=0.0) if isinstance(part, MeanTeacher | Anchor) else part
        for part in retention
    )


def distance_to_start(part: L2ToStart, weights: Tree, start: Tree) -> Float[Array, ""]:
    """The penalty on the weights' distance to where they began."""
    flat = flatten(weights)
    squares = [jnp.sum(jnp.square(flat[path] - leaf)) for path, leaf in flatten(start).items()]
    return part.weight / 2 * sum(squares, jnp.zeros(()))
