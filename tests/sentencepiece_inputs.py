"""Texts on which SentencePiece and its tokenizer.json have to agree."""

from inputs import chinese, compounds, english

from cpt_jax.vocab.gate import fuzzed_texts

TEXTS = (
    chinese(100, seed=3)
    + english(100, seed=3)
    + compounds(100, seed=3)
    + ["", " ", "  the   city ", "a\nb\n\nc\t", "12345 国务院 7", "▁the▁city", "x" * 300]
    + fuzzed_texts(1500, seed=3)
)
