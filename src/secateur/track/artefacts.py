"""The files of a run that a tracking store gets: those of its folder, its records so far, its curves as pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.report.figures import standalone
from secateur.report.view import charts
from secateur.track.local import line
from secateur.types import Record

RECORDS = "records.jsonl"
PRIVATE = ("state.safetensors", "rewind.safetensors", "held.safetensors")  # of an unfinished run; gone at its end


def artefacts(folder: Path, records: Sequence[Record], scratch: Path) -> list[tuple[Path, str]]:
    """Return (file, name in the store) of all that a store gets; what has to be written first is in ``scratch``."""
    found = [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [(path, name) for path, name in found if name not in (*PRIVATE, RECORDS) and not path.name.startswith(".")]
    return [*files, _records(records, scratch), *_figures(records, scratch)]


def _records(records: Sequence[Record], scratch: Path) -> tuple[Path, str]:
    """Write the records again: the file in the folder may grow, or be cut back by a resume, while it is sent."""
    path = scratch / RECORDS
    path.write_bytes(b"".join(line(record) for record in records))
    return path, RECORDS


def _figures(records: Sequence[Record], scratch: Path) -> list[tuple[Path, str]]:
    stages: dict[str, list[Any]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record.data)
    found = []
    for title, svg in charts(stages):
        if svg:
            path = scratch / f"{title.split(' ')[0].lower()}.svg"
            path.write_text(standalone(svg))
            found.append((path, f"figures/{path.name}"))
    return found


def digest(path: Path) -> str:
    """Return SHA-256 of a file, 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
