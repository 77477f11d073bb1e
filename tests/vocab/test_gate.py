"""The gate refuses, with the figure, what an extension must not do."""

import collections
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from inputs import chinese, compounds, english

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, Union, extend
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import (
    Limits,
    _leads_to_one,
    check,
    fuzzed_texts,
    moved_ids,
    piece_use,
    slow_fast_differences,
)
from cpt_jax.vocab.sentencepiece_model import append_pieces, processor, read_model
from cpt_jax.vocab.tokenizer import Tokenizer

OLD, NEW = english(60, seed=5), chinese(60, seed=5)
CONTINUED = ContinuedBPE(new_tokens=60)
ANYTHING = {"old_documents_changed": 1.0, "old_tokens_added": 1.0, "unreachable_pieces": 1.0}


@pytest.fixture(scope="module")
def good(bases, tmp_path_factory) -> dict[str, Path]:
    """Extensions that pass, by their base's kind."""
    root = tmp_path_factory.mktemp("good")
    for kind in ("gpt2", "qwen", "bpe", "unigram"):
        extension = (Union if kind == "unigram" else ContinuedBPE)(new_tokens=60)
        extend(bases[kind], extension, chinese(400), english(300), root / kind, drop_unreachable=True)
    return {path.name: path for path in root.iterdir()}


def pass_gate(base: Path, extended: Path, old=OLD, learnt=None, made_by=CONTINUED, **limits) -> None:
    before, after = Tokenizer(base), Tokenizer(extended)
    corpora = {"english": old, "chinese": NEW}
    compared = [compare(name, before, after, texts) for name, texts in corpora.items()]
    use = piece_use(before, after, chinese(400) if learnt is None else learnt)
    check(before, after, corpora, compared, ["english"], use, Limits(**limits), made_by)


def altered(directory: Path, out: Path, change: Callable[[dict], None], file: str = "tokenizer.json") -> Path:
    """A copy of a tokenizer with its JSON changed."""
    shutil.copytree(directory, out)
    document = json.loads((out / file).read_text())
    change(document)
    (out / file).write_text(json.dumps(document))
    return out


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "bpe", "unigram"])
def test_a_good_extension_passes_without_any_allowance(bases, good, kind):
    pass_gate(bases[kind], good[kind], old_documents_changed=0, old_tokens_added=0, unreachable_pieces=0)


