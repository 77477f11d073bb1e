"""Tensors that lie in files in a few bits, as one tensor each."""

from collections.abc import Mapping

from cpt_jax.checkpoint import fp8, mxfp4
from cpt_jax.checkpoint.fp8 import Fp8
from cpt_jax.checkpoint.mxfp4 import Mxfp4
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile

TensorFile = SafetensorsFile | Mxfp4 | Fp8


def with_unpacked(held: Mapping[str, SafetensorsFile]) -> dict[str, TensorFile]:
    """The files of tensors by name, what is packed as one tensor."""
    of_few_bits = [name.removesuffix(mxfp4.BLOCKS) for name in held if name.endswith(mxfp4.BLOCKS)]
    of_eight = [name for name, file in held.items() if file.tensors[name].dtype == fp8.TYPE]
    parts = {name + part for name in of_few_bits for part in (mxfp4.BLOCKS, mxfp4.SCALES)}
    parts |= {name + fp8.SCALE for name in of_eight}
    parts |= {f"{name.rpartition('.')[0]}.{fp8.OF_ACTIVATIONS}" for name in of_eight}
    found: dict[str, TensorFile] = {name: file for name, file in held.items() if name not in parts}
    found |= {name: Mxfp4(name, held) for name in of_few_bits}
    return found | {name: Fp8(name, held) for name in of_eight}
