"""Training steps beside the transformers Trainer with PEFT: same model, same batches, same precision, in turn on one machine.

    python -m benchmarks.train_step                                    # CPU: SmolLM2 and a 30M shape, 2 x 256 tokens, 11 minutes
    python -m benchmarks.train_step --model smollm2 1b --sequence 2048 8192 --tokens 16384 --documents 8 --compute bfloat16   # a GPU

Prints a Markdown table and writes benchmarks/results/train_step-DEVICE.json, whose other rows of the same machine and versions stay. Each figure comes from a process of its own. Seconds are those of `--steps`
steps after three, waited for at the end; to first step: from the weights' reading to the first step's end, imports apart; memory: what the process had at most
on a CPU, what the allocator gave at most on a GPU. MFU: model FLOPs (causal attention halved, no gradient of frozen weights: cpt_jax/training/flops.py) over the device's peak;
on a CPU over the bfloat16 product of 4,096 x 4,096 that was measured beside it. A row of `--sequence` tokens is packed of `--documents`; torch is given their positions.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shapes import MODELS, model_directory, peak_resident
from cpt_jax.core import huge_pages
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic

METHODS = ("full", "lora", "embeddings")
OURS, WARM_UP = "cpt_jax", 3
# transformers Trainer; on a GPU also compiled, with Liger's kernels, and with the attentions that know documents.
THEIRS = ("torch", "torch compiled", "torch compiled, flex attention", "torch Liger, flex attention")
if importlib.util.find_spec("flash_attn") is not None:
    THEIRS += ("torch compiled, flash attention", "torch Liger, flash attention")
ATTENTIONS = {"flash": "flash_attention_2", "flex": "flex_attention"}


def rows(arguments: argparse.Namespace, vocabulary: int) -> list[dict[str, np.ndarray]]:
    """Batches of packed documents of random tokens."""
    batch, length, generator = arguments.batch, arguments.length, np.random.default_rng(0)
    place = np.arange(length, dtype=np.int32) * arguments.documents // length
    starts = np.searchsorted(place, place)
    found = []
    for _ in range(4):
        tokens = generator.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
        # The last token of a document has nothing to predict.
        weights = np.append(place[1:] == place[:-1], True).astype(np.float32)
        every = {
            "positions": np.arange(length) - starts,
            "segment_ids": place + 1,
            "domains": 0 * place,
            "weights": weights,
        }
        batches = {name: np.tile(row, (batch, 1)).astype(row.dtype) for name, row in every.items()}
        batches["positions"] = batches["positions"].astype(np.int32)
        found.append({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **batches})
    return found


def our_run(arguments: argparse.Namespace) -> dict:
    import jax

    from cpt_jax.adapt import Embeddings, Full, LoRA
    from cpt_jax.core.precision import Precision
    from cpt_jax.core.tree import flatten
    from cpt_jax.data.packing import documents_in_a_row
    from cpt_jax.optim.optimizer import AdamW
    from cpt_jax.recipe.model import load_model
    from cpt_jax.sharding.mesh import make_mesh
    from cpt_jax.training.program import Settings
    from cpt_jax.training.step import Controls
    from cpt_jax.training.training import place_weights

    precision = Precision(compute=arguments.compute)
    method = {"full": Full(), "lora": LoRA(rank=16, alpha=32), "embeddings": Embeddings(rows="all")}[arguments.method]
    started = time.perf_counter()
    model = load_model(model_directory(arguments.model)).adapted(method, 0).for_training(jax.default_backend())
    documents = documents_in_a_row(arguments.length, arguments.documents / arguments.length)
    model = model.attending("auto", arguments.length, precision.dtype, documents)
    mesh = make_mesh(jax.devices()[:1])
    program = Settings(
        network=model.network,
        trains=frozenset(path for path in flatten(model.weights) if method.trains(path)),
        names=("text",),
        optimizer=AdamW(learning_rate=1e-5),
        compute=arguments.compute,
        mesh=mesh,
    ).program()
    trainable, frozen = place_weights(model.weights, method.trains, precision, program.where)
    state = program.begin(trainable)
    del trainable
    batches, controls = rows(arguments, model.config.vocab_size), Controls(np.float32(1e-5))
    with jax.set_mesh(mesh):
        state, metrics = program.step(state, frozen, {}, batches[0], controls)
        jax.block_until_ready(state)
        first = time.perf_counter() - started
        for number in range(1, WARM_UP):
            state, metrics = program.step(state, frozen, {}, batches[number % 4], controls)
        jax.block_until_ready(state)
        started = time.perf_counter()
        for number in range(arguments.steps):
            state, metrics = program.step(state, frozen, {}, batches[number % 4], controls)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - started) / arguments.steps
    statistics = jax.devices()[0].memory_stats()
    peak = peak_resident() if statistics is None else statistics["peak_bytes_in_use"]
    return {"seconds": seconds, "to_first_step": first, "peak_bytes": peak, "loss": float(metrics["loss"])}


def torch_run(arguments: argparse.Namespace) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    gpu = torch.cuda.is_available()
    started = time.perf_counter()
    attention = next((name for word, name in ATTENTIONS.items() if word in arguments.program), "sdpa")
    model = AutoModelForCausalLM.from_pretrained(
        model_directory(arguments.model), dtype=torch.float32, attn_implementation=attention
    )
    if arguments.method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    elif arguments.method == "embeddings":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    examples = []
    for batch in rows(arguments, model.config.vocab_size):
        for index in range(arguments.batch):
            ids = torch.from_numpy(batch["inputs"][index]).long()
            example = {"input_ids": ids, "labels": ids}
            if arguments.documents > 1:
                example["position_ids"] = torch.from_numpy(batch["positions"][index]).long()
            examples.append(example)
    times: list[float] = []
    wanted = WARM_UP + arguments.steps

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            # Only where a time is read: a wait in every step would hold the GPU up.
            if gpu and len(times) + 1 in (1, WARM_UP, wanted):
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory,
            per_device_train_batch_size=arguments.batch,
            max_steps=wanted,
            learning_rate=1e-5,
            bf16=arguments.compute == "bfloat16",
            fp16=arguments.compute == "float16",
            use_cpu=not gpu,
            torch_compile="compiled" in arguments.program,
            use_liger_kernel="Liger" in arguments.program,
            optim="adamw_torch_fused" if gpu else "adamw_torch",
            logging_steps=wanted,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=examples * (wanted // 4 + 1), callbacks=[Clock()])
        result = trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else peak_resident()
    return {
        "seconds": (times[-1] - times[WARM_UP - 1]) / arguments.steps,
        "to_first_step": times[0] - started,
        "peak_bytes": peak,
        "loss": result.training_loss,
    }


def flops_of(model: str, method: str, length: int) -> float:
    """Model FLOPs a token."""
    from cpt_jax.adapt import Embeddings, Full, LoRA
    from cpt_jax.checkpoint.hf import read_config
    from cpt_jax.models.decoder import abstract_decoder
    from cpt_jax.models.families import family_for
    from cpt_jax.training.flops import token_flops

    kind = {"full": Full(), "lora": LoRA(rank=16, alpha=32), "embeddings": Embeddings(rows="all")}[method]
    hf_config = read_config(model_directory(model))
    network = abstract_decoder(family_for(hf_config).config_from_hf(hf_config), kind.lora_config())
    return token_flops(network, kind.trains, length).total


def peak_here() -> tuple[str, float]:
    """(device, FLOP/s): of its data sheet, in the type that is fastest there, or of a large bfloat16 product that is
    measured now."""
    import jax
    import jax.numpy as jnp

    from cpt_jax.sharding.hardware import fastest_type, peak_flops

    kind = jax.devices()[0].device_kind
    if (known := peak_flops(kind, fastest_type())) is not None:
        return kind, known
    matrix = jnp.ones((4096, 4096), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return kind, 2 * 4096**3 / min(seconds)


def child(arguments: list[str]) -> dict | str:
    """What one measurement printed, or why it failed."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--one", *arguments]
    # One pool, as JAX has by itself: in regions that grow as needed, 1B in full did not find 28 GB in one piece of an H100's 80.
    pool = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    # As `cpt` has it; torch has the same.
    pages = huge_pages.environment()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | pool | pages)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
    return json.loads(lines[-1])


