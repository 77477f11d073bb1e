"""Filters: a text to the reason for leaving it out, or None. Anyone's function of that form is one, as `module:function`."""

import collections
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import cast

import regex

from cpt_jax.core.errors import UserError, nearest

Filter = Callable[[str], str | None]

# What the language of a long text is told by.
LANGUAGE_CHARACTERS = 2000
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


def gopher(text: str) -> str | None:
    """Quality by lengths and symbols, after Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1: 50 to 100,000 words of 3
    to 10 letters on average, at most 0.1 hashes or ellipses a word, at most 90% of lines that begin with a bullet and 30%
    that end with an ellipsis, letters in 80% of the words, and two English stop words. For English, and languages that
    are written as it is."""
    words = text.split()
    if not 50 <= len(words) <= 100_000:
        return "fewer than 50 or more than 100,000 words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "words shorter than 3 or longer than 10 letters on average"
    if max(text.count("#"), text.count("...") + text.count("…")) / len(words) > 0.1:
        return "a hash or an ellipsis for every tenth word"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(("•", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "nine of ten lines are bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "three of ten lines end in an ellipsis"
    if sum(any(letter.isalpha() for letter in word) for word in words) < 0.8 * len(words):
        return "a word in five has no letter"
    if len(_STOP_WORDS.intersection(word.lower() for word in words)) < 2:
        return "fewer than two of English's commonest words"
    return None


def repeats(text: str) -> str | None:
    """Text that repeats itself, after Rae et al. 2021, table A1: at most 30% of the lines said before, at most 20% of the
    characters in them, and at most 20% of the characters in the commonest pair of words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    seen: set[str] = set()
    again = [line for line in lines if line in seen or seen.add(line)]
    if len(again) > 0.3 * len(lines):
        return "three of ten lines repeat another"
    if sum(map(len, again)) > 0.2 * sum(map(len, lines)):
        return "a fifth of the text is in lines that repeat another"
    words = text.split()
    pairs = collections.Counter(itertools.pairwise(words))
    if len(words) >= 20 and pairs:
        (first, second), count = pairs.most_common(1)[0]
        if count > 1 and count * (len(first) + len(second)) > 0.2 * sum(map(len, words)):
            return "a fifth of the text is one pair of words"
    return None


def symbols(text: str) -> str | None:
    """Text of any language that is mostly no letters: fewer than half of its characters, spaces left out, are letters,
    marks or digits."""
    shown = regex.sub(r"\s+", "", text[:20_000])
    letters = len(regex.findall(r"[\p{L}\p{M}\p{N}]", shown))
    return "more symbols than letters" if letters < 0.5 * len(shown) else None


def language(text: str, wanted: str) -> str | None:
    """Text whose language is none of `wanted` ("zh,en"), by py3langid."""
    allowed = frozenset(wanted.split(","))
    # A long text's language is told from its middle, where there are fewer headings.
    middle = max(0, (len(text) - LANGUAGE_CHARACTERS) // 2)
    found = language_of(text[middle : middle + LANGUAGE_CHARACTERS])
    return None if found in allowed else f"language {found}"


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise UserError(
            "the filter 'language' needs the package py3langid: pip install py3langid, or cpt_jax[cleaning]"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def language_of(text: str) -> str:
    """The code of a text's likeliest language, as in ISO 639-1."""
    return _identifier().classify(text)[0]


def check_languages(wanted: str) -> None:
    """Raises a UserError for a code that py3langid does not know."""
    known = sorted(_identifier().labels)
    for code in wanted.split(","):
        if code not in known:
            raise UserError(
                f"filter language={wanted}: there is no language {nearest(code, known)}; known: {' '.join(known)}"
            )


BUILT_IN: dict[str, Callable[..., str | None]] = {
    "gopher": gopher,
    "repeats": repeats,
    "symbols": symbols,
    "language": language,
}


def find_filter(spec: str) -> Filter:
    """A filter by its name: one of `BUILT_IN`, or `module:function`; with =ARGUMENT, which the function then gets behind
    the text.

    Raises:
      UserError: there is none of that name.
    """
    name, separator, argument = spec.partition("=")
    if name in BUILT_IN:
        function = BUILT_IN[name]
        if (name == "language") != bool(argument):
            wrong = "names no language: give language=zh,en" if name == "language" else "takes no argument"
            raise UserError(f"filter {spec!r} {wrong}")
        if name == "language":
            check_languages(argument)
    elif ":" in name:
        function = _imported(spec, *name.split(":", 1))
    else:
        raise UserError(f"filter {nearest(name, BUILT_IN)}: give module:function, or one of {', '.join(BUILT_IN)}")
    return (lambda text: function(text, argument)) if separator else function


def _imported(spec: str, module: str, name: str) -> Callable[..., str | None]:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"filter {spec!r} cannot be imported ({error}): give module:function of a module on the path"
        ) from error
    if not callable(function):
        raise UserError(f"filter {spec!r} is no function: give one that takes a text")
    return cast(Callable[..., str | None], function)


def first_reason(filters: Sequence[Filter], text: str) -> str | None:
    """What the first filter that refuses a text says.

    Raises:
      UserError: a filter gives something that is neither text nor None.
    """
    for each in filters:
        if (reason := each(text)) is not None:
            if not isinstance(reason, str):
                raise UserError(
                    f"a filter gave {reason!r}: it has to give the reason as text, or None to keep the document"
                )
            return reason
    return None
