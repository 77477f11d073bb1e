"""What may become a piece: the user's terms, bans and limits, and what is refused to everyone."""

import random
import unicodedata

import pytest
import regex
from inputs import chinese, compounds, english

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, Union, extend
from cpt_jax.vocab.gate import piece_use
from cpt_jax.vocab.selection import Selection, forbidden, sampled
from cpt_jax.vocab.tokenizer import Tokenizer

BPE_KINDS = ("gpt2", "qwen", "llama3", "bpe")
# Every way to learn pieces, for limits that hold for all of them.
WAYS = [(kind, ContinuedBPE) for kind in BPE_KINDS] + [(kind, Union) for kind in (*BPE_KINDS, "unigram")]
way = pytest.mark.parametrize(("kind", "method"), WAYS, ids=[f"{kind}-{method.__name__}" for kind, method in WAYS])


def learnt(directory, method, texts, out, **limits) -> list[str]:
    """The new pieces as text."""
    extend(directory, method(**({"new_tokens": 60} | limits)), texts, [], out)
    base, extended = Tokenizer(directory), Tokenizer(out)
    # Behind a letter, so that a decoder leaves a piece's first space.
    (letter,) = extended.backend.model.tokenize("a")
    return [extended.decode([letter.id, index])[1:] for index in range(base.size, extended.size)]


@way
def test_pieces_keep_to_the_scripts_asked_for(bases, tmp_path, kind, method):
    texts = chinese(300) + compounds(100) + ["ひらがな と かな"] * 50
    pieces = learnt(bases[kind], method, texts, tmp_path / "out", scripts=("Han",))
    whole = [piece for piece in pieces if "\ufffd" not in piece]
    assert whole
    for piece in whole:
        assert regex.fullmatch(r" ?[\p{Han}\p{P}\s]*\p{Han}[\p{Han}\p{P}\s]*", piece), piece
    both = learnt(bases[kind], method, texts, tmp_path / "both", scripts=("Han", "Hiragana"), new_tokens=100)
    assert any(regex.search(r"\p{Hiragana}", piece) for piece in both)
    assert not any(regex.search(r"\p{Latin}", piece) for piece in both)


@way
def test_banned_pieces_are_never_added(bases, tmp_path, kind, method):
    texts = chinese(300) + compounds(100)
    before = {piece.removeprefix(" ") for piece in learnt(bases[kind], method, texts, tmp_path / "all")}
    banned = tuple(sorted(piece for piece in before if "\ufffd" not in piece)[::5])
    assert len(banned) > 2
    after = {piece.removeprefix(" ") for piece in learnt(bases[kind], method, texts, tmp_path / "out", banned=banned)}
    assert after.isdisjoint(banned)
    assert after & before


@way
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_pieces_are_no_longer_than_asked(bases, tmp_path, kind, method, limit):
    pieces = learnt(bases[kind], method, chinese(300), tmp_path / "out", max_piece_characters=limit)
    # The space that stands before a word is one of a byte-level piece's characters.
    assert max(len(piece.replace("\ufffd", "").lstrip(" ")) for piece in pieces) <= limit


