"""Rotary positions (RoPE: Su et al. 2021, arXiv 2104.09864), and the ways in which released models stretch them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError

Frequencies = np.ndarray
# Angles are computed as transformers computes them: in float32, in NumPy, because XLA's power is some units in the last
# place off and positions multiply that.
_ONE = np.float32(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """A document longer than `original_length` gets a larger theta, by its length (NTK-aware scaling)."""

    factor: float
    original_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Long wavelengths divided by `factor`, short ones kept, those between interpolated (Llama 3.1's reference code)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Interpolation by frequency, and `attention_factor` on cosines and sines (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRoPE:
    """A divisor for each frequency: one set for documents up to `original_length`, another for longer ones (Ding et
    al. 2024, arXiv 2402.13753)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional:
    """Of a head's pairs the first `pairs` turn, as fast as if all did, divided by `factor`; the others stand still (LFM3
    and Gemma 4, in layers without a window)."""

    pairs: int
    factor: float = 1.0


Scaling = Linear | DynamicNTK | Llama3 | Yarn | LongRoPE | Proportional


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries are multiplied by 1 + beta * log(1 + floor(position / original_length)), so that attention over long texts
    does not flatten (Llama 4; Nakanishi 2025, arXiv 2501.19399)."""

    beta: float
    original_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotation of the first `dim` numbers of a head, with base `theta`; and what else positions do to queries."""

    theta: float
    dim: int
    scaling: Scaling | None = None
    query_growth: QueryGrowth | None = None

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise UserError(f"rotary positions turn {self.dim} numbers of a head: they need pairs, so an even number")
        if isinstance(self.scaling, LongRoPE):
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.scaling, name))) != self.dim // 2:
                    raise UserError(f"rope_scaling's {name} has {count} numbers, the heads need {self.dim // 2}")

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn | LongRoPE) else 1.0

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angle depends on how long its document is."""
        return isinstance(self.scaling, DynamicNTK | LongRoPE)

    def frequencies(self) -> Frequencies:
        """Radians a position [dim / 2], float32; of documents up to the original length, where lengths matter."""
        powers = self._powers()
        match self.scaling:
            case Linear(factor=factor):
                return _ONE / powers / np.float32(factor)
            case Llama3():
                return _llama3(_ONE / powers, self.scaling)
            case Yarn():
                return _yarn(powers, self.theta, self.dim, self.scaling)
            case LongRoPE(short_factor=divisors):
                return _ONE / (np.asarray(divisors, np.float32) * powers)
            case Proportional(pairs=pairs, factor=factor):
                turning = np.arange(self.dim // 2) < pairs
                return np.where(turning, _ONE / powers / np.float32(factor), np.float32(0))
        return _ONE / powers

    def _powers(self) -> np.ndarray:
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return np.float32(self.theta) ** exponents

    def frequencies_at(self, lengths: Int[Array, "B S"]) -> Float[Array, "B S half"]:
        """As `frequencies`, for each token by the length of its document."""
        match self.scaling:
            case DynamicNTK(factor=factor, original_length=original):
                ratio = jnp.maximum(lengths, original).astype(jnp.float32) / original
                grown = self.theta * (factor * ratio - (factor - 1)) ** (self.dim / (self.dim - 2))
                exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
                stretched = 1.0 / grown[..., None] ** exponents[None, None]
            case LongRoPE(long_factor=divisors, original_length=original):
                stretched = jnp.asarray(_ONE / (np.asarray(divisors, np.float32) * self._powers()))[None, None]
            case _:
                raise TypeError(f"{self.scaling} does not depend on lengths")
        return jnp.where((lengths > original)[..., None], stretched, self.frequencies()[None, None])


def _llama3(frequencies: Frequencies, scaling: Llama3) -> Frequencies:
    factor, low, high = scaling.factor, scaling.low_frequency_factor, scaling.high_frequency_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (scaling.original_length / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * frequencies / np.float32(factor) + smooth * frequencies
    long = wavelengths > scaling.original_length / low
    short = wavelengths < scaling.original_length / high
    return np.where(long, frequencies / np.float32(factor), np.where(short, frequencies, between)).astype(np.float32)


def _yarn(powers: np.ndarray, theta: float, dim: int, scaling: Yarn) -> Frequencies:
    def dimension(rotations: float) -> float:
        """The pair that turns so often within the original length."""
        return dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    kept = _ONE - ramp
    interpolated = _ONE / (np.float32(scaling.factor) * powers)
    return interpolated * (1 - kept) + _ONE / powers * kept


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, and what queries are multiplied by (None: 1), computed once for all
    layers."""

    cosine: Float[Array, "B S half"]
    sine: Float[Array, "B S half"]
    queries: Float[Array, "B S"] | None = None


def rotation(positions: Int[Array, "B S"], lengths: Int[Array, "B S"] | None, rope: Rope) -> Rotation:
    """Rotary angles; `lengths` of the tokens' documents are needed where `rope.depends_on_length`."""
    if rope.depends_on_length:
        assert lengths is not None
        frequencies = rope.frequencies_at(lengths)
    else:
        frequencies = rope.frequencies()[None, None, :]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    queries = None
    if (growth := rope.query_growth) is not None:
        queries = 1 + growth.beta * jnp.log1p((positions // growth.original_length).astype(jnp.float32))
    return Rotation(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor, queries)


def rotations_of(
    positions: Int[Array, "B S"], lengths: Int[Array, "B S"] | None, ropes: Sequence[Rope | None]
) -> list[Rotation]:
    """Of kinds of layers, each the rotation that it has. Angles of none are zeros where other kinds have some: all kinds
    run as one program."""
    width = max((rope.dim // 2 for rope in ropes if rope is not None), default=0)
    none = jnp.zeros((*positions.shape, width), jnp.float32)
    return [
        Rotation(jnp.cos(none), jnp.sin(none)) if rope is None else rotation(positions, lengths, rope) for rope in ropes
    ]


def rotate(
    x: Float[Array, "B heads S head"], angles: Rotation, interleaved: bool = False
) -> Float[Array, "B heads S head"]:
    """Rotates halves against each other, as most released checkpoints expect, or neighbours, `interleaved`; what lies
    behind the rotary part passes."""
    half = angles.cosine.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (
        (turning[..., ::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    )
    cosine, sine = angles.cosine[:, None], angles.sine[:, None]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(turning.shape)]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
