"""What `cpt tokenizer` shows: tables for the terminal, and one self-contained HTML page."""

import dataclasses
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.progress import number_of
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.report.page import page
from cpt_jax.report.run_report import pieces_to_look_at, visible
from cpt_jax.report.tables import html_table, text_table
from cpt_jax.report.tokenizer_curve import curve_section
from cpt_jax.vocab.tokenizer import BYTE, Tokenizer

STYLE = """
.cut { font-size: 1.05rem; line-height: 2.1; padding: .7rem .9rem; background: var(--band); border-radius: 6px;
overflow-wrap: anywhere; } .cut span { border-radius: 4px; padding: .12rem .16rem; margin-right: 2px; color: #1c2127;
white-space: pre-wrap; -webkit-box-decoration-break: clone; box-decoration-break: clone; } .cut .a { background:
#d9e2ea; } .cut .b { background: #ece4d3; } .cut .n { background: #a9d6e2; font-weight: 600; } .cut .n.b {
background: #8cc6d6; } .cut sup { font-size: .62em; color: #a3341c; font-weight: 700; margin-left: 1px; line-height: 0;
} .key span { border-radius: 4px; padding: .05rem .4rem; color: #1c2127; } .key .a { background: #d9e2ea; } .key .n {
background: #a9d6e2; } tr.knee td { font-weight: 700; color: var(--accent); } .example { margin: 1rem 0 1.6rem; }
"""


# The terminal


def report_text(figures: dict) -> str:
    """The corpora under both tokenizers, the new pieces and the speed, as text."""
    rows = [["corpus", "tokens/character", "bytes/token", "tokens/word", "changed", "tokens", "lost"]]
    for corpus in figures["corpora"]:
        before, after = corpus["base"], corpus["extended"]
        note = {True: " (held out)", False: " (learnt from)", None: ""}[corpus.get("held_out")]
        rows.append([
            corpus["name"] + note,
            f"{before['tokens_per_character']:.3f} -> {after['tokens_per_character']:.3f}",
            f"{before['bytes_per_token']:.2f} -> {after['bytes_per_token']:.2f}",
            f"{before['tokens_per_word']:.2f} -> {after['tokens_per_word']:.2f}",
            f"{corpus['documents_changed']:.1%}",
            f"{corpus['tokens_change']:+.1%}",
            str(corpus["round_trip_failures"]),
        ])  # fmt: skip
    legend = "changed: documents tokenised differently; lost: documents that do not come back"
    parts = [text_table(rows), legend, _pieces_text(figures), *_agreement(figures), *_speed_lines(figures)]
    return "\n".join(part for part in parts if part)


def _pieces_text(figures: dict) -> str:
    if figures["new_pieces"] is None:
        return _unrelated(figures)
    lists = {
        "never used:    ": figures["unreachable"],
        "most frequent: ": [piece for piece, _ in figures["most_frequent"]],
        "longest:       ": figures["longest"],
    }
    lines = [f"  {title}{_shown(pieces)}" for title, pieces in lists.items() if pieces]
    return "\n".join([_pieces_sentence(figures), *lines])


def _shown(pieces: Sequence[str], count: int = 10) -> str:
    more = f" ... ({len(pieces) - count:,} more)" if len(pieces) > count else ""
    return "  ".join(repr(piece) for piece in pieces[:count]) + more


def _unrelated(figures: dict) -> str:
    return (
        f"{figures['moved_ids']:,} pieces of the base have another id, or none, in the other tokenizer: it is no extension of the base, "
        "and nothing is said of new pieces"
    )


def _pieces_sentence(figures: dict) -> str:
    sentence = f"{number_of(figures['new_pieces'], 'new piece')}, {figures['unreachable_pieces']:,} of them never used in this text"
    if steps := figures.get("steps_to_candidates"):
        sentence += f", and {number_of(steps, 'step')} to candidates"
    if dropped := figures.get("dropped"):
        sentence += f"; {dropped:,} unreachable ones dropped"
    return sentence


def _agreement(figures: dict) -> list[str]:
    """How far tokenizer.model and tokenizer.json cut alike, where there is a tokenizer.model."""
    lines = []
    for side in ("base", "extended"):
        shares = [corpus.get("slow_fast_differences", {}).get(side) for corpus in figures["corpora"]]
        known = [share for share in shares if share is not None]
        if known:
            worst = max(known)
            words = "cut every document alike" if not worst else f"differ on up to {worst:.1%} of a corpus's documents"
            lines.append(f"{side}: tokenizer.model and tokenizer.json {words}")
    return lines


