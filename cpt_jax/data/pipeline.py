"""A corpus prepared by all cores of this machine, split by split; begun again, it goes on with the splits that are not
done."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import progress
from cpt_jax.core.storage import locked
from cpt_jax.core.stores import Location, is_address
from cpt_jax.data import steps
from cpt_jax.data.prepare import Manifest
from cpt_jax.data.splits import SPLIT_BYTES, Split, splits_of
from cpt_jax.data.steps import Task

Step = Callable[[Task, Split], None]
# Does a step over splits, in any order.
Each = Callable[[str, Step, Task, Sequence[Split]], None]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_corpus(task: Task, workers: int | None = None, *, split_bytes: int = SPLIT_BYTES) -> Manifest:
    """Prepares a corpus by `workers` processes (default: one for each core). The result does not depend on how many.

    Raises:
      UserError: there is nothing to learn, something cannot be read, or the disk is full.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}: give at least 1")
    splits = splits_of(task.corpus, split_bytes)
    with _processes(min(workers or cores(), len(splits))) as each:
        return prepare_by(task, splits, each)


def prepare_by(task: Task, splits: Sequence[Split], each: Each) -> Manifest:
    """The order of the steps.

    Raises:
      UserError: another process is at them in the same place.
    """
    with _claimed(task.place):
        task = steps.identified(task, splits)
        if (manifest := steps.begin(task, splits)) is not None:
            return manifest
        name = task.corpus.name
        if task.cleaning.compares:
            each(f"{name}: looked at", steps.look, task, [s for s in splits if not steps.looked_at(task, s)])
            steps.compare(task, splits)
        each(f"{name}: prepared", steps.write, task, [s for s in splits if not steps.written(task, s)])
        return steps.finish(task, splits)


@contextmanager
def _claimed(place: Location) -> Iterator[None]:
    """Keeps others out of a local directory; in a store, where nothing is locked, their receipts tell them apart."""
    if is_address(place):
        yield
        return
    lock = Path(place) / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise UserError(
                f"another process prepares data in {place}: wait for it, or choose another directory"
            ) from None
        held.callback(lock.unlink)
        yield


@contextmanager
def _processes(workers: int) -> Iterator[Each]:
    """This process, or several others."""
    if workers == 1:
        yield _here
        return
    threads = max(1, cores() // workers)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (threads,))

    def elsewhere(what: str, step: Step, task: Task, splits: Sequence[Split]) -> None:
        with progress(what, len(splits), "splits") as shown:
            try:
                for _ in pool.map(step, [task] * len(splits), splits):
                    shown.advance()
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that prepared data ended too early (killed by the kernel, if memory ran out): run it again with "
                    'fewer --workers; what is done is kept. A script of your own must begin under `if __name__ == "__main__":`'
                ) from error

    try:
        yield elsewhere
    finally:
        pool.shutdown(cancel_futures=True)


def _here(what: str, step: Step, task: Task, splits: Sequence[Split]) -> None:
    with progress(what, len(splits), "splits") as shown:
        for split in splits:
            step(task, split)
            shown.advance()


def _begin_worker(threads: int) -> None:
    """The tokenizer's threads are shared out; and a worker ends with the process that it works for."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    # Ctrl-C reaches all processes of a terminal: the first one says so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
