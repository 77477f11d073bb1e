"""Directories of runs as a sweep leaves them, with made-up results that follow a known law."""

import json
import math
import random
from pathlib import Path

BASE = {"zh": 2.2, "en": 1.2}


def losses(share: float, tokens: float = 1e6) -> dict[str, float]:
    """What a run with this share of replay ends with."""
    return {
        "zh": 1.2 + 0.3 * (1 - share + 0.01) ** -0.5 * (tokens / 1e6) ** -0.2,
        "en": 1.1 + 0.06 * (share + 0.01) ** -0.3 * (tokens / 1e6) ** 0.1,
    }


def write_run(
    path: Path,
    share: float,
    seed: int = 0,
    *,
    tokens: int = 1_000_000,
    rate: float = 1e-3,
    noise: float = 0.0,
    watch: bool = False,
) -> None:
    """One run's config.json, eval.json and metrics."""
    mixture = {"zh": 1 - share, "en": share} if share else {"zh": 1.0}
    domains = [
        {"corpus": {"name": name, "spec": f"{name}.jsonl"}, "role": role}
        for name, role in (("zh", "new"), ("en", "replay"))
    ]
    stage = {
        "name": "lora",
        "tokens": tokens,
        "batch_size": 10,
        "sequence_length": 1000,
        "mixture": mixture,
        "optimizer": {"kind": "AdamW", "learning_rate": rate},
    }
    config = {"kind": "Recipe", "name": path.name, "base": "tiny", "seed": seed, "domains": domains, "stages": [stage]}
    chance = random.Random(f"{share} {seed} {rate} {tokens}")
    final = {name: value * math.exp(chance.gauss(0, noise)) for name, value in losses(share, tokens).items()}
    entries = [
        {"stage": stage, "weights": "last", "domain": name, "bits_per_byte": values[name], "bytes": 1000}
        for stage, values in (("base", BASE), ("lora", final))
        for name in BASE
    ]
    directory = path / "stages" / "1-lora"
    directory.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "eval.json").write_text(json.dumps(entries))
    steps = range(1, 41)
    way = {step: 1 - math.exp(-step / 10) for step in steps}
    between = {step: {name: BASE[name] + way[step] * (final[name] - BASE[name]) for name in BASE} for step in steps}
    lines = [
        # A step that was skipped.
        {
            "step": step,
            "tokens": tokens // 40,
            **{f"nats/{name}": None if step == 7 else 2 * between[step][name] for name in mixture},
        }
        for step in steps
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if watch:
        seen = [
            {"step": step, "tokens": step * tokens // 40, "bits_per_byte": between[step]}
            for step in steps
            if step % 5 == 0
        ]
        (directory / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seen))


def changed_stage(run, **changes):
    config = json.loads((run / "config.json").read_text())
    config["stages"][0] |= changes
    (run / "config.json").write_text(json.dumps(config))
