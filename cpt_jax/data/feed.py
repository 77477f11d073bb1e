"""The batches of several loaders, made ahead: in a thread, or by processes where one core is too slow."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from cpt_jax.core.errors import UserError
from cpt_jax.data.loader import Batch, Loader

# A loader makes some millions of tokens a second on one core; fewer than so many need no other processes.
FEW_LOADERS = 4


class Made(NamedTuple):
    """A loader's batch and its state behind it, or what kept it from making one."""

    batch: Batch
    state: dict
    unreadable: dict[str, int]
    epochs: dict[str, float]
    error: Exception | None = None


class Feed:
    """What several loaders make, a round at a time, the next one while this one is used.

    Loaders that are made alike and stand alike are one: runs that differ only in their learning rates read once.

    Args:
      makers: of loaders; made again in another process, so they must be picklable (`functools.partial(Loader, ...)`).
      states: where each continues; None: from its beginning.
      use: of a round, one `Made` a loader, what `next` is to give; called in the thread that makes ahead.
      processes: how many to make batches in; None: as many as are of use.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], Loader]],
        states: Sequence[dict | None],
        use: Callable[[list[Made]], Any],
        processes: int | None = None,
    ) -> None:
        self._place, distinct = _distinct(makers, states)
        self._use = use
        # One core is left to the program.
        count = processes_of_use(len(distinct)) if processes is None else processes
        shares = [distinct[start::count] for start in range(count)] if count else [distinct]
        # The order in which the shares give them.
        self._order = [number for start in range(max(count, 1)) for number in range(start, len(distinct), count or 1)]
        self._sources: list[_Here | _Elsewhere] = [(_Elsewhere if count else _Here)(share) for share in shares if share]
        self._pool = ThreadPoolExecutor(1, "feed")
        self._coming: Future = self._pool.submit(self._round)

    def __next__(self) -> Any:
        ready = self._coming.result()
        self._coming = self._pool.submit(self._round)
        return ready

    def __iter__(self) -> Iterator[Any]:
        return self

    def _round(self) -> Any:
        made = [each for source in self._sources for each in source.round()]
        by_number = dict(zip(self._order, made, strict=True))
        return self._use([by_number[number] for number in self._place])

    def close(self) -> None:
        # Their pipes first: the thread may wait for one.
        for source in self._sources:
            source.close()
        self._pool.shutdown(cancel_futures=True)


def processes_of_use(loaders: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(loaders, cores - 2) if loaders >= FEW_LOADERS and cores > 3 else 0


def _distinct(makers: Sequence[Callable], states: Sequence[dict | None]) -> tuple[list[int], list[tuple]]:
    """(for each loader, which of the different ones it is; these)."""
    place, distinct, known = [], [], []
    for make, state in zip(makers, states, strict=True):
        parts = (getattr(make, "func", make), getattr(make, "args", ()), getattr(make, "keywords", {}), state)
        if parts not in known:
            known.append(parts)
            distinct.append((make, state))
        place.append(known.index(parts))
    return place, distinct


class _Here:
    """Loaders in this process."""

    def __init__(self, share: Sequence[tuple]) -> None:
        self._loaders = []
        for make, state in share:
            self._loaders.append(loader := make())
            if state is not None:
                loader.restore(state)
        self._failed: dict[int, Exception] = {}

    def round(self) -> list[Made]:
        return [self._made(index, loader) for index, loader in enumerate(self._loaders)]

    def _made(self, index: int, loader: Loader) -> Made:
        if index not in self._failed:
            try:
                return Made(next(loader), loader.state(), loader.unreadable(), loader.epochs())
            # Whatever it is, it is one run's.
            except Exception as error:
                self._failed[index] = error
        return Made({}, {}, {}, {}, self._failed[index])

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


class _Elsewhere:
    """Loaders in a process of their own, which is a round ahead."""

    def __init__(self, share: Sequence[tuple]) -> None:
        # Not forked: JAX has threads.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(share)), daemon=True)
        self._process.start()
        theirs.close()

    def round(self) -> list[Made]:
        try:
            made = self._connection.recv()
        except EOFError as error:
            raise UserError(
                "a process that makes batches ended too early (killed by the kernel, if memory ran out): run it again, "
                "which goes on from the newest checkpoints, with fewer runs at once"
            ) from error
        if isinstance(made, Exception):
            raise made
        return made

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, share: list[tuple]) -> None:
    # Who reads saves where it is when all are asked to end; then it ends this process.
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        try:
            loaders = _Here(share)
        except Exception as error:
            connection.send(error)
            return
        while True:
            connection.send(loaders.round())
