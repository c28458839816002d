"""How a program begins and ends: one line instead of a traceback, and the exit status that says why.

Imports nothing large, so that Ctrl-C is answered from the first moment.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from specextend.cli.flag_names import FLAGS
from specextend.errors import SpecExtendError, describe

MISTAKE, INTERRUPTED, CLOSED = 2, 130, 141  # the last two as a shell counts signals: 128 + SIGINT, 128 + SIGPIPE


def run(main: Callable[[], None]) -> None:
    """Run an entry point: a mistake of the user's is one line on stderr and status 2, Ctrl-C is 130.

    A reader of stdout that is gone ends it with 141; where stdout cannot be written, its disk is full.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        main()
        sys.stdout.flush()
    except SpecExtendError as error:
        _end(describe(error, FLAGS) if _speaks() else "", MISTAKE)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _end("the output was closed before everything was written", CLOSED)
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _end(f"the output cannot be written ({error.strerror})", MISTAKE)


def _end(line: str, status: int) -> None:
    """Say why, and leave; what a stream still holds is dropped where it cannot be written."""
    with suppress(OSError):
        sys.stderr.write(f"{line}\n" if line else "")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _speaks() -> bool:
    """Whether this is the one of several ranks that reports."""
    parallel = sys.modules.get("specextend.models.tensor_parallel")
    return parallel is None or parallel.speaks()
