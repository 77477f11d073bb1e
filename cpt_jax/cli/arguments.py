"""Arguments that several commands share."""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

from cpt_jax.core.stores import location


def on_disk(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is in a store, and is needed on a disk: fetch it, and give its path")
    return Path(text)


def named_spec(text: str) -> tuple[str, str]:
    name, separator, spec = text.partition("=")
    if not separator or not name or not spec:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SPEC, as in zh=law.jsonl")
    return name, spec


class Commands(argparse.ArgumentParser):
    """A parser whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (one that begins with - goes behind an equals sign: --flag=-value)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def nearly_a_flag(word: str, parser: argparse.ArgumentParser) -> str | None:
    """The parser's flag that was meant by what looks like a recipe's field: --replay-share by --replay_share=0.5."""
    name = word.partition("=")[0].replace("_", "-")
    flags = re.findall(r"--[a-z-]+", parser.format_usage())
    similar = difflib.get_close_matches(name, flags, n=1, cutoff=0.8) if name.startswith("--") else []
    return next(iter(similar), None)


def whole_number(text: str) -> int:
    """A count, also written as 1e6 or 1,000,000."""
    plain = text.replace(",", "")
    try:
        return int(plain)
    except ValueError:
        pass
    try:
        if (value := float(plain)).is_integer():
            return int(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, as in 1000000 or 1e6")


def text_field_of(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text-field", default="text", help="the field that holds a record's text")


def chat_of(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--chat",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="corpora that hold conversations: answers are learnt",
    )


def chat_template_of(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--chat-template", type=on_disk, metavar="FILE", help="Jinja (default: the tokenizer's own chat template)"
    )


def texts_and_learning(sub: argparse.ArgumentParser) -> None:
    """What `tokenizer extend` and `tokenizer report --curve` learn from, and how."""
    spec: dict[str, Any] = dict(action="extend", nargs="+", metavar="SPEC")
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
    sub.add_argument("--ban", type=on_disk, metavar="FILE", help="pieces that are never learnt, one a line (UTF-8)")
    sub.add_argument(
        "--scripts",
        action="extend",
        nargs="+",
        default=[],
        metavar="SCRIPT",
        help="keep to these, as in Han Hiragana (default: any)",
    )
    sub.add_argument("--min-frequency", type=int, metavar="N", help="of a learnt piece in the text (default 2)")
    sub.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="merge pairs that are at most so frequent in the old text against the new (default 0: old text is cut as before; 0.01 where it holds some of the new language)",
    )
    sub.add_argument("--max-piece-characters", type=int, metavar="N", help="(default 16)")
    sub.add_argument(
        "--sample-bytes",
        type=int,
        metavar="N",
        help="of more text than this, documents chosen by hash (default 200,000,000; to compare, 20,000,000 a corpus)",
    )
    sub.add_argument("--heldout-share", type=float, default=0.1, help="of documents, by hash (default 0.1)")
    text_field_of(sub)


def trackers_of(sub: argparse.ArgumentParser) -> None:
    """Where the figures of training go besides."""
    sub.add_argument(
        "--track",
        action="extend",
        nargs="+",
        default=[],
        choices=("tensorboard", "wandb", "mlflow"),
        help="also tell it the figures",
    )


def replay_and_forgetting(sub: argparse.ArgumentParser) -> None:
    """How much `adapt` replays, and what it does about forgetting."""
    sub.add_argument(
        "--replay-share", type=float, default=0.25, help="share of the tokens that is replay (default 0.25)"
    )
    sub.add_argument(
        "--replay-until",
        type=float,
        metavar="SHARE",
        help="the share that it goes to, along a line (default: it stays)",
    )
    sub.add_argument(
        "--watch-every",
        type=int,
        metavar="STEPS",
        help="measure bits per byte of replayed and watched domains (default with a budget: 20 times)",
    )
    sub.add_argument(
        "--forgetting-budget",
        type=float,
        metavar="SHARE",
        help="act when one of them is worse than the base by more than this, as in 0.02",
    )
    sub.add_argument(
        "--on-forgetting",
        choices=("raise-replay", "stop"),
        help="what is done then (default: raise replay where there is some)",
    )


def plan_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    sub.add_argument("recipe", nargs="?", help="as `cpt run` takes it; or give --model alone")
    sub.add_argument("--model", help="a config.json, a model's directory or a hub id (default: the recipe's base)")
    sub.add_argument(
        "--hardware", required=True, metavar="NAME", help="as in v5p-128, v6e-256, v5e:16x16, v5e-256x2, h100-64, cpu-8"
    )
    sub.add_argument("--mesh", metavar="AXIS=SIZE,...", help="as `cpt run` takes it (default: all along fsdp)")
    sub.add_argument("--stage", metavar="NAME", help="of the recipe (default: each)")
    of_model = "with --model alone"
    sub.add_argument("--method", choices=("full", "lora", "new-rows"), help=f"{of_model} (default full)")
    sub.add_argument("--new-tokens", type=int, metavar="N", help=f"rows that the vocabulary gains, {of_model}")
    sub.add_argument("--ema", action="store_true", help=f"keep a moving average, {of_model}")
    sub.add_argument("--sequence", type=int, metavar="TOKENS", help=f"of a row ({of_model}: 8192)")
    sub.add_argument("--batch", type=int, metavar="ROWS", help=f"of a step ({of_model}: one for each device)")
    sub.add_argument("--accumulate", type=int, metavar="PARTS", help="that a step is computed in")
    sub.add_argument("--tokens", type=whole_number, metavar="N", help=f"of the stage ({of_model}: 1,000,000,000)")
    sub.add_argument(
        "--remat",
        metavar="WHAT",
        help="none, all, or what the backward pass keeps, as in products or attention_out,mlp_up",
    )
    sub.add_argument("--price", type=float, help="of a chip's hour, for the cost")
    sub.add_argument("--search", action="store_true", help="rank meshes, remat policies and batch sizes")
    sub.add_argument(
        "--compile", type=int, default=3, metavar="N", help="of what --search ranks on paper, the first N (default 3)"
    )
    sub.add_argument("--json", type=location, help="also write the figures to this file")


def tokenizer_extend_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `tokenizer extend`."""
    texts_and_learning(sub)
    sub.add_argument("--new-tokens", required=True, type=int, help="pieces learnt from the corpora, at most")
    sub.add_argument(
        "--candidates", type=on_disk, metavar="FILE", help="terms to be pieces besides, one a line (UTF-8)"
    )
    sub.add_argument(
        "--drop-unreachable", action="store_true", help="leave out pieces that the corpora never come to use"
    )
    for name, help in (
        ("old-documents-changed", "protected documents that may be tokenised differently"),
        ("old-tokens-added", "more tokens that protected documents may take"),
        ("unreachable", "new pieces that may never be used"),
        ("slow-fast-differences", "documents that tokenizer.model and tokenizer.json may cut differently"),
    ):
        sub.add_argument(f"--max-{name}", type=float, metavar="SHARE", help=f"limit (0 to 1) of {help}")
    sub.add_argument("--out", required=True, type=location)


def tokenizer_report_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `tokenizer report`."""
    texts_and_learning(sub)
    sub.add_argument("--tokenizer", help="the other tokenizer's directory or hub id")
    sub.add_argument("--curve", action="store_true", help="fertility against the number of new pieces")
    sub.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[500, 1000, 2000, 4000, 8000, 16000, 32000],
        metavar="N",
        help="the curve's numbers of new pieces (default 500 to 32000)",
    )
    sub.add_argument("--html", type=location, help="also write a self-contained page to this file")
    sub.add_argument("--plot", type=location, help="also write the curve's picture to this PNG file")
