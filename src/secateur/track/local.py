"""Records as JSON lines in one file: appended, flushed to the disk, readable after a crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.types import CheckpointError, Record

LONGEST_HEAD = 100_000_000  # bytes; safetensors allows no more


class Log:
    """Appends records to ``path``; ``keep`` first drops all but that many (what came after a saved state).

    ``mute`` leaves the file alone and only counts.
    """

    def __init__(self, path: Path, keep: int = 0, *, mute: bool = False) -> None:
        self.path, self.count, self.mute = path, keep, mute
        if mute:
            return
        lines = path.read_bytes().split(b"\n")[:keep] if path.exists() else []
        if len(lines) < keep:
            raise CheckpointError(f"{path} holds {len(lines)} records, the run's state needs {keep}; start it anew.")
        if path.exists():
            with open(path, "rb+") as file:
                file.truncate(sum(len(line) + 1 for line in lines))

    def append(self, stage: str, **data: Any) -> Record:
        """Write one record: ``stage``, the time (seconds since 1970) and ``data`` (JSON values)."""
        record = Record(stage, finite(data), time.time())
        if not self.mute:
            with open(self.path, "ab") as file:
                file.write(line(record))
                file.flush()
                os.fsync(file.fileno())
        self.count += 1
        return record


def line(record: Record) -> bytes:
    """Return a record as it stands in the file."""
    return json.dumps({"stage": record.stage, "time": record.time, **record.data}, allow_nan=False).encode() + b"\n"


def read(path: Path) -> list[Record]:
    """Return the records in ``path``; a torn last line (a crash while writing) is left out.

    Raises ``CheckpointError`` when the file is missing or another line is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is this the folder of a run?") from error
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            data = json.loads(line)
            records.append(Record(str(data.pop("stage")), data, float(data.pop("time"))))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}:{number}: this line is not a record ({error}).") from error
    return records


def settled(records: Path, state: Path) -> list[Record]:
    """Return the records that stay: all of a finished run, else those that the saved ``state`` counts.

    What came after the saved state is dropped and done again when the run is resumed, so that a copy elsewhere
    must wait for it.  Raises ``CheckpointError`` as ``read`` does.
    """
    for _ in range(2):  # a run that ends between the two looks has no state, but an end
        found = read(records)
        if any(record.stage == "end" for record in found):
            return found
        if (count := _counted(state)) is not None:
            return found[:count]
    return []


def _counted(state: Path) -> int | None:
    """Return how many records belong to a saved state, by the header of its file alone; None without a state."""
    try:
        with open(state, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(size, LONGEST_HEAD)))
        return int(json.loads(head["__metadata__"]["state"])["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finite(value: Any) -> Any:
    """Return ``value`` with numbers that JSON cannot hold (nan, inf) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
