"""The commands and their flags."""

import argparse
from typing import Any

from cpt_jax.cli import handlers
from cpt_jax.cli.arguments import (
    Commands,
    chat_of,
    chat_template_of,
    named_spec,
    on_disk,
    plan_of,
    replay_and_forgetting,
    text_field_of,
    tokenizer_extend_of,
    tokenizer_report_of,
    trackers_of,
    whole_number,
)
from cpt_jax.cli.data import data_generate, data_generate_of, data_prepare, data_prepare_of, data_stats, data_stats_of
from cpt_jax.cli.laws import LAW, law, law_of
from cpt_jax.cli.sweep import HELP, sweep, sweep_of
from cpt_jax.core.stores import location

# Kinds of initial rows (`vocab.init_rows`), named here so that --help imports no JAX.
ROWS = (
    "random",
    "mean",
    "subword-mean",
    "subword-mean-length",
    "subword-mean-first",
    "subword-mean-last",
    "subword-mean-calibrated",
    "focus",
    "wechsel",
    "distilled",
)

# Optimizers (`optim.optimizer.OPTIMIZERS`), named here for the same reason.
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
# Ways to stretch positions (`adapt.POSITIONS`).
ROPES = ("yarn", "theta", "linear")
# How a GGUF file holds matrices (`checkpoint.gguf_write.KINDS`).
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0")


PLAN = "Compiles a recipe's steps for hardware that is not here: memory, collectives, time and cost."


