"""Greedy generation with a cache is that of transformers."""

import numpy as np
import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.models.generate import generate
from cpt_jax.recipe.model import load_model


def test_greedy_is_that_of_transformers(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    model = load_model(tiny_model)
    weights = model.on_device(Precision(compute="float32"))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for size in (1, 5, 70):
        prompt = np.random.default_rng(size).integers(2, 320, size).tolist()
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)[
            0, size:
        ].tolist()
        assert generate(model.network, weights, prompt, new_tokens=30) == expected
        stop = expected[7]
        assert (
            generate(model.network, weights, prompt, new_tokens=30, end_ids=(stop,)) == expected[: expected.index(stop)]
        )


def test_prompts_that_cannot_be_continued_are_told(tiny_model):
    model = load_model(tiny_model)
    with pytest.raises(UserError, match="prompt is empty"):
        generate(model.network, model.weights, [], new_tokens=3)
    with pytest.raises(UserError, match="context of 256"):
        generate(model.network, model.weights, [1] * 250, new_tokens=10)
