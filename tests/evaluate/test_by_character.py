"""Bits of tokens and characters: against transformers, against bits per byte, and by hand."""

import dataclasses
import math

import numpy as np
import pytest
from inputs import chinese, english, write_sentencepiece

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.evaluate.bits_per_byte import bits_per_byte, pack_documents
from cpt_jax.evaluate.by_character import TextBits, bits_by_character, text_bits
from cpt_jax.evaluate.token_scores import token_log_likelihoods
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

TEXTS = [*english(4, seed=3), *chinese(2, seed=3), " the  city\n国 <|endoftext|> é😀", "x"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    tokenizer, model = Tokenizer(tiny_model), load_model(tiny_model)
    return tokenizer, model.network, model.on_device(FLOAT32)


def test_each_token_has_the_log_likelihood_that_transformers_gives(tiny_model, loaded):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, network, weights = loaded
    sequences = [[tokenizer.start_id, *tokenizer.encode(text)] for text in TEXTS]
    found = token_log_likelihoods(network, weights, sequences, max_length=256, batch_tokens=512, precision=FLOAT32)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for tokens, log_likelihoods in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
        expected = logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()
        np.testing.assert_allclose(log_likelihoods, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "softcap"), [(16, None), (33, 2.0), (256, None)])
def test_characters_sum_to_the_bits_of_the_text_in_windows_too(loaded, length, softcap):
    tokenizer, network, weights = loaded
    network = abstract_decoder(dataclasses.replace(network.config, logit_softcap=softcap))
    for found in text_bits(tokenizer, network, weights, TEXTS, max_length=length, batch_tokens=128, precision=FLOAT32):
        packed = pack_documents(tokenizer, [found.text], length)
        expected = bits_per_byte(network, weights, packed, batch_size=2, precision=FLOAT32)
        by_character = bits_by_character(found)
        assert by_character.shape == (len(found.text),)
        assert by_character.sum() == pytest.approx(expected.bits_per_byte * expected.bytes, rel=1e-5)


def test_a_token_is_spread_over_its_characters_and_the_bytes_of_one_are_summed():
    found = TextBits(
        text="ab 国c",
        ids=[5, 6, 7, 8, 9],
        offsets=[(0, 3), (3, 4), (3, 4), (4, 4), (5, 5)],
        bits=np.array([6.0, 1.0, 2.0, 4.0, 8.0]),
    )
    np.testing.assert_array_equal(bits_by_character(found), [2, 2, 2, 3, 12])


def test_every_character_is_paid_for_and_tokens_are_those_of_training(tiny_model, tmp_path):
    write_sentencepiece(tmp_path, english(300), "bpe", 300)
    for tokenizer in (Tokenizer(tiny_model), Tokenizer(tmp_path)):
        for text, encoding in zip(TEXTS, tokenizer.encode_placed(TEXTS), strict=True):
            assert encoding.ids == tokenizer.encode(text)
            found = TextBits(text=text, ids=encoding.ids, offsets=encoding.offsets, bits=np.ones(len(encoding.ids)))
            by_character = bits_by_character(found)
            assert (by_character > 0).all()
            assert by_character.sum() == pytest.approx(len(encoding.ids))


def test_bad_input_is_told(loaded):
    tokenizer, network, weights = loaded
    options = dict(max_length=64, batch_tokens=64, precision=FLOAT32)
    with pytest.raises(UserError, match="is empty: leave it out"):
        text_bits(tokenizer, network, weights, ["a", ""], **options)
    with pytest.raises(UserError, match="sequence of 1 tokens has none to predict"):
        token_log_likelihoods(network, weights, [[0]], **options)
    found = TextBits(text="a", ids=[1], offsets=[(0, 1)], bits=np.ones(1))
    with pytest.raises(UserError, match="1 tokens, 1 offsets and 2 bits"):
        dataclasses.replace(found, bits=np.ones(2))
    assert math.isclose(bits_by_character(found).sum(), 1.0)
