"""Where a model can have gates, and which layers share their masks: read from a recorded run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.graph.trace import Op, Recording, Ref
from secateur.runtime.gates.flows import Flow
from secateur.runtime.gates.follow import FOLLOWING, Follower, Following
from secateur.runtime.gates.gated import NORMS, Gated
from secateur.runtime.gates.passing import ADD, PASSING, Held, activates, passed

CONVOLUTION, NORM = "aten::convolution", "aten::native_batch_norm"
PRODUCTS = ("aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "aten::baddbmm")
SIMPLE = frozenset([*ADD, "aten::max_pool2d_with_indices", "aten::avg_pool2d", "aten::dropout", "aten::mean.dim"])


@dataclass(frozen=True)
class Site:
    """A layer that can be gated, its batch norm ("" without one), and the value that leaves the two."""

    path: str
    norm: str
    value: int


@dataclass(eq=False)
class Scene:
    """A model and what one run of it shows: who reads which value, how often each module's weights are used."""

    model: nn.Module
    rec: Recording
    everywhere: bool
    readers: dict[int, list[Op]] = field(default_factory=dict)
    weighted: list[Op] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, rec: Recording, everywhere: bool) -> Scene:
        """Return the scene of a recorded run."""
        scene = cls(model, rec, everywhere)
        turned = {op.outs[0]: op.args[0].value for op in rec.ops if op.target in ("aten::t", "aten::transpose.int")}
        for op in scene.ops:
            reads = {ref.value for ref in torch.utils._pytree.tree_leaves(op.args) if isinstance(ref, Ref)}
            for value in reads:
                scene.readers.setdefault(value, []).append(op)
            weights = {turned.get(value, value) for value in reads}
            if op.target == CONVOLUTION or (
                op.target in PRODUCTS and any(rec.values[value].origin == "parameter" for value in weights)
            ):
                scene.weighted.append(op)
        return scene

    @property
    def ops(self) -> list[Op]:
        """What ran in eval mode."""
        return self.rec.ops[: self.rec.eval_ops or None]

    @property
    def batch(self) -> int:
        """The number of samples of the example."""
        first = next((value for value in self.rec.values if value.origin == "input" and value.shape), None)
        return 1 if first is None else first.shape[0]

    def module(self, op: Op) -> Any:
        """The module that ``op`` ran in."""
        return self.model.get_submodule(op.module)

    def once(self, op: Op) -> bool:
        """Is this the only time that the module of ``op`` does this?"""
        return sum(other.module == op.module and other.target == op.target for other in self.ops) == 1

    def follower(self, op: Op) -> bool:
        """Can the module of ``op`` share the mask of what it reads?"""
        module = self.module(op)
        kind = "BatchNorm" if op.target == NORM else "Conv"
        return type(module) in FOLLOWING[kind] and "forward" not in vars(module) and self.once(op)


def depthwise(scene: Scene, op: Op) -> bool:
    """Does each input channel of the convolution ``op`` make channels of its own?"""
    return op.target == CONVOLUTION and 1 < op.args[8] == scene.rec.values[op.args[0].value].shape[1] and not op.args[6]


def sites(scene: Scene) -> tuple[tuple[Site, ...], tuple[tuple[str, str], ...]]:
    """Return where gates can sit, and (path, reason) of the other layers with weights, in the order they run."""
    found: list[Site] = []
    dense: dict[str, str] = {}
    for op in scene.weighted:
        if op.module in dense or any(site.path == op.module for site in found):
            continue
        site = _site(scene, op)
        if isinstance(site, Site):
            found.append(site)
        else:
            dense[op.module] = site
    named = {site.path for site in found} | dense.keys()
    for path, module in scene.model.named_modules():
        if type(module) in NORMS and path not in named and not path.endswith(".gate.predictor"):
            dense[path] = "it does not run on the example in eval mode"
    return tuple(found), tuple(dense.items())


