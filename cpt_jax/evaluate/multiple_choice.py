"""Multiple choice: which of a question's answers the model finds likeliest, and whether it is the right one.

Texts are put together, cut into tokens and counted as the Language Model Evaluation Harness does it (Gao et al., `lm_eval`
0.4, task type multiple_choice), so that figures can be compared with published ones.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree
from cpt_jax.evaluate.token_scores import TokenPair, score_continuations
from cpt_jax.models.decoder import Network
from cpt_jax.vocab.tokenizer import Tokenizer

# The names of a record's fields; the second are those of lm_eval's own files.
QUESTION, CHOICES, ANSWER = ("question", "query"), ("choices",), ("answer", "gold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its possible answers (at least two), and which of them is right, counted from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not isinstance(self.question, str):
            raise UserError(f"the question is {self.question!r}: give text")
        if len(self.choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in self.choices):
            raise UserError(f"the choices are {list(self.choices)!r}: give at least two texts, none of them empty")
        for text in (self.question, *self.choices):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{text!r} holds half a UTF-16 pair: write the whole character, or leave it out")
        if not isinstance(self.answer, int) or isinstance(self.answer, bool):
            raise UserError(f"the answer is {self.answer!r}: give the number of the right choice, from 0")
        if not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"the answer is {self.answer}: give 0 to {len(self.choices) - 1}, there are so many choices"
            )


def _field(record: dict, names: Sequence[str]):
    given = [name for name in names if name in record]
    if len(given) != 1:
        found = " and ".join(map(repr, given)) or ", ".join(map(repr, record)) or "nothing"
        raise UserError(f"it has {found}: give one field {names[0]!r}")
    return record[given[0]]


def _question(line: bytes) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"it is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError('it is no record: give {"question": ..., "choices": [...], "answer": ...}')
    choices = _field(record, CHOICES)
    if not isinstance(choices, list):
        raise UserError(f"the choices are {choices!r}: give a list of texts")
    return Question(question=_field(record, QUESTION), choices=tuple(choices), answer=_field(record, ANSWER))


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON Lines file, {"question": str, "choices": [str, ...], "answer": int} each; "query" and
    "gold", as `lm_eval` has it, are read as well.

    Raises:
      UserError: there is no such file, it is empty, or a line is wrong: the figure would be another test's without it.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    questions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                questions.append(_question(line))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise UserError(f"{path} holds no question: give one JSON object a line")
    return questions


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """For each question, whether the likeliest choice is the right one, and whether it is by log-likelihood per byte.

    Per byte is `lm_eval`'s acc_bytes. Its acc_norm divides by characters instead: the same in ASCII, and where all
    choices are of one script nearly so; bytes are what this project's other figure is counted in.
    """

    correct: Bool[np.ndarray, "N"]
    correct_normalised: Bool[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def accuracy_normalised(self) -> float:
        return float(self.correct_normalised.mean())

    @property
    def standard_error(self) -> float:
        """Of `accuracy`, over the choice of questions."""
        return standard_error(self.correct.astype(float))


def standard_error(values: Float[np.ndarray, "N"]) -> float:
    """The standard error of the values' mean, from the sample's standard deviation; of one value alone, 0."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def difference(first: Outcomes, second: Outcomes) -> tuple[float, float]:
    """(accuracy of the second less that of the first on the same questions, its standard error).

    Paired: what is hard for both does not count as noise (Miller 2024, arXiv 2411.00640).
    """
    values = second.correct.astype(float) - first.correct
    return float(values.mean()), standard_error(values)


def token_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[TokenPair]:
    """Token ids of questions and of answers after them, as `lm_eval` separates them.

    A space stands before the answer, also where the question is empty (as in BLiMP) or ends in white space; not where the
    answer begins with some (a task of `lm_eval` with such choices has no delimiter). Both are cut into tokens as one
    text; the answer is what is left without as many tokens as the question alone has, its last white space not counted as
    its own. Special tokens stand in front if the tokenizer puts them there; an
    empty question is the token before a document.
    """
    contexts, wholes = [], []
    for question, answer in texts:
        context = question.rstrip()
        contexts.append(context)
        wholes.append(question + ("" if answer[:1].isspace() else " ") + answer)
    encoding = tokenizer.backend.encode("a")
    special = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    front = [token for token, is_special in itertools.takewhile(lambda pair: pair[1], special)]
    found = []
    for alone, whole in zip(tokenizer.encode_documents(contexts), tokenizer.encode_documents(wholes), strict=True):
        # A tokenizer may join the end of a question with its answer: the last token is then the answer all the same.
        cut = min(len(alone), len(whole) - 1)
        found.append(TokenPair(context=front + whole[:cut] or [tokenizer.start_id], continuation=whole[cut:]))
    return found


def answer_questions(
    tokenizer: Tokenizer,
    network: Network,
    weights: Tree,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
    precision: Precision,
    on_progress: Callable[[int], None] = lambda choices: None,
) -> Outcomes:
    """What the model answers. A question that is too long for its context loses its beginning.

    Args:
      weights: on the device, in `precision`'s types.
      batch_tokens: tokens of a batch.
      on_progress: called with the number of choices read since the last call.
    """
    texts = [(question.question, choice) for question in questions for choice in question.choices]
    scores = score_continuations(
        network,
        weights,
        token_pairs(tokenizer, texts),
        max_length=network.config.context_length,
        batch_tokens=batch_tokens,
        precision=precision,
        on_progress=on_progress,
    )
    return outcomes(questions, [score.log_likelihood for score in scores])


def outcomes(questions: Sequence[Question], log_likelihoods: Sequence[float]) -> Outcomes:
    """Which questions are answered rightly, from the log-likelihoods of all their choices, in order; of equal ones,
    the first is the answer."""
    correct, normalised, first = [], [], 0
    for question in questions:
        values = np.array(log_likelihoods[first : first + len(question.choices)])
        first += len(question.choices)
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        correct.append(values.argmax() == question.answer)
        normalised.append((values / sizes).argmax() == question.answer)
    return Outcomes(np.array(correct), np.array(normalised))
