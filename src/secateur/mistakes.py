"""What a user sees of a mistake: one message and an exit code, no traceback."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

LATER = 2.0  # seconds before a process that is not the first of its run tells its error


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the mistakes of a user, a full disk and Ctrl-C into one message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            code = 143 if isinstance(stop, Terminated) else 130
            if os.environ.get("RANK", "0") != "0":
                raise typer.Exit(code) from None
            fail(f"interrupted. {' '.join(map(str, stop.args))}".strip(), code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
            raise typer.Exit(141) from None
        except Exception as error:
            text = _explained(error)
            if text is None or os.environ.get("SECATEUR_TRACEBACK"):
                raise
            fail(text, 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """Return the message for an error that is no bug, else None."""
    from secateur.types import SecateurError

    if isinstance(error, SecateurError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        todo = "; free some space and continue with --resume" if error.errno == errno.ENOSPC else ""
        return f"{where}{error.strerror or error}{todo}."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory ({str(error).splitlines()[0] if str(error) else 'host'}); lower the batch size."
    return None


def fail(text: str, code: int) -> None:
    """End with ``error: text`` and an exit code."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # one of several processes: what happens to all of them is told by the first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LATER)  # torchrun ends the others meanwhile
        text = f"process {rank}: {text}"
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)
