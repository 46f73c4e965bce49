"""Layers that share the masks of gates before them: depthwise convolutions and batch norms on gated channels.

A batch norm or a bias turns the zero of a skipped channel into a constant.  The channel belongs to the group that the
gate decides about, so it is computed where the gate says so, and zero elsewhere.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.runtime.gates.flows import Flow
from secateur.runtime.gates.gated import Gated
from secateur.types import PlanError


class Board(threading.local):
    """The masks of one forward pass, path of the gated layer -> bool (B, C); each thread has its own."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Board:
        """Return an empty board, the same for all layers that are copied together."""
        return Board()


class Follower(nn.Module):
    """A layer whose channels are computed where the gates of ``flow`` compute theirs, and exactly 0 elsewhere."""

    def __init__(self, layer: nn.Module, flow: Flow, board: Board) -> None:
        super().__init__()
        self.layer = layer
        self.flow = flow
        self.board = board

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` (B, C, ...), other channels zero."""
        y: Tensor = self.layer(x)
        mask = self.flow.mask(self.board.masks, len(x))
        return y if mask is None else y * mask.to(y.dtype).reshape(*mask.shape, *[1] * (y.dim() - 2))

    def extra_repr(self) -> str:
        """The gates, for ``print(model)``."""
        return f"gates={', '.join(self.flow.gates)}"


@dataclass(frozen=True, eq=False)
class Following:
    """A follower as a value: the path of its layer, and the flow of its channels."""

    path: str
    flow: Flow

    def row(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"follows": self.path, "units": self.flow.rows()}

    @classmethod
    def of(cls, row: Any, model: nn.Module) -> Following:
        """Return the follower of a JSON object that somebody wrote; raises ``PlanError`` where it does not fit."""
        widths = {path: module.units for path, module in model.named_modules() if isinstance(module, Gated)}
        if not isinstance(row, dict) or row.keys() != {"follows", "units"} or not isinstance(row["follows"], str):
            raise PlanError(f"a layer with a shared mask has follows and units; got {list(row) or row!r}.")
        return cls(row["follows"], Flow.read(row["units"], widths))


def follow_(model: nn.Module, following: Following) -> None:
    """Let a layer of ``model`` share the masks of its gates, in place; raises ``PlanError`` when it cannot."""
    layer: Any = dict(model.named_modules()).get(following.path)
    units = {"BatchNorm": "num_features", "Conv": "out_channels"}
    kind = next((name for name in units if type(layer) in FOLLOWING[name]), "")
    if not kind or (kind == "Conv" and layer.groups != layer.in_channels):
        raise PlanError(
            f"batch norms and depthwise convolutions share masks; {following.path!r} is {type(layer).__name__}."
        )
    if getattr(layer, units[kind]) != following.flow.units:
        raise PlanError(
            f"{following.path!r} has {getattr(layer, units[kind])} channels, its mask {following.flow.units}."
        )
    gates = [model.get_submodule(path) for path in following.flow.gates]
    boards = [module.board for module in model.modules() if isinstance(module, Gated) and module.board is not None]
    board = boards[0] if boards else Board()
    for path, module in zip(following.flow.gates, gates, strict=True):
        if isinstance(module, Gated):
            module.board, module.path = board, path
    model.set_submodule(following.path, Follower(layer, following.flow, board))


FOLLOWING = {
    "BatchNorm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
}


def followings(model: nn.Module) -> tuple[Following, ...]:
    """Return the followers of ``model``, in the order of its modules."""
    return tuple(Following(path, m.flow) for path, m in model.named_modules() if isinstance(m, Follower))
