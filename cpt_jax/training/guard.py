"""What a run does when it is asked to end, and when it hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cpt_jax.core.errors import TRY_AGAIN, Preempted
from cpt_jax.core.progress import clock, say

# Generous: the first step compiles, and a file system may be slow.
HANG_SECONDS = 1800.0
# Steps after which several processes agree whether to save: an agreement waits for the devices.
AGREE_EVERY = 8
KEPT = "what was finished is kept: run the same command again to continue"


@contextlib.contextmanager
def ends_when_asked() -> Iterator[None]:
    """SIGTERM ends what is being done with `Preempted`, outside of training, where the stations before are kept.

    Where `jax.distributed` is in use, its preemption service has the signal.
    """

    def end(*_: object) -> None:
        raise Preempted(KEPT)

    with _handler(end):
        yield


@contextlib.contextmanager
def _handler(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or jax.distributed.is_initialized():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """SIGTERM while a stage trains: known after the step that runs, in all processes after the same one."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._handling = _handler(self._ask)

    def __enter__(self) -> "Preemption":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Raises what was asked for behind the last step, while its checkpoint was written."""
        self._handling.__exit__(kind, *error)
        if kind is None and self.asked_at is not None:
            raise Preempted(KEPT)

    def _ask(self, *_: object) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            # os.write: a handler may have interrupted a print.
            os.write(2, b"asked to end: saving after this step\n")

    def after(self, step: int) -> bool:
        """Whether to save and end now; to be called after every step."""
        if jax.distributed.is_initialized():
            # Processes that hear of it agree on a step that none has passed.
            if multihost_utils.reached_preemption_sync_point(step):
                self.asked_at = self.asked_at or time.monotonic()
                return True
            return False
        return self.asked_at is not None

    def ended(self, name: str, step: int) -> Preempted:
        """The error to raise when all is saved."""
        seconds = time.monotonic() - (self.asked_at or time.monotonic())
        return Preempted(f"{name}: step {step} is saved ({seconds:.1f} s): run the same command again to continue")


def agreed(step: int, wanted: bool) -> bool:
    """Whether the first process wants something that all do together: asked every few steps where there are several."""
    if jax.process_count() == 1:
        return wanted
    return step % AGREE_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(np.int32(wanted)))


class Watchdog:
    """Says where each thread is when no step has ended for `seconds`, and after as many again ends the process, so that
    a launcher starts it anew: with another host gone, or a device or a file system that does not answer, a step waits
    without end. None: never."""

    def __init__(self, name: str, seconds: float | None) -> None:
        self._name, self._seconds, self._over = name, seconds, threading.Event()
        self._beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self) -> None:
        """A step has ended."""
        self._beat = time.monotonic()

    def _watch(self, seconds: float) -> None:
        told_for = None
        while not self._over.wait(min(seconds / 10, 10.0)):
            beat = self._beat
            silent = time.monotonic() - beat
            if silent > seconds and told_for != beat:
                told_for = beat
                say(f"{self._name}: no step has ended for {clock(silent)}; process {jax.process_index()} is here:")
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            if silent > 2 * seconds:
                say(
                    f"{self._name}: no step has ended for {clock(silent)}: ending the process with {TRY_AGAIN}, try again"
                )
                os._exit(TRY_AGAIN)
