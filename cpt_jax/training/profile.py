"""A profile of some steps, for XProf, TensorBoard and Perfetto."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfiledSteps:
    """The steps of each stage, numbered from 1, from `first` up to, and without, `stop`."""

    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 1 <= self.first < self.stop:
            raise UserError(f"profile is {self.first}:{self.stop}: give START:STOP with 1 <= START < STOP")

    @staticmethod
    def parse(text: str) -> "ProfiledSteps":
        """ "10:13" profiles steps 10, 11 and 12. The first step compiles: begin later."""
        first, _, stop = text.partition(":")
        if not (first.isdigit() and stop.isdigit()):
            raise UserError(f"profile is {text!r}: give START:STOP, two step numbers (10:13 profiles 10, 11 and 12)")
        return ProfiledSteps(first=int(first), stop=int(stop))


class Profile:
    """Traces the chosen steps of one stage into `directory`: an .xplane.pb for XProf and TensorBoard, and
    perfetto_trace.json.gz for https://ui.perfetto.dev."""

    def __init__(self, steps: ProfiledSteps | None, directory: Path) -> None:
        self._steps, self._directory, self._running = steps, directory, False

    def before(self, step: int) -> None:
        if self._steps is not None and not self._running and self._steps.first <= step < self._steps.stop:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends behind the last step; `outputs` are waited for, so that the devices' work is in the trace."""
        if self._running and self._steps is not None and step + 1 >= self._steps.stop:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(f"profile: {self._directory}")
