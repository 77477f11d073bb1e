"""Each process reads its share of the files, and every device holds the slice that the rules give it."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.lazy import LazyArray, rows_of
from cpt_jax.core.tree import flatten
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings

PROCESS = """
import json, sys, warnings
from pathlib import Path
import jax, numpy as np
process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from cpt_jax.checkpoint import safetensors_file
from cpt_jax.checkpoint.hf import load
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings
config, leaves, _ = load(directory)
network = abstract_decoder(config)
expected = {path: np.asarray(leaf) for path, leaf in flatten(leaves).items()}
read, original = 0, safetensors_file.SafetensorsFile.read
def counted(self, name, rows=None, member=None):
    global read
    array = original(self, name, rows, member)
    read += array.nbytes
    return array
safetensors_file.SafetensorsFile.read = counted
# As that of a buffer that is donated and of no use.
warnings.simplefilter("error", UserWarning)
where = flatten(shardings(network.logical_axes, network.shapes, make_mesh(shape=MeshShape(fsdp=4, tensor=2))))
for path, leaf in flatten(leaves).items():
    array = place(leaf, np.float32, where[path])
    assert array.sharding == where[path]
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)
print(json.dumps({"read": read, "whole": sum(leaf.nbytes for leaf in expected.values())}))
"""


def test_two_processes_read_half_each(tmp_path):
    config = tiny_config(tie_word_embeddings=False)
    save(tmp_path / "model", config, random_weights(config), hf_config(config), tmp_path, shard_bytes=50_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(port), str(tmp_path / "model")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [(process, *process.communicate(timeout=120)) for process in processes]
    for process, out, problems in ended:
        assert process.returncode == 0, problems
        figures = json.loads(out.splitlines()[-1])
        assert figures["read"] < 0.51 * figures["whole"]


def test_one_process_reads_each_byte_once():
    """Eight devices, one of whose axes holds copies: the leaf is asked for once, as a whole."""
    asked = []
    whole = np.arange(2 * 16 * 24, dtype=np.float32).reshape(2, 16, 24)

    def read(slices, dtype):
        asked.append(slices)
        return whole[slices].astype(dtype)

    mesh = make_mesh(shape=MeshShape(replica=2, fsdp=2, tensor=2))
    leaf = LazyArray(whole.shape, np.float32, read)
    where = shardings({"k": ("layers", "embed", "mlp")}, {"k": jax.ShapeDtypeStruct(whole.shape, np.float32)}, mesh)[
        "k"
    ]
    array = place(leaf, np.float16, where)
    assert asked == [tuple(slice(0, size) for size in whole.shape)]
    assert array.dtype == np.float16
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_rows_of_a_leaf_are_read_alone_and_filled_with_zeros():
    whole, asked = np.arange(60, dtype=np.float32).reshape(12, 5), []

    def read(slices, dtype):
        asked.append(slices[0])
        return whole[slices].astype(dtype)

    for source in (LazyArray(whole.shape, np.float32, read), whole):
        rows = rows_of(source, 3, 10, 16)
        expected = np.concatenate([whole[3:10], np.zeros((9, 5), np.float32)])
        np.testing.assert_array_equal(rows, expected)
        for index in (slice(2, 5), slice(5, 11), slice(8, 16), (slice(6, 9), slice(1, 3)), 0, -1):
            np.testing.assert_array_equal(rows[index], expected[index])
    assert slice(5, 8) in asked
    assert all(each.stop - each.start <= 7 for each in asked)


def test_a_part_of_a_leaf_is_the_part_of_the_whole(tmp_path):
    config = tiny_config(num_layers=3)
    weights = random_weights(config)
    save(tmp_path / "model", config, weights, hf_config(config), tmp_path)
    for path, leaf in flatten(load(tmp_path / "model")[1]).items():
        whole = flatten(weights)[path]
        for index in (0, -1, slice(1, None), np.array([1, 0]), ..., (slice(None, 2), slice(3, 5))[: whole.ndim]):
            np.testing.assert_array_equal(leaf[index], whole[index], err_msg=path)
        assert leaf.shape == whole.shape