def _speed_lines(figures: dict) -> list[str]:
    if "speed" not in figures:
        return []
    rates, sizes = figures["speed"], figures["vocabulary"]
    return [
        f"vocabulary: {sizes['base']:,} -> {sizes['extended']:,} ids",
        "; ".join(
            f"{name}: {rates['base'][name]:.2f} -> {rates['extended'][name]:.2f} MB/s (ratio {rates[f'{name}_ratio']:.2f})"
            for name in ("encode", "decode")
        ),
    ]


# The page


def write_page(
    path: Path, figures: dict, base: Tokenizer, extended: Tokenizer | None, texts: dict[str, list[str]]
) -> None:
    """Tables, the new pieces, sentences cut by both tokenizers, and the curve, as far as they were measured."""
    name = html.escape(_name(base))
    title, subtitle, sections = f"How many new pieces for {name}?", "fertility against the size of the vocabulary", []
    if extended is not None:
        title = f"{name} → {html.escape(_name(extended))}"
        sizes = figures["vocabulary"]
        documents = sum(corpus["documents"] for corpus in figures["corpora"])
        subtitle = (
            f"two tokenizers, {sizes['base']:,} → {sizes['extended']:,} ids, on {number_of(documents, 'document')}"
        )
        sections = [_answer(figures), _corpora_section(figures), _examples_section(figures, base, extended, texts),
                    _pieces_section(figures), _speed_section(figures)]  # fmt: skip
    if "curve" in figures:
        sections.insert(2, curve_section(figures["curve"]))
    write_text_atomic(path, page(title, subtitle, "".join(sections), STYLE))


def _name(tokenizer: Tokenizer) -> str:
    return tokenizer.directory.resolve().name


def _answer(figures: dict) -> str:
    lines = []
    for corpus in figures["corpora"]:
        before, after = corpus["base"]["tokens_per_character"], corpus["extended"]["tokens_per_character"]
        name = f"<b>{html.escape(corpus['name'])}</b>"
        if not corpus["documents_changed"]:
            lines.append(f"<p>{name} is cut exactly as before, {after:.2f} tokens per character.</p>")
        elif abs(corpus["tokens_change"]) < 0.0005:
            lines.append(
                f"<p>{name} is cut differently in {corpus['documents_changed']:.1%} of its documents, and takes as many tokens as before.</p>"
            )
        else:
            lines.append(
                f"<p>{name} takes <b>{before:.2f} → {after:.2f} tokens per character</b> ({corpus['tokens_change']:+.1%} tokens).</p>"
            )
    return f'<div class="answer">{"".join(lines)}</div>'


def _corpora_section(figures: dict) -> str:
    rows = []
    for corpus in figures["corpora"]:
        before, after = corpus["base"], corpus["extended"]
        rows.append([
            f"<td>{html.escape(corpus['name'])}<small>{number_of(corpus['documents'], 'document')}, {corpus['bytes'] / 1e6:,.2f} MB</small></td>",
            f"{before['tokens_per_character']:.3f} → {after['tokens_per_character']:.3f}",
            f"{before['bytes_per_token']:.2f} → {after['bytes_per_token']:.2f}",
            f"{before['tokens_per_word']:.2f} → {after['tokens_per_word']:.2f}",
            f"{corpus['tokens_change']:+.1%}",
            f"{corpus['documents_changed']:.1%}",
            str(corpus["round_trip_failures"]),
        ])  # fmt: skip
    header = ["corpus", "tokens per character", "bytes per token", "tokens per word", "tokens",
              "documents cut differently", "documents lost"]  # fmt: skip
    note = "Words are what stands between white space. A document is lost when the base gives it back from its tokens and the other does not."
    agreement = "".join(f" {line[0].upper()}{line[1:]}." for line in _agreement(figures))
    return f"<h2>The text</h2>{html_table(header, rows)}<p class=note>{note}{agreement}</p>"


