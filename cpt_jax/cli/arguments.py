"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import Any


def named_spec(text: str) -> tuple[str, str]:
    name, separator, spec = text.partition("=")
    if not separator or not name or not spec:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SPEC, as in zh=law.jsonl")
    return name, spec


def texts_and_learning(sub: argparse.ArgumentParser) -> None:
    """What `tokenizer extend` and `tokenizer report --curve` learn from, and how."""
    spec: dict[str, Any] = dict(nargs="+", metavar="SPEC")
    sub.add_argument("--base", required=True, help="a directory with tokenizer.json or tokenizer.model, or a hub id")
    sub.add_argument("--corpus", required=True, help="text of the new domain", **spec)
    sub.add_argument(
        "--protect",
        default=[],
        help="old text: cut as before by learning, and a held-out part of it is what is measured",
        **spec,
    )
    sub.add_argument("--method", choices=("union", "continued-bpe"), default="continued-bpe")
    sub.add_argument(
        "--scores", choices=("below-base", "own", "zero"), help="of a SentencePiece union (default below-base)"
    )
    sub.add_argument("--ban", type=Path, metavar="FILE", help="pieces that are never learnt, one a line (UTF-8)")
    sub.add_argument(
        "--scripts", nargs="+", default=[], metavar="SCRIPT", help="keep to these, as in Han Hiragana (default: any)"
    )
    sub.add_argument("--min-frequency", type=int, metavar="N", help="of a learnt piece in the text (default 2)")
    sub.add_argument("--max-piece-characters", type=int, metavar="N", help="(default 16)")
    sub.add_argument(
        "--sample-bytes",
        type=int,
        metavar="N",
        help="of more text than this, documents chosen by hash (default 200,000,000; to compare, 20,000,000 a corpus)",
    )
    sub.add_argument("--heldout-share", type=float, default=0.1, help="of documents, by hash (default 0.1)")
    sub.add_argument("--text-field", default="text", help="the field that holds a record's text")
