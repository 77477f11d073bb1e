"""Learning rate against step. Each begins with a re-warming: a trained model's optimizer state is gone, and a jump
to the peak costs what it knew (Ibrahim et al. 2024, arXiv 2403.08763)."""

import dataclasses
from collections.abc import Callable

import numpy as np

from cpt_jax.core.errors import UserError

# The learning rate of the step with a number (from 0): of the host, which gives it to the compiled step.
Rate = Callable[[int], float]
# Of shares that make up a whole: 0.33 + 0.56 + 0.11 is a little more than 1.
ROUNDING = 1e-9


def _check_shares(schedule) -> None:
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if not 0 <= value <= 1:
            raise UserError(f"{type(schedule).__name__}.{field.name} is {value}: give a share between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear to the peak over `warmup` (a share of the steps), then level."""

    warmup: float = 0.05

    __post_init__ = _check_shares

    def build(self, peak: float, steps: int) -> Rate:
        warm = _warm_steps(self.warmup, steps)
        return lambda step: peak * _warming(step, warm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear to the peak over `warmup`, then half a cosine down to `final` times the peak at the last step."""

    warmup: float = 0.05
    final: float = 0.05

    __post_init__ = _check_shares

    def build(self, peak: float, steps: int) -> Rate:
        warm = _warm_steps(self.warmup, steps)

        def schedule(step):
            done = _done(step, warm, steps)
            return peak * _warming(step, warm) * (self.final + (1 - self.final) * 0.5 * (1 + np.cos(np.pi * done)))

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear to the peak over `warmup`, then linear down to `final` times the peak at the last step."""

    warmup: float = 0.05
    final: float = 0.05

    __post_init__ = _check_shares

    def build(self, peak: float, steps: int) -> Rate:
        warm = _warm_steps(self.warmup, steps)

        def schedule(step):
            done = _done(step, warm, steps)
            return peak * _warming(step, warm) * (1 - (1 - self.final) * done)

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear to the peak over `warmup`, then down as one over the root of the step (Vaswani et al. 2017, arXiv
    1706.03762): 4 times the warm-up's steps, half the peak."""

    warmup: float = 0.05

    __post_init__ = _check_shares

    def build(self, peak: float, steps: int) -> Rate:
        warm = max(1, _warm_steps(self.warmup, steps))
        return lambda step: peak * _warming(step, warm) * np.sqrt(np.minimum(1.0, warm / (step + 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear to the peak over `warmup`, level, then linear down to `final` times the peak over the last `decay`
    (Hu et al. 2024, arXiv 2404.06395)."""

    warmup: float = 0.05
    decay: float = 0.3
    final: float = 0.05

    def __post_init__(self) -> None:
        _check_shares(self)
        if self.warmup + self.decay > 1 + ROUNDING:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} are more than the whole run: lower one")

    def build(self, peak: float, steps: int) -> Rate:
        warm = _warm_steps(self.warmup, steps)
        # The first of these steps is at the peak, so that one alone would not decay.
        decay = min(steps, max(2, round(self.decay * steps))) if self.decay else 1

        def schedule(step):
            done = np.clip((step - (steps - decay)) / max(1, decay - 1), 0.0, 1.0)
            return peak * _warming(step, warm) * (1 - (1 - self.final) * done)

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infinite:
    """Linear to the peak over `warmup`, half a cosine down to `constant` times the peak over `cooldown`, level, and
    exponential down to `final` times the peak over the last `annealing` (Ibrahim et al. 2024, arXiv 2403.08763).

    The level part knows nothing of the run's end: a stage without `annealing` can be followed by one without `warmup`
    and `cooldown`, of the same learning rate and `constant`, without re-warming.
    """

    warmup: float = 0.05
    cooldown: float = 0.3
    constant: float = 0.5
    annealing: float = 0.15
    final: float = 0.05

    def __post_init__(self) -> None:
        _check_shares(self)
        if self.warmup + self.cooldown + self.annealing > 1 + ROUNDING:
            raise UserError(
                f"warmup {self.warmup}, cooldown {self.cooldown} and annealing {self.annealing} are more than the whole "
                "run: lower one"
            )
        if not 0 < self.final <= self.constant:
            raise UserError(f"final {self.final} is not above 0 and at most constant, {self.constant}: change one")

    def build(self, peak: float, steps: int) -> Rate:
        warm = _warm_steps(self.warmup, steps)
        cooling, annealing = round(self.cooldown * steps), round(self.annealing * steps)

        def schedule(step):
            cooled = np.clip((step - warm) / cooling, 0.0, 1.0) if cooling else 1.0
            annealed = np.clip((step - (steps - 1 - annealing)) / annealing, 0.0, 1.0) if annealing else 0.0
            level = self.constant + (1 - self.constant) * 0.5 * (1 + np.cos(np.pi * cooled))
            return peak * _warming(step, warm) * level * (self.final / self.constant) ** annealed

        return schedule


Schedule = Constant | Cosine | Linear | InverseSqrt | WarmupStableDecay | Infinite


def _warm_steps(share: float, steps: int) -> int:
    return round(share * steps)


def _done(step, warm: int, steps: int):
    """0 at the end of the warm-up, 1 at the last step, also where that alone is left; 0 of a step that is the only one."""
    after = steps - 1 - warm
    return np.clip((step - warm) / after, 0.0, 1.0) if after > 0 else 1.0 * (step >= max(1, warm))


def _warming(step, warm: int):
    """1/warm at step 0, 1 from step warm-1 on: no step is wasted at a learning rate of zero."""
    return np.minimum(1.0, (step + 1) / max(1, warm))
