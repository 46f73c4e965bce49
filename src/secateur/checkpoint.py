"""Save a model to one ``.safetensors`` file and load it in another process, without pickle.

The file holds every parameter and buffer once (tied tensors under one name, non-persistent buffers too) and
the JSON header of ``secateur.header``.  ``load`` checks every name, shape, kind and digest before it hands
out a model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur import rebuild
from secateur.header import KEY, Header, data_digest
from secateur.types import CheckpointError, Measurement, Plan, Proof, SecateurError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format
STORABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex128, torch.complex64, torch.complex32,
}  # fmt: skip


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    proof: Proof | None = None,
    measurements: Iterable[Measurement] = (),
    recipe: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` (dense, masked or compacted) to one ``.safetensors`` file and return its path.

    The file appears whole or not at all.  ``recipe`` is a recipe hash; ``extra`` takes JSON values, e.g. the
    class names for ``predict``.  Raises ``CheckpointError`` for what such a file cannot hold (sparse,
    quantised, lazy or meta tensors, extra state, values that are not JSON) and when the disk refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(nn.Linear(2, 3), f"{folder}/a.safetensors")
    ...     load(path, model=nn.Linear(2, 3)).weight.shape
    torch.Size([3, 2])
    """
    path = Path(path)
    model = _unwrap(model)
    owners, aliases = _owners(model)
    tensors = _storable(owners)
    inner, gates, steering = rebuild.gates_of(model)
    spec = rebuild.spec_of(inner)
    surgery = getattr(inner, "_secateur", None)
    try:
        header = Header(
            class_name=f"{type(model).__module__}:{type(model).__qualname__}",
            spec=spec.spec if spec else None,
            kwargs=dict(spec.kwargs) if spec else {},
            modules=rebuild.looks(model),
            aliases=aliases,
            frozen=tuple(n for n, t in owners.items() if isinstance(t, nn.Parameter) and not t.requires_grad),
            temporary=rebuild.temporary(model),
            pairs=tuple(name for name, tensor in owners.items() if tensor.is_complex()),
            channels_last=tuple(name for name, tensor in owners.items() if _channels_last(tensor)),
            surgery=json.loads(surgery.to_json()) if surgery is not None else None,
            gates=gates,
            steering=steering,
            plan=plan,
            proof=proof,
            measurements=tuple(measurements),
            recipe=recipe,
            extra=json.loads(json.dumps(dict(extra or {}))),
            versions=_versions(spec.spec if spec else ""),
            data=data_digest(tensors.items()),
        )
        text = header.to_text()
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} was not saved: {error}") from error
    _write(path, tensors, {KEY: text})
    return path


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of a checkpoint without reading its tensors; raises ``CheckpointError``."""
    with _opened(Path(path)) as (header, _):
        return header


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    trust: Iterable[str] = (),
) -> nn.Module:
    """Return the model of a checkpoint, in eval mode on ``device``; call ``.train()`` to train it further.

    ``model`` is the dense model to start from, needed when the file does not say how to build it; it is
    copied and never changed.  ``trust`` names modules or packages of yours that the file may import to build
    the model (``"my.package:factory"``); registry, torchvision, timm and transformers names need none.
    Raises ``CheckpointError`` for a missing, damaged, foreign or unfitting file, and hands out no model then.
    """
    path = Path(path)
    if isinstance(trust, str):
        raise CheckpointError(f"trust takes a list of module names, e.g. trust=[{trust!r}]; got the text {trust!r}.")
    with _opened(path) as (header, file):
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if data_digest(stored.items()) != header.data:
            raise CheckpointError("its tensors were changed after it was saved (digest differs); get a fresh copy.")
        dense = rebuild.built(header, path.stat().st_size, trust) if model is None else rebuild.copied(model)
        target = rebuild.operated(header, dense)
        if header.gates:
            target = rebuild.gated(header, target)
        rebuild.fill(header, target, stored)
        if model is None:
            rebuild.compare(header, target, _versions(header.spec or ""))
    try:
        return target.eval().to(device)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path} was read, but cannot be moved to device {str(device)!r}: {error}") from error


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _owners(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors under their first names, and the first name of each further name."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"module {name!r} ({type(module).__name__}) keeps extra state that is no tensor.")
    first: dict[int, str] = {}
    owners, aliases = {}, {}
    for name, tensor in rebuild.named(model).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            owners[name] = tensor
    return owners, aliases


def _storable(owners: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous CPU tensors, each with a memory of its own."""
    tensors, seen = {}, set()
    for name, tensor in owners.items():
        _check_storable(name, tensor)
        plain = tensor.detach()
        if plain.is_complex():
            plain = torch.view_as_real(plain.resolve_conj())
        plain = plain.cpu().resolve_neg().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise CheckpointError(f"{name!r} has no shape yet; run the model once before saving it.")
    if tensor.is_meta:
        raise CheckpointError(f"{name!r} is on the meta device and holds no values; give it values before saving.")
    plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
    if not plain or tensor.dtype not in STORABLE:
        found = f"{type(tensor).__name__} ({tensor.layout}, {tensor.dtype})"
        raise CheckpointError(f"{name!r} is a {found}; a checkpoint holds plain dense tensors: convert it first.")


def _channels_last(tensor: torch.Tensor) -> bool:
    layout = rebuild.LAYOUTS.get(tensor.ndim)
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


def _versions(spec: str) -> dict[str, str]:
    """Return the versions of the libraries that decide what a model built from ``spec`` computes."""
    found = {}
    for name in ("secateur", "torch", spec.partition(":")[0].partition(".")[0]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            found[name] = importlib.metadata.version(name)
    return found


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write to a file beside ``path``, flush it to the disk, then rename it into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, metadata=metadata)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} was not saved: {error}. Is the folder there, writable and not full?") from error
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Header, Any]]:
    """Open a checkpoint; what goes wrong inside the block becomes a ``CheckpointError`` with the path."""
    try:
        _check_frame(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise CheckpointError(
                    "it is a safetensors file, but not of secateur (no 'secateur' entry); read it with "
                    "safetensors.torch.load_file and save the model again with sc.save."
                )
            yield Header.from_text(text), file
    except SecateurError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}; get a fresh copy.") from error


def _check_frame(path: Path) -> None:
    """Check the first eight bytes against the size of the file, so that nothing large is read in vain."""
    if not path.is_file():
        raise CheckpointError("there is no such file." if not path.exists() else "it is not a file.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"it is no safetensors file, or cut short ({size} bytes, its header would take {length}); get a fresh copy."
        )
