"""Two prepared domains."""

import numpy as np
import pytest
from training_inputs import Numbers

from cpt_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("zh", "en"):
        texts = [" ".join(map(str, generator.integers(2, 330, generator.integers(5, 40)))) for _ in range(120)]
        prepare(name, iter(texts), Numbers(), root / name)
    return {name: root / name for name in ("zh", "en")}
