"""The recipe of `cpt adapt`: defaults from the model, the text and the hardware, each with its reason."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from cpt_jax.adapt import POSITIONS, Context, Embeddings, Expand, Full, LoRA, Method, usual_blocks
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.hf import read_config
from cpt_jax.core.config import override
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import number_of
from cpt_jax.core.storage import is_file_name
from cpt_jax.core.tree import flatten
from cpt_jax.data.chat_template import read_template
from cpt_jax.data.mixture import Mixture, Ramp, described, domains_of
from cpt_jax.data.sources import named_corpora
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import OPTIMIZERS, AdamW, Optimizer
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.find import apply_overrides, model_named, overrides_of
from cpt_jax.recipe.first_look import Sample, kept_sample
from cpt_jax.recipe.recipe import Domain, Evaluation, Recipe, Role, Samples, Stage, Vocabulary
from cpt_jax.sharding.hardware import fastest_type
from cpt_jax.training.retention import Anchor, MeanTeacher, Retention
from cpt_jax.training.watch import RaiseReplay, Stop, Watch
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.init_rows import ROWS_STEP
from cpt_jax.vocab.tokenizer import Tokenizer

# Below this many bytes a token the base's tokenizer wastes tokens on the text (English: 4 to 5; Chinese with an
# English one: 1.7).
WASTEFUL_BYTES_PER_TOKEN = 3.0
# A share of tokens; more is text that is lost.
MOST_UNKNOWN = 0.001
# What some ten minutes on a small CPU machine hold for a 135M model.
CPU_TOKENS = 150_000
ACCELERATOR_TOKENS = 1_000_000_000
# Fewer are a mistake: both stages want a step.
MIN_TOKENS = 100
# As ROWS_STEP, of new rows beside other weights, and of old rows, which say something already (LOG.md).
CALMER_ROWS_STEP = 0.037
OLD_ROWS_STEP = 0.004


def _new_pieces(sample: Sample, given: int | None) -> tuple[int, str]:
    rate = f"the base's tokenizer makes a token of every {sample.bytes_per_token:.2f} bytes of the new text"
    if given is not None:
        return given, f"as given; {rate}"
    pieces = 2000 if sample.whole else 8000
    if sample.unknown > MOST_UNKNOWN:
        return pieces, (
            f"of the tokens that the base's tokenizer makes of the new text {sample.unknown:.1%} stand for what it cannot spell"
        )
    if sample.bytes_per_token >= WASTEFUL_BYTES_PER_TOKEN:
        return 0, f"{rate}: good enough (from {WASTEFUL_BYTES_PER_TOKEN:.1f} on)"
    return pieces, f"{rate}: wasteful (below {WASTEFUL_BYTES_PER_TOKEN:.1f})"


def _training_tokens(sample: Sample, new_share: float, given: int | None, on_cpu: bool) -> tuple[int, str]:
    if given is not None:
        return given, "as given"
    epoch = round(sample.tokens / new_share)
    limit = CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS
    if sample.whole and epoch <= limit:
        return epoch, "the new text once, with its replay"
    return limit, f"a limit for {'a CPU' if on_cpu else 'this accelerator'}: more is better, give --tokens"


def _method(name: str, grows: bool, layers: int) -> Method:
    if name in ("lora", "dora"):
        return LoRA(rank=16, alpha=32, new_rows=grows, dora=name == "dora")
    if name == "expand":
        return Expand(blocks=usual_blocks(layers), new_rows=grows)
    return Full() if name == "full" else Embeddings(rows="new" if grows else "all")


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def _optimizer(name: str, method: str, size: int, rows: float) -> Optimizer:
    """By the number of weights, and the rate of rows: of all that train, or of new ones beside the method's own weights."""
    # LoRA's rate falls with size: 2e-3 was found best for SmolLM2-135M, at which Gemma 3 270M learns no more than at 5e-4, and
    # forgets (LOG.md); 2e-4 is what others use at 7B, and for added blocks.
    adapters = 2e-3 if size < 2e8 else 5e-4 if size < 3e9 else 2e-4
    peak = {"lora": adapters, "dora": adapters, "full": 5e-5, "embeddings": rows, "expand": 2e-4}[method]
    multiplier = _rounded(rows / peak)
    # Lion's steps are whole ones; the new rows get AdamW in any case.
    slower = 5 if name == "lion" else 1
    return OPTIMIZERS[name](learning_rate=peak / slower, new_rows_multiplier=multiplier * slower)


def _retention(anchor: float | None, mean_teacher: float | None, replayed: Sequence[str]) -> tuple[Retention, ...]:
    """Teachers, over the replayed text where there is any."""
    domains = tuple(replayed) or None
    given = ((Anchor, anchor), (MeanTeacher, mean_teacher))
    return tuple(kind(weight=weight, domains=domains) for kind, weight in given if weight is not None)


def _mixture(new: Sequence[str], replayed: Sequence[str], share: float, until: float | None) -> Mixture:
    """The new domains in equal parts, and the replayed ones."""

    def shares(replay: float) -> dict[str, float]:
        return {name: (1 - replay) / len(new) for name in new} | {
            name: replay / len(replayed) for name in replayed if share or until
        }

    return shares(share) if until is None or not replayed else Ramp(start=shares(share), end=shares(until))


