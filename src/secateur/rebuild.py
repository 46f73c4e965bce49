"""From the header of a checkpoint to the model it describes: build, operate, fill, compare."""

from __future__ import annotations

import difflib
import importlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.compact import copy_model
from secateur.header import Header, canonical
from secateur.types import CheckpointError, SecateurError

BUILD_LIMIT = 2**30  # bytes that building a model may allocate when a file names it; or 64 times the file
SMALLEST = 2**16  # bytes each allocation counts at least, so that endless tiny layers stop too
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def spec_of(model: nn.Module) -> Any:
    """Return the ``Spec`` of ``model`` or ``None``; see ``secateur.models.build``."""
    # models come after checkpoints in the order of imports; only names cross here (docs/decisions.md)
    return importlib.import_module("secateur.models.build").spec_of(model)


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer of ``model`` under every name it has."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def temporary(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the buffers that ``state_dict`` leaves out."""
    return tuple(
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(leaf) is not None
    )


def looks(model: nn.Module) -> dict[str, str]:
    """Return class and settings of each module: what ``print(model)`` shows, without memory addresses."""
    return {
        path: f"{type(module).__name__}({re.sub(r' at 0x[0-9a-f]+', '', module.extra_repr())})"
        for path, module in model.named_modules(remove_duplicate=False)
    }


class _Ration(TorchDispatchMode):
    """Refuse to allocate more than ``limit`` bytes in all: the sizes come from a file nobody vouches for."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # as in trace.py

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.left = limit, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        sizes = given.get("size", given.get("end", given.get("steps", given.get("n"))))
        if sizes is not None and ("self" not in given or func._schema.name.startswith("aten::new_")):
            sizes = sizes if isinstance(sizes, list | tuple) else [sizes]
            itemsize = (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            self.left -= max(SMALLEST, math.prod(max(0, int(size)) for size in sizes) * itemsize)
            if self.left < 0:
                raise CheckpointError(
                    f"the model it describes takes more than {self.limit:,} bytes to build, far more than "
                    "the file holds; if that is right, build it yourself and pass it as model=."
                )
        return func(*args, **kwargs)


def built(header: Header, file_size: int, trust: Iterable[str]) -> nn.Module:
    """Return the dense model that the header names, leaving the random state of the process as it was."""
    if header.spec is None:
        raise CheckpointError(
            f"it does not say how to build its model (class {header.class_name!r}); pass the dense model as "
            "model=, or make models with secateur.models.build so that checkpoints know."
        )
    make = importlib.import_module("secateur.models.build")
    if not make.trusted(header.spec, trust):
        module = header.spec.partition(":")[0]
        raise CheckpointError(
            f"to build its model it imports {module!r} and calls {header.spec!r}; if that is your own code, "
            f"pass trust=[{module!r}], or build the dense model yourself and pass it as model=."
        )
    limit = max(BUILD_LIMIT, 64 * file_size)
    with torch.random.fork_rng(devices=[]), _Ration(limit):
        return make.build(header.spec, **header.kwargs)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of the caller's model on the CPU."""
    try:
        twin = copy_model(model, {})
        return twin.to_empty(device="cpu") if any(t.is_meta for t in named(twin).values()) else twin.cpu()
    except Exception as error:  # whatever a stranger's __deepcopy__ raises
        raise CheckpointError(f"the model passed as model= cannot be copied: {error}") from error


def operated(header: Header, model: nn.Module) -> nn.Module:
    """Return the small model: the surgery of the header done on ``model``, unless it had it already."""
    if header.surgery is None:
        return model
    compact = importlib.import_module("secateur.compact")
    try:
        surgery = compact.Surgery.from_json(canonical(header.surgery))
        if getattr(model, "_secateur", None) == surgery:
            return model
        with torch.random.fork_rng(devices=[]):
            return compact.reshape(model, surgery)
    except Exception as error:  # a surgery for another model can fail anywhere in it
        raise CheckpointError(f"its surgery does not fit the model: {type(error).__name__}: {error}") from error


def gates_of(model: nn.Module) -> tuple[nn.Module, tuple[dict[str, Any], ...], dict[str, int] | None]:
    """Return the model inside a controller's hands, its gates as JSON objects, and the sizes of the controller."""
    runtime = importlib.import_module("secateur.runtime.gates")
    steering = model.controller.sizes if isinstance(model, runtime.Steered) else None
    inner = model.model if isinstance(model, runtime.Steered) else model
    return inner, runtime.rows(inner), steering


