"""A prepared domain as a TFDS dataset: `tfds.builder_from_directory(DIR).as_data_source(split="train")`.

TFDS keeps an example as a serialised tf.train.Example (github.com/tensorflow/tensorflow, core/example/example.proto).
Ours has one feature, "tokens", whose value is the bytes of a uint32 array (`tfds.features.Tensor(shape=(None,),
dtype=np.uint32, encoding="bytes")`): some 24 bytes before the array itself, which need no protobuf library.
"""

import re

import numpy as np

from cpt_jax.core.storage import json_bytes

FEATURE = "tokens"
DATASET_INFO, FEATURES = "dataset_info.json", "features.json"
_KEY = FEATURE.encode()
# The tags of the nested messages' fields: each field 1 of its message, length-delimited; the map's value is field 2.
_FIRST, _SECOND = b"\x0a", b"\x12"
_MARK = _KEY + _SECOND
# The key lies behind the lengths of three messages.
_MARK_WITHIN = 24


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def example_of(array: bytes) -> bytes:
    """The bytes of a uint32 array as a tf.train.Example: Example.features.feature["tokens"].bytes_list.value[0]."""
    value = _field(_FIRST, _field(_FIRST, array))
    return _field(_FIRST, _field(_FIRST, _field(_FIRST, _KEY) + _field(_SECOND, value)))


def array_of(example: bytes) -> np.ndarray:
    """The array [n], uint32, of an example that `example_of` made."""
    place = example.index(_MARK, 0, _MARK_WITHIN) + len(_MARK)
    # The length of the map's value, and twice a tag and a length.
    for tag in (0, 1, 1):
        place += tag
        while example[place] & 0x80:
            place += 1
        place += 1
    return np.frombuffer(example, "<u4", offset=place)


def dataset_files(name: str, description: str, shards: dict[str, int], size: int) -> dict[str, bytes]:
    """The files that make a directory of shards a TFDS dataset. `shards`: records by file name, as in
    train-00000.arrayrecord; `size`: bytes of all shards."""
    tensor = {"shape": {"dimensions": ["-1"]}, "dtype": "uint32", "encoding": "bytes"}
    features = {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": {
            "features": {
                FEATURE: {
                    "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
                    "tensor": tensor,
                }
            }
        },
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    }
    split = {
        "name": "train",
        "filepathTemplate": "{SPLIT}-{SHARD_INDEX}.arrayrecord",
        "shardLengths": [str(shards[shard]) for shard in sorted(shards)],
        "numBytes": str(size),
    }
    info = {
        # TFDS wants a Python name.
        "name": re.sub(r"\W", "_", name),
        "version": "1.0.0",
        "description": description,
        "fileFormat": "array_record",
        "splits": [split],
    }
    return {DATASET_INFO: json_bytes(info), FEATURES: json_bytes(features)}
