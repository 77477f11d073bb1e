"""What saving costs training: how much longer the step takes in which a checkpoint is saved, and those beside which it is written.

    python -m benchmarks.checkpoint_cost                                   # SmolLM2, 2 x 256 tokens, LoRA and full; CPU: some 6 minutes
    python -m benchmarks.checkpoint_cost --rows 8 --sequence 2048 --compute bfloat16    # a GPU

A stage trains on random tokens and saves `--saves` times, each time the write before has ended and `--between` steps have gone by. A step's time is that of metrics.jsonl;
compared are the median of the steps that begin with a save, of those during the write, and of those without either. Writes benchmarks/results/checkpoint_cost-DEVICE.json.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import model_directory
from cpt_jax.core.progress import quiet_libraries
from cpt_jax.core.storage import write_json_atomic


class Batches:
    """Random tokens, one document a row, without end."""

    names = ("text",)

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.sequence_length, generator = length, np.random.default_rng(0)
        tokens = generator.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
        ones, positions = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        self._batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": positions,
            "segment_ids": ones,
            "domains": 0 * ones,
            "weights": ones.astype(np.float32),
        }

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def epochs(self) -> dict[str, float]:
        return {}

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass

    def unreadable(self) -> dict[str, int]:
        return {}


def measured(arguments: argparse.Namespace, method: Any, directory: Path) -> dict[str, float]:
    """Median seconds of a step of each kind."""
    import jax

    from cpt_jax.checkpoint.train_state import Checkpoints
    from cpt_jax.core.precision import Precision
    from cpt_jax.optim.optimizer import AdamW
    from cpt_jax.optim.schedules import Constant
    from cpt_jax.recipe.model import load_model
    from cpt_jax.sharding.mesh import make_mesh
    from cpt_jax.training import loop

    precision = Precision(compute=arguments.compute)
    model = load_model(model_directory(arguments.model)).adapted(method, 0).for_training(jax.default_backend())
    model = model.attending("auto", arguments.sequence, precision.dtype, 2)
    due, writing = set(), []

    class Scheduled(Checkpoints):
        """Saves that are asked for at every step, taken at those that are due."""

        def check(self) -> None:
            super().check()
            writing.append(self._saving)

        def save(self, state: Any, loader_state: dict, loss: float) -> None:
            if len(writing) in due:
                super().save(state, loader_state, loss)

    due.update(arguments.between * (number + 1) for number in range(arguments.saves))
    loop.Checkpoints = Scheduled
    steps = arguments.between * (arguments.saves + 1)
    loop.train(
        loop.Training(
            name="saving",
            network=model.network,
            weights=model.weights,
            trains=method.trains,
            loader=Batches(arguments.rows, arguments.sequence, model.config.vocab_size),  # pyright: ignore
            optimizer=AdamW(learning_rate=1e-5),
            schedule=Constant(),
            ema=None,
            steps=steps,
            accumulate=1,
            precision=precision,
            mesh=make_mesh(),
            directory=directory,
            # Every step reads its own metrics, as one that saves does: what is compared is the save alone.
            checkpoint_seconds=0.0,
        )
    )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kinds: dict[str, list[float]] = {"saves": [], "beside a write": [], "without": []}
    for index, line in enumerate(lines[3:], 3):
        # The save behind step n is in the time of step n + 1.
        kind = "saves" if index in due else "beside a write" if writing[index] else "without"
        kinds[kind].append(line["seconds"])
    size = sum(path.stat().st_size for path in (directory / "checkpoints" / str(max(due))).rglob("*") if path.is_file())
    medians = {kind: statistics.median(values) if values else float("nan") for kind, values in kinds.items()}
    blocked = statistics.median(line["checkpoint_seconds"] for index, line in enumerate(lines) if index in due)
    return medians | {"blocked": blocked, "bytes": size, "longer": medians["saves"] / medians["without"] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=("lora", "full"))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--between", type=int, default=8, help="steps from save to save")
    arguments = parser.parse_args()
    import jax

    from cpt_jax.adapt import Full, LoRA

    quiet_libraries()
    results = {}
    print(
        "| | a step without | beside a write | that saves | longer | blocked | checkpoint |\n|---|---|---|---|---|---|---|"
    )
    for name in arguments.methods:
        with tempfile.TemporaryDirectory() as directory:
            found = measured(arguments, {"lora": LoRA(rank=16, alpha=32), "full": Full()}[name], Path(directory))
        results[name] = found
        print(
            f"| {name} | {found['without']:.3f} s | {found['beside a write']:.3f} s | {found['saves']:.3f} s | {found['longer']:+.1%} | {found['blocked']:.3f} s | {found['bytes'] / 1e6:,.0f} MB |",
            flush=True,
        )
    device = jax.devices()[0].device_kind.replace(" ", "-")
    settings = {name: getattr(arguments, name) for name in ("model", "rows", "sequence", "compute", "saves", "between")}
    write_json_atomic(
        Path(__file__).parent / "results" / f"checkpoint_cost-{device}.json", {"settings": settings, **results}
    )


if __name__ == "__main__":
    main()
