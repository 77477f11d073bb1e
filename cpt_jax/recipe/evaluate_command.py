"""`cpt eval`: bits per byte by domain and multiple choice, of one model or of two side by side; and `cpt lm-eval`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.progress import number_of, progress, quiet_libraries, say
from cpt_jax.core.stores import Location, fetched, is_address, write_json
from cpt_jax.data.chat import ChatEncoder
from cpt_jax.data.chat_template import ChatTemplate
from cpt_jax.data.sources import Corpus, Document, SkipCounts, counted, named_corpora, read
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, Result, bits_per_byte, pack_conversations, pack_documents
from cpt_jax.evaluate.multiple_choice import Outcomes, Question, answer_questions, difference, read_questions
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.model import load_model
from cpt_jax.report.positions import position_rows
from cpt_jax.report.tables import text_table
from cpt_jax.vocab.tokenizer import Tokenizer

# Text is read in rows of so many tokens, four at a time; questions, in batches of as many tokens.
SEQUENCE_LENGTH, BATCH_SIZE = 512, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Figures:
    """What a model reached, by the name of a domain or of a set of questions."""

    bits: dict[str, Result]
    choices: dict[str, Outcomes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Domain:
    """The documents of a corpus to evaluate on, and, where they are conversations, by which template."""

    documents: list[Document]
    chat: bool
    template: Path | None

    def packed(self, tokenizer: Tokenizer, length: int, by_position: bool) -> PackedDocuments:
        if self.chat:
            encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, self.template))
            return pack_conversations(encoder, self.documents, length)
        return pack_documents(tokenizer, self.texts, length, by_position)

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]


def _limited(corpus: Corpus, max_bytes: int, skipped: SkipCounts) -> list[Document]:
    documents, size = [], 0
    for document in read(corpus, skipped):
        size += len(document.text.encode())
        if documents and size > max_bytes:
            break
        documents.append(document)
    return documents


def _domain(
    corpus: Corpus, documents: list[Document], skipped: SkipCounts, template: Path | None, directories: Sequence[Path]
) -> _Domain:
    """A corpus's documents; of conversations, those that every model's template takes, so that two models are compared
    on the same ones. What is left out is told.

    Raises:
      UserError: no conversation is left.
    """
    if corpus.format == "chat":
        tokenizers = [Tokenizer(directory) for directory in directories]
        encoders = [ChatEncoder(tokenizer, ChatTemplate(tokenizer, template)) for tokenizer in tokenizers]
        usable = [each for each in documents if all(list(e.rendered([each], skipped)) for e in encoders)]
        if not usable:
            raise UserError(
                f"corpus {corpus.name}={corpus.spec}: none of {len(documents):,} conversations can be used "
                f"({counted(skipped)}): give others, or another --chat-template"
            )
        documents = usable
    if skipped:
        say(f"{corpus.name}: {number_of(len(documents), 'document')}; left out: {counted(skipped)}")
    return _Domain(documents=documents, chat=corpus.format == "chat", template=template)


def _evaluate(
    model: str, directory: Path, domains: dict[str, _Domain], questions: dict[str, list[Question]], by_position: bool
) -> _Figures:
    tokenizer, loaded = Tokenizer(directory), load_model(directory)
    check_fits(tokenizer, loaded.config.total_rows, directory)
    length, rows_at_once = SEQUENCE_LENGTH, BATCH_SIZE
    if by_position:
        texts = [text for domain in domains.values() for text in domain.texts]
        length, rows_at_once = max(length, *map(len, tokenizer.encode_documents(texts))), 1
    length = min(length, loaded.config.context_length)
    packed = {name: domain.packed(tokenizer, length, by_position) for name, domain in domains.items()}
    network, weights = loaded.network, loaded.on_device(FLOAT32)
    bits, choices = {}, {}
    if packed:
        with progress(f"evaluate {model}", sum(map(len, packed.values())), "rows") as shown:
            for name, rows in packed.items():
                bits[name] = bits_per_byte(
                    network, weights, rows, batch_size=rows_at_once, precision=FLOAT32, on_progress=shown.advance
                )
    for name, asked in questions.items():
        with progress(f"{name}, {model}", sum(len(question.choices) for question in asked), "choices") as shown:
            choices[name] = answer_questions(
                tokenizer,
                network,
                weights,
                asked,
                batch_tokens=BATCH_SIZE * SEQUENCE_LENGTH,
                precision=FLOAT32,
                on_progress=shown.advance,
            )
    return _Figures(bits=bits, choices=choices)


def _bits_entries(figures: dict[str, _Figures], domains: Sequence[str]) -> list[dict]:
    """Prints bits per byte, a line a domain, and returns them for JSON."""
    models, entries = list(figures), []
    rows = [["domain", *models] + (["difference"] if len(models) > 1 else [])]
    for domain in domains:
        values = [figures[name].bits[domain].bits_per_byte for name in models]
        row = [domain, *(f"{value:.4f}" for value in values)]
        row += [f"{values[1] / values[0] - 1:+.1%}"] if len(models) > 1 else []
        rows.append(row)
        for name in models:
            result = figures[name].bits[domain].figures()
            entries.append({"stage": name, "weights": "last", "domain": domain, **result})
    print(text_table(rows))
    for domain in domains:
        if cells := position_rows([entry for entry in entries if entry["domain"] == domain]):
            print("\n" + text_table([[f"{domain}, by position", *cells[0][1:]], *cells[1:]]))
    return entries


def _choices_entries(figures: dict[str, _Figures], names: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """Prints accuracies, a line a model, and returns them and the differences for JSON."""
    models = list(figures)
    entries: list[dict] = []
    differences: list[dict] = []
    rows = [["choices", "", "questions", "accuracy ± std. error", "per byte"]]

    def show(name: str, of: str, count: int, accuracy: str, normalised: str) -> None:
        rows.append([name, of, f"{count:,}", accuracy, normalised])

    for name in names:
        found = [figures[model].choices[name] for model in models]
        for model, outcomes in zip(models, found, strict=True):
            entry = {
                "model": model,
                "name": name,
                "accuracy": outcomes.accuracy,
                "accuracy_normalised": outcomes.accuracy_normalised,
                "standard_error": outcomes.standard_error,
                "questions": len(outcomes),
            }
            entries.append(entry)
            accuracy = f"{outcomes.accuracy:.1%} ± {outcomes.standard_error:.1%}"
            show(name, model, len(outcomes), accuracy, f"{outcomes.accuracy_normalised:.1%}")
        if len(models) > 1:
            change, error = difference(*found)
            normalised = found[1].accuracy_normalised - found[0].accuracy_normalised
            entry = {"name": name, "accuracy": change, "accuracy_normalised": normalised, "standard_error": error}
            differences.append(entry)
            show(name, "difference", len(found[0]), f"{change:+.1%} ± {error:.1%}", f"{normalised:+.1%}")
    print(text_table(rows))
    return entries, differences


def evaluate_model(
    *,
    model: str,
    against: str | None,
    data: Sequence[tuple[str, str]],
    choices: Sequence[tuple[str, str]],
    text_field: str,
    chat: Sequence[str],
    chat_template: Path | None,
    max_bytes: int,
    by_position: bool,
    json_path: Location | None,
) -> None:
    """`cpt eval`: the first `max_bytes` of each domain's documents, whole ones, and all questions. `by_position`: in rows as
    long as each model reads, and also by where in its document a byte is."""
    if by_position and not data:
        raise UserError("--by-position is of text: give --data NAME=SPEC")
    if not data and not choices:
        raise UserError("nothing to evaluate: give --data NAME=SPEC or --choices NAME=FILE.jsonl")
    if twice := sorted({name for name, _ in choices if [given for given, _ in choices].count(name) > 1}):
        raise UserError(f"--choices {twice[0]}=... is given twice: give each set of questions a name of its own")
    if against == model:
        raise UserError(f"--against {against} is the model itself: give another one")
    if max_bytes < 1:
        raise UserError(f"--max-bytes is {max_bytes}: give at least 1")
    quiet_libraries()
    models = [model] if against is None else [against, model]
    corpora = named_corpora(data, text_field, chat)
    skipped = {corpus.name: SkipCounts() for corpus in corpora}
    documents = {corpus.name: _limited(corpus, max_bytes, skipped[corpus.name]) for corpus in corpora}
    questions: dict[str, list[Question]] = {}
    for name, given in choices:
        with fetched(given if is_address(given) else Path(given).expanduser()) as file:
            questions[name] = read_questions(file)
    directories = {name: find_model(name) for name in models}
    domains = {
        corpus.name: _domain(
            corpus, documents[corpus.name], skipped[corpus.name], chat_template, list(directories.values())
        )
        for corpus in corpora
    }
    figures = {
        name: _evaluate(name, directory, domains, questions, by_position) for name, directory in directories.items()
    }
    written: dict[str, list[dict]] = {"results": [], "choices": []}
    if domains:
        written["results"] = _bits_entries(figures, list(domains))
    if questions:
        written["choices"], written["differences"] = _choices_entries(figures, list(questions))
    if json_path is not None:
        write_json(json_path, written)


def run_harness(arguments: Sequence[str]) -> None:
    """`cpt lm-eval`: the Language Model Evaluation Harness's own command, with our model in its registry."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError("cpt lm-eval needs the package lm_eval: pip install lm_eval") from error
    import cpt_jax.recipe.lm_eval_model  # noqa: F401

    quiet_libraries()
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
