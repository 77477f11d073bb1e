"""Robust fits of the law: Huber on the logarithm of the loss, many starts at once, draws for the intervals, and the error
on runs that the fit did not see."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError
from cpt_jax.laws.form import PARAMETERS, Form, Settings, form_for, predict, settings_of, slopes
from cpt_jax.laws.points import Point, trained

STARTS = 64
STEPS = 80
# Que et al. (and Hoffmann et al.) take 1e-3 for log losses; noisier runs get 1.345 of their own spread (Huber 1981: 95%
# as efficient as least squares on Gaussian noise).
LEAST_DELTA, EFFICIENT = 1e-3, 1.345


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The loss at one share of replay (that was asked for), and what the law said of it when fitted on the other shares."""

    share: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law of one domain.

    `draws` are parameters of the law fitted on data drawn anew (a parametric-free residual bootstrap); `held_out` holds
    one entry a run, each predicted without any run of its share. `is_new`: the domain's own share is what is not replay.
    """

    domain: str
    is_new: bool
    form: Form
    points: tuple[Point, ...]
    parameters: Float[np.ndarray, "parameters"]
    draws: Float[np.ndarray, "draws parameters"]
    unit: float
    size_unit: float
    token_unit: float
    delta: float
    held_out: tuple[HeldOut, ...]

    def settings(self, replay: np.ndarray, tokens: float, size: float | None) -> Settings:
        """Settings at these shares of replay."""
        one = np.ones(len(replay))
        own = 1.0 if size is None or self.size_unit == 1.0 else size / self.size_unit
        share = 1 - replay if self.is_new else replay
        return Settings(size=one * own, tokens=one * tokens / self.token_unit, share=share, asked=share)

    def predict(self, replay: np.ndarray, tokens: float, size: float | None) -> Float[np.ndarray, "replay"]:
        """Losses at shares of replay."""
        return self.unit * predict(self.parameters[None], self.settings(replay, tokens, size))[0]

    def predict_draws(self, replay: np.ndarray, tokens: float, size: float | None) -> Float[np.ndarray, "draws replay"]:
        """Losses at shares of replay, for each draw."""
        return self.unit * predict(self.draws, self.settings(replay, tokens, size))

    @property
    def r_squared(self) -> float:
        """Of the fit, on the runs it was made from."""
        measured = np.array([point.losses[self.domain] for point in self.points])
        fitted = np.array([self.predict(np.array([p.share]), p.tokens, p.size)[0] for p in self.points])
        return _r_squared(measured, fitted)

    @property
    def held_out_r_squared(self) -> float:
        return _r_squared(
            np.array([each.measured for each in self.held_out]), np.array([each.predicted for each in self.held_out])
        )

    @property
    def held_out_error(self) -> float:
        """Mean relative error, absolute, on shares that were left out."""
        return float(np.mean([abs(each.error) for each in self.held_out]))

    @property
    def in_units(self) -> dict[str, float]:
        """The parameters in the loss's unit, parameters and tokens: A and B as they stand in the formula."""
        named = dict(zip(PARAMETERS, self.parameters.tolist(), strict=True))
        named["A"] *= self.size_unit ** named["alpha"]
        named["B"] *= self.token_unit ** named["beta"]
        return {name: value * (self.unit if name in "EABC" else 1.0) for name, value in named.items()}


def _r_squared(measured: np.ndarray, fitted: np.ndarray) -> float:
    spread = float(((measured - measured.mean()) ** 2).sum())
    return 1 - float(((measured - fitted) ** 2).sum()) / spread if spread > 0 else float("nan")


