"""One run by several processes: how they find each other, who does what only one may do, and who waits."""

import dataclasses
import itertools
import json
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import hide_progress

# A station that one process does alone (a tokenizer, a corpus) may take hours.
WAIT_SECONDS = 24 * 3600
_questions = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others: by what the cluster says (Cloud TPU, GKE, Slurm, Open MPI, ...), or by the
    address of the first one, how many there are, and which this is.

    Raises:
      UserError: an address without the other two, or the other way round.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        given = (self.coordinator, self.count, self.index)
        if any(each is None for each in given) and any(each is not None for each in given):
            raise UserError(
                "several processes: give --coordinator, --processes and --process together, or none of them"
            )
        if self.index is not None and self.count is not None and not 0 <= self.index < self.count:
            raise UserError(f"--process is {self.index}: give 0 to {self.count - 1} for --processes {self.count}")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator {self.coordinator!r} has no port: give HOST:PORT")

    def start(self) -> None:
        """Returns when all processes are there. To be called before anything of JAX runs.

        Raises:
          UserError: no cluster says how many there are.
        """
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(self.coordinator, self.count, self.index)
        except ValueError as error:
            raise UserError(
                f"--distributed: nothing here says who the other processes are ({error}): start it in a cluster, or give --coordinator HOST:PORT --processes N --process I"
            ) from error
        if not is_first():
            hide_progress()


def count() -> int:
    import jax

    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that does what only one may do."""
    import jax

    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    if count() > 1:
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(name, timeout=WAIT_SECONDS)


def told(value: Any) -> Any:
    """The first process's value (of JSON). All are to ask the same in the same order. No device takes part: the first one
    may have hours of work behind the others' question."""
    if count() == 1:
        return value
    from orbax.checkpoint import multihost

    client, key = multihost.get_jax_distributed_client(), f"cpt_jax/told/{next(_questions)}"
    if is_first():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, WAIT_SECONDS * 1000))
