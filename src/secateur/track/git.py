"""Which commit a folder is at: of its git repository, with or without git installed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds; a status of a large tree on a slow disk is not worth more
HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # SHA-1, or SHA-256


def revision(folder: Path) -> dict[str, Any] | None:
    """Return ``{"commit": hash, "dirty": bool}`` of the repository that ``folder`` is in, None outside of one.

    ``dirty`` says whether files that git tracks differ from the commit; None where that cannot be found out (git is
    not installed, or refuses the folder).  Without git the commit is read from the files of the repository.
    """
    commit = _asked(folder, "rev-parse", "--verify", "-q", "HEAD")
    if commit is None or not HASH.fullmatch(commit):
        found = _read(folder)
        return {"commit": found, "dirty": None} if found else None
    changes = _asked(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _asked(folder: Path, *words: str) -> str | None:
    """Return what git says about ``folder``, None when it is not installed, fails, or takes too long."""
    names = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # of a hook that runs around us
    env = {name: value for name, value in os.environ.items() if name not in names}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(folder: Path) -> str | None:
    """Return the commit by the files of the repository (not of the format reftable, which has none)."""
    try:
        whole = folder.resolve()
        dot = next((place / ".git" for place in (whole, *whole.parents) if (place / ".git").exists()), None)
        if dot is None:
            return None
        home = dot if dot.is_dir() else (dot.parent / dot.read_text().removeprefix("gitdir:").strip())
        shared = home / (home / "commondir").read_text().strip() if (home / "commondir").exists() else home
        head = (home / "HEAD").read_text().strip()
        name = head.removeprefix("ref:").strip()
        found = head if name == head else _reference(name, home, shared)
    except (OSError, UnicodeDecodeError):
        return None
    return found if found and HASH.fullmatch(found) else None


def _reference(name: str, home: Path, shared: Path) -> str | None:
    """Return the commit of a branch: in a file of its own, or a line of the packed ones."""
    for place in (home / name, shared / name):
        if place.is_file():
            return place.read_text().strip()
    packed = shared / "packed-refs"
    rows = [line.split() for line in packed.read_text().splitlines()] if packed.exists() else []
    return next((row[0] for row in rows if len(row) == 2 and row[1] == name), None)
