"""Several processes that train one model, as ``torchrun`` starts them: who they are, and what they do together.

``torchrun`` tells each process its place in the environment.  Without it there is one process, ``ALONE``, and nothing
here does anything.  A process has one device; the recipe is that of one process.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Loaded before there is a group: defaults of its functions would hold that group for good, and its threads could then
# abort the process as it ends (pytorch/pytorch#190489). Optimisers load it, too.
import torch.distributed.nn
from torch import nn

from secateur.data import Dataset
from secateur.data.share import Share, held, share_of
from secateur.measure.quality import Quality
from secateur.measure.task import evaluate, task_of
from secateur.types import SecateurError

# How long one process waits for another. Processes that end are noticed at once; this is for those that hang.
PATIENCE = timedelta(minutes=30)
JOINING = timedelta(minutes=5)  # how long the first process waits for the last one to start
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CPU = torch.device("cpu")
T = TypeVar("T", bound=torch.Tensor)


class TeamError(SecateurError):
    """Processes of one run that do not fit together, or of which one ended."""


@dataclass(frozen=True)
class Team:
    """This process (``rank`` of ``size``, number ``local`` on its machine) and its ``device``.

    All processes must call the methods that pass values around in the same order; ``size`` 1 passes none.
    """

    device: torch.device = CPU
    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    def share(self, total: int) -> Share:
        """Return which rows of a batch of ``total`` this process takes."""
        return share_of(total, self.rank, self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by its sum over all processes, the same bits in each; return it."""
        if self.several:
            with _told():
                dist.all_reduce(tensor)
        return tensor

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of the whole batch, in order, from what each process holds of it; gradients flow back."""
        if not self.several:
            return rows
        share = held(len(rows))
        if not share.real:  # still part of the graph: the backward pass is a thing done together
            rows = rows.masked_fill(torch.ones_like(rows, dtype=torch.bool), 0)
        above, below = share.begin, share.total - share.end
        ends = (rows.new_zeros(n, *rows.shape[1:]) for n in (above, below))
        return _Sum.apply(torch.cat([next(ends), rows, next(ends)]), self)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes; a parameter without one anywhere keeps none."""
        if not self.several:
            return
        for some in _alike(p for p in parameters if p.requires_grad):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            present = [p.grad is not None for p in some]
            flags = some[0].new_tensor(present)
            _spread(self.sum_(_flat([*grads, flags])), [*grads, flags])
            if not all(present):  # to look waits for the device
                present = [bool(n) for n in flags.tolist()]
            for parameter, grad, found in zip(some, grads, present, strict=True):
                parameter.grad = grad if found else None

    def copy_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give every process the values of the first one."""
        for some in _alike(tensors.values()) if self.several else ():
            flat = _flat(some)
            with _told():
                dist.broadcast(flat, 0)
            _spread(flat, some)

    def same(self, text: str, what: str) -> None:
        """Raise ``TeamError``, in every process, unless all of them have the same ``text``."""
        if not self.several:
            return
        own = hashlib.sha256(text.encode()).digest()
        table = torch.zeros(self.size, len(own), dtype=torch.int32)
        table[self.rank] = torch.tensor(list(own), dtype=torch.int32)
        digests = [bytes(row).hex()[:16] for row in self.sum_(table).tolist()]
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise TeamError(
                f"{what} is not the same in all {self.size} processes: process 0 has the hash {digests[0]}, process "
                f"{others[0]} has {digests[others[0]]} ({len(others)} differ). The recipe, data, software and kind of "
                "device must be the same everywhere; continue from the last saved state with --resume."
            )

    def decided(self, choose: Callable[[], str]) -> str:
        """Return what ``choose`` returns in the first process, the only one that calls it.

        Where it raises there, the others raise ``TeamError``.
        """
        if not self.several:
            return choose()
        if not self.lead:
            failed, data = self._heard(None)
            if failed:
                raise TeamError(f"process 0 stopped: {data.decode()}")
            return data.decode()
        try:
            text = choose()
        except Exception as error:
            self._heard((True, str(error).encode()))
            raise
        self._heard((False, text.encode()))
        return text

    @contextmanager
    def copy_of(self, path: Path) -> Iterator[Path]:
        """Yield ``path`` or, beside the first process, a copy: a run folder need not be on every machine.

        A file that is missing is missing everywhere.
        """
        if not self.several:
            yield path
            return
        if self.lead:
            try:
                data = path.read_bytes()
            except OSError:
                self._heard((True, b""))
            else:
                self._heard((False, data))
            yield path
            return
        missing, data = self._heard(None)
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            copy = Path(folder) / path.name
            if not missing:
                copy.write_bytes(data)
            yield copy

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """Let the first process of each machine do something before the others, e.g. download."""
        if self.several and self.local:
            self._wait()
        yield
        if self.several and not self.local:
            self._wait()

    def dissolve(self) -> None:
        """Part: from here on each process works alone.  Waits until all are here."""
        if self.several and dist.is_initialized():
            self._wait()
            dist.destroy_process_group()

    def _wait(self) -> None:
        self.sum_(torch.zeros(1))

    def _heard(self, said: tuple[bool, bytes] | None) -> tuple[bool, bytes]:
        """Return the flag and the bytes that the first process says."""
        flag, data = said or (False, b"")
        head = torch.tensor([flag, len(data)])
        with _told():
            dist.broadcast(head, 0)
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            body = body if self.lead else torch.empty(int(head[1]), dtype=torch.uint8)
            if len(body):
                dist.broadcast(body, 0)
        return bool(head[0]), body.numpy().tobytes()


ALONE = Team()


def _alike(tensors: Iterable[T]) -> list[list[T]]:
    """Return the tensors in lists of one type and device each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def _spread(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Put what ``_flat`` joined back, whatever the order of the numbers in memory is."""
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))


class _Sum(torch.autograd.Function):
    """The sum over all processes; a loss that each of them holds a share of flows back as the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, team: Team) -> torch.Tensor:
        ctx.team = team
        return team.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.team.sum_(grads[0].contiguous().clone()), None


