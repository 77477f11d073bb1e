"""What each command does with its arguments; imports happen inside, so that --help needs no JAX."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any


def _named(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments of these names."""
    return {name: getattr(arguments, name) for name in names}


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in arguments.items() if value is not None}


def adapt(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from cpt_jax.core.stores import cache_of, is_address
    from cpt_jax.recipe.defaults import adapt_recipe, explain
    from cpt_jax.recipe.run import claim, run
    from cpt_jax.training.memory import accelerator_memory

    names = (
        "base",
        "new",
        "replay",
        "watch",
        "new_tokens",
        "context",
        "rope",
        "method",
        "optimizer",
        "anchor",
        "mean_teacher",
        "tokens",
        "replay_share",
        "replay_until",
        "watch_every",
        "forgetting_budget",
        "on_forgetting",
        "text_field",
        "chat",
        "chat_template",
        "workdir",
    )
    machine = _machine(arguments)
    given = _named(arguments, *names)
    given["workdir"] = cache_of(arguments.workdir) if is_address(arguments.workdir) else arguments.workdir
    # What a CPU has free is something else with each call.
    if (memory := accelerator_memory()) is not None:
        from cpt_jax.plan.fit import fitted

        given["fit"] = functools.partial(fitted, memory=memory, shape=machine["mesh"])
    recipe, reasons = adapt_recipe(**given, overrides=overrides)
    print(explain(recipe, reasons), file=sys.stderr, flush=True)
    if arguments.dry_run:
        claim(recipe, arguments.workdir, update=arguments.update, mesh=machine["mesh"])
    else:
        run(recipe, arguments.workdir, update=arguments.update, **machine)


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from cpt_jax.recipe.find import find_recipe
    from cpt_jax.recipe.run import run

    machine = _machine(arguments)
    recipe = _overridden(find_recipe(arguments.recipe), overrides)
    workdir = arguments.workdir or Path("runs") / recipe.name
    run(recipe, workdir, update=arguments.update, only=arguments.only, **machine)


def plan(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from cpt_jax.plan.command import Wanted, plan

    names = ("method", "sequence", "batch", "accumulate", "remat", "tokens", "new_tokens", "ema")
    plan(
        overrides=overrides,
        wanted=Wanted(**_named(arguments, *names)),
        searching=arguments.search,
        compiled=arguments.compile,
        json_path=arguments.json,
        **_named(arguments, "recipe", "model", "hardware", "mesh", "stage", "price"),
    )


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a run lies on the machine, and what is watched there; starts it with the other processes, if there are."""
    from cpt_jax.core.errors import UserError
    from cpt_jax.core.processes import Processes
    from cpt_jax.recipe.shared import SharedStations
    from cpt_jax.sharding.mesh import MeshShape
    from cpt_jax.training.profile import ProfiledSteps

    profiled = None if arguments.profile is None else ProfiledSteps.parse(arguments.profile)
    if not arguments.hang_seconds >= 0:
        raise UserError(f"--hang-seconds is {arguments.hang_seconds:g}: give seconds, or 0 for no watchdog")
    processes = Processes(coordinator=arguments.coordinator, count=arguments.processes, index=arguments.process)
    if arguments.distributed or processes.coordinator is not None:
        processes.start()
    return {
        "profiled": profiled,
        "mesh": None if arguments.mesh is None else MeshShape.parse(arguments.mesh),
        "hang_seconds": arguments.hang_seconds or None,
        "unreadable": arguments.unreadable,
        "track": tuple(arguments.track),
        "shared": None if arguments.shared is None else SharedStations(arguments.shared),
    }


def _overridden(recipe, overrides: list[str]):
    from cpt_jax.recipe.find import apply_overrides

    return apply_overrides(recipe, overrides)


def _extension(arguments: argparse.Namespace, new_tokens: int, candidates: Path | None):
    from cpt_jax.recipe.tokenizer_commands import extension_of

    names = ("method", "scores", "ban", "scripts", "min_frequency", "max_piece_characters", "tolerance", "sample_bytes")
    return extension_of(new_tokens=new_tokens, candidates=candidates, **_named(arguments, *names))


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
        corpora=arguments.corpus,
        extension=_extension(arguments, arguments.new_tokens, arguments.candidates),
        limits=Limits(**_given(given)),
        json_path=arguments.json,
        **_named(arguments, "base", "protect", "drop_unreachable", "heldout_share", "text_field", "out"),
    )


def tokenizer_report(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.tokenizer_commands import tokenizer_report

    names = ("base", "tokenizer", "protect", "sizes", "sample_bytes", "heldout_share", "text_field")
    tokenizer_report(
        corpora=arguments.corpus,
        extension=_extension(arguments, max(arguments.sizes), None) if arguments.curve else None,
        json_path=arguments.json,
        html_path=arguments.html,
        picture_path=arguments.plot,
        **_named(arguments, *names),
    )


def model_import_gguf(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.checkpoint.gguf import import_gguf
    from cpt_jax.core.stores import fetched, refuse_existing, written_to

    refuse_existing(arguments.out)
    with fetched(arguments.gguf) as file, written_to(arguments.out) as local:
        import_gguf(file, local)
    print(arguments.out)


def model_export_gguf(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.checkpoint.gguf_write import export_gguf
    from cpt_jax.core.stores import refuse_existing, written_beside
    from cpt_jax.recipe.find import find_model

    refuse_existing(arguments.out)
    directory = find_model(arguments.model)
    with written_beside(arguments.out) as file:
        export_gguf(directory, file, arguments.type)
    print(arguments.out)


def model_inspect(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.find import find_model
    from cpt_jax.recipe.inspect_command import model_inspect

    names = ("method", "rank", "targets", "optimizer", "new_tokens")
    model_inspect(find_model(arguments.model), json_path=arguments.json, **_named(arguments, *names))


def model_extend(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.extend_command import model_extend

    model_extend(
        corpora=arguments.corpus,
        probe_steps=arguments.probe,
        json_path=arguments.json,
        **_named(arguments, "model", "tokenizer", "init", "vectors", "text_field", "seed", "out"),
    )


def evaluate(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.evaluate_command import evaluate_model

    names = ("model", "against", "data", "choices", "text_field", "chat", "chat_template", "max_bytes", "by_position")
    evaluate_model(json_path=arguments.json, **_named(arguments, *names))


def lm_eval(_: argparse.Namespace, arguments: list[str]) -> None:
    from cpt_jax.recipe.evaluate_command import run_harness

    run_harness(arguments)


def generate(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.models.sampling import Sampling
    from cpt_jax.recipe.generate_command import generate_text

    generate_text(
        prompts=arguments.prompt,
        prompts_path=arguments.prompts,
        sampling=Sampling(**_named(arguments, "temperature", "top_k", "top_p", "seed")),
        json_path=arguments.json,
        **_named(arguments, "model", "new_tokens", "stop", "chat"),
    )


def export(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.run import export_run

    changes = _named(arguments, "weights", "interpolate_base", "adapter", "dtype", "shard_gb")
    export_run(arguments.run, arguments.out, _given(changes))


def doctor(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.doctor import examine_run

    if not examine_run(arguments.run, arguments.json):
        sys.exit(1)


def report(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.core.errors import UserError
    from cpt_jax.core.stores import location
    from cpt_jax.report.many import is_sweep
    from cpt_jax.report.many_report import write_runs_report
    from cpt_jax.report.run_report import write_report

    runs = arguments.run
    several = is_sweep(runs[0]) or len(runs) > 1
    if arguments.out is not None and not several:
        raise UserError(f"--out is of the page over several runs: a single one's report is {runs[0]}/report.html")
    for run in runs:
        if not is_sweep(run):
            print(write_report(run))
    if several:
        of_sweep = location(f"{runs[0]}/report.html")
        print(write_runs_report(runs, arguments.out or (Path("compare.html") if len(runs) > 1 else of_sweep)))
