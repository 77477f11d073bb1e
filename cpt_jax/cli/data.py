"""`cpt data`: its flags, and what it does with them; imports happen inside, so that --help needs no JAX."""

import argparse
from typing import Any

from cpt_jax.cli.arguments import chat_of, chat_template_of, named_spec, text_field_of
from cpt_jax.core.stores import location

# Where the steps run: by processes of this machine, or by a runner of Apache Beam.
RUNNERS = ("local", "DirectRunner", "dataflow", "flink", "spark")


def _cleaning(sub: argparse.ArgumentParser) -> None:
    """What is left out."""
    sub.add_argument(
        "--filter",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILTER",
        help="gopher, repeats, symbols, language=zh,en, or module:function of a text that gives a reason or None",
    )
    sub.add_argument("--duplicates", action="store_true", help="of equal texts, keep the first")
    sub.add_argument(
        "--near-duplicates",
        type=float,
        metavar="SHARE",
        help="of texts that have so much in common (0.8 is usual), keep the first",
    )
    sub.add_argument(
        "--evaluation",
        action="extend",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="leave out documents that share text with these",
    )
    sub.add_argument(
        "--evaluation-words", type=int, default=13, metavar="N", help="that text is so many words in a row (default 13)"
    )
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")


def data_prepare_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `data prepare`."""
    spec: dict[str, Any] = dict(type=named_spec, action="extend", nargs="+", metavar="NAME=SPEC")
    sub.add_argument("--tokenizer", required=True, help="its directory, or a hub id")
    sub.add_argument("--input", required=True, **spec)
    sub.add_argument("--out", required=True, type=location, help="a directory, or an address as gs://BUCKET/DATA")
    text_field_of(sub)
    chat_of(sub)
    chat_template_of(sub)
    _cleaning(sub)
    sub.add_argument("--runner", choices=RUNNERS, default="local", help="of Apache Beam, but the first (default local)")
    sub.add_argument(
        "--runner-options",
        default="",
        metavar="OPTIONS",
        help="of Beam, in one argument, as in '--project=P --region=R --temp_location=gs://B/tmp'",
    )


def data_stats_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `data stats`."""
    sub.add_argument("data", nargs="+", metavar="DIR|NAME=SPEC", help="prepared directories, or corpora as they are")
    text_field_of(sub)
    chat_of(sub)
    _cleaning(sub)
    sub.add_argument("--html", type=location, help="also write a self-contained page to this file")
    sub.add_argument("--json", type=location, help="also write the figures to this file")


def _cleaned(arguments: argparse.Namespace):
    from cpt_jax.data.cleaning import Cleaning

    return Cleaning(
        filters=tuple(arguments.filter),
        duplicates=arguments.duplicates,
        near_duplicates=arguments.near_duplicates,
        evaluation_sets=tuple(arguments.evaluation),
        evaluation_words=arguments.evaluation_words if arguments.evaluation else None,
    )


def data_prepare(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.data_commands import prepare_data

    prepare_data(
        tokenizer=arguments.tokenizer,
        inputs=arguments.input,
        text_field=arguments.text_field,
        chat=arguments.chat,
        chat_template=arguments.chat_template,
        cleaning=_cleaned(arguments),
        workers=arguments.workers,
        runner=arguments.runner,
        runner_options=arguments.runner_options.split(),
        out=arguments.out,
    )


def data_stats(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.data_commands import show_data

    show_data(
        given=arguments.data,
        text_field=arguments.text_field,
        chat=arguments.chat,
        cleaning=_cleaned(arguments),
        workers=arguments.workers,
        html_path=arguments.html,
        json_path=arguments.json,
    )
