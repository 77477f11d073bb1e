"""Documents that can be told apart in a batch, and a loader of them."""

import random

from cpt_jax.data.loader import Loader

START, END = 0, 1


class Letters:
    fingerprint = "letters"

    def encode_documents(self, texts):
        return [[int(token) for token in text.split()] for text in texts]


def documents(count: int, mean: float, first: int, seed: int) -> list[str]:
    """Documents of random lengths; each token is the document's own number, so that it can be told in a batch."""
    generator = random.Random(seed)
    return [" ".join([str(first + index)] * (1 + int(generator.expovariate(1 / mean)))) for index in range(count)]


def loader(directories, mixture=None, **changes) -> Loader:
    settings = dict(sequence_length=128, batch_size=4, start_id=START, end_id=END, tokenizer="letters", seed=3)
    return Loader(mixture or {"zh": 0.75, "en": 0.25}, directories, **(settings | changes))
