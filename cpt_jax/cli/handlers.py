"""What each command does with its arguments; imports happen inside, so that --help needs no JAX."""

import argparse
import sys
from pathlib import Path


def adapt(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from cpt_jax.recipe.defaults import adapt_recipe, explain
    from cpt_jax.recipe.run import run

    recipe, reasons = adapt_recipe(
        base=arguments.base,
        new=arguments.new,
        replay=arguments.replay,
        watch=arguments.watch,
        new_tokens=arguments.new_tokens,
        method=arguments.method,
        tokens=arguments.tokens,
        replay_share=arguments.replay_share,
        text_field=arguments.text_field,
        workdir=arguments.workdir,
    )
    recipe = _overridden(recipe, overrides)
    print(explain(recipe, reasons), file=sys.stderr, flush=True)
    run(recipe, arguments.workdir, update=arguments.update)


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from cpt_jax.recipe.find import find_recipe
    from cpt_jax.recipe.run import run

    recipe = _overridden(find_recipe(arguments.recipe), overrides)
    run(recipe, arguments.workdir or Path("runs") / recipe.name, update=arguments.update, only=arguments.only)


def _overridden(recipe, overrides: list[str]):
    from cpt_jax.recipe.find import apply_overrides

    return apply_overrides(recipe, overrides)


def _extension(arguments: argparse.Namespace, new_tokens: int, candidates: Path | None):
    from cpt_jax.recipe.tokenizer_commands import extension_of

    return extension_of(
        method=arguments.method,
        new_tokens=new_tokens,
        scores=arguments.scores,
        candidates=candidates,
        ban=arguments.ban,
        scripts=arguments.scripts,
        min_frequency=arguments.min_frequency,
        max_piece_characters=arguments.max_piece_characters,
        sample_bytes=arguments.sample_bytes,
    )


def tokenizer_extend(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.tokenizer_commands import tokenizer_extend
    from cpt_jax.vocab.gate import Limits

    given = {
        "old_documents_changed": arguments.max_old_documents_changed,
        "old_tokens_added": arguments.max_old_tokens_added,
        "unreachable_pieces": arguments.max_unreachable,
        "slow_fast_differences": arguments.max_slow_fast_differences,
    }
    tokenizer_extend(
        base=arguments.base,
        corpora=arguments.corpus,
        protect=arguments.protect,
        extension=_extension(arguments, arguments.new_tokens, arguments.candidates),
        drop_unreachable=arguments.drop_unreachable,
        limits=Limits(**{name: value for name, value in given.items() if value is not None}),
        heldout_share=arguments.heldout_share,
        text_field=arguments.text_field,
        out=arguments.out,
        json_path=arguments.json,
    )


def tokenizer_report(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.tokenizer_commands import tokenizer_report

    tokenizer_report(
        base=arguments.base,
        tokenizer=arguments.tokenizer,
        corpora=arguments.corpus,
        protect=arguments.protect,
        extension=_extension(arguments, max(arguments.sizes), None) if arguments.curve else None,
        sizes=arguments.sizes,
        sample_bytes=arguments.sample_bytes,
        heldout_share=arguments.heldout_share,
        text_field=arguments.text_field,
        json_path=arguments.json,
        html_path=arguments.html,
        picture_path=arguments.plot,
    )


def model_import_gguf(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.checkpoint.gguf import import_gguf

    import_gguf(arguments.gguf, arguments.out)
    print(arguments.out)


def model_inspect(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.find import find_model
    from cpt_jax.recipe.inspect_command import method_named, model_inspect

    method = method_named(arguments.method, arguments.rank, arguments.targets)
    model_inspect(find_model(arguments.model), method=method, new_tokens=arguments.new_tokens, json_path=arguments.json)


def model_extend(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.commands import model_extend

    model_extend(
        model=arguments.model,
        tokenizer=arguments.tokenizer,
        init=arguments.init,
        corpora=arguments.corpus,
        vectors=arguments.vectors,
        probe_steps=arguments.probe,
        text_field=arguments.text_field,
        seed=arguments.seed,
        out=arguments.out,
        json_path=arguments.json,
    )


def data_prepare(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.commands import data_prepare

    data_prepare(arguments.tokenizer, arguments.input, arguments.out, text_field=arguments.text_field)


def evaluate(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.evaluate_command import evaluate_model

    evaluate_model(
        model=arguments.model,
        against=arguments.against,
        data=arguments.data,
        choices=arguments.choices,
        text_field=arguments.text_field,
        max_bytes=arguments.max_bytes,
        json_path=arguments.json,
    )


def lm_eval(_: argparse.Namespace, arguments: list[str]) -> None:
    from cpt_jax.recipe.evaluate_command import run_harness

    run_harness(arguments)


def generate(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.models.sampling import Sampling
    from cpt_jax.recipe.generate_command import generate_text

    generate_text(
        model=arguments.model,
        prompts=arguments.prompt,
        prompts_path=arguments.prompts,
        new_tokens=arguments.new_tokens,
        sampling=Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
        ),
        stop=arguments.stop,
        chat=arguments.chat,
        json_path=arguments.json,
    )


def export(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.run import export_run

    names = ("weights", "interpolate_base", "adapter", "dtype", "shard_gb")
    given = {name: getattr(arguments, name) for name in names}
    export_run(arguments.run, arguments.out, {name: value for name, value in given.items() if value is not None})


def report(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.report import compare_reports, write_report

    for run in arguments.run:
        print(write_report(run))
    if len(arguments.run) > 1:
        print(compare_reports(arguments.run, arguments.out))
