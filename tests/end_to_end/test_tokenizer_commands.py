"""`cpt tokenizer extend` and `cpt tokenizer report` on tiny tokenizers of both kinds."""

import json
from pathlib import Path

import pytest
from inputs import chinese, english, hf_config, tiny_config, write_jsonl, write_tokenizer

from cpt_jax.cli import main
from cpt_jax.report.tokenizer_curve import curve_sentences
from cpt_jax.report.tokenizer_report import spans
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts, a byte-level base with a model's config, the same with pieces trained on Chinese, and a SentencePiece
    base."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_jsonl(root / "zh.jsonl", chinese(300))
    write_jsonl(root / "en.jsonl", english(300))
    write_tokenizer(root / "base", english(300))
    write_tokenizer(root / "other", chinese(300))
    (root / "base" / "config.json").write_text(json.dumps(hf_config(tiny_config())))
    write_sentencepiece(root / "pieces", english(300))
    return root


def write_sentencepiece(directory, texts):
    from sentencepiece import SentencePieceTrainer

    directory.mkdir()
    settings = dict(model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    with (directory / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=340,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            **settings,
        )


@pytest.fixture
def cpt(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def call(*arguments) -> str:
        main(["tokenizer", *(str(argument) for argument in arguments)])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def grown(place):
    main(f"tokenizer extend --base {place}/base --corpus {place}/zh.jsonl --new-tokens 25 --out {place}/grown".split())
    return place / "grown"


def test_extend_tells_what_it_did(cpt, place):
    out = cpt("extend", "--base", "base", "--corpus", "zh.jsonl", "--protect", "en.jsonl", "--new-tokens", 25, "--out",
              "protected", "--json", "extend.json")  # fmt: skip
    assert "25 new pieces" in out
    figures = json.loads((place / "extend.json").read_text())
    new, old = figures["corpora"]
    assert (new["held_out"], old["held_out"]) == (False, True)
    assert 0 < old["documents"] < 300
    assert old["documents_changed"] == 0
    assert new["extended"]["tokens_per_character"] < new["base"]["tokens_per_character"]
    assert figures["learnt_bytes"] == figures["corpus_bytes"] == sum(len(text.encode()) for text in chinese(300))


def test_what_the_gate_refuses_leaves_what_was_there(cpt, place, grown, capsys):
    """Scores of zero take old text apart: English pieces, against English that is protected."""
    before = (grown / "tokenizer.json").read_bytes()
    names = sorted(path.name for path in place.iterdir())
    refused = ("extend", "--base", "pieces", "--corpus", "en.jsonl", "--protect", "en.jsonl", "--method", "union",
               "--scores", "zero", "--new-tokens", 50, "--max-unreachable", 1, "--out", "grown")  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cpt(*refused)
    assert stop.value.code == 2
    assert "of the old documents (en-2) are tokenised differently" in capsys.readouterr().err.splitlines()[-1]
    assert (grown / "tokenizer.json").read_bytes() == before
    assert sorted(path.name for path in place.iterdir()) == names
    assert "never used" in cpt(*refused[:-1], "raised", "--max-old-documents-changed", 1, "--max-old-tokens-added", 1)


def test_an_earlier_tokenizer_stays_until_the_new_one_is_there(cpt, grown, monkeypatch):
    before, moved = (grown / "tokenizer.json").read_bytes(), Path.replace

    def interrupted(path, target):
        if path.name.endswith(".unchecked"):
            raise KeyboardInterrupt
        return moved(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cpt("extend", "--base", "base", "--corpus", "zh.jsonl", "--new-tokens", 15, "--out", "grown")
    assert (grown / "tokenizer.json").read_bytes() == before


def test_candidates_alone_ban_and_scripts(cpt, place):
    (place / "terms.txt").write_text("\ufeff代币法\n\nblockchain\n代币法\n", encoding="utf-8")
    (place / "ban.txt").write_text("国务院\n", encoding="utf-8")
    cpt("extend", "--base", "base", "--corpus", "zh.jsonl", "--new-tokens", 0, "--candidates", "terms.txt",
        "--out", "terms")  # fmt: skip
    extended, size = Tokenizer(place / "terms"), Tokenizer(place / "base").size
    for term in ("代币法", "blockchain"):
        (index,) = extended.encode(term)
        assert index >= size
    cpt("extend", "--base", "base", "--corpus", "zh.jsonl", "en.jsonl", "--new-tokens", 40, "--ban", "ban.txt",
        "--scripts", "Han", "--max-piece-characters", 3, "--out", "han")  # fmt: skip
    han = Tokenizer(place / "han")
    pieces = [han.piece_bytes(index) for index in range(size, han.size)]
    assert pieces
    assert "国务院".encode() not in pieces
    assert all(len(piece.decode(errors="ignore")) <= 3 and not piece.isascii() for piece in pieces)


@pytest.mark.parametrize("scores", ["below-base", "own", "zero"])
def test_a_directory_with_only_tokenizer_model(cpt, place, scores):
    cpt("extend", "--base", "pieces", "--corpus", "zh.jsonl", "--method", "union", "--scores", scores, "--new-tokens",
        30, "--max-unreachable", 1, "--drop-unreachable", "--out", f"union-{scores}")  # fmt: skip
    assert (place / f"union-{scores}" / "tokenizer.model").exists()
    cpt("report", "--base", "pieces", "--tokenizer", f"union-{scores}", "--corpus", "zh.jsonl", "--json", "u.json")
    report = json.loads((place / "u.json").read_text())
    assert report["corpora"][0]["slow_fast_differences"] == {"base": 0, "extended": 0}


def test_report_of_an_extension(cpt, place, grown):
    out = cpt("report", "--base", "base", "--tokenizer", "grown", "--corpus", "zh.jsonl", "en.jsonl", "--json", "r.json",
              "--html", "r.html")  # fmt: skip
    report = json.loads((place / "r.json").read_text())
    new, old = report["corpora"]
    assert new["name"] == "zh"
    assert {"tokens_per_character", "bytes_per_token", "tokens_per_word"} <= set(new["base"])
    assert new["extended"]["bytes_per_token"] > new["base"]["bytes_per_token"]
    assert old["documents_changed"] == old["round_trip_failures"] == 0
    assert report["new_pieces"] == 25
    assert report["speed"]["encode_ratio"] > 0
    assert "25 new pieces" in out
    page = (place / "r.html").read_text()
    assert 'class="n ' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_unrelated_tokenizers_have_no_new_pieces(cpt, place):
    out = cpt("report", "--base", "base", "--tokenizer", "other", "--corpus", "zh.jsonl", "--json", "x.json", "--html",
              "x.html")  # fmt: skip
    assert "no extension of the base" in out
    report = json.loads((place / "x.json").read_text())
    assert report["new_pieces"] is report["unreachable_pieces"] is None
    assert 'class="n ' not in (place / "x.html").read_text()


def test_curve(cpt, place):
    out = cpt("report", "--base", "base", "--corpus", "zh.jsonl", "--protect", "en.jsonl", "--curve", "--sizes", 5, 10,
              20, 4000, "--json", "c.json", "--html", "c.html", "--plot", "c.png")  # fmt: skip
    curve = json.loads((place / "c.json").read_text())["curve"]
    rates = [point["tokens_per_character"] for point in curve["points"]]
    assert rates == sorted(rates, reverse=True)
    sizes = [point["new_tokens"] for point in curve["points"]]
    assert sizes[:4] == [0, 5, 10, 20]
    # The text gives fewer than 4,000: the last point is all of them.
    assert 20 < sizes[4] < 4000
    config = tiny_config()
    tables = 1 if config.tie_word_embeddings else 2
    assert curve["points"][2]["parameters"] == 10 * config.hidden_size * tables
    assert curve["knee"] in sizes
    assert f"The knee: {curve['knee']:,} pieces" in out
    assert "<svg" in (place / "c.html").read_text()
    assert (place / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_knee_in_words():
    points = [
        {"new_tokens": n, "tokens_per_character": r} for n, r in ((0, 2.0), (1000, 1.0), (2000, 0.5), (4000, 0.4567))
    ]
    (sentence,) = curve_sentences({"points": points, "knee": 2000})
    assert sentence == (
        "The knee: 2,000 pieces (0.500 tokens per character): beyond it, twice as many pieces save less than 8.7% of the tokens; "
        "up to it, 50% or more."
    )


@pytest.mark.parametrize("base", ["base", "pieces"])
@pytest.mark.parametrize("text", ["the city  was old.\n本法，国务院规定 river", " a\n\n龘b "])
def test_spans_are_the_whole_text_and_all_tokens(place, base, text):
    tokenizer = Tokenizer(place / base)
    found = spans(tokenizer, text, None)
    assert "".join(span.text for span in found) == text
    assert sum(span.tokens for span in found) == len(tokenizer.encode(text))


EXTEND = "extend --base base --corpus zh.jsonl --new-tokens 5 --out x"
WRONG = {
    "scores without union": (f"{EXTEND} --scores zero", "goes with --method union"),
    "scores of byte-level": (f"{EXTEND} --method union --scores zero", "for SentencePiece"),
    "no candidates file": (f"{EXTEND} --candidates nowhere.txt", "nowhere.txt cannot be read"),
    "candidates not UTF-8": (f"{EXTEND} --candidates latin.txt", "is not UTF-8"),
    "control character": (f"{EXTEND} --candidates control.txt", "control or private character"),
    "no such script": (f"{EXTEND} --scripts Klingonese", "is no Unicode script"),
    "limit no share": (f"{EXTEND} --max-unreachable 5", "between 0 and 1"),
    "out is the base": ("extend --base base --corpus zh.jsonl --new-tokens 5 --out base", "is the base itself"),
    "out holds a model": ("extend --base pieces --corpus zh.jsonl --new-tokens 5 --out base", "no tokenizer's file"),
    "no base": ("extend --base nowhere --corpus zh.jsonl --new-tokens 5 --out x", "neither a model directory"),
    "no corpus": ("extend --base base --corpus nowhere.jsonl --new-tokens 5 --out x", "there is no such file"),
    "nothing to report": ("report --base base --corpus zh.jsonl", "give --tokenizer DIR, or --curve"),
    "size 0": ("report --base base --corpus zh.jsonl --curve --sizes 0 5", "at least 1"),
    "plot of nothing": ("report --base base --tokenizer base --corpus zh.jsonl --plot p.png", "give --curve"),
    "nothing held out": ("report --base base --corpus zh.jsonl --curve --heldout-share 0", "share is 0"),
}


@pytest.mark.parametrize(("line", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_exits_with_2(place, monkeypatch, capsys, line, message):
    monkeypatch.chdir(place)
    (place / "latin.txt").write_bytes("Gebühr\n".encode("latin-1"))
    (place / "control.txt").write_text("a\u0007b\n")
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", *line.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "x").exists()