def fit_law(points: Sequence[Point], domain: str, *, is_new: bool, draws: int = 400, seed: int = 0) -> Law:
    """Fits the law of one domain.

    Args:
      points: of runs; those of 0 tokens (bases) and those without the domain are left out.
      is_new: the domain is what is learnt; its own share is 1 less the share of replay.

    Raises:
      UserError: no run has the domain, or there are too few runs for the law; it says how many are needed.
    """
    used = trained(points, domain)
    if len(missing := [point.name for point in used if point.size is None]) not in (0, len(used)):
        raise UserError(
            f"the model size is known of some runs only: add it for {missing[0]!r}, or leave the column out"
        )
    at, size_unit, token_unit = settings_of(
        [p.size for p in used],
        [p.tokens for p in used],
        [1 - p.share if is_new else p.share for p in used],
        [p.asked for p in used],
    )
    losses = np.array([point.losses[domain] for point in used])
    unit, random = float(losses.mean()), np.random.default_rng(seed)
    form, target = form_for(at, domain), np.log(losses / unit)
    coordinates, delta = _fit(form, at, target, random)
    best = form.parameters(coordinates[None])[0]
    return Law(
        domain=domain,
        is_new=is_new,
        form=form,
        points=tuple(used),
        parameters=best,
        draws=_draws(form, at, target, coordinates, delta, draws, random),
        unit=unit,
        size_unit=size_unit,
        token_unit=token_unit,
        delta=delta,
        held_out=_held_out(used, domain, at, target, unit, random),
    )


def _fit(form: Form, at: Settings, target: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """The best coordinates of many starts, and the width within which residuals count squared."""
    starts = _starts(form, at, target, STARTS, random)
    found, cost = _minimise(form, at, np.tile(target, (len(starts), 1)), starts, 10 * LEAST_DELTA)
    first = found[np.argmin(cost)]
    residuals = np.log(predict(form.parameters(first[None]), at))[0] - target
    freedom = max(1, len(target) - len(form.free))
    spread = 1.4826 * float(np.median(np.abs(residuals))) * np.sqrt(len(target) / freedom)
    delta = max(LEAST_DELTA, EFFICIENT * spread)
    again = found[np.argsort(cost)[:8]]
    found, cost = _minimise(form, at, np.tile(target, (len(again), 1)), again, delta)
    return found[np.argmin(cost)], delta


def _starts(form: Form, at: Settings, target: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Exponents and epsilon at random in their boxes; the factors are then solved for."""
    low, high = form.bounds
    coordinates = random.uniform(low, high, (count, len(form.free)))
    factors = [name for name in ("E", "A", "B", "C") if name in form.free]
    whole = form.parameters(coordinates)
    for name in factors:
        whole[:, PARAMETERS.index(name)] = 1.0
    columns = slopes(whole, at)[:, :, [PARAMETERS.index(name) for name in factors]]
    normal = np.einsum("fpi,fpj->fij", columns, columns) + 1e-6 * np.eye(len(factors))
    solved = np.linalg.solve(normal, np.einsum("fpi,p->fi", columns, np.exp(target))[..., None])[..., 0]
    for index, name in enumerate(factors):
        column = form.free.index(name)
        value = solved[:, index]
        coordinates[:, column] = value if name == "B" else np.log(np.maximum(value, 1e-3))
    return np.clip(coordinates, low, high)


def _minimise(
    form: Form, at: Settings, targets: Float[np.ndarray, "fits points"], starts: np.ndarray, delta: float
) -> tuple[Float[np.ndarray, "fits free"], Float[np.ndarray, "fits"]]:
    """Levenberg-Marquardt on all fits at once, with Huber's weights, inside the box; coordinates and costs."""
    low, high = form.bounds
    x, places, identity = np.clip(starts, low, high), form.places, np.eye(len(form.free))
    damping = np.full(len(x), 1e-2)
    cost = _cost(form, at, targets, x, delta)
    for _ in range(STEPS):
        parameters = form.parameters(x)
        loss = np.maximum(predict(parameters, at), 1e-9)
        residual = np.log(loss) - targets
        jacobian = slopes(parameters, at)[:, :, places] / loss[..., None]
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-15))[..., None]
        gradient = np.einsum("fpi,fp->fi", jacobian * weight, residual)
        curvature = np.einsum("fpi,fpj->fij", jacobian * weight, jacobian)
        # What stands at a wall and would go through it stays there.
        moves = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
        curvature *= moves[:, :, None] & moves[:, None, :]
        diagonal = np.maximum(np.einsum("fii->fi", curvature), 1e-9)
        system = curvature + identity * (damping[:, None] * diagonal + ~moves)[:, None, :]
        step = np.linalg.solve(system, -(gradient * moves)[..., None])[..., 0]
        trial = np.clip(x + np.clip(step, -1.5, 1.5), low, high)
        trial_cost = _cost(form, at, targets, trial, delta)
        better = trial_cost < cost
        gain = np.where(better, cost - trial_cost, 0.0)
        x, cost = np.where(better[:, None], trial, x), np.where(better, trial_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-10, 1e8)
        if np.all((gain <= 1e-12 * cost) & (better | (damping >= 1e6))):
            break
    return x, cost


