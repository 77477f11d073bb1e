"""The pieces of an extension: those of a plain learning, used as often as asked, none of them in vain."""

import collections
import itertools

import pytest
from inputs import chinese, compounds, english

from cpt_jax.vocab.extend import ContinuedBPE, Union, extend
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.selection import Selection
from cpt_jax.vocab.tokenizer import Tokenizer, byte_alphabet

KINDS = ("gpt2", "qwen", "llama3")


def spelt(piece: str) -> bytes:
    return bytes(byte_alphabet()[character] for character in piece)


def new_pieces(base: Tokenizer, extended: Tokenizer) -> list[str]:
    """In order of their ids, in inner spelling."""
    vocabulary = extended.backend.get_vocab()
    return sorted((piece for piece in vocabulary if vocabulary[piece] >= base.size), key=vocabulary.__getitem__)


def uses(tokenizer: Tokenizer, texts: list[str]) -> collections.Counter[int]:
    return collections.Counter(index for ids in tokenizer.encode_documents(texts) for index in ids)


def plain_learning(base: Tokenizer, extension: Selection, texts: list[str], protected: list[str]) -> list[bytes]:
    """Continued BPE written plainly: count all pairs of all words, merge the most frequent one that may be, again."""
    words = collections.Counter(word for text in texts for word, _ in base.backend.pre_tokenizer.pre_tokenize_str(text))
    tokens = {word: [token.id for token in base.backend.model.tokenize(word)] for word in words}
    old = {
        pair
        for text in protected
        for word, _ in base.backend.pre_tokenizer.pre_tokenize_str(text)
        for pair in itertools.pairwise(token.id for token in base.backend.model.tokenize(word))
    }
    pieces = {index: piece for piece, index in base.document["model"]["vocab"].items()}
    learnt: list[bytes] = []
    while len(learnt) < extension.new_tokens:
        pairs, used = collections.Counter(), collections.Counter()
        for word, ids in tokens.items():
            pairs.update(
                {pair: words[word] * times for pair, times in collections.Counter(itertools.pairwise(ids)).items()}
            )
            used.update({index: words[word] * times for index, times in collections.Counter(ids).items()})
        for (left, right), count in sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0])):
            piece, taken = pieces[left] + pieces[right], 2 * count if left == right else count
            leaves = all(i < base.size or used[i] - taken >= extension.min_frequency for i in {left, right})
            characters = sum(byte & 0xC0 != 0x80 for byte in spelt(piece))
            fits = characters <= extension.max_piece_characters and count >= extension.min_frequency
            if leaves and fits and (left, right) not in old and piece not in pieces.values():
                break
        else:
            break
        new = base.size + len(learnt)
        pieces[new] = piece
        learnt.append(spelt(piece))
        for word, ids in tokens.items():
            index = 0
            while index < len(ids) - 1:
                if (ids[index], ids[index + 1]) == (left, right):
                    ids[index : index + 2] = [new]
                index += 1
            tokens[word] = ids
    return learnt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "extension",
    [
        ContinuedBPE(new_tokens=80),
        ContinuedBPE(new_tokens=200, min_frequency=12),
        ContinuedBPE(new_tokens=80, max_piece_characters=3),
    ],
    ids=["80", "rare ones left", "short"],
)
def test_continued_learning_is_that_of_a_plain_implementation(bases, tmp_path, kind, extension):
    texts, protected = chinese(60) + compounds(40), english(60)
    base = Tokenizer(bases[kind])
    expected = plain_learning(base, extension, texts, protected)
    extend(bases[kind], extension, texts, protected, tmp_path / "out")
    assert list(map(spelt, new_pieces(base, Tokenizer(tmp_path / "out")))) == expected
    assert 0 < len(expected) <= extension.new_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frequency", [1, 2, 40])
def test_every_continued_piece_is_used_as_often_as_asked(bases, tmp_path, kind, frequency):
    texts = chinese(300) + compounds(100)
    done = extend(bases[kind], ContinuedBPE(new_tokens=300, min_frequency=frequency), texts, [], tmp_path / "out")
    base, extended = Tokenizer(bases[kind]), Tokenizer(tmp_path / "out")
    counts = uses(extended, texts)
    assert done.new_pieces > 20
    assert min(counts[index] for index in range(base.size, extended.size)) >= frequency


