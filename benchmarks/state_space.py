"""Forward and backward of Mamba 2's state space, beside transformers' own in torch (the one it takes without mamba-ssm), in
turn; one layer of a model 2,048 wide.

    python -m benchmarks.state_space                                           # rows of 512 and 2,048 tokens
    python -m benchmarks.state_space --heads 128 --lengths 2048 8192           # 4,096 wide, on a GPU

Rows are one document: transformers' keeps no documents apart. Medians of `--repeats`, after one for warming up. Writes
benchmarks/results/state_space-<device>.json.
"""

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks.delta_rule import compared, written
from cpt_jax.models.state_space import state_space


def inputs(batch: int, length: int, heads: int, head_dim: int, state_size: int) -> list[np.ndarray]:
    """q, k, v, log decay of one layer whose heads are one group."""
    generator = np.random.default_rng(0)
    q, k = (generator.normal(size=(batch, length, 1, state_size)) * state_size**-0.5 for _ in range(2))
    v = generator.normal(size=(batch, length, 1, heads, head_dim))
    # Steps that torch may divide by.
    return [x.astype(np.float32) for x in (q, k, v, -0.01 - generator.exponential(0.1, v.shape[:-1]))]


def theirs(arrays: list[np.ndarray]) -> Callable[[], list]:
    import torch
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = [torch.tensor(x, device=device, requires_grad=True) for x in arrays]
    q, k, v, log_decay = leaves
    ones = torch.ones(log_decay.shape[-1], device=device)

    def call() -> list:
        for leaf in leaves:
            leaf.grad = None
        # Values are multiplied by their steps within, and decays are rates times steps.
        steps = -log_decay[:, :, 0]
        mixed = mamba2_chunk_scan(v[:, :, 0] / steps[..., None], steps, -ones, k, q, chunk_size=256)
        mixed.square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return [mixed.detach().reshape(v.shape), *(leaf.grad for leaf in leaves)]

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results = []
    for length in arguments.lengths:
        arrays = inputs(arguments.batch, length, arguments.heads, arguments.head_dim, arguments.state_size)
        results += compared(state_space, theirs(arrays), arrays, length, arguments.repeats)
    written("state_space", arguments, results)


if __name__ == "__main__":
    main()
