"""What a worker of a cluster does for one cell: start the ordinary run in its folder, wait for it, stop it."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from secateur.track.local import read

TURN = 30.0  # seconds that a second try waits for what the first one left behind


@dataclass(frozen=True)
class Order:
    """A command without its interpreter, where and with what environment it runs, the files of its cell."""

    words: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    records: str
    log: str
    lock: str
    patience: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (None: it was not started, for the reason in ``text``), and whether it is complete.

    ``lost`` says that another try may do better.
    """

    code: int | None
    complete: bool
    text: str = ""
    lost: bool = False


def attend(order: Order) -> Outcome:
    """Run one cell on this machine; at an interruption let it save its state first."""
    here = socket.gethostname()
    missing = [path for path in (order.cwd, str(Path(order.log).parent)) if not Path(path).is_dir()]
    if missing:
        why = f"{missing[0]} is not there on {here}: the nodes of the cluster must share the file system of the sweep"
        return Outcome(None, False, why)
    with open(order.lock, "ab") as lock:
        if not _locked(lock):
            return Outcome(None, False, f"another process still works on it, seen from {here}", lost=True)
        process = _start(order, lock)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(order.patience)
            finally:
                process.kill()
                process.wait()
            raise
    records = Path(order.records)
    return Outcome(code, records.exists() and any(record.stage == "end" for record in read(records)))


def _locked(lock: IO[bytes]) -> bool:
    """Take the lock of the cell, which its run inherits, so that no two ever work in one folder."""
    end = time.monotonic() + TURN
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)


def _start(order: Order, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    tied = [sys.executable, "-m", "secateur.lifeline", str(os.getpid()), sys.executable]
    with open(order.log, "ab") as file:
        return subprocess.Popen(
            [*tied, *order.words],
            cwd=order.cwd,
            env={**os.environ, **order.env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
