"""The loss of a packed batch: the pre-training loss, with sums by domain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cpt_jax.core.tree import Tree
from cpt_jax.models.cross_entropy import token_losses
from cpt_jax.models.decoder import Network, apply, head_path


def make_loss(network: Network, compute_dtype: Any, trains: Callable[[str], bool], domains: int) -> Callable:
    """`loss(weights, batch) -> (sum of losses, metrics)`: next-token losses over a packed batch.

    A batch holds inputs, targets, positions, segment_ids, domains (int32 [B, S]) and weights (float32 [B, S], 0
    where nothing is to be learnt). Metrics are sums by domain (float32 [domains]): "nats" and "tokens"; nothing is
    averaged here, so that parts of a batch can be added up.
    """
    table = head_path(network.config)
    parts = [f"{table}/base"] + ([f"{table}/new"] if network.config.new_rows else [])
    table_gradients = tuple(trains(part) for part in parts)

    def loss(weights: Tree, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        hidden = apply(
            network, weights, batch["inputs"], batch["positions"], batch["segment_ids"], compute_dtype=compute_dtype
        )
        tables = tuple(weights[table][part.split("/")[1]] for part in parts)
        token_weights = batch["weights"].reshape(-1)
        total, losses = token_losses(
            hidden.reshape(-1, hidden.shape[-1]),
            tables,
            batch["targets"].reshape(-1),
            token_weights,
            compute_dtype,
            table_gradients,
        )
        of_domain = jax.nn.one_hot(batch["domains"].reshape(-1), domains, dtype=jnp.float32)
        weighted = jnp.stack([jax.lax.stop_gradient(losses) * token_weights, token_weights])
        nats, tokens = jnp.matmul(weighted, of_domain, precision="highest")
        return total, {"nats": nats, "tokens": tokens}

    return loss