def test_ids_that_moved_are_refused_and_counted(bases, good, tmp_path):
    def swap(document):
        vocabulary = document["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    out = altered(good["gpt2"], tmp_path / "out", swap)
    assert sorted(moved_ids(Tokenizer(bases["gpt2"]), Tokenizer(out))) == ["a", "b"]
    with pytest.raises(UserError, match=r"changed 2 ids of the base, '[ab]' first"):
        pass_gate(bases["gpt2"], out)


def test_lost_special_tokens_are_refused(bases, good, tmp_path):
    def not_special(document):
        document["added_tokens"][0]["special"] = False

    with pytest.raises(UserError, match="lost the base's special tokens"):
        pass_gate(bases["qwen"], altered(good["qwen"], tmp_path / "out", not_special))


def test_a_lost_chat_template_is_refused(bases, good, tmp_path):
    def forget(settings):
        del settings["chat_template"]

    with pytest.raises(UserError, match="lost the base's chat template"):
        pass_gate(bases["qwen"], altered(good["qwen"], tmp_path / "out", forget, "tokenizer_config.json"))


def test_arbitrary_text_that_does_not_come_back_is_refused(bases, good, tmp_path):
    def lower(document):
        document["normalizer"] = {"type": "Lowercase"}

    with pytest.raises(UserError, match=r"does not give back '.*', which the base does"):
        pass_gate(bases["gpt2"], altered(good["gpt2"], tmp_path / "out", lower))


def test_documents_that_do_not_come_back_are_refused_and_counted(bases, good, tmp_path):
    def shorten(document):
        document["normalizer"] = {"type": "Replace", "pattern": {"String": "国务院"}, "content": "国"}

    count = sum("国务院" in text for text in NEW)
    with pytest.raises(UserError, match=f"^{count} documents of chinese would not come back"):
        pass_gate(bases["gpt2"], altered(good["gpt2"], tmp_path / "out", shorten))


def test_what_the_base_does_not_give_back_is_no_fault_of_the_extension(bases, good):
    # Qwen's normalizer composes.
    decomposed = "cafe\u0301"
    base, extended = Tokenizer(bases["qwen"]), Tokenizer(good["qwen"])
    assert extended.decode(extended.encode(decomposed)) != decomposed
    assert compare("x", base, extended, [decomposed])["round_trip_failures"] == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_files_that_disagree_are_refused_with_the_share(bases, good, tmp_path, kind):
    """tokenizer.model holds a piece that tokenizer.json does not know."""
    out = tmp_path / "out"
    shutil.copytree(good[kind], out)
    tokens = [Tokenizer(out).backend.encode(text, add_special_tokens=False).tokens for text in NEW]
    pairs = ((a, b) for text in tokens for a, b in itertools.pairwise(text) if "<" not in a + b and "▁" not in a + b)
    pair = next(a + b for a, b in pairs if Tokenizer(out).backend.token_to_id(a + b) is None)
    grown = append_pieces(read_model(out / "tokenizer.model"), [], [(pair, 0.0)])
    (out / "tokenizer.model").write_bytes(grown.SerializeToString())
    tokenizer, reference = Tokenizer(out), processor(grown)
    share = sum(reference.encode(text) != tokenizer.encode(text) for text in NEW) / len(NEW)
    assert 0 < share < 1
    assert slow_fast_differences(tokenizer, NEW) == share
    message = f"{share:.1%} of the documents of chinese are cut differently by tokenizer.model and tokenizer.json"
    with pytest.raises(UserError, match=re.escape(message)):
        pass_gate(bases[kind], out)
    pass_gate(bases[kind], out, slow_fast_differences=1.0)


def test_scores_of_zero_are_refused_where_the_two_files_cannot_agree(bases, tmp_path):
    """Of pieces with one score SentencePiece merges the leftmost; merges have an order."""
    zero = Union(new_tokens=60, scores="zero")
    extend(bases["bpe"], zero, chinese(400), [], tmp_path / "out")
    with pytest.raises(UserError, match=r"cut differently .*: use --scores below-base .*, use --method continued-bpe"):
        pass_gate(bases["bpe"], tmp_path / "out", old=[*OLD, *chinese(300)], made_by=zero, **ANYTHING)


@pytest.mark.parametrize(
    ("kind", "made_by", "ways"),
    [
        ("gpt2", ContinuedBPE(new_tokens=60), {"--new-tokens"}),
        ("gpt2", Union(new_tokens=60), {"--new-tokens", "--method"}),
        ("bpe", Union(new_tokens=60, scores="own"), {"--new-tokens", "--scores", "--method"}),
        ("unigram", Union(new_tokens=60, scores="own"), {"--new-tokens", "--scores"}),
        ("unigram", Union(new_tokens=60), {"--new-tokens"}),
    ],
)
def test_a_refusal_names_the_ways_out_that_there_are(bases, good, kind, made_by, ways):
    """No other method for a unigram, no scores where there are none, and what a run in its directory needs besides."""
    with pytest.raises(UserError) as refused:
        pass_gate(bases[kind], good[kind], old=OLD[:45] + chinese(15), made_by=made_by)
    told = str(refused.value)
    named = {flag for flag in ("--new-tokens", "--scores", "--method") if f"{flag} " in told or f"({flag};" in told}
    assert named == ways
    assert told.endswith(
        "or raise the limit (--max-old-documents-changed; of a run "
        "--vocabulary.limits.old_documents_changed); a run that has begun takes another setting with --update"
    )


def test_where_the_base_s_files_disagree_is_no_fault_of_the_extension(bases, tmp_path):
    """As transformers 5 writes LLaMA's tokenizer.json: SentencePiece puts a space before " a" too."""

    base, spaced = tmp_path / "base", [f" {text}" for text in OLD]
    shutil.copytree(bases["bpe"], base)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    document = Tokenizer(base).document | {"normalizer": None, "pre_tokenizer": metaspace}
    (base / "tokenizer.json").write_text(json.dumps(document))
    extend(base, ContinuedBPE(new_tokens=60), chinese(400), english(300), tmp_path / "out", drop_unreachable=True)
    assert slow_fast_differences(Tokenizer(tmp_path / "out"), spaced) == 1
    pass_gate(base, tmp_path / "out", old=spaced)


def test_names_of_added_tokens_in_a_text_are_no_disagreement(bases, good):
    """To tokenizer.json they are these tokens, to SentencePiece they are text: so it was in the base."""
    assert slow_fast_differences(Tokenizer(good["bpe"]), ["the <s>old</s> price", "the city"]) == 0
    assert slow_fast_differences(Tokenizer(good["gpt2"]), ["no tokenizer.model, nothing to compare"]) == 0


def test_old_text_that_changed_is_refused_with_the_share(bases, good):
    with pytest.raises(UserError, match=r"^25\.0% of the old documents \(english\) are tokenised differently"):
        pass_gate(bases["gpt2"], good["gpt2"], old=OLD[:45] + chinese(15))
    pass_gate(bases["gpt2"], good["gpt2"], old=OLD[:45] + chinese(15), old_documents_changed=0.25)


def test_a_single_old_document_that_changed_is_chance(bases, good):
    """Of few documents it is more than the limit of 5%."""
    pass_gate(bases["gpt2"], good["gpt2"], old=OLD[:11] + chinese(1), old_tokens_added=1)
    with pytest.raises(UserError, match=r"^15\.4% of the old documents"):
        pass_gate(bases["gpt2"], good["gpt2"], old=OLD[:11] + chinese(2))
    with pytest.raises(UserError, match=r"^8\.3% of the old documents .* limit of 0\.0%"):
        pass_gate(bases["gpt2"], good["gpt2"], old=OLD[:11] + chinese(1), old_documents_changed=0)


def test_more_tokens_for_old_text_are_refused_with_the_share(bases, tmp_path):
    """Scores of zero cut old words at the new pieces' borders."""
    extend(bases["bpe"], Union(new_tokens=60, scores="zero"), compounds(400), [], tmp_path / "out")
    base, extended = Tokenizer(bases["bpe"]), Tokenizer(tmp_path / "out")
    added = sum(len(extended.encode(text)) for text in OLD) / sum(len(base.encode(text)) for text in OLD) - 1
    assert added > 0.05
    with pytest.raises(UserError, match=re.escape(f"{added:.1%} more tokens are needed for the old documents")):
        pass_gate(bases["bpe"], tmp_path / "out", old_documents_changed=1.0, unreachable_pieces=1.0)
    pass_gate(bases["bpe"], tmp_path / "out", **ANYTHING)


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "bpe", "unigram"])
def test_unreachable_pieces_are_counted_listed_and_refused(bases, good, kind):
    learnt = [text.replace("人民法院", "").replace("责任", "") for text in chinese(400)]
    base, extended = Tokenizer(bases[kind]), Tokenizer(good[kind])
    seen = {index for text in learnt for index in extended.encode(text)}
    expected = [extended.piece(index) for index in range(base.size, extended.size) if index not in seen]
    use = piece_use(base, extended, learnt)
    assert use.unreachable == expected
    assert use.unreachable_pieces == len(expected) > 1
    assert use.new_pieces == extended.size - base.size
    assert set(use.longest).isdisjoint(expected)
    # In characters: of one that is not whole nothing counts.
    lengths = [len(re.sub("<0x[0-9A-F]{2}>", "", piece)) for piece in use.longest]
    assert lengths == sorted(lengths, reverse=True)
    share = f"{len(expected) / use.new_pieces:.1%} of the new pieces are never used"
    with pytest.raises(UserError, match=rf"^{re.escape(share)}.*--drop-unreachable"):
        pass_gate(bases[kind], good[kind], learnt=learnt, unreachable_pieces=0.0)
    pass_gate(bases[kind], good[kind], learnt=learnt, unreachable_pieces=1.0)


