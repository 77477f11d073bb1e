"""Where in a text a model's loss lies: bits by character, which compare models whose tokenizers cut it differently."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree
from cpt_jax.evaluate.token_scores import token_log_likelihoods
from cpt_jax.models.decoder import Network
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBits:
    """A text's tokens, the characters [start, end) that each stands for, and the bits that each costs."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    bits: Float[np.ndarray, "tokens"]

    def __post_init__(self) -> None:
        sizes = (len(self.ids), len(self.offsets), len(self.bits))
        if len(set(sizes)) != 1:
            raise UserError(
                f"a text has {sizes[0]} tokens, {sizes[1]} offsets and {sizes[2]} bits: give one of each a token"
            )


def text_bits(
    tokenizer: Tokenizer,
    network: Network,
    weights: Tree,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int,
    precision: Precision,
) -> list[TextBits]:
    """What each token of the texts costs, each text predicted from its start token alone, as bits per byte has it.

    Args:
      weights: on the device, in `precision`'s types.
      max_length: tokens that the model reads at once; a longer text is read in windows that overlap by half.
      batch_tokens: tokens of a batch.

    Raises:
      UserError: a text is empty.
    """
    if not all(texts):
        raise UserError("a text to look at is empty: leave it out")
    encodings = tokenizer.encode_placed(list(texts))
    found = token_log_likelihoods(
        network,
        weights,
        [[tokenizer.start_id, *encoding.ids] for encoding in encodings],
        max_length=max_length,
        batch_tokens=batch_tokens,
        precision=precision,
    )
    return [
        TextBits(text=text, ids=encoding.ids, offsets=encoding.offsets, bits=-log_likelihoods / math.log(2))
        for text, encoding, log_likelihoods in zip(texts, encodings, found, strict=True)
    ]


def bits_by_character(found: TextBits) -> Float[np.ndarray, "characters"]:
    """The bits of each token in equal parts on the characters that it stands for; tokens of one character (bytes of
    it) are summed, and a token that stands for none counts to the character where it is. The sum is that of the tokens.
    """
    bits = np.zeros(len(found.text))
    for (start, end), value in zip(found.offsets, found.bits, strict=True):
        start = min(start, len(bits) - 1)
        end = max(end, start + 1)
        bits[start:end] += value / (end - start)
    return bits
