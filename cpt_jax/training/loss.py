"""The loss of a packed batch: the pre-training loss, with sums by domain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cpt_jax.core.tree import Tree
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import Network, apply_with_balance, head_path


def make_loss(network: Network, compute_dtype: Any, trains: Callable[[str], bool], domains: int) -> Callable:
    """`loss(weights, batch) -> (sum of losses, metrics)`: next-token losses over a packed batch.

    A batch holds inputs, targets, positions, segment_ids, domains (int32 [B, S]) and weights (float32 [B, S], 0
    where nothing is to be learnt). Metrics are sums by domain (float32 [domains]): "nats" and "tokens"; nothing is
    averaged here, so that parts of a batch can be added up. A mixture of experts' load-balancing loss is in the sum.
    """
    table = head_path(network.config)
    rows = network.config.table_rows
    uses = tuple(TableUse(count, trains(f"{table}/{part}")) for part, count in rows.items())

    def loss(weights: Tree, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        segment_ids = batch["segment_ids"]
        hidden, balance = apply_with_balance(
            network,
            weights,
            batch["inputs"],
            batch["positions"],
            segment_ids,
            (segment_ids > 0).astype(jnp.float32),
            compute_dtype=compute_dtype,
        )
        tables = tuple(weights[table][part] for part in rows)
        token_weights = batch["weights"].reshape(-1)
        total, losses, _ = token_losses(
            hidden.reshape(-1, hidden.shape[-1]),
            tables,
            batch["targets"].reshape(-1),
            token_weights,
            compute_dtype,
            uses,
            network.config.logit_softcap,
        )
        of_domain = jax.nn.one_hot(batch["domains"].reshape(-1), domains, dtype=jnp.float32)
        weighted = jnp.stack([jax.lax.stop_gradient(losses) * token_weights, token_weights])
        nats, tokens = jnp.matmul(weighted, of_domain, precision="highest")
        if (experts := network.config.experts) is not None:
            # The total is divided by the tokens' number; the balance is a mean already.
            total += experts.balance_coefficient * balance * token_weights.sum()
        return total, {"nats": nats, "tokens": tokens}

    return loss
