"""The loss of a packed batch: the pre-training loss, what holds the model to what it knew, and sums by domain."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpt_jax.core.tree import Tree
from cpt_jax.models.cross_entropy import TableUse, Teacher, token_losses
from cpt_jax.models.decoder import Network, apply, apply_with_balance, head_path
from cpt_jax.training.retention import (
    Anchor,
    Held,
    L2ToStart,
    MeanTeacher,
    Retention,
    distance_to_start,
    teacher_of,
    teacher_weights,
)

Batch = dict[str, Array]


def make_loss(
    network: Network,
    compute_dtype: Any,
    trains: Callable[[str], bool],
    names: Sequence[str],
    *,
    retention: Sequence[Retention] = (),
    z_loss: float = 0.0,
) -> Callable[..., tuple[Float[Array, ""], dict[str, Array]]]:
    """`loss(weights, batch, key, held) -> (sum of losses, metrics)`: next-token losses over a packed batch.

    A batch holds inputs, targets, positions, segment_ids, domains (int32 [B, S], indices of `names`) and weights
    (float32 [B, S], 0 where nothing is to be learnt). Metrics are sums by domain (float32 [domains]): "nats", "tokens"
    (that are learnt), "positions" (that are no padding) and, with a teacher, "divergence"; nothing is averaged here, so
    that parts of a batch can be added up. The experts' load-balancing loss, `z_loss` and `retention` are in the sum; the
    first is a product of means over the batch that is given, so that those of parts do not add up to that of the whole.

    What adapters drop follows from the key; without one they drop nothing. `held` is what `retention` needs.
    """
    table, rows, config = head_path(network.config), network.config.table_rows, network.config
    uses = tuple(TableUse(count, trains(f"{table}/{part}")) for part, count in rows.items())
    drops = network.lora is not None and network.lora.dropout > 0
    taught = next((part for part in retention if isinstance(part, MeanTeacher | Anchor)), None)
    drawn = next((part for part in retention if isinstance(part, L2ToStart)), None)

    def teacher(weights: Tree, batch: Batch, held: Held) -> Teacher | None:
        if taught is None:
            return None
        wise, wise_weights = teacher_of(taught, network, weights, held)
        hidden = apply(
            wise, wise_weights, batch["inputs"], batch["positions"], batch["segment_ids"], compute_dtype=compute_dtype
        )
        parts = ("base",) if isinstance(taught, Anchor) else tuple(rows)
        each = teacher_weights(taught, batch["weights"], batch["domains"], names, held.teacher_weight)
        tables = tuple(wise_weights[table][part] for part in parts)
        return Teacher(hidden, tables, each)

    def loss(weights: Tree, batch: Batch, key: Array | None = None, held: Held | None = None):
        segment_ids = batch["segment_ids"]
        real = (segment_ids > 0).astype(jnp.float32)
        hidden, balance = apply_with_balance(
            network,
            weights,
            batch["inputs"],
            batch["positions"],
            segment_ids,
            real,
            compute_dtype=compute_dtype,
            dropout_key=key if drops else None,
        )
        token_weights = batch["weights"]
        losses = token_losses(
            hidden,
            tuple(weights[table][part] for part in rows),
            batch["targets"],
            token_weights,
            compute_dtype,
            uses,
            config.logit_softcap,
            z_loss=z_loss,
            teacher=None if held is None else teacher(weights, batch, held),
        )
        total = losses.total
        # The total is divided by the tokens' number; these are no sums over tokens.
        if config.experts is not None:
            total += config.experts.balance_coefficient * balance * token_weights.sum()
        if drawn is not None and held is not None:
            total += distance_to_start(drawn, weights, held.start) * token_weights.sum()
        of_token = {"nats": losses.nats * token_weights, "tokens": token_weights, "positions": real}
        if taught is not None:
            of_token["divergence"] = losses.divergence * token_weights
        of_domain = jax.nn.one_hot(batch["domains"], len(names), dtype=jnp.float32)
        stacked = jax.lax.stop_gradient(jnp.stack(list(of_token.values())))
        sums = jnp.einsum("kbs,bsd->kd", stacked, of_domain, precision="highest")
        return total, dict(zip(of_token, sums, strict=True))

    return loss
