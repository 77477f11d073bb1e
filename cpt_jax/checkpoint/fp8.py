"""Matrices in FP8, read as bfloat16: numbers of eight bits (E4M3), and a scale for each block of 128 x 128 of them, or one for
all (DeepSeek-V3: arXiv 2412.19437, section 3.3.2).

`NAME` [..., outputs, inputs] has the numbers, `NAME_scale_inv` [..., outputs / 128, inputs / 128], or [], what they are
multiplied by.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from cpt_jax.checkpoint.safetensors_file import Described, SafetensorsFile
from cpt_jax.core.errors import UserError

SCALE = "_scale_inv"
TYPE = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128
# Of activations, beside a matrix: what is computed in another type has none.
OF_ACTIVATIONS = "activation_scale"
_VALUES = np.arange(256, dtype=np.uint8).view(TYPE).astype(np.float32)


class Fp8:
    """A tensor that lies in FP8 numbers and scales, with a `SafetensorsFile`'s interface.

    Raises:
      UserError: there are no scales, or those of other blocks.
    """

    def __init__(self, name: str, held: Mapping[str, SafetensorsFile]) -> None:
        numbers, shape = held[name], held[name].tensors[name].shape
        if (scales := held.get(name + SCALE)) is None:
            raise UserError(
                f"{numbers.path} holds {name} in FP8, and there is no {name + SCALE}: fetch the model again"
            )
        self._numbers, self._scales = numbers, scales
        found = scales.tensors[name + SCALE].shape
        blocks = (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
        if found and found != blocks:
            raise UserError(
                f"{numbers.path}: {name + SCALE} has shape {list(found)}, blocks of {BLOCK} x {BLOCK} of {list(shape)} are {list(blocks)}: fetch the model again"
            )
        self.tensors = {name: Described(shape, np.dtype(ml_dtypes.bfloat16))}

    def read(self, name: str, rows: slice | None = None, member: int | None = None) -> np.ndarray:
        """As `SafetensorsFile.read`."""
        numbers = _VALUES.take(self._numbers.read(name, rows, member).view(np.uint8))
        if not self._scales.tensors[name + SCALE].shape:
            return (numbers * self._scales.read(name + SCALE).astype(np.float32)).astype(ml_dtypes.bfloat16)
        # The rows are those of the matrix, or, of a whole stack, its members.
        stack = len(self.tensors[name].shape) > 2 and member is None
        of_blocks = rows if stack or rows is None else slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
        scales = self._scales.read(name + SCALE, of_blocks, member).astype(np.float32)
        first = 0 if stack or rows is None else rows.start % BLOCK
        scales = scales.repeat(BLOCK, axis=-2)[..., first : first + numbers.shape[-2], :]
        numbers *= scales.repeat(BLOCK, axis=-1)[..., : numbers.shape[-1]]
        return numbers.astype(ml_dtypes.bfloat16)
