"""The state of an unfinished run in one file: tensors as safetensors, the rest as JSON in its header.

No pickle; the file is replaced whole (temporary file, flush, rename), so that a kill at any moment leaves the
state before or the state after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from secateur.train.loop import Cursor, Point
from secateur.types import CheckpointError

FORMAT = 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """Where a run stands: stage number, records that belong to it, point of the training, weights, plan so far."""

    stage: int
    records: int
    point: Point
    model: Mapping[str, torch.Tensor]
    plan: str | None = None


def atomic_write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` whole: written beside it, flushed to the disk, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name must survive a power cut too
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def write_state(path: Path, state: State) -> None:
    """Write ``state`` to ``path``."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (state.point.average or {}).items()}
    tensors |= {f"evidence.{name}": tensor for name, tensor in (state.point.evidence or {}).items()}
    optimizer: dict[str, Any] | None = None
    if state.point.optimizer is not None:
        numbers: dict[str, dict[str, Any]] = {}
        for index, values in state.point.optimizer["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        optimizer = {"groups": state.point.optimizer["param_groups"], "numbers": numbers}
    head = {
        "format": FORMAT,
        "stage": state.stage,
        "records": state.records,
        "cursor": asdict(state.point.cursor),
        "optimizer": optimizer,
        "plan": state.plan,
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    atomic_write(path, save(plain, metadata={"state": json.dumps(head)}))


def read_state(path: Path) -> State:
    """Return the state in ``path``; raises ``CheckpointError`` when it is damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if head["format"] != FORMAT:
            raise CheckpointError(f"{path} has state format {head['format']!r}, not {FORMAT}; start the run anew.")
        model, average = _named("model.", tensors), _named("average.", tensors)
        optimizer = _optimizer(head["optimizer"], tensors) if head["optimizer"] else None
        evidence = _named("evidence.", tensors)
        cursor = Cursor(**head["cursor"])
        cursor = replace(cursor, parts=tuple(cursor.parts))  # JSON has lists
        point = Point(cursor, optimizer, average or None, evidence or None)
        return State(int(head["stage"]), int(head["records"]), point, model, head["plan"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable run state ({error}); start the run anew.") from error


def _named(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer(head: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return an optimiser's ``state_dict``."""
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in head["numbers"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in head["groups"]]
    return {"state": state, "param_groups": groups}