def test_the_most_frequent_pieces_come_with_their_counts(bases, good):
    base, extended, texts = Tokenizer(bases["gpt2"]), Tokenizer(good["gpt2"]), chinese(100)
    use = piece_use(base, extended, iter(texts), shown=3)
    counts = collections.Counter(i for text in texts for i in extended.encode(text) if i >= base.size)
    assert [count for _, count in use.most_frequent] == [count for _, count in counts.most_common(3)]
    for piece, count in use.most_frequent:
        assert any(extended.piece(index) == piece for index in counts if counts[index] == count)


def test_steps_to_candidates_are_not_unreachable(bases, tmp_path):
    terms = ("人民法院令", "riverhouse")
    extend(bases["gpt2"], ContinuedBPE(new_tokens=0, candidates=terms), ["the riverhouse"], [], tmp_path / "out")
    base, extended = Tokenizer(bases["gpt2"]), Tokenizer(tmp_path / "out")
    asked, plain = (piece_use(base, extended, ["the riverhouse"], names) for names in (terms, ()))
    assert asked.unreachable_pieces == 0
    assert asked.steps_to_candidates > 0
    # Nobody asked for the court, and the text does not hold it.
    assert plain.unreachable_pieces == asked.steps_to_candidates + 1
    assert plain.steps_to_candidates == 0


@pytest.mark.parametrize(
    ("piece", "leads"),
    [
        (b" riv", True),
        ("人民".encode()[:4], True),
        ("院".encode(), True),
        (b"ver", False),
        (b"x", False),
    ],
)
def test_a_step_is_a_beginning_or_a_character_of_a_term(piece, leads):
    assert _leads_to_one(piece, ("riverhouse", " 人民法院")) is leads
    assert not _leads_to_one(b" ", ("riverhouse",))


def test_what_is_listed_is_cut_short_and_was_used(bases, good):
    use = piece_use(Tokenizer(bases["gpt2"]), Tokenizer(good["gpt2"]), [], shown=1)
    assert use.unreachable_pieces > len(use.unreachable) == 10
    assert use.most_frequent == use.longest == []


def test_parts_of_other_characters_are_no_steps_to_a_candidate(bases, good):
    base, extended = Tokenizer(bases["gpt2"]), Tokenizer(good["gpt2"])
    broken = [index for index in range(base.size, extended.size) if extended.piece(index).startswith("<0x")]
    use = piece_use(base, extended, [], ("riverhouse",))
    assert broken
    assert use.steps_to_candidates == 0


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_limits_are_shares(value):
    with pytest.raises(UserError, match=f"limit old_tokens_added is {value}: give a share between 0 and 1"):
        Limits(old_tokens_added=value)


def test_fuzzed_text_is_valid_varied_and_the_same_each_time():
    texts = fuzzed_texts(500, seed=1)
    assert texts == fuzzed_texts(500, seed=1) != fuzzed_texts(500, seed=2)
    assert all(text.encode().decode() == text for text in texts)
    characters = set("".join(texts))
    assert {"\x00", "\u200d", "\u0301"} <= characters
    assert any(character > "\uffff" for character in characters)
