"""Byte-level tokenizers extended: nothing is taken from the base, and what cannot be extended is refused."""

import dataclasses
import itertools
import json
import re

import pytest
from inputs import chinese, compounds, english, write_tokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, Union, extend, old_segmentation
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import fuzzed_texts, moved_ids
from cpt_jax.vocab.tokenizer import Tokenizer

KINDS = ("gpt2", "qwen", "llama3")
METHODS = {"continued-bpe": ContinuedBPE(new_tokens=60), "union": Union(new_tokens=60)}
SPECIAL = ["<|im_end|>国务院<|endoftext|>本法", "应当<|im_end|>", "the<|endoftext|>city"]
CHAT = ["<|im_start|>国务院<|im_end|><think>应当</think>"]


@pytest.fixture(scope="module", params=list(itertools.product(KINDS, METHODS)), ids="-".join)
def grown(request, bases, tmp_path_factory):
    """(base, extended) of every kind by every method."""
    kind, method = request.param
    out = tmp_path_factory.mktemp("grown") / "tokenizer"
    extend(bases[kind], METHODS[method], chinese(400), english(300), out)
    return Tokenizer(bases[kind]), Tokenizer(out)


def test_a_little_of_the_new_language_in_old_text_keeps_it_apart_unless_tolerated(bases, tmp_path, capsys):
    texts = chinese(400)
    # One Chinese text among the English ones, with everything that the new text has.
    old = [*english(2000), "".join(sorted(set("".join(texts)))), texts[0]]
    lengths = {}
    for tolerance in (0.0, 0.2):
        out = tmp_path / f"{tolerance}"
        extend(bases["gpt2"], ContinuedBPE(new_tokens=60, tolerance=tolerance), texts, old, out)
        extended = Tokenizer(out)
        assert extended.encode_documents(english(2000)) == Tokenizer(bases["gpt2"]).encode_documents(english(2000))
        lengths[tolerance] = sum(map(len, extended.encode_documents(texts)))
    assert lengths[0.2] < 0.8 * lengths[0.0]
    with pytest.raises(UserError, match=r"tolerance is 1\.5"):
        ContinuedBPE(new_tokens=60, tolerance=1.5)


def test_ids_of_the_base_keep_their_meaning_and_new_ones_follow_without_a_gap(grown):
    base, extended = grown
    before, after = base.backend.get_vocab(), extended.backend.get_vocab()
    assert {piece: after[piece] for piece in before} == before
    assert sorted(after.values()) == list(range(base.size + 60))
    for index in range(base.size):
        assert extended.backend.id_to_token(index) == base.backend.id_to_token(index)


def test_protected_text_is_tokenised_as_before(grown):
    base, extended = grown
    texts = english(300)
    assert base.encode_documents(texts) == extended.encode_documents(texts)


def test_every_text_that_came_back_comes_back(grown):
    base, extended = grown
    for text in chinese(200, seed=9) + english(200, seed=9) + SPECIAL + CHAT + fuzzed_texts(500, seed=9):
        assert extended.decode(extended.encode(text)) == base.decode(base.encode(text))


def test_new_text_takes_fewer_tokens(grown):
    base, extended = grown
    rates = compare("zh", base, extended, chinese(100, seed=5))
    assert rates["extended"]["tokens_per_character"] < 0.5 * rates["base"]["tokens_per_character"]
    assert rates["documents_changed"] == 1.0


def test_transformers_reads_it_alike(grown):
    from transformers import AutoTokenizer

    _, extended = grown
    reference = AutoTokenizer.from_pretrained(extended.directory)
    assert len(reference) == extended.size
    texts = chinese(30, seed=3) + english(30, seed=3) + SPECIAL + CHAT + fuzzed_texts(300, seed=3)
    for text, written in zip(texts, extended.encode_marked(texts), strict=True):
        assert reference(text, add_special_tokens=False)["input_ids"] == written.ids


def test_special_tokens_and_the_chat_template_stay(grown):
    base, extended = grown
    assert extended.document["added_tokens"] == base.document["added_tokens"]
    assert (extended.start_id, extended.end_id) == (base.start_id, base.end_id)
    assert extended.chat_template == base.chat_template
    for token in base.document["added_tokens"]:
        [written] = extended.encode_marked([f"国务院{token['content']}应当"])
        assert written.ids.count(token["id"]) == 1


def test_a_new_piece_is_its_old_pieces(grown):
    base, extended = grown
    table = {index: piece for piece, index in extended.backend.get_vocab().items()}
    segmented = old_segmentation(base, extended)
    assert len(segmented) == 60
    for offset, ids in enumerate(segmented):
        assert "".join(table[index] for index in ids) == table[base.size + offset]
        assert max(ids) < base.size
        assert len(ids) >= 2


