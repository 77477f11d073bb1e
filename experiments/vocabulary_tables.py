"""What do new pieces bring, and what do they take from old text, for each method on real tokenizers and text?

Question: a tokenizer gets 1,000 to 16,000 pieces. How many tokens does a character of held-out text cost before and after, how
much of the old text is tokenised otherwise, and how many of the new pieces are ever produced?

Expectation: `continued-bpe` and `union` with `below-base` leave English as it was; `union` with `zero` does not. `continued-bpe` has at least 99% of its pieces in
use at every size, and SmolLM2 needs at most 0.52 tokens per character of statutes with 8,000 (a plain union: 0.529, with 94 to 98% in use).

Result: `continued-bpe` has every piece in use in all 10 cases at every size; SmolLM2 needs 0.509 tokens per character of statutes with 8,000 pieces (0.496
with nothing protected, `union` 0.502 with 95% in use). English stays exactly as it was where the new text is Chinese; Japanese manual pages hold English words, and
change up to 3% of the English documents, Python up to 37%, to fewer tokens each time. `zero` changes 87% and costs 1.3% more tokens; its two files disagree.
`docs/vocabulary.md` has the tables and the reasons.

`python -m experiments.vocabulary_tables` (some 40 minutes on two cores; the inputs come from `configs.quickstart_inputs` and
`experiments.vocabulary_inputs`). Results go to `docs/vocabulary_tables.json` one by one; what is there is not computed again. `--tables` prints what is
there. A tenth of the documents is held out by hash, laws and poets as a whole.
"""

import argparse
import dataclasses
import json
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from configs.quickstart import quickstart
from configs.quickstart_inputs import DIRECTORY as QUICKSTART
from configs.quickstart_inputs import write_jsonl
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.core.progress import progress, quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus, SkipCounts, read
from cpt_jax.vocab.extend import ContinuedBPE, Extension, Union, learn, write_extended
from cpt_jax.vocab.gate import slow_fast_differences
from cpt_jax.vocab.tokenizer import Tokenizer
from experiments.vocabulary_inputs import DIRECTORY

OUT = Path("docs/vocabulary_tables.json")
LARGEST = 16_000
# Pieces in the row that shows what happens with nothing protected.
UNPROTECTED = 8_000
HOLDOUT = Holdout(share=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How pieces are learnt, and whether English is protected meanwhile."""

    name: str
    extension: Extension
    protects: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A base that learns one corpus."""

    base: str
    corpus: str
    sizes: tuple[int, ...] = (1_000, 4_000, 8_000, 16_000)

    @property
    def methods(self) -> tuple[Method, ...]:
        scores = ("below-base", "own", "zero") if self.base == "Mistral v1" else ("below-base",)
        unions = [Union(new_tokens=LARGEST, scores=name) for name in scores]
        names = [f"union, {union.scores}" for union in unions] if len(unions) > 1 else ["union"]
        scripts = ContinuedBPE(new_tokens=UNPROTECTED, scripts=JAPANESE)
        return (
            Method(name="continued-bpe", extension=ContinuedBPE(new_tokens=LARGEST)),
            Method(
                name="continued-bpe, nothing protected",
                extension=ContinuedBPE(new_tokens=UNPROTECTED),
                protects=False,
            ),
            *([Method(name="continued-bpe, Japanese scripts", extension=scripts)] * (self.corpus == "manpages")),
            *(Method(name=name, extension=union) for name, union in zip(names, unions, strict=True)),
        )


CASES = (
    Case(base="SmolLM2", corpus="statutes", sizes=(1_000, 2_000, 4_000, 8_000, 16_000)),
    *(Case(base="Mistral v1", corpus=corpus) for corpus in ("statutes", "poems", "python")),
    *(Case(base=base, corpus=corpus) for base in ("SmolLM2", "Qwen3", "Llama 3") for corpus in ("manpages", "poems")),
)
JAPANESE = ("Han", "Hiragana", "Katakana", "Common")
# What must stay as it was, beside the text that is learnt.
OLD = ("english", "python", "statutes")


@dataclasses.dataclass(frozen=True)
class Split:
    training: list[str]
    heldout: list[str]


def _standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(("test", "site-packages", "idle_test")) for part in parts):
            yield {"text": path.read_text(encoding="utf-8", errors="ignore")}