def gated(header: Header, model: nn.Module) -> nn.Module:
    """Return the model with the gates of the header on it (``model`` itself is changed), unless it has them."""
    runtime = importlib.import_module("secateur.runtime.gates")
    try:
        inner = model.model if isinstance(model, runtime.Steered) else model
        with torch.random.fork_rng(devices=[]):
            if not runtime.layers(inner):
                runtime.restore_(inner, header.gates)
            if header.steering is not None and inner is model:
                return runtime.Steered.of(model, header.steering)
        return model
    except SecateurError as error:
        raise CheckpointError(f"its gates do not fit the model: {error}") from error


def fill(header: Header, model: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors of the file into ``model``; check first that every name, shape and kind fits."""
    have = named(model)
    owner = {name: name for name in stored} | header.aliases
    if not {*owner.values(), *header.pairs} <= set(stored):
        raise CheckpointError("its header names tensors that the file does not hold; get a fresh copy.")
    _check_names(model, have, owner, set(header.temporary))
    tensors = {name: _restored(header, name, tensor) for name, tensor in stored.items()}
    for name, first in owner.items():
        _check_fits(name, tensors[first], have.get(name), name in header.temporary)
    placed: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, first in owner.items():  # an object is filled once; ties become what they are in the file
        current = have.get(name)
        if first not in placed:
            if current is None or id(current) in taken:
                current = nn.Parameter(tensors[first], False) if isinstance(current, nn.Parameter) else tensors[first]
            current.data = tensors[first]
            placed[first] = current
            taken.add(id(current))
        if placed[first] is not have.get(name):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, placed[first])
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(owner[name] not in header.frozen)


def compare(header: Header, model: nn.Module, versions: Mapping[str, str]) -> None:
    """Check that the rebuilt model looks like the saved one: settings such as an activation have no tensor.

    A difference is an error where the libraries are those of the file, else a warning: their text may differ.
    """
    now = looks(model)
    paths = [path for path in {**header.modules, **now} if header.modules.get(path) != now.get(path)]
    if not paths:
        return
    path = paths[0]
    text = (
        f"{len(paths)} modules are not as they were saved, first {path or 'the model'}: "
        f"{header.modules.get(path, 'absent')} in the file, {now.get(path, 'absent')} as built from "
        f"{header.spec!r}"
    )
    if all(header.versions.get(name) == version for name, version in versions.items()):
        raise CheckpointError(f"{text}. It was changed after it was built: pass the dense model as model=.")
    warnings.warn(f"{text}; saved with {header.versions}, loaded with {dict(versions)}.", stacklevel=3)


def _check_names(model: nn.Module, have: Iterable[str], owner: Iterable[str], extra: set[str]) -> None:
    free = set(temporary(model))
    missing = sorted(set(have) - set(owner) - free)
    unexpected = sorted(name for name in set(owner) - set(have) if not (name in extra and _empty_slot(model, name)))
    for names, what in (
        (missing, "the model has, but the file does not"),
        (unexpected, "the file has, but not the model"),
    ):
        if names:
            near = difflib.get_close_matches(names[0], unexpected if names is missing else missing, n=1)
            hint = f" (nearest on the other side: {near[0]})" if near else ""
            raise CheckpointError(
                f"{len(names)} tensors {what}, first {names[0]!r}{hint}; pass the right model as model=."
            )


def _empty_slot(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return leaf in model.get_submodule(path)._buffers
    except AttributeError:
        return False


def _check_fits(name: str, tensor: torch.Tensor, current: torch.Tensor | None, free: bool) -> None:
    if current is None:
        return
    if is_lazy(current):
        raise CheckpointError(f"{name!r} of the model has no shape yet; run the model once, then load.")
    if tensor.shape != current.shape and not free:
        raise CheckpointError(
            f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(current.shape)} in the model; "
            "pass the dense model that was saved, or its small form, as model=."
        )
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (tensor, current)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{name!r} is {tensor.dtype} in the file and {current.dtype} in the model.")


def _restored(header: Header, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that does not lean on the open file, in the layout it was saved from."""
    tensor = tensor.clone()
    if name in header.pairs:
        if (
            tensor.ndim < 1
            or tensor.shape[-1] != 2
            or tensor.dtype not in (torch.float16, torch.float32, torch.float64)
        ):
            raise CheckpointError(f"{name!r} should hold pairs of reals, but is {tensor.dtype} {tuple(tensor.shape)}.")
        tensor = torch.view_as_complex(tensor)
    if name in header.channels_last and tensor.ndim in LAYOUTS:
        tensor = tensor.contiguous(memory_format=LAYOUTS[tensor.ndim])
    return tensor
