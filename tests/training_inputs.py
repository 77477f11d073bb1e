"""A stage of training on a tiny model and two domains of random numbers."""

import json

import jax
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.core.precision import Precision
from cpt_jax.data.loader import Loader
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.model import Model
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.training import Training

FLOAT32 = Precision(compute="float32")


class Numbers:
    fingerprint = "numbers"

    def encode_documents(self, texts):
        return [[int(token) for token in text.split()] for text in texts]


def training(directories, directory, method, *, steps=8, devices=None, **changes) -> Training:
    config = tiny_config(new_rows=10)
    model = Model(config=config, weights=random_weights(config), hf_config=hf_config(config)).adapted(method, 0)
    settings = dict(
        name="stage",
        network=model.network,
        weights=model.weights,
        trains=method.trains,
        loader=Loader(
            {"zh": 0.75, "en": 0.25},
            directories,
            sequence_length=32,
            batch_size=8,
            start_id=0,
            end_id=1,
            tokenizer="numbers",
            seed=1,
        ),
        optimizer=AdamW(learning_rate=1e-2, weight_decay=0.1, new_rows_multiplier=2.0),
        schedule=Cosine(),
        ema=EMA(decay=0.9),
        steps=steps,
        accumulate=1,
        precision=FLOAT32,
        mesh=make_mesh(jax.devices()[: devices or 1]),
        directory=directory,
        checkpoint_seconds=1e9,
    )
    return Training(**(settings | changes))


def losses(directory) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


class At:
    """A loader that does something to the batches from step `first` to `last`."""

    def __init__(self, loader, first, last, act):
        self._loader, self._first, self._last, self._act, self.step = loader, first, last, act, 0

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __next__(self):
        self.step += 1
        batch = next(self._loader)
        return self._act(batch) if self._first <= self.step <= self._last else batch


def changed(run, first, last, act):
    run.__dict__["loader"] = At(run.loader, first, last, act)
    return run
