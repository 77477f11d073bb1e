"""Matrices in MXFP4, as gpt-oss's released files hold its experts', read as bfloat16 (OCP Microscaling Formats 1.0).

A row of a matrix [outputs, inputs] is cut into blocks of 32: `NAME_blocks` [..., outputs, inputs / 32, 16] has two numbers of
four bits in a byte, the lower bits' first, and `NAME_scales` [..., outputs, inputs / 32] the exponent of 2 that a block is
multiplied by, plus 127. Products have two digits: bfloat16 holds them exactly.
"""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from cpt_jax.checkpoint.safetensors_file import Described, SafetensorsFile
from cpt_jax.core.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
# Of each byte both numbers, in the place of one of 64 bits: looked up so, they take a third of the time.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1).view(np.uint64)[:, 0]
# 255 is no number.
_FACTORS = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


class Mxfp4:
    """A tensor that lies in blocks and scales, with a `SafetensorsFile`'s interface.

    Raises:
      UserError: there are no scales, or those of other blocks.
    """

    def __init__(self, name: str, held: Mapping[str, SafetensorsFile]) -> None:
        blocks = held[name + BLOCKS]
        if (scales := held.get(name + SCALES)) is None:
            raise UserError(
                f"{blocks.path} holds {name + BLOCKS}, and there is no {name + SCALES}: fetch the model again"
            )
        self._blocks, self._scales = blocks, scales
        (*shape, count, width), of_scales = blocks.tensors[name + BLOCKS].shape, scales.tensors[name + SCALES].shape
        if of_scales != (*shape, count):
            raise UserError(
                f"{blocks.path}: {name + SCALES} has shape {list(of_scales)}, its blocks {[*shape, count, width]}: fetch the model again"
            )
        self.tensors = {name: Described((*shape, count * width * 2), np.dtype(ml_dtypes.bfloat16))}

    def read(
        self,
        name: str,
        rows: slice | None = None,
        member: int | None = None,
        picked: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    ) -> np.ndarray:
        """As `SafetensorsFile.read`; of the rows those that are `picked`, and no others unpacked."""
        blocks = picked(self._blocks.read(name + BLOCKS, rows, member))
        values = _PAIRS.take(blocks).view(np.float32)
        values *= _FACTORS.take(picked(self._scales.read(name + SCALES, rows, member)))[..., None]
        return values.reshape(*blocks.shape[:-2], -1).astype(ml_dtypes.bfloat16)
