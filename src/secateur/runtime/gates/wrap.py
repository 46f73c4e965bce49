"""Put gates on a model: on the layers that a recorded run shows can have one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from secateur.graph.trace import inputs_of, record
from secateur.runtime.gates.fbs import FBS
from secateur.runtime.gates.follow import Following, follow_, followings
from secateur.runtime.gates.gated import NORMS, Gated, gated
from secateur.runtime.gates.prefix import Prefix
from secateur.runtime.gates.sites import Scene, followers, sites
from secateur.types import PlanError


@dataclass(frozen=True)
class Gating:
    """A gated copy of a model, the paths of its gated layers, and why each other layer with weights is left dense.

    ``sharing`` are the depthwise convolutions and batch norms that share the masks of gates before them.
    """

    model: nn.Module
    gated: tuple[str, ...]
    dense: tuple[tuple[str, str], ...]
    sharing: tuple[str, ...] = ()


def gate(
    model: nn.Module,
    density: float | Mapping[str, float] | None,
    example: Any,
    *,
    everywhere: bool = False,
    pooling: str = "l1",
    groups: int = 4,
    threshold: str = "online",
    scale: str = "gate",
) -> Gating:
    """Return a copy of ``model`` with a gate on every convolution (and batch norm) that an activation follows.

    ``density`` in (0, 1] makes FBS gates, one number for all or one per path of a layer (others stay dense); None
    makes prefix gates of ``groups`` nested groups (RNP).  The copy equals the model as long as its gates compute
    everything (methods of the FBS paper: rho = gamma, phi = 0, shift beta / gamma).  The saving of a layer in a
    residual sum is smaller: its consumers compute the union of the branches.

    ``everywhere`` puts a gate wherever a plan would cut channels or neurons: also on linear layers and on
    convolutions that no activation follows, and lets batch norms and depthwise convolutions share the masks of the
    gates before them (the engine runs such a model as it is).  Without it a depthwise convolution has its own gate.
    ``pooling`` and ``threshold`` are those of ``FBS``, ``scale`` ("gate" or "norm") is that of ``gated``.

    Raises ``PlanError`` when nothing can be gated, or a path of ``density`` cannot.

    >>> import torch
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> gate(chain, 0.5, torch.rand(1, 3, 8, 8)).gated
    ('0',)
    >>> heads = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    >>> gate(heads, 0.5, torch.rand(1, 4), everywhere=True).dense
    (('2', 'its values are an output of the model'),)
    """
    args, kwargs = inputs_of(example)
    scene = Scene.of(model, record(model, args, kwargs), everywhere)
    found, dense = sites(scene)
    if density is None:
        narrow = [site for site in found if len(_submodule(model, site.path).weight) < groups]  # type: ignore[union-attr, arg-type]
        dense = (*dense, *((site.path, f"it has too few channels for {groups} groups") for site in narrow))
        found = tuple(site for site in found if site not in narrow)
    if isinstance(density, Mapping):
        strangers = sorted(set(density) - {site.path for site in found})
        if strangers:
            why = dict(dense).get(strangers[0], "there is no such layer")
            raise PlanError(f"{strangers[0]!r} cannot be gated: {why}. Gateable: {[site.path for site in found]}.")
        dense = (*dense, *((site.path, "no density given") for site in found if site.path not in density))
        found = tuple(site for site in found if site.path in density)
    if not found:
        hint = "" if everywhere else " everywhere=True (fbs.everywhere in a recipe) looks further."
        raise PlanError(f"no layer can be gated: {'; '.join(f'{p}: {w}' for p, w in dense) or 'there is none'}.{hint}")
    following, sharing = followers(scene, found) if everywhere else ((), frozenset())
    model = copy.deepcopy(model)
    for site in found:
        one = density[site.path] if isinstance(density, Mapping) else density
        put_(model, Layer(site.path, site.norm, one, pooling, groups, threshold, scale))
    for follower in following:
        follow_(model, follower)
    shared = tuple(dict.fromkeys([*sharing, *(follower.path for follower in following)]))
    left = tuple((path, why) for path, why in dense if path not in sharing)
    return Gating(model, tuple(site.path for site in found), left, shared)


LATER = {"threshold": "online", "scale": "gate"}  # of a layer: newer than the first version of files


@dataclass(frozen=True)
class Layer:
    """A gate as a value: where it sits, the batch norm it took over ("": none), and its kind.

    ``conv`` is the path of a convolution or linear layer.  ``density`` None stands for a prefix gate of ``groups``, a
    number for an FBS gate with ``pooling`` and ``threshold``; ``scale`` says what keeps the scale of the batch norm.
    """

    conv: str
    norm: str
    density: float | None
    pooling: str = "l1"
    groups: int = 4
    threshold: str = "online"
    scale: str = "gate"

    def row(self) -> dict[str, Any]:
        """Return a JSON object; what is new in it since the first version is left out where it says nothing."""
        return {key: value for key, value in asdict(self).items() if key not in LATER or LATER[key] != value}

    @classmethod
    def of(cls, row: Any) -> Layer:
        """Return the layer of a JSON object that somebody wrote; raises ``PlanError`` for anything else."""
        kinds = {"conv": str, "norm": str, "density": (float, int, type(None)), "pooling": str, "groups": int}
        kinds |= {key: str for key in LATER if isinstance(row, dict) and key in row}
        if not isinstance(row, dict) or row.keys() != kinds.keys():
            raise PlanError(f"a gate has {', '.join(kinds)}; got {row!r}.")
        wrong = [key for key, kind in kinds.items() if isinstance(row[key], bool) or not isinstance(row[key], kind)]
        if wrong:
            raise PlanError(f"{wrong[0]} of a gate is {row[wrong[0]]!r}.")
        return cls(**row)


def put_(model: nn.Module, layer: Layer) -> None:
    """Put a gate on ``model`` in place; raises ``PlanError`` when ``layer`` does not fit it."""
    conv: Any = _submodule(model, layer.conv)
    norm: Any = _submodule(model, layer.norm) if layer.norm else None
    if type(conv) not in NORMS or not (norm is None or isinstance(norm, NORMS[type(conv)])):
        found = type(conv).__name__ if norm is None else f"{type(conv).__name__} and {type(norm).__name__}"
        raise PlanError(f"a gate at {layer.conv!r} takes a convolution or Linear and its batch norm; found {found}.")
    if layer.scale not in ("gate", "norm"):
        raise PlanError(f"the scale of a batch norm stays with the gate or the norm; got {layer.scale!r}.")
    after = len(conv.weight)
    if norm is not None and (norm.num_features != after or not norm.affine or norm.running_mean is None):
        raise PlanError(f"the batch norm {layer.norm!r} does not fit the layer {layer.conv!r}.")

    def make(before: int, after: int) -> FBS | Prefix:
        if layer.density is None:
            return Prefix(after, layer.groups)
        return FBS(before, after, layer.density, layer.pooling, layer.threshold)

    made = gated(conv, norm, make, layer.scale)
    made.took = layer.norm
    model.set_submodule(layer.conv, made)
    if layer.norm:
        model.set_submodule(layer.norm, nn.Identity())


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """Return the gates of ``model``, in the order of its modules.

    >>> import torch
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> layers(gate(chain, 0.5, torch.rand(1, 3, 8, 8)).model)
    (Layer(conv='0', norm='1', density=0.5, pooling='l1', groups=4, threshold='online', scale='gate'),)
    """
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Gated) and isinstance(module.gate, FBS):
            kind = {"pooling": module.gate.pooling, "threshold": module.gate.threshold, "scale": _scale(module)}
            found.append(Layer(path, module.took, module.gate.density, **kind))
        elif isinstance(module, Gated) and isinstance(module.gate, Prefix):
            found.append(Layer(path, module.took, None, groups=module.gate.groups, scale=_scale(module)))
    return tuple(found)


def _scale(layer: Gated) -> str:
    return "norm" if getattr(layer.norm, "affine", False) else "gate"


def rows(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the gates of ``model`` and what shares their masks as JSON objects."""
    return (*(layer.row() for layer in layers(model)), *(one.row() for one in followings(model)))


def restore_(model: nn.Module, given: tuple[Any, ...]) -> None:
    """Put back on ``model`` what ``rows`` wrote, in place; raises ``PlanError`` when it does not fit."""
    for row in given:
        if isinstance(row, dict) and "follows" in row:
            follow_(model, Following.of(row, model))
        else:
            put_(model, Layer.of(row))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)
