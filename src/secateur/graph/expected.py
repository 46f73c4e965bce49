"""What the integer arguments of a recorded call become on the smaller model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from secateur.graph.calls import MAKES, SCALARS, SHAPES, SLICES, SPLITS, BoundCall, Ids

RATIO = "ratio"  # (RATIO, a, b): what Python computes times a / b, for sizes that also hold a batch
Path = tuple[Any, ...]
Changes = list[tuple[Path, Any]]


def changes(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    """Return [(path into (args, kwargs), new value)] where ``args`` as Python computed them are wrong.

    A path starts with ``0`` (args) or ``1`` (kwargs).  The path ``("sizes",)`` asks for a split into given sizes.
    """
    if call.name in SHAPES or call.name in MAKES:
        return _shape(call, kept, args, kwargs)
    if call.name in SPLITS:
        return _split(call, kept, args, kwargs)
    if call.name in SLICES:
        return _slices(call, kept, args, kwargs)
    if call.name in SCALARS:
        return _scalar(call, kept, args, kwargs)
    rule = _RULES.get(call.name)
    return rule(call, kept, args, kwargs) if rule else []


def unitless(call: BoundCall, path: Path) -> bool:
    """Does the size at ``path`` belong to an axis without units (any more)?"""
    if call.name in SPLITS:
        return call.inputs[0][_dim(call.args, call.kwargs, len(call.shapes[0]))] is None
    paths, shift = _sizes_at(call, call.args, call.kwargs)
    if path not in paths or not call.results or paths.index(path) + shift >= len(call.results[0]):
        return False
    return call.results[0][paths.index(path) + shift] is None


def size(ids: np.ndarray | None, kept: np.ndarray, dense: int) -> int:
    """Kept positions of an axis."""
    return int(kept[ids].sum()) if ids is not None else dense


def _sizes_at(call: BoundCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Path], int]:
    """Paths of the size arguments and the result axis of the first one."""
    first = 0 if call.name in ("zeros", "ones", "full", "empty", "rand", "randn") else 1
    shift = 0
    if call.name == "unflatten":
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        shift = dim % (len(call.shapes[0]) or 1)
        first = 2
    if len(args) > first and isinstance(args[first], int):
        return [(0, k) for k in range(first, len(args))], shift
    if len(args) > first and isinstance(args[first], list | tuple):
        return [(0, first, k) for k in range(len(args[first]))], shift
    for name in ("shape", "size", "sizes"):
        if isinstance(kwargs.get(name), list | tuple):
            return [(1, name, k) for k in range(len(kwargs[name]))], shift
    return [], shift


def fetch(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    """Return the value at a path."""
    value: Any = (args, kwargs)
    for step in path:
        value = getattr(value, step) if step in ("start", "stop") else value[step]
    return value


def _shape(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    paths, shift = _sizes_at(call, args, kwargs)
    if not call.results:
        return []
    ids, dense = call.results[0], call.result_shapes[0]
    given = [fetch(args, kwargs, p) for p in paths]
    views = call.name in ("view", "reshape", "unflatten")
    infer = -1 in given or not views
    out: Changes = []
    for k, (path, value) in enumerate(zip(paths, given, strict=True)):
        own = ids[k + shift] if k + shift < len(dense) else None
        if own is None or value == -1 or not isinstance(value, int):
            continue
        want = size(own, kept, dense[k + shift])
        if value == want:
            continue
        given[k] = want
        repeated = len(np.unique(own[own >= 0])) < int((own >= 0).sum())
        if repeated and not infer:
            want, infer = -1, True  # also holds a batch or a window: let the shape tell
        out.append((path, (RATIO, want, value) if repeated and want > 0 < value else want))
    return (
        out + _derived(call, kept, args, list(zip(paths, range(shift, shift + len(paths)), strict=True)))
        if views
        else out
    )


def _derived(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], slots: list[tuple[Path, int]]) -> Changes:
    """Sizes without units that Python derived from one that was cut: ``C // heads``, ``n = x.numel() // 400``.

    Only when the tensor has exactly the elements that the dense sizes and the kept units ask for: a size that
    depends on values (boxes, routed tokens) may differ for reasons of its own.
    """
    ids, dense = call.results[0], call.result_shapes[0]
    expected = [size(own, kept, n) for own, n in zip(ids, dense, strict=True)]
    if not hasattr(args[0], "numel") or args[0].numel() != int(np.prod(expected)):
        return []
    out: Changes = []
    for path, k in slots:
        value = fetch(args, {}, path) if path[0] == 0 else -1
        if k < len(dense) and ids[k] is None and isinstance(value, int) and value >= 0 and value != dense[k]:
            out.append((path, (RATIO, dense[k], value) if value else dense[k]))
    return out


def _scalar(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    """A number computed from a size that was cut (sqrt(C), 1 / C) keeps the value it had in the dense model.

    What differs here may also depend on the data: ``fit`` asks the masked model, which has the dense sizes.
    """
    out: Changes = []
    for k, dense in enumerate(call.args):
        now = args[k] if k < len(args) else None
        if type(dense) in (int, float) and type(now) in (int, float) and abs(now - dense) > 1e-6 * abs(dense):
            out.append(((0, k), dense))
    return out


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> int:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return int(dim) % rank


def _split(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    dim = _dim(args, kwargs, len(call.shapes[0]))
    ids = call.inputs[0][dim]
    if ids is None:
        return []
    want = [size(r[dim], kept, s[dim]) for r, s in zip(call.results, call.result_shapes, strict=True)]
    total = size(ids, kept, call.shapes[0][dim])
    how = args[1] if len(args) > 1 else next(iter(v for k, v in kwargs.items() if k != "dim"), 1)
    if isinstance(how, list | tuple):
        return [] if list(how) == want else [(("sizes",), want)]
    if call.name in ("chunk", "unsafe_chunk"):
        how = -(-total // how)
    elif call.name == "tensor_split":
        return [(("sizes",), want)]
    now = [min(how, total - s) for s in range(0, total, max(how, 1))]
    return [] if now == want else [(("sizes",), want)]


def _slices(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    if call.name == "narrow":
        dim = int(args[1]) % len(call.shapes[0])
        ids = call.inputs[0][dim]
        if ids is None or not isinstance(call.args[2], int):
            return []
        start, length = call.args[2], call.args[3]
        want = int(kept[ids[:start]].sum()), int(kept[ids[start : start + length]].sum())
        return [((0, k), w) for k, w in zip((2, 3), want, strict=True) if args[k] != w]
    index = call.args[1]
    now = args[1]
    parts = index if isinstance(index, tuple) else (index,)
    out: Changes = []
    axis = 0
    named = sum(1 for p in parts if p is not None and p is not Ellipsis)
    for n, part in enumerate(parts):
        if part is Ellipsis:
            axis += len(call.shapes[0]) - named
            continue
        if part is None:
            continue
        ids = call.inputs[0][axis] if axis < len(call.inputs[0]) else None
        if isinstance(part, slice) and ids is not None and part.step in (None, 1):
            base: Path = (0, 1, n) if isinstance(index, tuple) else (0, 1)
            actual = now[n] if isinstance(index, tuple) else now
            out += _one_slice(part, actual, ids, kept, base)
        axis += 1
    return out


def _one_slice(part: slice, actual: slice, ids: np.ndarray, kept: np.ndarray, base: Path) -> Changes:
    out: Changes = []
    start, stop, _ = part.indices(len(ids))
    total = int(kept[ids].sum())
    for name, dense, at in (("start", part.start, start), ("stop", part.stop, stop)):
        if dense is None:
            continue
        want = int(kept[ids[:at]].sum())
        now = getattr(actual, name)
        effective = slice(None, now).indices(total)[1]
        if effective != want:
            out.append(((*base, name), want))
    return out


def _repeat(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    paths, _ = _sizes_at(call, args, kwargs)
    ids, dense = call.results[0], call.result_shapes[0]
    lead = len(dense) - len(call.shapes[0])
    out: Changes = []
    for k, path in enumerate(paths):
        at = k + len(dense) - len(paths)
        single = at < lead or call.shapes[0][at - lead] == 1
        if ids[at] is not None and single:
            want = size(ids[at], kept, dense[at])
            if fetch(args, kwargs, path) != want:
                out.append((path, want))
    return out


def _interleave(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    """Heads repeated within each group of queries: the number of repeats may be what shrinks."""
    path: Path = (0, 1) if len(args) > 1 else (1, "repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    now = fetch(args, kwargs, path)
    if not isinstance(dim, int) or not isinstance(now, int):
        return []
    each = size(call.inputs[0][dim], kept, call.shapes[0][dim])
    want, rest = divmod(size(call.results[0][dim], kept, call.result_shapes[0][dim]), max(each, 1))
    return [] if rest or now == want else [(path, want)]


def _pad(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    path: Path = (0, 1) if len(args) > 1 else (1, "pad")
    dense = list(fetch(call.args, call.kwargs, path))
    want = list(fetch(args, kwargs, path))
    for k in range(len(dense) // 2):
        ids = call.results[0][len(call.result_shapes[0]) - 1 - k]
        if ids is not None:
            want[2 * k] = int(kept[ids[: dense[2 * k]]].sum())
            want[2 * k + 1] = int(kept[ids[len(ids) - dense[2 * k + 1] :]].sum())
    return [] if want == list(fetch(args, kwargs, path)) else [(path, want)]


def _roll(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    path: Path = (0, 1) if len(args) > 1 else (1, "shifts")
    dims = args[2] if len(args) > 2 else kwargs.get("dims")
    dense, now = fetch(call.args, call.kwargs, path), fetch(args, kwargs, path)
    if dims is None:
        return []
    many = isinstance(dense, list | tuple)
    want = []
    for shift, dim, old in zip(*(x if many else [x] for x in (dense, dims, now)), strict=False):
        ids = call.inputs[0][dim]
        if ids is None:
            want.append(old)
            continue
        shift %= len(ids)
        want.append(int(kept[ids[len(ids) - shift :]].sum()) if shift else 0)
    target: Any = want if many else want[0]
    return [] if (list(now) if many else now) == target else [(path, target)]


def _layer_norm(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    path: Path = (0, 1) if len(args) > 1 else (1, "normalized_shape")
    now = list(fetch(args, kwargs, path))
    rank = len(call.shapes[0])
    want = [
        size(call.inputs[0][rank - len(now) + k], kept, call.shapes[0][rank - len(now) + k]) for k in range(len(now))
    ]
    return [] if now == want else [(path, want)]


def _group_norm(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    """Whole groups go, or equal positions of all groups: count the groups that have something left."""
    path: Path = (0, 1) if len(args) > 1 else (1, "groups" if "shuffle" in call.name else "num_groups")
    ids = call.inputs[0][1]
    if ids is None:
        return []
    dense = fetch(call.args, call.kwargs, path)
    want = int(kept[ids].reshape(dense, -1).any(axis=1).sum())
    return [] if fetch(args, kwargs, path) == want else [(path, want)]


def _attention(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    ids, dense = call.inputs[0][-1], call.shapes[0][-1]
    now = kwargs.get("scale") or size(ids, kept, dense) ** -0.5
    want = call.kwargs.get("scale") or dense**-0.5  # the scale of the dense model keeps its meaning
    return [((1, "scale"), want)] if abs(now - want) > 1e-6 * want else []


def _convolution(call: BoundCall, kept: np.ndarray, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changes:
    groups = conv_groups(call, kept)
    at = 6
    path: Path = (0, at) if len(args) > at else (1, "groups")
    now = args[at] if len(args) > at else kwargs.get("groups", 1)
    return [] if now == groups else [(path, groups)]


def conv_groups(call: BoundCall, kept: np.ndarray) -> int:
    """Number of groups of a convolution call on the smaller model."""
    x, w = call.inputs[0], call.inputs[1]
    shape_x, shape_w = call.shapes[0], call.shapes[1]
    at = len(shape_x) - len(shape_w) + 1
    channels = size(x[at], kept, shape_x[at])
    if "transpose" in call.name:
        out = size(call.results[0][at], kept, call.result_shapes[0][at])
        return out // max(size(w[1], kept, shape_w[1]), 1)
    return channels // max(size(w[1], kept, shape_w[1]), 1)


_RULES: dict[str, Callable[..., Changes]] = {
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _interleave,
    "pad": _pad,
    "roll": _roll,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "channel_shuffle": _group_norm,
    "native_channel_shuffle": _group_norm,
    "scaled_dot_product_attention": _attention,
    **{f"conv{t}{n}d": _convolution for t in ("", "_transpose") for n in (1, 2, 3)},
}

__all__ = ["Changes", "Ids", "Path", "changes", "conv_groups", "fetch", "size"]
