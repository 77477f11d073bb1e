"""`cpt data`: its flags, and what it does with them; imports happen inside, so that --help needs no JAX."""

import argparse
from typing import Any

from cpt_jax.cli.arguments import chat_of, chat_template_of, named_spec, on_disk, text_field_of, whole_number
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


def data_generate_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `data generate`."""
    sub.add_argument("--model", required=True, help="the base: a HF directory, a .gguf file or a hub id")
    sub.add_argument("--tokens", required=True, type=whole_number, metavar="N", help="of all documents, at least")
    sub.add_argument("--document-tokens", type=int, default=512, metavar="N", help="at most (default 512)")
    sub.add_argument("--batch", type=int, default=32, metavar="N", help="documents written together (default 32)")
    sub.add_argument("--chat", action="store_true", help="questions and answers, by the tokenizer's chat template")
    sub.add_argument("--temperature", type=float, default=1.0, help="default 1: what the model holds for how likely")
    sub.add_argument("--top-p", type=float, metavar="SHARE", help="draw from the fewest tokens that have this share")
    sub.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sub.add_argument("--seed", type=int, default=0, help="another one for each process that writes (default 0)")
    sub.add_argument("--out", required=True, type=on_disk, metavar="FILE.jsonl", help="called again, it goes on")


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


def data_generate(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.models.sampling import Sampling
    from cpt_jax.recipe.generative_replay import Rehearsal, generate_data

    drawn = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    rehearsal = Rehearsal(
        document_tokens=arguments.document_tokens, batch=arguments.batch, chat=arguments.chat, sampling=drawn
    )
    generate_data(model=arguments.model, tokens=arguments.tokens, rehearsal=rehearsal, out=arguments.out)
