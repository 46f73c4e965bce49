"""The run's side of tracking: start the process that copies the run, tell it of news, and never wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from secateur.track.follow import END, NEWS, Settings, allowed

BRIEF = 2.0  # seconds that an interrupted run waits, at most
WORDS = ("-m", "secateur.track.follow")
LOOK = 0.05  # seconds between looks at the process


@dataclass(eq=False)
class Live:
    """A run's copying process: told the folder by the first news, then a byte for each; ``line`` gets its lines."""

    uri: str
    experiment: str | None
    wait: float
    line: Callable[[str], None]
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    heard: bytes = b""

    def news(self, folder: Path) -> None:
        """Say that there is something to copy; a process that does not read, or is gone, is not waited for."""
        if self.folder is None:
            self.folder = folder
            settings = Settings(str(folder.resolve()), self.uri, self.experiment, self.wait)
            self._say(json.dumps(asdict(settings)).encode() + b"\n")
        self._say(NEWS)
        self._relay()

    def start(self) -> None:
        """Start the process, which loads MLflow while the run prepares."""
        words = [sys.executable, *WORDS]
        try:  # a session of its own: Ctrl-C is for the run
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            self.line(f"note: this run is not copied to MLflow while it works ({error}).")
            return
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)

    def _say(self, what: bytes) -> None:
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(OSError):  # the pipe is full, and the news in it will do; or nobody reads
                self.process.stdin.write(what)

    def _relay(self) -> None:
        """Hand on the whole lines that the process said."""
        if self.process is None or self.process.stdout is None or self.process.stdout.closed:
            return
        self.heard += self.process.stdout.read() or b""  # None: nothing there yet
        *lines, self.heard = self.heard.split(b"\n")
        for text in lines:
            self.line(text.decode(errors="replace"))

    def end(self, wait: float) -> bool:
        """Let the process finish for ``wait`` seconds, then stop it; return whether the copy is whole."""
        if self.process is None:
            return self.folder is None
        self._say(END)
        if self.process.stdin is not None:
            self.process.stdin.close()
        last = time.monotonic() + (allowed(self.uri, wait) if self.folder is not None else 0.0)
        try:
            while self.process.poll() is None and time.monotonic() < last:
                time.sleep(LOOK)
                self._relay()
        finally:
            self.process.kill()
            self.process.wait()
            self._relay()
            if self.process.stdout is not None:
                self.process.stdout.close()
        return self.process.returncode == 0 or self.folder is None


@contextmanager
def following(
    uri: str | None, experiment: str | None, wait: float, line: Callable[[str], None]
) -> Iterator[Callable[[Path], None]]:
    """Yield what a run calls with its folder when it has news for the store at ``uri`` (None: for nobody)."""
    if uri is None:
        yield lambda folder: None
        return
    live = Live(uri, experiment, wait, line)
    live.start()
    try:
        yield live.news
    except BaseException:  # what does not arrive now comes when the run is resumed
        live.end(min(wait, BRIEF))
        raise
    if not live.end(wait):
        line(f"MLflow does not have all of this run yet; send the rest with: secateur track push {live.folder}")
