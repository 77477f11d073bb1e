"""Weights and gradients of every kind of leaf, and one optimizer of each kind."""

import numpy as np
import optax

from cpt_jax.optim.optimizer import Adafactor, AdamW, Lion, Muon, Optimizer

SHAPES = {
    "embed/base": (12, 6),
    "embed/new": (5, 6),
    "final_norm/scale": (6,),
    "layers/attention/q/bias": (3, 8),
    "layers/attention/q/kernel": (3, 6, 8),
    "layers/attention/q/lora_a": (3, 6, 2),
    "layers/attention/q/lora_b": (3, 2, 8),
    "layers/attention/q/magnitude": (3, 8),
    "layers/attention_norm/scale": (3, 6),
    "layers/experts/gate/kernel": (3, 9, 6, 10),
    "layers/experts/router": (3, 6, 4),
}
SIZE = {path: int(np.prod(shape)) for path, shape in SHAPES.items()}
# Every setting that concerns a group is unlike the others', and no setting is the default, which would hide that it has
# no effect.
GROUPS = dict(
    weight_decay=0.3,
    clip_norm=2.0,
    old_rows_multiplier=0.5,
    new_rows_multiplier=2.0,
    new_rows_epsilon=2e-5,
    lora_b_multiplier=16.0,
)
MULTIPLIERS = {"embed/base": 0.5, "embed/new": 2.0, "layers/attention/q/lora_b": 16.0}
DECAYED = ("layers/attention/q/kernel", "layers/experts/gate/kernel")
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(learning_rate=1e-2, b1=0.8, b2=0.95, epsilon=1e-4, **GROUPS),
    "adafactor": Adafactor(
        learning_rate=1e-2,
        decay_rate=0.7,
        clipping_threshold=0.8,
        min_dim_size_to_factor=4,
        multiply_by_parameter_scale=True,
        **GROUPS,
    ),
    "lion": Lion(learning_rate=1e-2, b1=0.8, b2=0.95, **GROUPS),
    "muon": Muon(
        learning_rate=1e-2,
        beta=0.9,
        newton_schulz_steps=6,
        consistent_rms=0.3,
        adam_b1=0.8,
        adam_b2=0.95,
        adam_epsilon=1e-4,
        **GROUPS,
    ),
}


def schedule(step):
    return 0.01 / (1 + 0.1 * step)


def stepping(optimizer: Optimizer, tree) -> optax.GradientTransformation:
    """What the training step makes of an optimizer: against its directions, by the learning rate."""
    return optax.chain(optimizer.build(tree), optax.scale_by_learning_rate(schedule))


def draw(seed: int, size: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {path: generator.normal(0, size, shape).astype(np.float32) for path, shape in SHAPES.items()}


WEIGHTS = draw(0, 0.5)
# The tenth step's gradient is large enough to be clipped.
GRADIENTS = [draw(seed, 3.0 if seed == 10 else 0.01) for seed in range(1, 11)]