def test_an_extended_tokenizer_is_extended_again(grown, tmp_path):
    base, extended = grown
    extend(extended.directory, ContinuedBPE(new_tokens=20), compounds(200), chinese(400), tmp_path / "out")
    again = Tokenizer(tmp_path / "out")
    vocabulary = again.backend.get_vocab()
    assert all(vocabulary[piece] == index for piece, index in extended.backend.get_vocab().items())
    assert again.size == base.size + 80
    assert again.encode_documents(chinese(400)) == extended.encode_documents(chinese(400))


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "bpe"])
def test_added_tokens_whose_ids_the_library_does_not_keep_are_extended_as_it_reads_them(bases, tmp_path, kind):
    from transformers import AutoTokenizer

    base = Tokenizer(bases[kind])
    far = base.document["added_tokens"][-1] | {"content": "<|far|>", "id": base.size + 50, "special": True}
    document = base.document | {"added_tokens": [*base.document["added_tokens"], far]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(document))
    base = Tokenizer(tmp_path / "base")
    extend(tmp_path / "base", ContinuedBPE(new_tokens=20), chinese(200), [], tmp_path / "out")
    extended, read = Tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert moved_ids(base, extended) == []
    assert base.document["added_tokens"] == extended.document["added_tokens"]
    assert read.convert_tokens_to_ids("<|far|>") == extended.backend.token_to_id("<|far|>") == base.size - 1
    assert extended.size == base.size + 20


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer(bases, tmp_path, kind, method):
    for name in ("first", "second"):
        extend(bases[kind], method, chinese(100), english(100), tmp_path / name)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()


def test_merges_never_join_what_stands_together_in_old_text(bases, tmp_path):
    texts = ["zzqq zzqq zzqq"] * 50
    for method in METHODS.values():
        with pytest.raises(UserError, match="nothing in the corpus is worth adding"):
            extend(bases["gpt2"], method, texts, texts, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_of_much_old_text_a_sample_is_protected(bases, tmp_path, capsys):
    old = english(2000)
    whole = sum(len(text.encode()) for text in old)
    for method in METHODS.values():
        extend(bases["gpt2"], dataclasses.replace(method, sample_bytes=40_000), chinese(100), old, tmp_path / "out")
        told = capsys.readouterr().err
        [size] = re.findall(rf"tokenizer: protecting ([\d,]+) of {whole:,} bytes", told)
        assert 35_000 < int(size.replace(",", "")) <= 40_000


def test_a_refused_extension_leaves_an_earlier_one_as_it_was(bases, tmp_path):
    out = tmp_path / "out"
    extend(bases["gpt2"], METHODS["union"], chinese(100), [], out)
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="worth adding"):
        extend(bases["gpt2"], METHODS["union"], ["the city"], [], out)
    assert (out / "tokenizer.json").read_bytes() == before


def test_options_of_other_kinds_are_refused(bases, tmp_path):
    with pytest.raises(UserError, match="'zero' are for SentencePiece"):
        extend(bases["gpt2"], Union(new_tokens=5, scores="zero"), chinese(10), [], tmp_path / "out")
    with pytest.raises(UserError, match="candidates go with continued-bpe"):
        extend(bases["gpt2"], Union(new_tokens=5, candidates=("国务院",)), chinese(10), [], tmp_path / "out")


def test_other_kinds_of_tokenizer_are_refused_with_what_would_work(tmp_path):
    import tokenizers

    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    wordpiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"WordPiece cannot be extended: byte-level BPE .*new pieces 0"):
        extend(tmp_path, ContinuedBPE(new_tokens=5), ["a"], [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tiktoken_file_without_its_table_is_refused_with_what_would_work(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(
        UserError, match=r"tiktoken .* cannot be read; give a model or tokenizer directory that has one"
    ):
        extend(tmp_path, ContinuedBPE(new_tokens=5), ["a"], [], tmp_path / "out")


def test_merges_written_as_text_stay_so(bases, tmp_path):
    """Files of older `tokenizers` hold merges as "left right"."""
    write_tokenizer(tmp_path / "base", english(300))
    document = json.loads((tmp_path / "base/tokenizer.json").read_text())
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(document))
    for name, base in (("text", tmp_path / "base"), ("pairs", bases["gpt2"])):
        extend(base, METHODS["continued-bpe"], chinese(100), [], tmp_path / name)
    text, pairs = (Tokenizer(tmp_path / name) for name in ("text", "pairs"))
    assert text.document["model"]["merges"] == [" ".join(merge) for merge in pairs.document["model"]["merges"]]
    assert text.encode_documents(chinese(50)) == pairs.encode_documents(chinese(50))