@way
def test_control_characters_and_special_tokens_are_never_learnt(bases, tmp_path, kind, method):
    special = "</s>" if kind in ("bpe", "unigram") else "<|im_end|>"
    wrong = f"\x07\ue000\u202e{special}"
    pieces = learnt(bases[kind], method, [f"国务院{wrong}应当 {wrong}本法"] * 200 + chinese(100), tmp_path / "out")
    assert pieces
    for piece in pieces:
        assert special not in piece
        assert not [c for c in piece if unicodedata.category(c) in ("Cc", "Co", "Cf") and c not in "\n\t"], piece


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_candidates_become_pieces_that_their_own_text_gives(bases, tmp_path, kind):
    terms = ("人民法院", "人民", "国务院令", "riverhouse", "违反")
    texts = [*english(50), "the riverhouse"]
    for name, count in (("alone", 0), ("besides", 40)):
        extension = ContinuedBPE(new_tokens=count, candidates=terms)
        extend(bases[kind], extension, texts + chinese(100) * bool(count), [], tmp_path / name)
        base, extended = Tokenizer(bases[kind]), Tokenizer(tmp_path / name)
        for term in terms:
            # "riverhouse" stands behind a space in the corpus, and its piece holds it.
            text = " " + term if term.isascii() else term
            (piece,) = [index for index in extended.encode("。" + text) if extended.piece(index).strip() == term]
            assert piece >= base.size
        use = piece_use(base, extended, texts + chinese(100), terms)
        assert use.unreachable == []
        assert use.new_pieces == extended.size - base.size >= len(terms) + count


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_candidates_do_not_change_protected_text(bases, tmp_path, kind, capsys):
    # ŵ is spelt in bytes, which no piece may join.
    protected = [*english(200), "zqzq", "ŵ"]
    extension = ContinuedBPE(new_tokens=0, candidates=("人民法院", "zqzq", "ŵœ", "theriver", "schoolcity"))
    extend(bases[kind], extension, [""], protected, tmp_path / "out")
    base, extended = Tokenizer(bases[kind]), Tokenizer(tmp_path / "out")
    assert base.encode_documents(protected) == extended.encode_documents(protected)
    told = capsys.readouterr().err
    assert "candidate 'zqzq' is left out" in told
    assert "candidate 'ŵœ' is left out" in told


def test_a_candidate_of_several_words_is_told_and_left_out(bases, tmp_path, capsys):
    extend(bases["gpt2"], ContinuedBPE(new_tokens=0, candidates=("国务院", "the river")), [], [], tmp_path / "out")
    assert "1 candidates are several words" in capsys.readouterr().err
    with pytest.raises(UserError, match="no candidate can be a piece of this tokenizer"):
        extend(bases["gpt2"], ContinuedBPE(new_tokens=0, candidates=("the river",)), [], [], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("国务\x00院", r"control or private character U\+0000"),
        ("\ue123", r"U\+E123"),
        ("a\u202eb", r"U\+202E"),
        ("国务院<|im_end|>", r"the special token '<\|im_end\|>'"),
        ("  ", "is empty"),
        ("国务院", "is a candidate and banned"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_candidates_that_no_tokenizer_should_have_are_refused(bases, tmp_path, kind, term, message):
    extension = ContinuedBPE(new_tokens=5, candidates=("应当", term), banned=("国务院",))
    with pytest.raises(UserError, match=message):
        extend(bases[kind], extension, chinese(50), [], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_text_that_needs_joiners_and_line_breaks_may_be_learnt():
    for text in ("می\u200cخواهم", "क\u094d\u200dष", "\n\n", "\t"):
        assert forbidden(text, ["<s>"]) is None
    for text in ("\x1b", "\u2066", "\ufeff", "\U000e0001", "\uffff"):
        assert forbidden(text, ["<s>"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(new_tokens=0), "new_tokens is 0: give at least 1"),
        (dict(new_tokens=-1, candidates=("a",)), "new_tokens is -1"),
        (dict(min_frequency=0), "min_frequency is 0: give at least 1"),
        (dict(max_piece_characters=0), "max_piece_characters is 0"),
        (dict(sample_bytes=0), "sample_bytes is 0"),
        (dict(scripts=("Klingon",)), "'Klingon' is no Unicode script: give names like Han"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Selection(**({"new_tokens": 5} | changes))


def test_a_sample_is_bounded_and_the_same_in_any_order():
    texts = [f"{index} " + "国" * (index % 50) for index in range(2000)]
    kept, size, total = sampled(iter(texts), 20_000)
    assert total == sum(len(text.encode()) for text in texts)
    assert size == sum(len(text.encode()) for text in kept) <= 20_000 < size + 200
    assert kept == [text for text in texts if text in set(kept)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert set(sampled(iter(shuffled), 20_000)[0]) == set(kept)
    # Drawn from everywhere, and part of any larger sample.
    assert {int(text.split()[0]) // 500 for text in kept} == {0, 1, 2, 3}
    assert set(kept) <= set(sampled(iter(texts), 40_000)[0])


def test_a_sample_of_a_small_corpus_is_all_of_it():
    assert sampled(iter(["b", "a", "国"]), 100) == (["b", "a", "国"], 5, 5)
    assert sampled(iter([]), 100) == ([], 0, 0)
    assert sampled(iter(["a" * 200]), 100) == (["a" * 200], 200, 200)