def _pieces_section(figures: dict) -> str:
    if figures["new_pieces"] is None:
        return f"<h2>New pieces</h2><p class=note>{_unrelated(figures)}.</p>"
    unused = ""
    if figures["unreachable"]:
        spans = "".join(f"<span>{visible(piece)}</span>" for piece in figures["unreachable"])
        unused = (
            f"<details><summary>Never used in this text: {len(figures['unreachable']):,} of {figures['unreachable_pieces']:,}</summary>"
            f"<div class=pieces>{spans}</div></details>"
        )
    broken = any(BYTE.search(piece) for piece in (*figures["longest"], *figures["unreachable"]))
    note = " <0xE6>: a byte of a character that begins or ends outside the piece." if broken else ""
    return (
        f"<h2>New pieces</h2><p class=note>{_pieces_sentence(figures)}.{note}</p>{pieces_to_look_at(figures)}{unused}"
    )


def _speed_section(figures: dict) -> str:
    rates = figures["speed"]
    rows = [
        [name, f"{rates['base'][name]:.2f}", f"{rates['extended'][name]:.2f}", f"{rates[f'{name}_ratio']:.2f}"]
        for name in ("encode", "decode")
    ]
    header = ["megabytes a second", "before", "after", "ratio"]
    note = "The same text and library, the two tokenizers in turns, the best of three."
    return f"<h2>Speed</h2>{html_table(header, rows)}<p class=note>{note}</p>"


# Sentences cut by both


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of text that one token covers, or several when characters are cut into bytes."""

    text: str
    tokens: int
    is_new: bool


def spans(tokenizer: Tokenizer, text: str, first_new: int | None) -> list[Span]:
    """A text as its tokens; ids from `first_new` on are new."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    found: list[tuple[int, int, bool]] = []
    end = 0
    for index, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
        is_new = first_new is not None and index >= first_new
        if found and (first < end or last <= end):
            count, new = found[-1][1] + 1, found[-1][2] or is_new
            end = max(end, last)
            found[-1] = (end, count, new)
        else:
            end = last
            found.append((end, 1, is_new))
    starts = [0, *(last for last, *_ in found)]
    return [Span(text[first:last], count, new) for first, (last, count, new) in zip(starts, found, strict=False)]


def _sentence(text: str) -> str:
    """The first sentence or line of 25 to 110 characters, or the text's beginning."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", text))
    if found := next((part for part in parts if 25 <= len(part) <= 110), None):
        return found
    text = text.strip()
    return text if len(text) <= 70 else re.split(r"\s", text[:70][::-1], maxsplit=1)[-1][::-1]


def examples(base: Tokenizer, extended: Tokenizer, texts: Sequence[str], ratio: float, count: int = 2) -> list[str]:
    """Sentences, each of another document, whose change in tokens is nearest to the corpus's."""
    lines = [_sentence(text) for text in texts[:: max(1, len(texts) // 200)]]
    counts = zip(base.encode_documents(lines), extended.encode_documents(lines), strict=True)
    distance = [abs(math.log(max(1, len(after)) / max(1, len(before))) - math.log(ratio)) for before, after in counts]
    order = sorted(range(len(lines)), key=lambda index: (len(lines[index]) < 25, distance[index], index))
    return list(dict.fromkeys(lines[index] for index in order))[:count]


def _examples_section(figures: dict, base: Tokenizer, extended: Tokenizer, texts: dict[str, list[str]]) -> str:
    first_new = None if figures["new_pieces"] is None else base.size
    blocks = []
    for corpus in figures["corpora"]:
        chosen = examples(base, extended, texts[corpus["name"]], 1 + corpus["tokens_change"])
        for line in chosen:
            sides = "".join(_cut_html(side, spans(tokenizer, line, first_new))
                            for side, tokenizer in (("before", base), ("after", extended)))  # fmt: skip
            blocks.append(
                f"<div class=example><span class=note>{html.escape(corpus['name'])}</span><div class=pair>{sides}</div></div>"
            )
    new = ", <span class=n>a new piece</span>" if first_new is not None else ""
    key = (
        f'<p class="note key"><span class=a>a token</span>{new}; a red number: so many tokens for these characters.</p>'
    )
    return f"<h2>Sentences, cut by both</h2>{key}{''.join(blocks)}"


def _cut_html(side: str, found: Sequence[Span]) -> str:
    cells = []
    for index, span in enumerate(found):
        style = ("n " if span.is_new else "") + "ab"[index % 2]
        number = f"<sup>{span.tokens}</sup>" if span.tokens > 1 else ""
        cells.append(f'<span class="{style}">{html.escape(span.text)}{number}</span>')
    total = sum(span.tokens for span in found)
    return f"<div><span class=note>{side}: {total} tokens</span><div class=cut>{'<wbr>'.join(cells)}</div></div>"
