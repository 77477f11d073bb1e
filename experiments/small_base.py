"""A small base of our own, for experiments that ask what a model forgets: 12.8M parameters, English only.

A released model's training data is not known, and what it forgets can only be guessed at. This one is pre-trained by `cpt run`'s own program on
`english.jsonl` (`experiments.small_base_inputs`), so that replay is replay of what it was trained on, and Chinese and code are new to it but for what
documentation has of them.

`python -m experiments.small_base` makes `.cache/small-base/base` (40M tokens, some four epochs). The experiments that begin from it take `adapted`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from cpt_jax.adapt import Full
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import quiet_libraries
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.recipe import Domain, Evaluation, Recipe, Stage
from experiments.small_base_inputs import DIRECTORY

BASE = DIRECTORY / "base"
VOCABULARY = 8192
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEQUENCE = 512
HELDOUT = Holdout(share=0.05, max_bytes=60_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long the base is pre-trained, and how long it is adapted. Steps of 8,192 tokens in adaptation: with fewer,
    larger ones too few are left."""

    pretraining_tokens: int = 40_000_000
    pretraining_rows: int = 64
    learning_rate: float = 3e-3
    tokens: int = 2_000_000
    rows: int = 16


BUDGET = Budget()
EVALUATION = Evaluation(sequence_length=SEQUENCE, batch_size=32)


def domain(name: str, role: Any) -> Domain:
    """`english`, `chinese` or `code`, 5% of it held out (a law's articles together)."""
    path = DIRECTORY / f"{name}.jsonl"
    if not path.exists():
        raise UserError(f"{path} is not there: run `python -m experiments.small_base_inputs`")
    group = "law" if name == "chinese" else None
    return Domain(corpus=Corpus(name=name, spec=str(path), group_field=group), role=role, heldout=HELDOUT)


def pretraining() -> Recipe:
    """From random numbers to a base that knows English: `cpt run experiments.small_base:pretraining`."""
    stage = Stage(
        name="pretraining",
        method=Full(),
        mixture={"english": 1.0},
        tokens=BUDGET.pretraining_tokens,
        batch_size=BUDGET.pretraining_rows,
        sequence_length=SEQUENCE,
        optimizer=AdamW(learning_rate=BUDGET.learning_rate, weight_decay=0.1),
        schedule=Cosine(warmup=0.02, final=0.1),
    )
    return Recipe(
        name="small-base",
        base=str(DIRECTORY / "random"),
        domains=(domain("english", "new"), domain("chinese", "watch"), domain("code", "watch")),
        stages=(stage,),
        evaluation=EVALUATION,
        layer_loop="scan",
    )


def adapted(
    name: str,
    new: str,
    replay: float,
    *,
    seed: int = 0,
    learning_rate: float = 1e-3,
    tokens: int | None = None,
    method: Any = None,
    **settings: Any,
) -> Recipe:
    """The base continued on a new domain, everything training, `replay` of the tokens English; `settings` are the
    stage's."""
    if not (BASE / "config.json").exists():
        raise UserError(f"{BASE} is not there: run `python -m experiments.small_base`")
    given: dict[str, Any] = {"schedule": Cosine(warmup=0.05, final=0.1), "ema": EMA(decay=0.99)} | settings
    stage = Stage(
        name="adapt",
        method=method or Full(),
        mixture={new: 1 - replay, "english": replay} if replay else {new: 1.0},
        tokens=tokens or BUDGET.tokens,
        batch_size=BUDGET.rows,
        sequence_length=SEQUENCE,
        optimizer=AdamW(learning_rate=learning_rate),
        **given,
    )
    return Recipe(
        name=name,
        base=str(BASE),
        domains=(domain(new, "new"), domain("english", "replay")),
        stages=(stage,),
        evaluation=EVALUATION,
        layer_loop="scan",
        seed=seed,
    )


def write_random(directory: Path) -> None:
    """The shape with random numbers, and a byte-level BPE tokenizer learned from English outside its held-out part."""
    import jax
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from cpt_jax.checkpoint.hf_write import save
    from cpt_jax.core.storage import atomic_directory, write_json_atomic
    from cpt_jax.data.sources import SkipCounts, read
    from cpt_jax.models.decoder import abstract_decoder, initial_weights
    from cpt_jax.models.families import family_for

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = read(domain("english", "new").corpus, SkipCounts())
    tokenizer.train_from_iterator((d.text for d in documents if not HELDOUT.holds_out(d)), trainer)
    config = family_for(CONFIG).config_from_hf(CONFIG)
    weights = initial_weights(abstract_decoder(config), jax.random.key(0))
    with atomic_directory(directory.with_suffix(".tokenizer")) as out:
        tokenizer.save(str(out / "tokenizer.json"))
        end = "<|endoftext|>"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
        write_json_atomic(out / "tokenizer_config.json", settings)
    save(directory, config, weights, CONFIG, directory.with_suffix(".tokenizer"))


def main() -> None:
    from cpt_jax.recipe.copies import link_directory
    from cpt_jax.recipe.run import run

    quiet_libraries()
    if (BASE / "config.json").exists():
        return
    if not (DIRECTORY / "random" / "config.json").exists():
        write_random(DIRECTORY / "random")
    run(pretraining(), Path("runs/small-base"))
    link_directory(Path("runs/small-base/export"), BASE)


if __name__ == "__main__":
    main()
