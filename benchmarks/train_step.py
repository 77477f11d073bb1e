"""Tokens per second of a training step on SmolLM2-135M: ours, and transformers with PEFT on torch, same batch, one
after the other.

    python -m benchmarks.train_step                        # CPU: 2 x 256 tokens
    python -m benchmarks.train_step --batch 16 --sequence 2048 --unroll 0     # an accelerator

Writes benchmarks/results/train_step-<device>.json. Each figure is the median of the steps after two for warming up.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

MODEL = Path(".cache/models/SmolLM2-135M-Instruct.Q4_1")
GGUF = Path(".cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf")
METHODS = ("full", "lora", "embeddings")


def our_step(method: str, compute: str, batch: int, sequence: int, unroll: bool, steps: int) -> dict:
    import jax
    import jax.numpy as jnp

    from cpt_jax.adapt import Embeddings, Full, LoRA
    from cpt_jax.core.precision import Precision
    from cpt_jax.core.tree import flatten, partition, unflatten
    from cpt_jax.optim.optimizer import AdamW
    from cpt_jax.recipe.model import load_model
    from cpt_jax.training.loss import make_loss
    from cpt_jax.training.state import initial_state
    from cpt_jax.training.step import make_train_step

    precision = Precision(compute=compute)
    kind = {"full": Full(), "lora": LoRA(rank=16, alpha=32), "embeddings": Embeddings(rows="all")}[method]
    model = load_model(MODEL).adapted(kind, 0).unrolled(unroll)
    trainable, frozen = partition(model.weights, kind.trains)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trainable)
    frozen = unflatten(
        {path: jnp.asarray(leaf).astype(precision.dtype_of(path)) for path, leaf in flatten(frozen).items()}
    )
    optimizer = AdamW(learning_rate=1e-5).build(lambda step: 1e-5, trainable)
    loss = make_loss(model.network, precision.dtype, kind.trains, ("text",))
    step = jax.jit(make_train_step(loss, optimizer, lambda step: 1e-5, None), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, 49152, (batch, sequence + 1)).astype(np.int32)
    ones = np.ones((batch, sequence), np.int32)
    rows = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(sequence, dtype=np.int32), (batch, 1)),
        "segment_ids": ones,
        "domains": 0 * ones,
        "weights": ones.astype(np.float32),
    }
    state = initial_state(trainable, optimizer, False)
    started = time.perf_counter()
    compiled = step.lower(state, frozen, {}, rows).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, {}, rows)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {
        "seconds": statistics.median(seconds[2:]),
        "compile_seconds": compile_seconds,
        "temporaries_mib": temporaries / 2**20,
    }


def torch_step(method: str, compute: str, batch: int, sequence: int, steps: int) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    if method == "lora":
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=linears))
    elif method == "embeddings":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 49152, (batch, sequence)), device=device)
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=compute == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[2:])}


def main() -> None:
    import jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--compute", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--without-torch", action="store_true")
    arguments = parser.parse_args()
    if not (MODEL / "config.json").exists():
        from cpt_jax.checkpoint.gguf import import_gguf

        import_gguf(GGUF, MODEL)
    size = (arguments.batch, arguments.sequence)
    results = []
    for compute in arguments.compute:
        for method in METHODS:
            runs = {"cpt_jax": our_step(method, compute, *size, bool(arguments.unroll), arguments.steps)}
            if not arguments.without_torch:
                runs["transformers + PEFT"] = torch_step(method, compute, *size, arguments.steps)
            for name, run in runs.items():
                rate = arguments.batch * arguments.sequence / run["seconds"]
                results.append(
                    {"program": name, "method": method, "compute": compute, "tokens_per_second": rate, **run}
                )
                print(f"{name:<22}{compute:<10}{method:<12}{rate:>9,.0f} tokens/s", flush=True)
    device = jax.devices()[0].device_kind
    out = Path("benchmarks/results") / f"train_step-{device.replace(' ', '-')}.json"
    out.parent.mkdir(exist_ok=True)
    machine = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    out.write_text(json.dumps({"machine": machine, "arguments": vars(arguments), "results": results}, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
