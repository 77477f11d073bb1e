"""A frozen base in bfloat16, int8 and NF4: its size, its bits per byte, and what LoRA makes of it.

    python -m benchmarks.quantised_base

SmolLM2-135M; the layers' kernels are quantised, the vocabulary table stays bfloat16. LoRA (rank 16) trains on Chinese statutes, `STEPS` steps of 2 x 256
tokens, each kind of base on the same batches; afterwards it is measured on the base it was trained on, and merged into the base as it was released,
which is what an export holds. Prints a Markdown table and writes benchmarks/results/quantised_base.json.
"""

import platform
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.loading import GGUF
from configs.quickstart import quickstart
from cpt_jax.adapt import LoRA
from cpt_jax.checkpoint.gguf import import_gguf
from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.data.holdout import HeldApart
from cpt_jax.data.loader import Loader
from cpt_jax.data.prepare import prepare
from cpt_jax.evaluate.bits_per_byte import bits_per_byte, pack_documents
from cpt_jax.models.quantised import quantise
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.loop import train
from cpt_jax.training.training import Training
from cpt_jax.vocab.tokenizer import Tokenizer

OUT = Path("benchmarks/results/quantised_base.json")
KINDS = ("as computed", "int8", "nf4")
STEPS = 20
METHOD = LoRA(rank=16, alpha=32.0)
EVALUATED = Precision(compute="bfloat16")


def on_device(model: Model, kind: str) -> dict:
    """The weights as they are while a stage trains: kernels quantised, if asked for."""
    flat = flatten(model.on_device(EVALUATED))
    if kind != "as computed":
        flat = {p: quantise(leaf, kind) if p.endswith("/kernel") else leaf for p, leaf in flat.items()}
    return unflatten(flat)


def size(weights: dict, model: Model) -> int:
    """Bytes of the layers' kernels and their scales; four bits are half a byte, which the CPU backend does not pack."""

    def of(leaf) -> int:
        values = leaf.qvalue if hasattr(leaf, "qvalue") else leaf
        bits = 4 if values.dtype in ("int4", "uint4") else 8 * values.dtype.itemsize
        return values.size * bits // 8 + (leaf.scale.nbytes if hasattr(leaf, "scale") else 0)

    return sum(of(leaf) for path, leaf in flatten(weights).items() if path.endswith("/kernel"))


def trained(model: Model, kind: str, directory: Path, data: Path, tokenizer: Tokenizer) -> tuple[Model, float]:
    """The model with what LoRA learnt, and seconds a step."""
    adapted = model.adapted(METHOD, seed=0).for_training(jax.default_backend())
    loader = Loader(
        {"statutes": 1.0},
        {"statutes": data},
        sequence_length=256,
        batch_size=2,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        tokenizer=tokenizer.fingerprint,
        seed=0,
    )
    started = time.perf_counter()
    train(
        Training(
            name=f"lora on {kind}",
            network=adapted.network,
            weights=adapted.weights,
            trains=METHOD.trains,
            loader=loader,
            optimizer=AdamW(learning_rate=1e-3),
            schedule=Cosine(),
            ema=None,
            steps=STEPS,
            accumulate=1,
            precision=Precision(compute="bfloat16", frozen_kernels=kind),  # type: ignore[arg-type]
            mesh=make_mesh(jax.devices()[:1]),
            directory=directory,
            checkpoint_seconds=1e9,
        )
    )
    seconds = (time.perf_counter() - started) / STEPS
    return adapted.overlaid(read_trained(directory / "checkpoints")["last"]), seconds


def main() -> None:
    quiet_libraries()
    results = []
    recipe = quickstart()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        import_gguf(GGUF, root / "model")
        model, tokenizer = load_model(root / "model"), Tokenizer(root / "model")
        parts = {d.name: HeldApart(d.corpus, d.heldout, root) for d in recipe.domains}
        texts = {name: parts[name].measured()[:16] for name in ("statutes", "english")}
        packed = {name: pack_documents(tokenizer, documents, 512) for name, documents in texts.items()}
        prepare("statutes", iter(parts["statutes"].learnt()), tokenizer, root / "statutes")

        def measured(model: Model, weights: dict) -> dict[str, float]:
            return {
                name: bits_per_byte(model.network, weights, rows, batch_size=2, precision=EVALUATED).bits_per_byte
                for name, rows in packed.items()
            }

        for kind in KINDS:
            say(f"base {kind}")
            weights = on_device(model, kind)
            before = measured(model, weights)
            after, seconds = trained(model, kind, root / f"stage {kind}", root / "statutes", tokenizer)
            row = {
                "kernels": kind,
                "bytes": size(weights, model),
                "base": before,
                "on its own base": measured(after, on_device(after, kind)),
                "merged into the released base": measured(after.merged(), after.merged().on_device(EVALUATED)),
                "seconds_a_step": seconds,
            }
            results.append(row)
            say(str(row))
    print(table(results))
    write_json_atomic(OUT, {"machine": platform.machine(), "steps": STEPS, "results": results})


def table(results: list[dict]) -> str:
    header = [
        "layers' kernels",
        "MB",
        "base: statutes",
        "english",
        "LoRA: statutes",
        "english",
        "merged: statutes",
        "english",
        "s a step",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in results:
        figures = [
            row[part][name]
            for part in ("base", "on its own base", "merged into the released base")
            for name in ("statutes", "english")
        ]
        cells = [
            row["kernels"].replace("as computed", "bfloat16"),
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{value:.3f}" for value in figures),
        ]
        lines.append("| " + " | ".join([*cells, f"{row['seconds_a_step']:.1f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