def test_no_piece_is_learnt_of_what_added_tokens_take(bases, tmp_path):
    base = Tokenizer(bases["gpt2"]).backend
    # As GPT-NeoX's.
    base.add_tokens([" " * count for count in range(8, 1, -1)])
    (tmp_path / "base").mkdir()
    base.save(str(tmp_path / "base" / "tokenizer.json"))
    texts = [f"def f(x):\n    if x:\n        {text}\n" for text in english(300)]
    extend(tmp_path / "base", ContinuedBPE(new_tokens=60), texts, [], tmp_path / "out")
    before, extended = Tokenizer(tmp_path / "base"), Tokenizer(tmp_path / "out")
    counts, new = uses(extended, texts), range(before.size, extended.size)
    assert len(new) > 10
    assert min(counts[index] for index in new) >= 2


def test_union_pieces_are_those_of_the_domains_own_tokenizer(bases, tmp_path):
    import tokenizers

    base, texts = Tokenizer(bases["gpt2"]), chinese(400)
    domain = tokenizers.Tokenizer(tokenizers.models.BPE())
    domain.pre_tokenizer = base.backend.pre_tokenizer  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=4500, min_frequency=2, show_progress=False)  # type: ignore[call-arg]
    domain.train_from_iterator(texts, trainer)
    extend(bases["gpt2"], Union(new_tokens=60), texts, [], tmp_path / "out")
    extended = Tokenizer(tmp_path / "out")
    new = new_pieces(base, extended)
    assert set(new) <= set(domain.get_vocab())
    # Each is what the extended tokenizer makes of its own text.
    for piece in new:
        assert [token.value for token in extended.backend.model.tokenize(piece)] == [piece]


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_unreachable_pieces_leaves_the_text_as_it_is(bases, tmp_path, kind):
    texts = compounds(150)
    extension = Union(new_tokens=200)
    whole = extend(bases[kind], extension, texts, [], tmp_path / "whole")
    fewer = extend(bases[kind], extension, texts, [], tmp_path / "fewer", drop_unreachable=True)
    assert fewer.new_pieces + fewer.dropped == whole.new_pieces
    assert fewer.dropped > 0
    base, one, two = (Tokenizer(path) for path in (bases[kind], tmp_path / "whole", tmp_path / "fewer"))
    for text in texts:
        tokens = [tokenizer.backend.encode(text, add_special_tokens=False).tokens for tokenizer in (one, two)]
        assert tokens[0] == tokens[1]
    # What is left and not used leads to a piece that is.
    counts, parts = uses(two, texts), {part for merge in two.document["model"]["merges"] for part in merge}
    for index in range(base.size, two.size):
        assert counts[index] or two.backend.id_to_token(index) in parts


def test_a_sample_is_told_and_bounds_what_is_learnt_from(bases, tmp_path, capsys):
    texts = chinese(400)
    total = sum(len(text.encode()) for text in texts)
    extension = ContinuedBPE(new_tokens=60, sample_bytes=total // 4)
    done = extend(bases["gpt2"], extension, iter(texts), [], tmp_path / "out")
    assert 0.8 * total / 4 < done.learnt_bytes <= total // 4
    assert done.corpus_bytes == total
    assert f"{done.learnt_bytes:,} of {total:,} bytes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_tokenizer_on_real_statutes(smollm2, tmp_path):
    """2,000 pieces: 0.70 tokens per character or less on held-out laws, English as before, and every text comes back."""
    from configs.quickstart import quickstart
    from cpt_jax.data.sources import SkipCounts, read

    statutes, english_domain, _ = quickstart().domains
    documents = list(read(statutes.corpus, SkipCounts()))
    learnt = [document.text for document in documents if not statutes.heldout.holds_out(document)]
    held = [document.text for document in documents if statutes.heldout.holds_out(document)]
    passages = list(read(english_domain.corpus, SkipCounts()))
    protected = [document.text for document in passages if not english_domain.heldout.holds_out(document)]
    old = [document.text for document in passages if english_domain.heldout.holds_out(document)]
    extend(smollm2, ContinuedBPE(new_tokens=2000), learnt, protected, tmp_path / "out")
    base, extended = Tokenizer(smollm2), Tokenizer(tmp_path / "out")
    rates = compare("statutes", base, extended, held)
    assert rates["extended"]["tokens_per_character"] < 0.70 < 1.75 < rates["base"]["tokens_per_character"]
    assert base.encode_documents(old) == extended.encode_documents(old)
    counts = uses(extended, learnt)
    assert sum(counts[index] > 0 for index in range(base.size, extended.size)) >= 0.99 * 2000
    for text in [*held[:1000], *old]:
        assert extended.decode(extended.encode(text)) == text
    # This base has no token for some bytes of the rarest planes: there the extended tokenizer is as it is.
    for text in fuzzed_texts(2000, seed=3):
        assert extended.decode(extended.encode(text)) == base.decode(base.encode(text))
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in held[:100]:
        assert reference(text, add_special_tokens=False)["input_ids"] == extended.encode(text)