def table(results: list[dict]) -> str:
    header = [
        "model",
        "tokens",
        "precision",
        "method",
        "program",
        "tokens/s",
        "MFU",
        "GB",
        "first step s",
        "over torch",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    key = ("model", "sequence", "documents", "compute", "method")
    for result in results:
        shown = [result["model"], f"{result['batch']} x {result['sequence']}", result["compute"], result["method"]]
        shown.append(result["program"])
        if "error" in result:
            lines.append("| " + " | ".join([*shown, result["error"], "", "", "", ""]) + " |")
            continue
        rivals = [
            other["tokens_per_second"]
            for other in results
            if all(other[name] == result[name] for name in key) and other["program"] != OURS and "error" not in other
        ]
        ratio = f"{result['tokens_per_second'] / max(rivals):.2f}" if rivals else ""
        shown += [f"{result['tokens_per_second']:,.0f}", f"{result['mfu']:.1%}", f"{result['peak_bytes'] / 1e9:.2f}"]
        lines.append("| " + " | ".join([*shown, f"{result['to_first_step']:.1f}", ratio]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["smollm2", "30m"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    choices = ("float32", "bfloat16", "float16")
    parser.add_argument("--compute", nargs="+", choices=choices, default=["float32", "bfloat16"])
    parser.add_argument("--sequence", nargs="+", type=int, default=[256])
    parser.add_argument("--tokens", type=int, default=512, help="in a batch")
    parser.add_argument("--documents", type=int, default=1, help="packed into a row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--programs", nargs="+", help="default: ours, and torch's that the machine can run")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.one:
        for name in ("model", "method", "compute"):
            setattr(arguments, name, getattr(arguments, name)[0])
        arguments.length, arguments.program = arguments.sequence[0], arguments.programs[0]
        arguments.batch = arguments.tokens // arguments.length
        print(json.dumps(our_run(arguments) if arguments.program == OURS else torch_run(arguments)))
        return
    # What measures has the GPU's memory for itself: this process leaves it alone.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    device, peak = peak_here()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "peft")}
    command = "python -m benchmarks.train_step " + shlex.join(sys.argv[1:])
    machine = {"device": device, "peak_flops": peak, "cores": os.cpu_count(), "python": platform.python_version()}
    machine |= versions
    out = Path("benchmarks/results") / f"train_step-{device.replace(' ', '-')}.json"
    programs = arguments.programs or (OURS, *(THEIRS if "cpu" not in device.lower() else THEIRS[:1]))
    # What the same machine measured before stays, but for what is measured again.
    before = json.loads(out.read_text()) if out.exists() else {}
    # The peak of a CPU is measured, and another each time.
    held = before.get("machine", {})
    # Of a CPU it is measured, and two CPUs differ in little else.
    same = 0.8 < held.get("peak_flops", 0) / peak < 1.25 and {**held, "peak_flops": peak} == machine
    results = before["results"] if same else []
    measured = []
    for model in arguments.model:
        for length in arguments.sequence:
            for compute in arguments.compute:
                for method in arguments.method:
                    for program in programs:
                        fixed = [
                            "--tokens",
                            arguments.tokens,
                            "--documents",
                            arguments.documents,
                            "--steps",
                            arguments.steps,
                        ]
                        case = {"model": model, "method": method, "compute": compute, "sequence": length}
                        flags = [str(word) for name, value in case.items() for word in (f"--{name}", value)]
                        found = child([*flags, "--programs", program, *map(str, fixed)])
                        result = {**case, "program": program, "batch": arguments.tokens // length}
                        result["documents"] = arguments.documents
                        results = [row for row in results if not result.items() <= row.items()]
                        result["command"] = command
                        if isinstance(found, str):
                            result["error"] = found
                        else:
                            rate = arguments.tokens / found["seconds"]
                            mfu = rate * flops_of(model, method, length) / peak
                            result |= {"tokens_per_second": rate, "mfu": mfu, **found}
                        results.append(result)
                        measured.append(result)
                        say(table(measured[-1:]).splitlines()[-1])
                        write_json_atomic(out, {"machine": machine, "results": results})
    print(table(measured))
    say(str(out))


if __name__ == "__main__":
    main()