def corpora() -> dict[str, Corpus]:
    """Python is the quickstart's 346 files and the running Python's standard library without its tests."""
    library = DIRECTORY / "standard_library.jsonl"
    if not library.exists():
        write_jsonl(_standard_library(), library)
    python = DIRECTORY / "python.jsonl"
    if not python.exists():
        python.write_bytes((QUICKSTART / "python.jsonl").read_bytes() + library.read_bytes())
    return {
        "english": Corpus(name="english", spec=str(QUICKSTART / "wikipedia.jsonl")),
        "statutes": Corpus(name="statutes", spec=str(QUICKSTART / "statutes.jsonl"), group_field="law"),
        "poems": Corpus(name="poems", spec=str(DIRECTORY / "poems.jsonl"), group_field="author"),
        "manpages": Corpus(name="manpages", spec=str(DIRECTORY / "manpages.jsonl")),
        "python": Corpus(name="python", spec=str(python)),
    }


def split(corpus: Corpus) -> Split:
    """Training text holds no document that is equal to a held-out one."""
    training, heldout = [], []
    for document in read(corpus, SkipCounts()):
        (heldout if HOLDOUT.holds_out(document) else training).append(document.text)
    known = set(heldout)
    return Split([text for text in training if text not in known], heldout)


def bases() -> dict[str, Path]:
    source = resolve_base(quickstart().base, DIRECTORY / "smollm2")
    return {
        "Mistral v1": DIRECTORY / "mistral-v1",
        "SmolLM2": Path(source),
        "Qwen3": DIRECTORY / "qwen3",
        "Llama 3": DIRECTORY / "llama3",
    }


class Reading:
    """The held-out documents of every corpus under a base, read once."""

    def __init__(self, base: Tokenizer, splits: dict[str, Split]) -> None:
        self.base, self.splits = base, splits
        self.ids = {name: base.encode_documents(texts.heldout) for name, texts in splits.items()}
        self.comes_back = {
            name: [text == back for text, back in zip(splits[name].heldout, _decoded(base, ids), strict=True)]
            for name, ids in self.ids.items()
        }


def _decoded(tokenizer: Tokenizer, documents: list[list[int]]) -> list[str]:
    return tokenizer.backend.decode_batch(documents, skip_special_tokens=False)


