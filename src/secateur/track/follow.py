"""The process that copies a run to MLflow while it works: told by the run, on its own, slow and failing alone.

The run writes to its standard input: a line of settings, then one byte whenever there may be something new, and
END.  What the user should know goes to standard output, a line each.  Exit code 0: everything arrived.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from secateur.track.artefacts import PRIVATE, RECORDS
from secateur.track.local import settled
from secateur.track.mlflow import Copy, TrackError, alone, answering, bare, bring, find, mark

NEWS, END = b".", b"!"
OFTEN = 1.0  # seconds between copies, so that short epochs go in batches
FILES = 30.0  # seconds between copies of files
LONGEST = 60.0  # seconds between tries while the store fails
WHOLE = 120.0  # seconds; MLflow makes the tables of a new SQLite file in steps, and cannot go on from a part of them
HASTE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # tried again from here


@dataclass(frozen=True)
class Settings:
    """Which run goes where; ``wait`` is how many seconds there are after the end of the run."""

    folder: str
    uri: str
    experiment: str | None
    wait: float


class Follower:
    """Copies what is new; remembers what the store has, and forgets it at every failure."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, Path(settings.folder)
        self.copy: Copy | None = None
        self.failures = 0
        self.next, self.next_files = 0.0, 0.0  # moments of time.monotonic()

    def copied(self, last: bool = False) -> bool:
        """Try to copy; return whether all that is to be copied arrived.  The first failure in a row is told."""
        now = time.monotonic()
        try:
            self._copy(files=last or now >= self.next_files, last=last)
        except Exception as error:  # of whatever kind: the run goes on, and the next try may do
            self.copy = None
            self.failures += 1
            self.next = time.monotonic() + min(LONGEST, 2.0 ** min(self.failures - 1, 10))
            if self.failures == 1:
                why = str(error) if isinstance(error, TrackError) else f"{type(error).__name__}: {error}"
                tell(f"note: the run goes on without MLflow for now: {why}")
            return False
        if self.failures:
            tell("MLflow answers again and has what it missed")
            self.failures = 0
        self.next = time.monotonic() + OFTEN
        return True

    def _copy(self, files: bool, last: bool) -> None:
        records = settled(self.folder / RECORDS, self.folder / PRIVATE[0])
        if not records:
            return
        uri = self.settings.uri
        with answering(self.folder, uri), alone(self.folder):
            if self.copy is None or last:  # at the end the store itself is asked what it has
                self.copy = find(self.folder, records, uri, self.settings.experiment)
            ended = any(record.stage == "end" for record in records)
            if not (last or ended):
                mark(self.copy, "RUNNING")
            bring(self.copy, self.folder, records, files=files)
            if files:
                self.next_files = time.monotonic() + FILES
            if last and not ended:
                mark(self.copy, "KILLED")


def tell(text: str) -> None:
    """Say one line to the run; a run that is gone does not hear it."""
    try:
        os.write(sys.stdout.fileno(), bare(text).replace("\n", " ").encode() + b"\n")
    except OSError:
        return


def allowed(uri: str, wait: float) -> float:
    """Return after how many seconds the copying is broken off: later for a file, which would stay half made.

    >>> allowed("http://host:5000", 5.0), allowed("sqlite:///mlflow.db", 5.0)
    (5.0, 120.0)
    """
    return max(wait, WHOLE) if uri.startswith("sqlite:") else wait


def follow(stream: int, follower: Follower) -> bool:
    """Copy whenever told on ``stream``, until told the end or the other side is gone; return whether all arrived."""
    waiting = False
    while True:
        pause = max(0.0, follower.next - time.monotonic()) if waiting else None
        if select.select([stream], [], [], pause)[0]:
            said = os.read(stream, 65536)
            if not said or END in said:
                break
            waiting = True
        if waiting and time.monotonic() >= follower.next:
            waiting = not follower.copied()
    limit = allowed(follower.settings.uri, follower.settings.wait)
    signal.setitimer(signal.ITIMER_REAL, limit + 1.0)  # ends this process wherever it hangs
    end = time.monotonic() + follower.settings.wait
    while not (whole := follower.copied(last=True)) and time.monotonic() + OFTEN < end:
        time.sleep(OFTEN)
    return whole


def main() -> int:
    """Read the settings and follow the run."""
    os.nice(5)  # the run comes first
    os.environ.update({key: os.environ.get(key, value) for key, value in HASTE.items()})
    with contextlib.suppress(TrackError), answering(Path(), None):
        pass  # MLflow is imported while the run prepares; what is wrong with it is told when it is used
    head = b""
    while not head.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            return 1
        head += piece
    return 0 if follow(0, Follower(Settings(**json.loads(head)))) else 1


if __name__ == "__main__":
    sys.exit(main())