def _shape(context: int | None, reads: int, on_cpu: bool) -> dict[str, Any]:
    """Rows of a step: of a model that is to read more, rows of all that, in no fewer tokens a device.

    Args:
      reads: tokens that the base reads.
    """
    if context is not None:
        rows = 1 if on_cpu else max(1, 16_384 // context) * jax.device_count()
        return dict(batch_size=rows, sequence_length=context)
    if on_cpu:
        return dict(batch_size=2, sequence_length=min(256, reads))
    return dict(batch_size=8 * jax.device_count(), sequence_length=min(2048, reads))


def _with_long_texts(domain: Domain, context: int) -> Domain:
    """Measured on documents that are as long as rows (at up to four bytes a token), of text for two."""
    held = domain.heldout
    most, whole = max(held.max_document_bytes, 4 * context), max(held.max_bytes, 8 * context)
    return dataclasses.replace(domain, heldout=dataclasses.replace(held, max_document_bytes=most, max_bytes=whole))


def _watch(every: int | None, limit: float | None, action: str | None, steps: int, replays: bool) -> Watch | None:
    if every is None and limit is None:
        return None
    raises = action == "raise-replay" or (action is None and replays)
    budget = None if limit is None else RaiseReplay(limit=limit) if raises else Stop(limit=limit)
    return Watch(every=every or max(1, steps // 20), budget=budget)


def _domains(
    given: dict[Role, Sequence[tuple[str, str]]], text_field: str, chat: Sequence[str], overrides: Sequence[str]
) -> tuple[Domain, ...]:
    """The domains as flags change them, before any text is read: each corpus may have a text field of its own."""
    corpora = named_corpora([spec for specs in given.values() for spec in specs], text_field, chat)
    roles: list[Role] = [role for role, specs in given.items() for _ in specs]
    domains = tuple(Domain(corpus=corpus, role=role) for corpus, role in zip(corpora, roles, strict=True))
    recipe = Recipe(name="domains", base="", domains=domains, stages=())
    of_domains = [(path, value) for path, value in overrides_of(overrides) if path.startswith("domains.")]
    return override(recipe, *of_domains).domains


def adapt_recipe(
    *,
    base: str,
    new: Sequence[tuple[str, str]],
    replay: Sequence[tuple[str, str]],
    watch: Sequence[tuple[str, str]],
    new_tokens: int | None,
    context: int | None,
    rope: str | None,
    method: str,
    optimizer: str,
    anchor: float | None,
    mean_teacher: float | None,
    tokens: int | None,
    replay_share: float,
    replay_until: float | None,
    watch_every: int | None,
    forgetting_budget: float | None,
    on_forgetting: str | None,
    text_field: str,
    chat: Sequence[str],
    chat_template: Path | None,
    workdir: Path,
    overrides: Sequence[str] = (),
    fit: Callable[[Recipe, dict], tuple[Recipe, str]] | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """A recipe for the user's own model and text, and the reason for each default; `overrides` (`apply_overrides`) are
    applied, then `fit` with the base's config.json, which cuts steps to the devices' memory (`plan.fit.fitted`).

    Raises:
      UserError: a share outside [0, 1), a watch over nothing, too little text, or whatever is wrong with the model, the corpora or the overrides.
    """
    if not 0 <= replay_share < 1:
        raise UserError(f"--replay-share is {replay_share}: give a share from 0 up to, not including, 1")
    for name, given_share in (("--replay-until", replay_until), ("--forgetting-budget", forgetting_budget)):
        if given_share is not None and not 0 <= given_share < 1:
            raise UserError(f"{name} is {given_share}: give a share from 0 up to, not including, 1")
    if replay_until is not None and not replay:
        raise UserError(f"--replay-until {replay_until} needs something to replay: give --replay NAME=SPEC")
    if watch_every is not None and watch_every < 1:
        raise UserError(f"--watch-every is {watch_every}: give at least 1 step")
    if on_forgetting is not None and forgetting_budget is None:
        raise UserError(f"--on-forgetting {on_forgetting} needs a budget: give --forgetting-budget, as in 0.02")
    if not (replay or watch) and (watch_every or forgetting_budget is not None):
        raise UserError("nothing is there that may be forgotten: give --replay or --watch with the forgetting watch")
    if rope is not None and context is None:
        raise UserError(f"--rope {rope} is for a longer context: give --context N")
    if chat_template is not None:
        read_template(chat_template)
    rope = rope or "yarn"
    share = replay_share if replay else 0.0
    given: dict[Role, Sequence[tuple[str, str]]] = {"new": new, "replay": replay, "watch": watch}
    domains = _domains(given, text_field, chat, overrides)
    base = model_named(base)
    directory = resolve_base(base, workdir / "source")
    hf_config = read_config(directory)
    network = abstract_decoder(family_for(hf_config).config_from_hf(hf_config))
    reads = network.config.context_length
    longer = None if context is None else Context(length=context, rope=POSITIONS[rope]())
    if longer is not None:
        longer.over(hf_config)
        domains = tuple(_with_long_texts(domain, longer.length) for domain in domains)
    size = sum(leaf.size for leaf in flatten(network.shapes).values())
    tokenizer = Tokenizer(directory)
    corpora = [domain.corpus for domain in domains if domain.role == "new"]
    sample = kept_sample(corpora, tokenizer, base, directory, workdir)
    steps_of_rows = (ROWS_STEP, CALMER_ROWS_STEP, OLD_ROWS_STEP)
    alone, calmer, of_old = (_rounded(step * sample.row_size) for step in steps_of_rows)
    on_cpu = jax.default_backend() == "cpu"
    pieces, pieces_reason = _new_pieces(sample, new_tokens)
    total, total_reason = _training_tokens(sample, 1 - share, tokens, on_cpu)
    if total < MIN_TOKENS:
        raise UserError(
            f"there are {total} tokens to train on ({total_reason}): give more text, or --tokens {MIN_TOKENS} or more"
        )
    mixture = _mixture([name for name, _ in new], [name for name, _ in replay], share, replay_until)
    shape = _shape(context, reads, on_cpu)
    stages = []
    if pieces and method != "embeddings":
        only_new = {name: 1 / len(new) for name, _ in new}
        stages.append(
            Stage(
                name="embeddings",
                method=Embeddings(rows="new"),
                mixture=only_new,
                tokens=total // 5,
                optimizer=AdamW(learning_rate=alone, new_rows_epsilon=1e-3),
                **shape,
            )
        )
    rest = total - sum(stage.tokens for stage in stages)
    steps = rest // (shape["batch_size"] * shape["sequence_length"])
    stages.append(
        Stage(
            name=method,
            method=_method(method, pieces > 0, network.config.num_layers),
            mixture=mixture,
            tokens=rest,
            watch=_watch(watch_every, forgetting_budget, on_forgetting, steps, bool(replay and share)),
            optimizer=_optimizer(
                optimizer, method, size, calmer if method != "embeddings" else alone if pieces else of_old
            ),
            schedule=Cosine(),
            ema=EMA(decay=0.98 if on_cpu else 0.999),
            retention=_retention(anchor, mean_teacher, [name for name, _ in replay if name in domains_of(mixture)]),
            **shape,
        )
    )
    compute = fastest_type()
    recipe = Recipe(
        name=workdir.name if is_file_name(workdir.name) else "adapt",
        base=base,
        domains=domains,
        vocabulary=Vocabulary(extension=ContinuedBPE(new_tokens=pieces)) if pieces else None,
        context=longer,
        stages=tuple(stages),
        chat_template=None if chat_template is None else str(chat_template),
        precision=Precision(compute=compute),
        evaluation=Evaluation(sequence_length=min(512, reads))
        if context is None
        else Evaluation(sequence_length=context, batch_size=1),
        samples=Samples(prompts=(sample.first[:40],)),
    )
    if len(new) > 1:
        total_reason += "; of the new domains each has as many, whatever its size"
    reasons = {
        "new pieces": f"{pieces:,}: {pieces_reason}",
        "tokens": f"{total:,}: {total_reason}",
        "replay": f"{share:.0%} of the tokens" + ("" if replay_until is None else f", going to {replay_until:.0%}")
        if replay
        else "none: no --replay was given, expect the old domain to be forgotten (without old text, the base can write some: cpt data generate)",
        "method": f"{method}, after the new rows alone" if len(stages) > 1 else method,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "precision": recipe.precision.compute
        + {
            "bfloat16": "",
            "float16": ": this GPU has no bfloat16",
            "float32": ": this CPU has no instructions for bfloat16",
        }[compute],
    }
    if pieces:
        reasons["new rows"] = (
            f"{alone:g} a step alone, {calmer:g} beside other weights: {ROWS_STEP:.1%} and {CALMER_ROWS_STEP:.1%} of the size of the base's ({sample.row_size:.2g})"
        )
    if context is not None:
        reasons["context"] = (
            f"{context:,} tokens, {context / reads:.3g} times the base's {reads:,}: {rope}, and rows of that length, which teach it where documents have more than {reads:,}"
        )
    recipe = apply_overrides(recipe, overrides)
    trained = recipe.stages[-1]
    reasons["hardware"] += f": {trained.batch_size} rows of {trained.sequence_length} a step"
    if fit is not None:
        recipe, reasons["memory"] = fit(recipe, hf_config)
    return recipe, reasons


def explain(recipe: Recipe, reasons: dict[str, str]) -> str:
    """The choices as lines to print before a run starts."""
    lines = [f"cpt adapt: {recipe.base}"]
    lines += [f"  {name:<12} {reason}" for name, reason in reasons.items()]
    lines += [
        f"  {stage.name:<12} {number_of(stage.steps, 'step')}, learning rate {stage.optimizer.learning_rate:g}, "
        f"tokens: {described(stage.mixture)}"
        for stage in recipe.stages
    ]
    lines.append(
        "  (all of it is saved in config.json; change any of it with --FIELD VALUE, as in --stages.0.tokens 50000)"
    )
    return "\n".join(lines)