def _reference_mismatches(extended: Tokenizer, texts: Sequence[str]) -> int:
    """Documents that `transformers` cuts otherwise than we do."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(extended.directory)
    theirs = reference(list(texts), add_special_tokens=False).input_ids
    return sum(a != b for a, b in zip(theirs, extended.encode_documents(list(texts)), strict=True))


def measure(reading: Reading, corpus: str, extended: Tokenizer, references: bool) -> dict:
    """One extended tokenizer; `references`: also whether SentencePiece and `transformers` agree with it."""
    base, splits = reading.base, reading.splits
    heldout = splits[corpus].heldout
    names = [corpus, *(name for name in OLD if name != corpus)]
    now = {name: extended.encode_documents(splits[name].heldout) for name in names}
    changed, tokens = {}, {}
    lost = 0
    for name in names:
        before = reading.ids[name]
        changed[name] = sum(a != b for a, b in zip(before, now[name], strict=True)) / len(before)
        tokens[name] = sum(map(len, now[name])) / sum(map(len, before)) - 1
        pairs = zip(_decoded(extended, now[name]), splits[name].heldout, reading.comes_back[name], strict=True)
        lost += sum(back != text and base_too for back, text, base_too in pairs)
    seen = set().union(*now[corpus])
    figures = {
        "new_pieces": extended.size - base.size,
        "before": sum(map(len, reading.ids[corpus])) / sum(map(len, heldout)),
        "after": sum(map(len, now[corpus])) / sum(map(len, heldout)),
        "in_use_training": sum(index >= base.size for index in extended.count(splits[corpus].training))
        / (extended.size - base.size),
        "in_use_heldout": sum(index >= base.size for index in seen) / (extended.size - base.size),
        "old": {name: [changed[name], tokens[name]] for name in names[1:]},
        "round_trip_failures": lost,
    }
    if not references:
        return figures
    checked = heldout + splits["english"].heldout
    return figures | {
        "documents_checked": len(checked),
        "sentencepiece_mismatches": round(slow_fast_differences(extended, checked) * len(checked)),
        "transformers_mismatches": _reference_mismatches(extended, checked),
    }


def run(out: Path) -> list[dict]:
    """Every case, with what is there already."""
    results = json.loads(out.read_text()) if out.exists() else []
    splits = {name: split(corpus) for name, corpus in corpora().items()}
    directories = bases()
    readings: dict[str, Reading] = {}
    jobs = [(case, method) for case in CASES for method in case.methods]
    with progress("vocabulary tables", len(jobs), "learnings") as shown:
        for case, method in jobs:
            key = {"base": case.base, "corpus": case.corpus, "method": method.name}
            if not any(key.items() <= result.items() for result in results):
                say(f"vocabulary tables: {', '.join(key.values())}")
                if case.base not in readings:
                    readings = {case.base: Reading(Tokenizer(directories[case.base]), splits)}
                results += [key | row for row in _job(readings[case.base], case, method)]
                write_json_atomic(out, results)
            shown.advance()
    return results


def _job(reading: Reading, case: Case, method: Method) -> list[dict]:
    base, splits = reading.base, reading.splits
    started = time.monotonic()
    protected = splits["english"].training if method.protects else ()
    additions = learn(base, method.extension, splits[case.corpus].training, protected)
    seconds = round(time.monotonic() - started, 1)
    learnt = len(additions.pieces)
    sizes = sorted({min(size, learnt) for size in case.sizes if method.protects or size == UNPROTECTED})
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory:
            write_extended(base, additions.chosen(range(size)), Path(directory))
            rows.append(measure(reading, case.corpus, Tokenizer(Path(directory)), references=size == sizes[-1]))
    return [row | {"seconds_to_learn": seconds} for row in rows]


def tables(results: list[dict]) -> str:
    """A Markdown table for each base and corpus; a cell has a figure for each size."""
    lines = []
    for case in CASES:
        base, corpus = case.base, case.corpus
        rows = [result for result in results if (result["base"], result["corpus"]) == (base, corpus)]
        if not rows:
            continue
        old = [name for name in rows[0]["old"] if (name, corpus) != ("statutes", "poems")]
        head = ["method", "pieces", "tokens per character", "in use, training", "in use, held out"]
        head += [title for name in old for title in (f"{name} documents changed", "tokens, last")]
        lines += [f"\n**{base}, {corpus}**: {rows[0]['before']:.3f} before.\n", f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        for name in (method.name for method in case.methods):
            lines.append(_line(name, [row for row in rows if row["method"] == name], old))
    others = [result for result in results if "zero" not in result["method"]]
    checked, theirs, transformers, lost = (
        sum(result.get(name, 0) for result in others)
        for name in ("documents_checked", "sentencepiece_mismatches", "transformers_mismatches", "round_trip_failures")
    )
    said = (
        f"Of all tokenizers but those with scores zero, at each method's largest size: {checked:,} documents checked, "
        f"{theirs} cut otherwise by `sentencepiece`, {transformers} by `AutoTokenizer`, {lost} lost."
    )
    return "\n".join([*lines, "", said])


def _line(method: str, rows: list[dict], old: list[str]) -> str:
    cells = [
        [f"{row['new_pieces'] / 1000:g}k" for row in rows],
        [f"{row['after']:.3f}" for row in rows],
        [_percent(row["in_use_training"]) for row in rows],
        [_percent(row["in_use_heldout"]) for row in rows],
    ]
    for name in old:
        cells += [[_percent(row["old"][name][0]) for row in rows], [_percent(rows[-1]["old"][name][1], 2)]]
    return f"| {method} | {' | '.join(' / '.join(cell) for cell in cells)} |"


def _percent(share: float, digits: int = 1) -> str:
    """Rounded, but what is not nothing is not shown as 0."""
    return "0" if share == 0 else f"{100 * share:.{digits}f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of the results that are there")
    arguments = parser.parse_args()
    quiet_libraries()
    print(tables(json.loads(OUT.read_text()) if arguments.tables else run(OUT)))


if __name__ == "__main__":
    main()
