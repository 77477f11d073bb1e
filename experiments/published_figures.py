"""What others published about replay: losses and critical ratios that the laws are checked on.

Taken from a transcription of the papers' tables that is public, not from the papers' files.
"""

import dataclasses

from cpt_jax.laws.points import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Runs of one paper with one model and one number of tokens. `rows`: share of replay, loss on the old domain, loss on
    the new one; `base`: the old domain's loss before."""

    name: str
    source: str
    base: float
    tokens: float
    rows: tuple[tuple[float, float, float], ...]

    @property
    def points(self) -> list[Point]:
        """The runs and the base, with the domains "old" and "new"."""
        runs = [
            Point(losses={"old": old, "new": new}, tokens=self.tokens, share=share) for share, old, new in self.rows
        ]
        return [*runs, Point(losses={"old": self.base}, tokens=0, share=0)]


_IBRAHIM = "Ibrahim et al. 2024, arXiv 2403.08763, tables 2 and 12, 405M parameters, nats a token"
GERMAN = Published(
    name="Pile to German",
    source=_IBRAHIM,
    base=2.17,
    tokens=200e9,
    rows=(
        (0, 3.56, 1.11),
        (0.01, 2.83, 1.12),
        (0.05, 2.57, 1.12),
        (0.1, 2.46, 1.13),
        (0.25, 2.33, 1.16),
        (0.5, 2.24, 1.22),
    ),
)
SLIMPAJAMA = Published(
    name="Pile to SlimPajama",
    source=_IBRAHIM,
    base=2.17,
    tokens=300e9,
    rows=(
        (0, 2.44, 2.50),
        (0.005, 2.27, 2.50),
        (0.01, 2.26, 2.50),
        (0.05, 2.23, 2.51),
        (0.1, 2.21, 2.51),
        (0.5, 2.16, 2.54),
    ),
)
CHEMISTRY = Published(
    name="chemistry",
    source="Que et al. 2024, arXiv 2406.01375, table 5, Qwen1.5-1.8B",
    base=2.8602,
    tokens=10e9,
    rows=(
        (0, 3.4667, 1.7220),
        (0.06, 2.9848, 1.7265),
        (0.07, 2.9644, 1.7279),
        (0.076, 2.9445, 1.7291),
        (0.08, 2.9376, 1.7311),
        (0.09, 2.9193, 1.7312),
        (0.1, 2.9052, 1.7321),
    ),
)
# Que et al.'s own answer: the share of the domain with which general text loses 3%.
CHEMISTRY_SHARE = 0.924


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalRatio:
    """Gu et al. 2024 (arXiv 2407.17467), one model. `curve`: alpha, s and beta of their R(T) = alpha T^s + beta, T in units
    of 0.2B tokens (table 5); `at_20b`: the ratio that they give for 20B tokens; `losses`: of the domain with its share at
    100, 75, 50 and 33% (table 2), then at 25% `measured` and, by their law of the other four, `predicted`."""

    model: str
    curve: tuple[float, float, float]
    at_20b: float
    losses: tuple[float, float, float, float]
    measured: float
    predicted: float

    def ratio(self, tokens: float) -> float:
        """The share of new text on their curve, in a run of so many tokens."""
        alpha, s, beta = self.curve
        return alpha * (tokens / 0.2e9) ** s + beta


CRITICAL_SHARES = (1, 0.75, 0.5, 1 / 3)
CRITICAL_RATIOS = (
    CriticalRatio(
        model="460M",
        curve=(0.22524761, 0.26944345, -0.48139982),
        at_20b=0.298,
        losses=(1.4628, 1.4844, 1.5122, 1.5387),
        measured=1.5561,
        predicted=1.5566,
    ),
    CriticalRatio(
        model="940M",
        curve=(0.7520627, 0.13720245, -1.06581937),
        at_20b=0.349,
        losses=(1.3723, 1.3910, 1.4155, 1.4385),
        measured=1.4538,
        predicted=1.4546,
    ),
    CriticalRatio(
        model="1.6B",
        curve=(-2.36384831, -0.15125569, 1.59223649),
        at_20b=0.414,
        losses=(1.3242, 1.3416, 1.3643, 1.3854),
        measured=1.3994,
        predicted=1.3999,
    ),
    CriticalRatio(
        model="3.1B",
        curve=(-2.5368197, -0.42071423, 0.84375368),
        at_20b=0.478,
        losses=(1.2585, 1.2750, 1.2965, 1.3170),
        measured=1.3305,
        predicted=1.3303,
    ),
)