def _site(scene: Scene, op: Op) -> Site | str:
    """Return the site of the layer that ``op`` is the work of, or why it cannot be gated."""
    layer, rec = scene.module(op), scene.rec
    owner = scene.model.get_submodule(op.module.rpartition(".")[0])
    if isinstance(owner, Gated | Follower):
        return "it has a gate"
    if type(layer) not in NORMS:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in NORMS)
        return f"a gate takes the place of a plain {kinds}; this is {type(layer).__name__}"
    if "forward" in vars(layer) or 0 in layer.weight.shape:
        return "a cut left it without units, or changed its forward"
    runs = sum(other.module == op.module for other in scene.weighted)
    if runs != 1:
        return f"it runs {runs} times in one forward pass"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding mode {layer.padding_mode!r} is not zeros"
    if scene.everywhere and depthwise(scene, op):
        return "depthwise: its channels are those of its input, and no gate decides about these"
    last = [other for other in scene.ops if other.module == op.module][-1]
    value, norm = last.outs[0], ""
    if value is None or len(rec.values[value].shape) < 2 or rec.values[value].shape[0] != scene.batch:
        return "its rows are not samples, and a gate decides per sample"
    following = scene.readers.get(value, [])
    if len(following) == 1 and following[0].target == NORM:
        norm = following[0].module
        module = scene.module(following[0])
        if not isinstance(module, NORMS[type(layer)]) or not module.affine or not module.track_running_stats:
            return "its batch norm has no scale or no running statistics"
        if not scene.once(following[0]) or "forward" in vars(module):
            return "its batch norm runs several times in one forward pass"
        value = following[0].outs[0]
    if value is None:
        return "it gives no tensor"
    why = _why(scene, value)
    if not why and isinstance(layer, nn.Linear) and not scene.everywhere:
        return "a linear layer, which gets a gate with everywhere"
    return why or Site(op.module, norm, value)


def _why(scene: Scene, value: int) -> str:
    """Return "" when zeros stay zeros on every way from ``value`` to an activation or a consumer, else why not."""
    todo, seen = [(value, False)], {value}
    if not scene.readers.get(value) and value not in scene.rec.outputs:
        return "nothing reads it"
    while todo:
        value, activated = todo.pop()
        if value in scene.rec.outputs:
            return "its values are an output of the model"
        for op in scene.readers.get(value, []):
            step = _step(scene, op, value)
            if step and not activated:
                return step
            if step is None or (activates(op) and scene.everywhere):  # a plan cuts no outputs, activated or not
                fresh = {out for out in op.outs if out is not None} - seen
                seen |= fresh
                todo += [(out, activated or activates(op)) for out in fresh]
    return ""


def _step(scene: Scene, op: Op, value: int) -> str | None:
    """Return "" where a way ends well, None where it goes on behind ``op``, else the reason against a gate."""
    if activates(op):
        return ""
    if op.target in (PASSING if scene.everywhere else SIMPLE):
        return None
    where = f"{op.target} in {op.module or 'the model'}"
    if not scene.everywhere:
        return f"{where} follows, not an activation that keeps 0"
    if op.target == NORM or depthwise(scene, op):
        return None if scene.follower(op) else f"{where} follows, and cannot share its mask"
    if op in scene.weighted and not _is_weight(scene, op, value):
        return ""
    return f"{where} follows, which does not keep what is zero apart"


def _is_weight(scene: Scene, op: Op, value: int) -> bool:
    """Is ``value`` the filter or matrix of the product ``op``?"""
    place = {CONVOLUTION: 1, "aten::addmm": 2}.get(op.target, 1)
    return isinstance(op.args[place], Ref) and op.args[place].value == value


def followers(scene: Scene, chosen: Collection[Site]) -> tuple[tuple[Following, ...], frozenset[str]]:
    """Return what must share the masks of gates at ``chosen``, and the convolutions that do, in the order they run."""
    held: dict[int, Held] = {}
    found: list[Following] = []
    sharing: list[str] = []
    gates = {site.value: site.path for site in chosen}
    taken = {path for site in chosen for path in (site.path, site.norm)}
    for op in scene.ops:
        if op.target in (NORM, CONVOLUTION) and op.module not in taken:
            flow = _shared(scene, op, held)
            if flow is not None:
                shifts = op.target == NORM or op.args[2] is not None
                found += [Following(op.module, flow)] if shifts else []  # a shift or a bias: its zeros are none
                sharing += [op.module] if op.target == CONVOLUTION else []
                held |= _held(scene, flow, op.outs[0], 1)
        else:
            held |= passed(scene.rec, op, held)
        for out in op.outs:
            if out in gates:
                layer: Any = scene.model.get_submodule(gates[out])
                axis = -1 if isinstance(layer, nn.Linear) else 1
                held |= _held(scene, Flow.of(gates[out], len(layer.weight)), out, axis)
    return tuple(found), frozenset(sharing)


def _held(scene: Scene, flow: Flow, value: int | None, axis: int) -> dict[int, Held]:
    one = None if value is None else Held.on(flow, len(scene.rec.values[value].shape), axis)
    return {} if one is None or value is None else {value: one}


def _shared(scene: Scene, op: Op, held: Mapping[int, Held]) -> Flow | None:
    """Return the flow of a batch norm or depthwise convolution without a gate; None where it cannot follow one."""
    source, out = op.args[0].value, op.outs[0]
    if source not in held or out is None or not (op.target == NORM or depthwise(scene, op)):
        return None
    before, after = scene.rec.values[source].shape[1], scene.rec.values[out].shape[1]
    flow = held[source].along(1, before)
    if flow is None or not flow.decided or not scene.follower(op):
        return None
    return flow.pick(torch.arange(after) // (after // before))
