"""Memory in pages of 2 MB on Linux. A training step on a CPU takes its temporaries from malloc and gives them back, gigabytes
each time, and to fault them in by 4 kB takes up to a seventh of the step. NumPy asks for huge pages by itself, XLA does not."""

import os
import sys
from pathlib import Path

_TUNABLES, _OURS = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment(mode: Path = _MODE) -> dict[str, str]:
    """What a process has to be started with for glibc to ask for huge pages (glibc manual, Memory Allocation Tunables; other
    C libraries ignore it). Empty where there are none or only they are used, or where the user has said what malloc does."""
    said = os.environ.get(_TUNABLES, "")
    if _OURS in said or not mode.exists() or "[madvise]" not in mode.read_text():
        return {}
    return {_TUNABLES: ":".join(filter(None, (said, f"{_OURS}=1")))}


def start_again() -> None:
    """This command from its start, in the same process, where malloc has huge pages only then; nothing is to be done yet."""
    if sys.executable and (needed := environment()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | needed)