@contextmanager
def joined(device: torch.device = CPU) -> Iterator[Team]:
    """Yield this process's place among those that ``torchrun`` started, on ``device`` or its own one of that kind.

    A second ``joined`` inside finds the same team.  Raises ``TeamError`` when the environment is not complete, or when
    there are fewer CUDA devices than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(device)
        return
    missing = [name for name in PLACE if name not in os.environ]
    if missing:
        raise TeamError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} of the environment is missing; start with "
            "`torchrun --nproc-per-node N -m secateur run RECIPE`, or unset WORLD_SIZE."
        )
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    team = Team(_own(device, local), rank, size, local)
    if dist.is_initialized():
        yield team
        return
    _loopback()
    _join(team)
    try:
        team.same(team.device.type, "the kind of device")
        yield team
    except BaseException:
        if team.device.type == "cpu" and dist.is_initialized():  # NCCL may wait for what never comes: leave it
            dist.destroy_process_group()
        raise
    team.dissolve()


def _join(team: Team) -> None:
    """Make the group; raises ``TeamError`` when a process does not come."""
    with _told():
        store, _, _ = next(dist.rendezvous("env://", timeout=JOINING))
        store.set(f"secateur/{team.rank}", "here")
    names = [f"secateur/{rank}" for rank in range(team.size)]
    try:
        store.wait(names, JOINING)
    except RuntimeError as error:
        came = [store.check([name]) for name in names]
        raise TeamError(
            f"{sum(came)} of {team.size} processes came within {JOINING}, process {came.index(False)} did not; see its "
            "message, or start it."
        ) from error
    cuda = team.device.type == "cuda"
    with _told():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=team.rank,
            world_size=team.size,
            timeout=PATIENCE,
            device_id=team.device if cuda else None,
        )


def _own(device: torch.device, local: int) -> torch.device:
    """Return the device of process ``local`` of this machine."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise TeamError(f"device = '{device}': several processes take one device each; use cuda or auto.")
    count = torch.cuda.device_count()
    if local >= count:
        raise TeamError(
            f"process {local} of this machine has no CUDA device of its own: there are {count}; start {count} "
            "processes with --nproc-per-node, or set device: cpu."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _loopback() -> None:
    """Where all processes are on this machine, let gloo use its loopback: the host's name may lead nowhere."""
    here = os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]
    here = here or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
    if here and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextmanager
def _told() -> Iterator[None]:
    """Say what a failure of something done together means."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeamError(
            f"another process of this run ended or cannot be reached ({line}); see its message, then continue from "
            "the last saved state with --resume."
        ) from error


def quality(model: nn.Module, data: Dataset, part: str, size: int, team: Team = ALONE) -> Quality:
    """Return the quality of ``model`` on a part of ``data`` in batches of ``size``, which the processes divide.

    The result is that of one process bit for bit: batches stay whole, and their sums are added in the same order.
    """
    batches = data.part(part).split(size)
    mine = range(team.rank, len(batches), team.size)

    def all_rows(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        if not team.several:
            return rows
        table = torch.zeros(len(batches), task_of(model).columns, dtype=torch.float64, device=team.device)
        for number, row in zip(mine, rows, strict=True):
            table[number] = row
        return list(team.sum_(table))

    return evaluate(model, data.stream([batches[number] for number in mine]), all_rows, mine)