def _cost(form: Form, at: Settings, targets: np.ndarray, x: np.ndarray, delta: float) -> np.ndarray:
    residual = np.abs(np.log(np.maximum(predict(form.parameters(x), at), 1e-9)) - targets)
    return np.where(residual <= delta, residual**2 / 2, delta * (residual - delta / 2)).sum(axis=1)


def _draws(
    form: Form,
    at: Settings,
    target: np.ndarray,
    best: np.ndarray,
    delta: float,
    count: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Parameters of fits on data drawn anew: the law plus its residuals in another order (with repetition), their signs at
    random (a run that went astray shall widen the interval, not move it), widened for the parameters that the fit
    used up, and by a chi-square's chance for the few degrees of freedom that are left."""
    if not count:
        return np.empty((0, len(PARAMETERS)))
    fitted = np.log(predict(form.parameters(best[None]), at))[0]
    freedom = max(1, len(target) - len(form.free))
    residuals = (target - fitted) * np.sqrt(len(target) / freedom)
    width = np.sqrt(freedom / np.maximum(random.chisquare(freedom, (count, 1)), 0.05 * freedom))
    signs = random.choice([-1.0, 1.0], (count, len(target)))
    targets = np.tile(fitted + width * signs * random.choice(residuals, (count, len(target))), (3, 1))
    drawn = form.with_usual_ranges(count, random)
    drawn = Form(
        free=drawn.free, fixed={name: np.tile(value, 3 if np.ndim(value) else 1) for name, value in drawn.fixed.items()}
    )
    nearby = best + random.normal(0, 0.5, (count, len(best)))
    starts = np.concatenate([np.tile(best, (count, 1)), nearby, _starts(form, at, target, count, random)])
    found, cost = _minimise(drawn, at, targets, starts, delta)
    winner = cost.reshape(3, count).argmin(axis=0) * count + np.arange(count)
    return drawn.parameters(found)[winner]


def _held_out(
    used: Sequence[Point], domain: str, at: Settings, target: np.ndarray, unit: float, random: np.random.Generator
) -> tuple[HeldOut, ...]:
    """Each share's runs, predicted by a law fitted on the other shares'; none where those are too few for any."""
    entries: list[HeldOut] = []
    for share in sorted(set(at.asked.tolist())):
        left_out = at.asked == share
        try:
            form = form_for(at.of(~left_out), domain)
        except UserError:
            return ()
        coordinates, _ = _fit(form, at.of(~left_out), target[~left_out], random)
        said = unit * predict(form.parameters(coordinates[None]), at.of(left_out))[0]
        for index, predicted in zip(np.flatnonzero(left_out), said.tolist(), strict=True):
            point = used[int(index)]
            entries.append(HeldOut(share=point.asked, measured=point.losses[domain], predicted=predicted))
    return tuple(sorted(entries, key=lambda each: each.share))
