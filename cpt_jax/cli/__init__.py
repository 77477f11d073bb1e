"""`cpt`: the commands. Exit 0: done; 2: the input is wrong, one line on stderr; 1: it failed while running; 75: it was
asked to end, or hung: run it again."""

import errno
import gc
import os
import select
import sys
import traceback
from pathlib import Path
from typing import NoReturn, TextIO

from cpt_jax.cli.arguments import nearly_a_flag
from cpt_jax.cli.parser import parser
from cpt_jax.core import huge_pages
from cpt_jax.core.errors import TRY_AGAIN, Preempted, UserError

# What a file system says to a place that is wrong, not to a mistake of ours.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def _fail(message: str, status: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader (head, a pager) is gone."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `cpt`."""
    if argv is None:
        huge_pages.start_again()
    commands = parser()
    arguments, rest = commands.parse_known_args(argv)
    if rest and not arguments.takes_overrides:
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for word in rest:
        if (flag := nearly_a_flag(word, arguments.parser)) is not None:
            arguments.parser.error(f"unrecognized argument {word}: did you mean {flag}?")
    # Tracing makes many objects and few cycles: looking for these 70 times as rarely takes a small run's CPU time
    # from 12.7 to 11.3 s.
    gc.set_threshold(50_000)
    # Libraries' own logging would tear the progress display.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Of transformers: that there is no PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # JAX's variable: programs that took more than a second to compile are kept for the next run.
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "cpt_jax" / "compiled"))
    try:
        arguments.function(arguments, rest)
        sys.stdout.flush()
    except BrokenPipeError as error:
        # Another pipe may have broken, to a process or a store.
        if not _nobody_reads(sys.stdout):
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, arguments.debug)
        # What is still to be written, Python writes when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        _fail(str(error), 2, arguments.debug)
    except Preempted as ended:
        print(f"preempted: {ended}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to continue", 1, arguments.debug)
    except OSError as error:
        if error.filename is None or error.errno not in REFUSED:
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, arguments.debug)
        _fail(f"{error.filename}: {error.strerror}: give another place, or see to it", 2, arguments.debug)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, arguments.debug)
