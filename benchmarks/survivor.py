"""The run under fire of `benchmarks.survival`: a small model on one or two domains, with a ledger of the documents that
each step took. Started again in the same directory, it goes on.

    python -m benchmarks.survivor DIRECTORY --steps 200 [--packing none] [--domains 1] [--mesh fsdp=2,tensor=2] [--processes 2 --process 0 --port 7777]
"""

import argparse
import hashlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SHARES = {1: {"new": 1.0}, 2: {"new": 0.7, "old": 0.3}}
DOCUMENTS, ROWS, LENGTH, VOCABULARY = 150, 8, 64, 512
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class _Numbers:
    fingerprint = "numbers"

    def encode_documents(self, documents: list[Any], /) -> list[list[int]]:
        return [[int(token) for token in text.split()] for text in documents]


def prepared(directory: Path) -> dict[str, Path]:
    """Two domains of random documents, some longer than a row; made once."""
    from cpt_jax.data.prepare import MANIFEST, prepare

    places = {name: directory / name for name in SHARES[2]}
    for seed, (name, place) in enumerate(places.items()):
        if not (place / MANIFEST).exists():
            generator = np.random.default_rng(seed)
            lengths = generator.integers(5, 100, DOCUMENTS)
            texts = [" ".join(map(str, generator.integers(2, VOCABULARY, length))) for length in lengths]
            prepare(name, iter(texts), _Numbers(), place)
    return places


class Ledgered:
    """A loader that writes down what each step takes: a number a piece of a document, row by row."""

    def __init__(self, loader: Any, path: Path) -> None:
        self._loader, self._path, self._step = loader, path, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def state(self) -> dict:
        return {"loader": self._loader.state(), "step": self._step}

    def restore(self, state: dict) -> None:
        self._loader.restore(state["loader"])
        self._step = state["step"]

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._loader)
        self._step += 1
        with self._path.open("a") as file:
            file.write(json.dumps({"step": self._step, "rows": pieces(batch)}) + "\n")
        return batch


def pieces(batch: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """Of each row, each piece's domain and the CRC-32 of its inputs and targets."""
    rows = []
    for row in range(len(batch["inputs"])):
        segments = batch["segment_ids"][row]
        found = []
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            content = batch["inputs"][row][inside].tobytes() + batch["targets"][row][inside].tobytes()
            found.append([int(batch["domains"][row][inside][0]), zlib.crc32(content)])
        rows.append(found)
    return rows


def training(directory: Path, data: Path, arguments: argparse.Namespace) -> Any:
    """The stage."""
    import jax

    from cpt_jax.adapt import Full
    from cpt_jax.core.journal import JOURNAL, Journal
    from cpt_jax.core.precision import Precision
    from cpt_jax.core.tree import flatten, unflatten
    from cpt_jax.data.loader import Loader
    from cpt_jax.models.decoder import abstract_decoder
    from cpt_jax.models.families import family_for
    from cpt_jax.optim.averaging import EMA
    from cpt_jax.optim.optimizer import AdamW
    from cpt_jax.optim.schedules import Cosine
    from cpt_jax.recipe.model import Model
    from cpt_jax.sharding.mesh import MeshShape, make_mesh
    from cpt_jax.training.training import Training

    config, generator = family_for(HF_CONFIG).config_from_hf(HF_CONFIG), np.random.default_rng(0)
    shapes = flatten(abstract_decoder(config).shapes)
    weights = {path: (0.02 * generator.normal(size=leaf.shape)).astype(np.float32) for path, leaf in shapes.items()}
    model = Model(config=config, weights=unflatten(weights), hf_config=HF_CONFIG).adapted(Full(), 0)
    settings = dict(
        sequence_length=LENGTH, batch_size=ROWS, start_id=0, end_id=1, tokenizer=_Numbers.fingerprint, seed=1
    )
    loader = Loader(SHARES[arguments.domains], prepared(data), packing=arguments.packing, **settings)
    return Training(
        name="stage-fire",
        network=model.network,
        weights=model.weights,
        trains=Full().trains,
        loader=Ledgered(loader, directory / f"ledger-{jax.process_index()}.jsonl"),  # pyright: ignore
        optimizer=AdamW(learning_rate=arguments.learning_rate),
        schedule=Cosine(),
        ema=EMA(decay=0.9),
        steps=arguments.steps,
        accumulate=1,
        precision=Precision(compute="float32"),
        mesh=make_mesh(shape=None if arguments.mesh is None else MeshShape.parse(arguments.mesh)),
        directory=directory,
        checkpoint_seconds=arguments.checkpoint_seconds,
        journal=Journal(directory / JOURNAL),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, help="default: DIRECTORY/../data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--packing", default="best fit")
    parser.add_argument("--domains", type=int, choices=(1, 2), default=2)
    parser.add_argument("--mesh")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint-seconds", type=float, default=0.2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    import jax

    from cpt_jax.core.errors import TRY_AGAIN, Preempted
    from cpt_jax.core.progress import quiet_libraries
    from cpt_jax.core.tree import flatten

    quiet_libraries()
    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{arguments.port}", arguments.processes, arguments.process)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    from cpt_jax.training.loop import train

    try:
        trained = train(training(arguments.directory, arguments.data or arguments.directory.parent / "data", arguments))
    except Preempted as ended:
        print(f"preempted: {ended}", file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN)
    digest = hashlib.sha256()
    for kind in sorted(trained):
        for path, leaf in sorted(flatten(trained[kind]).items()):
            digest.update(f"{kind} {path}".encode() + np.ascontiguousarray(leaf).tobytes())
    if arguments.process == 0:
        (arguments.directory / "weights.sha256").write_text(digest.hexdigest())


if __name__ == "__main__":
    main()
