"""Runs that differ only in what comes after the dense training share it: the first one trains, the others take it.

A training is known by the hash of everything that decides about it, so that a shared folder can serve any runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from secateur.folder import REWIND
from secateur.recipe import Recipe
from secateur.session import Run
from secateur.track.local import read
from secateur.train.average import tensors_of
from secateur.train.loop import Point
from secateur.train.resume import State, atomic_write, read_state, write_state
from secateur.types import CheckpointError

LATER = {
    "name",
    "out",
    "prune",
    "recover",
    "fbs",
    "rnp",
    "measure",
    "track",
}  # what the dense training does not depend on
TOLD = ("epoch", "dense")  # the records of a dense training


def training_hash(recipe: Recipe) -> str:
    """Return SHA-256 over all that decides about the dense training and what it leaves behind, 16 hex digits."""
    recover = recipe.recover
    left: list[object] = [recover.carry_optimizer, {"rewind": recover.rewind}.get(recover.name)]
    if (chosen := recipe.prune.criterion).rides:
        left.append([chosen.name, chosen.args, chosen.every, chosen.samples])  # its sums are gathered on the way
    values = [recipe.model_dump(mode="json", exclude=LATER), left]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def turn(run: Run) -> Iterator[Path | None]:
    """Wait until no other run trains the same; yield where the training is, or will be (None: nothing is shared).

    The system lets go of the lock of a run that dies, so that the next one trains.
    """
    if run.shared is None:
        yield None
        return
    run.shared.mkdir(parents=True, exist_ok=True)
    place = run.shared / f"{training_hash(run.recipe)}.safetensors"
    with open(place.with_suffix(".lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            run.screen.line("waiting for the run that trains the same dense model ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield place


def offer(run: Run, place: Path, model: nn.Module, end: Point) -> None:
    """Leave the finished training of ``run`` at ``place``; without the state file there is nothing to find."""
    records = [r for r in read(run.log.path) if r.stage in TOLD]
    rows = json.dumps([[r.stage, r.data] for r in records], allow_nan=False)
    atomic_write(place.with_suffix(".json"), rows.encode())
    if (mark := run.folder / REWIND).exists():
        atomic_write(place.with_suffix(".rewind"), mark.read_bytes())
    write_state(place, State(0, len(records), end, tensors_of(model)))


def take(run: Run, place: Path, model: nn.Module) -> Point:
    """Bring ``model`` and the records of ``run`` to the end of the training at ``place``; return that point."""
    try:
        state = read_state(place)
        rows = json.loads(place.with_suffix(".json").read_text())
        model.load_state_dict(state.model)
        for stage, data in rows:
            run.log.append(stage, **data, shared=place.stem)
    except (CheckpointError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the shared training {place} cannot be used ({error}); remove it.") from error
    if (mark := place.with_suffix(".rewind")).exists():
        atomic_write(run.folder / REWIND, mark.read_bytes())
    run.screen.line(f"the dense model was trained by another run, see {place}")
    return state.point
