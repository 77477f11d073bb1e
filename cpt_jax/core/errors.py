"""What ends a command by intent: the user's input is wrong, or the machine is wanted back."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input: one line that names the value and the remedy. `cpt` prints it and exits with 2."""


class Preempted(Exception):
    """The process was asked to end (SIGTERM), and what was computed is kept: `cpt` exits with `TRY_AGAIN`."""


# EX_TEMPFAIL of sysexits.h: the same command, run again, goes on.
TRY_AGAIN = 75


def nearest(name: str, choices: Iterable[str]) -> str:
    """`name` quoted, with the most similar choice if there is one: "'lerning_rate' (did you mean 'learning_rate'?)"."""
    similar = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"{name!r}" + (f" (did you mean {similar[0]!r}?)" if similar else "")
