"""What orbax says of a bit that has changed in a checkpoint's file: the reason for `cpt_jax/checkpoint/intact.py`.

    python -m benchmarks.damaged_bits

Flips a bit at twelve places of each file of a checkpoint of three arrays, and restores it each time: with an error, as it was, or as something else.
"""

import collections
import json
import tempfile
from pathlib import Path

import numpy as np

from cpt_jax.core.progress import quiet_libraries
from cpt_jax.core.storage import write_json_atomic

PLACES = 12


def main() -> None:
    import jax
    import orbax.checkpoint as ocp

    quiet_libraries()
    generator = np.random.default_rng(0)
    state = {
        name: jax.numpy.asarray(generator.normal(size=shape), np.float32)
        for name, shape in {"one": (300, 70), "two": (1000, 70), "three": (100,)}.items()
    }
    results: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        root = Path(directory) / "checkpoint"
        checkpointer.save(root, state)
        checkpointer.wait_until_finished()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            content, found = path.read_bytes(), collections.Counter()
            for place in np.linspace(0, len(content) - 1, PLACES).astype(int):
                changed = bytearray(content)
                changed[place] ^= 0x10
                path.write_bytes(changed)
                try:
                    restored = checkpointer.restore(root, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
                    same = all(np.array_equal(restored[name], array) for name, array in state.items())
                    found["as it was" if same else "other numbers, no error"] += 1
                except Exception:
                    found["an error"] += 1
            path.write_bytes(content)
            name = f"{path.relative_to(root)} ({len(content):,} bytes)"
            results[name] = dict(found)
            print(name, json.dumps(results[name]), flush=True)
    write_json_atomic(Path(__file__).parent / "results" / "damaged_bits.json", results)


if __name__ == "__main__":
    main()