def parser() -> argparse.ArgumentParser:
    parser = Commands(prog="cpt", description="Continued pre-training of language models in JAX.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(parent, name: str, function, help: str, *, overrides: bool = False) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=help, description=help)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        sub.set_defaults(function=function, takes_overrides=overrides, parser=sub)
        return sub

    def group(name: str, help: str):
        return commands.add_parser(name, help=help).add_subparsers(required=True, metavar="COMMAND")

    def json_out(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", type=location, help="also write the figures to this file")

    def machine(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--mesh",
            metavar="AXIS=SIZE,...",
            help="devices along replica, fsdp, expert, context, tensor (default: all along fsdp); may change from run to run",
        )
        sub.add_argument(
            "--distributed",
            action="store_true",
            help="one of several processes, as the cluster says: Cloud TPU, GKE, Slurm, Open MPI",
        )
        sub.add_argument("--coordinator", metavar="HOST:PORT", help="of the first of several processes")
        sub.add_argument("--processes", type=int, metavar="N", help="how many there are")
        sub.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
        sub.add_argument(
            "--profile",
            metavar="START:STOP",
            help="trace these steps of each stage (from 1, without STOP) for XProf, TensorBoard and Perfetto",
        )
        sub.add_argument(
            "--hang-seconds",
            type=float,
            default=1800.0,
            metavar="N",
            help="when no step ends for so long, say where it hangs; after as long again exit with 75 (default 1800; 0: never)",
        )
        sub.add_argument(
            "--shared", type=on_disk, metavar="DIR", help="where the runs of a sweep find what they have in common"
        )
        trackers_of(sub)
        sub.add_argument(
            "--unreadable",
            choices=("stop", "skip"),
            default="stop",
            help="prepared documents that cannot be read: stop and name them, or leave them out and count (default stop)",
        )

    spec: dict[str, Any] = dict(type=named_spec, action="extend", nargs="+", metavar="NAME=SPEC")
    sub = command(
        commands,
        "adapt",
        handlers.adapt,
        "The whole pipeline on your own model and text, without writing a recipe.",
        overrides=True,
    )
    sub.add_argument("--base", required=True, help="a HF directory, a .gguf file or a hub id")
    sub.add_argument("--new", required=True, help="what is to be learnt", **spec)
    sub.add_argument("--replay", default=[], help="what is to be kept, replayed in training", **spec)
    sub.add_argument("--watch", default=[], help="what is measured only", **spec)
    sub.add_argument("--workdir", required=True, type=location, help="a directory, or an address as s3://BUCKET/RUN")
    sub.add_argument(
        "--new-tokens", type=int, help="pieces added to the tokenizer (0: none; default: by how it splits the text)"
    )
    sub.add_argument(
        "--context",
        type=whole_number,
        metavar="N",
        help="tokens that the model is to read, more than the base does",
    )
    sub.add_argument("--rope", choices=ROPES, help="with --context: how positions are stretched (default yarn)")
    sub.add_argument("--method", choices=("lora", "dora", "full", "embeddings", "expand"), default="lora")
    sub.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    sub.add_argument("--anchor", type=float, metavar="WEIGHT", help="of staying near the base's predictions")
    sub.add_argument("--mean-teacher", type=float, metavar="WEIGHT", help="of staying near the moving average's")
    sub.add_argument(
        "--tokens", type=whole_number, metavar="N", help="tokens to train on (default: by the corpus and the hardware)"
    )
    replay_and_forgetting(sub)
    sub.add_argument(
        "--update", action="store_true", help="go on with changed settings; what they do not touch is kept"
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="print the choices and write them to WORKDIR/config.json; run nothing"
    )
    machine(sub)
    text_field_of(sub)
    chat_of(sub)
    chat_template_of(sub)

    sub = command(
        commands, "run", handlers.run, "Runs a recipe; called again, it continues where it stopped.", overrides=True
    )
    sub.add_argument("recipe", help="module:function, a function of configs/, or a saved config.json")
    sub.add_argument(
        "--workdir", type=location, help="a directory, or an address as s3://BUCKET/RUN (default: runs/NAME)"
    )
    sub.add_argument(
        "--update", action="store_true", help="go on with a changed recipe; what it does not touch is kept"
    )
    machine(sub)
    sub.set_defaults(only=None)

    sub = command(
        commands,
        "train",
        handlers.run,
        "Runs a recipe up to the last training stage: no export, no report.",
        overrides=True,
    )
    sub.add_argument("recipe", help="module:function, a function of configs/, or a saved config.json")
    sub.add_argument(
        "--workdir", type=location, help="a directory, or an address as s3://BUCKET/RUN (default: runs/NAME)"
    )
    sub.add_argument(
        "--update", action="store_true", help="go on with a changed recipe; what it does not touch is kept"
    )
    machine(sub)
    sub.set_defaults(only="train")

    sweep_of(command(commands, "sweep", sweep, HELP, overrides=True))
    plan_of(command(commands, "plan", handlers.plan, PLAN, overrides=True))

    tokenizer = group("tokenizer", "extend a tokenizer, and measure it")
    sub = command(
        tokenizer, "extend", handlers.tokenizer_extend, "Adds new pieces; every id of the base keeps its meaning."
    )
    tokenizer_extend_of(sub)
    json_out(sub)
    sub = command(
        tokenizer,
        "report",
        handlers.tokenizer_report,
        "Compares two tokenizers on text, or shows what extending one brings.",
    )
    tokenizer_report_of(sub)
    json_out(sub)

    model = group("model", "import, extend and inspect models")
    sub = command(model, "import-gguf", handlers.model_import_gguf, "A GGUF file as a HF directory (dequantised).")
    sub.add_argument("--gguf", required=True, type=location)
    sub.add_argument("--out", required=True, type=location)
    sub = command(model, "export-gguf", handlers.model_export_gguf, "A model as a GGUF file, for llama.cpp and Ollama.")
    sub.add_argument("--model", required=True, help="a HF directory, a hub id, a PEFT adapter, or a run's directory")
    sub.add_argument("--out", required=True, type=location, metavar="FILE.gguf")
    sub.add_argument("--type", choices=GGUF_KINDS, help="of matrices (default: as in the model's files)")
    sub = command(
        model, "extend", handlers.model_extend, "Grows the embedding (and an untied head) to the tokenizer's size."
    )
    sub.add_argument("--model", required=True)
    sub.add_argument("--tokenizer", required=True, help="its directory, or a hub id")
    sub.add_argument(
        "--init",
        action="extend",
        nargs="+",
        default=[],
        choices=ROWS,
        help="what the new rows start from; with --probe, several",
    )
    sub.add_argument("--corpus", action="extend", nargs="+", default=[], metavar="SPEC", help="text of the new domain")
    sub.add_argument("--vectors", nargs=2, default=[], metavar="VEC", help="wechsel: aligned .vec files, old and new")
    sub.add_argument("--probe", type=int, metavar="STEPS", help="train each kind of rows so long, and take the best")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", required=True, type=location)
    text_field_of(sub)
    json_out(sub)
    sub = command(
        model, "inspect", handlers.model_inspect, "Family, sizes, the table of parameters, and what would train."
    )
    sub.add_argument("--model", required=True)
    methods = ("lora", "dora", "full", "embeddings", "all-embeddings", "expand", "by-path")
    sub.add_argument("--method", choices=methods, help="show what it trains")
    sub.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="whose state is counted")
    sub.add_argument("--rank", type=int, default=16, help="of LoRA (default 16)")
    sub.add_argument(
        "--targets",
        action="extend",
        nargs="+",
        default=[],
        metavar="LINEAR",
        help="of LoRA (default: all); of by-path, patterns of weights",
    )
    sub.add_argument("--new-tokens", type=int, default=0, metavar="N", help="rows that the vocabulary would gain")
    json_out(sub)

    data = group("data", "prepare corpora, and look at them")
    data_prepare_of(command(data, "prepare", data_prepare, "Corpora to sharded, tokenised ArrayRecord."))
    data_stats_of(command(data, "stats", data_stats, "What is in corpora, and what is left out of them."))
    data_generate_of(command(data, "generate", data_generate, "Text that a base writes itself, to be replayed."))

    sub = command(commands, "eval", handlers.evaluate, "Bits per byte by domain, and multiple choice.")
    sub.add_argument("--model", required=True)
    sub.add_argument("--against", help="another model, to show the difference to")
    sub.add_argument("--data", default=[], help="text to predict", **spec)
    sub.add_argument(
        "--choices",
        default=[],
        type=named_spec,
        action="extend",
        nargs="+",
        metavar="NAME=FILE.jsonl",
        help='questions to answer, {"question": ..., "choices": [...], "answer": 0} each',
    )
    sub.add_argument("--max-bytes", type=int, default=100_000, help="text read per domain (default 100,000 bytes)")
    sub.add_argument(
        "--by-position",
        action="store_true",
        help="in rows as long as each model reads, also by where in its document a byte is",
    )
    text_field_of(sub)
    chat_of(sub)
    chat_template_of(sub)
    json_out(sub)

    command(
        commands,
        "lm-eval",
        handlers.lm_eval,
        "The lm_eval harness with our model: --model cpt_jax --model_args pretrained=DIR --tasks ... as lm_eval has it.",
        overrides=True,
    )

    sub = command(commands, "generate", handlers.generate, "Continues prompts: the likeliest tokens, or tokens drawn.")
    sub.add_argument("--model", required=True, help="a HF directory, a .gguf file, a hub id, or a run's directory")
    sub.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    sub.add_argument(
        "--prompts", type=location, metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": ...} on each'
    )
    sub.add_argument("--new-tokens", type=int, default=100, metavar="N", help="at most (default 100)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    sub.add_argument("--top-p", type=float, metavar="SHARE", help="draw from the fewest tokens that have this share")
    sub.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sub.add_argument("--seed", type=int, default=0, help="the same seed draws the same text")
    sub.add_argument("--stop", action="extend", nargs="+", default=[], metavar="STRING", help="end before any of these")
    sub.add_argument("--chat", action="store_true", help="prompts are a user's turns, by the tokenizer's chat template")
    json_out(sub)

    sub = command(commands, "export", handlers.export, "A run's result as a HF model directory, or as a PEFT adapter.")
    sub.add_argument("--run", required=True, type=location)
    sub.add_argument("--out", required=True, type=location)
    unset = "(default: as the recipe says)"
    sub.add_argument("--weights", choices=("ema", "last"), help=unset)
    sub.add_argument(
        "--interpolate-base", type=float, metavar="SHARE", help=f"of the base in every old weight, as WiSE-FT {unset}"
    )
    sub.add_argument("--adapter", action="store_true", default=None, help="a PEFT adapter over the run's base/")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=unset)
    sub.add_argument("--shard-gb", type=float, metavar="GB", help=f"largest weight file {unset}")

    sub = command(commands, "doctor", handlers.doctor, "Verifies a run: what is there is what was written, and agrees.")
    sub.add_argument("run", type=location, help="a run's directory, or its address in a store")
    json_out(sub)

    sub = command(
        commands,
        "report",
        handlers.report,
        "A run's HTML report; of a sweep or of several runs, a page over all of them.",
    )
    sub.add_argument("run", nargs="+", type=location, help="runs' directories, or a sweep's; or addresses of them")
    sub.add_argument("--out", type=location, help="of several (default: report.html of a sweep, else compare.html)")

    law_of(command(commands, "law", law, LAW))
    return parser
