"""One network in every way that can run it, side by side: the table of ``secateur bench``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import resolve, runtime
from secateur.checkpoint import read_header
from secateur.folder import DENSE, GATED, PRUNED
from secateur.infer import Reader, open_model
from secateur.measure.latency import race
from secateur.prune import prune
from secateur.rebuild import built
from secateur.runtime.gates.cost import meter
from secateur.runtime.macs import macs
from secateur.runtime.plain import plain
from secateur.types import Budget, CheckpointError, DataError, MeasureError, SecateurError

TORCH_DENSE, ORT_DENSE = "torch, dense", "ONNX Runtime, dense"
MASKS, ENGINE, PORTABLE = "torch, masks", "engine", "portable (ONNX Runtime)"
TORCH_STATIC, ORT_STATIC = "torch, static of equal MACs", "ONNX Runtime, static of equal MACs"
Run = Callable[[torch.Tensor], Any]


@dataclass(frozen=True, eq=False)
class Networks:
    """The ``model`` of a checkpoint, what it was before gates or cuts, and a ``static`` one of its mean MACs.

    ``macs`` are multiply-accumulates per image: of the model on the images measured (mean), of the dense network, of
    the static one.  ``missing`` says why there is no static one.
    """

    model: nn.Module
    dense: nn.Module
    static: nn.Module | None
    gated: bool
    macs: tuple[float, float, float]
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """One way to run it: milliseconds per call (median, quartile range), times faster than the fastest dense one.

    ``why`` says why it could not run; then the numbers are None.
    """

    way: str
    batch: int
    threads: int
    macs: float | None = None
    ms: float | None = None
    spread: float | None = None
    speedup: float | None = None
    speedup_spread: float | None = None
    rounds: int = 0
    why: str = ""


@dataclass(frozen=True)
class Bench:
    """All rows, and on what they were measured."""

    checkpoint: str
    images: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]


def bench(
    path: str | Path,
    sizes: Sequence[int] = (1, 32),
    *,
    threads: int = 1,
    repeats: int = 30,
    root: str | None = None,
    trust: Iterable[str] = (),
) -> Bench:
    """Return how fast the network of a checkpoint (or of a run's folder) is, run in every way there is.

    All ways take turns in one process on the first test images (random ones where the data is not at hand: a
    controller then decides about noise).  Raises ``CheckpointError`` for a file that is none, ``MeasureError`` for
    numbers that measure nothing.
    """
    if min(sizes, default=0) < 1 or threads < 1 or repeats < 1:
        raise MeasureError(f"batch sizes, threads and repeats are 1 or more; got {list(sizes)}, {threads}, {repeats}.")
    file = chosen(Path(path))
    reader = open_model(file, trust)
    images, told = _images(reader, max(sizes), root)
    rows: list[Row] = []
    with _threads(threads):
        for size in sizes:
            networks = _networks(file, reader.model, images[:size], trust)
            rows += _rows(networks, images[:size], threads, repeats)
    machine = {"processor": _processor(), "torch": torch.__version__, "load": os.getloadavg()[0]}
    return Bench(str(file), told, machine, tuple(rows))


def chosen(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or what a run in that folder ends with."""
    if not path.is_dir():
        return path
    found = next((path / name for name in (GATED, PRUNED, DENSE) if (path / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{path} holds no {GATED}, {PRUNED} or {DENSE}; give a checkpoint or a run's folder.")
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _images(reader: Reader, count: int, root: str | None) -> tuple[torch.Tensor, str]:
    """Return ``count`` test images, over and over if there are fewer, else random ones; and which these are."""
    try:
        data = resolve.dataset(reader.data.model_copy(update={"root": root} if root else {}), reader.seed)
        found = next(iter(data.batches("test", count)))[0]
        if tuple(found.shape[1:]) != reader.shape:
            raise DataError(f"the images are {tuple(found.shape[1:])}, the model was made for {reader.shape}")
        return found.repeat(-(-count // len(found)), 1, 1, 1)[:count], f"test images of {data.source.name}"
    except (DataError, OSError) as error:
        made = torch.randn(count, *reader.shape, generator=torch.Generator().manual_seed(0))
        return made, f"random images ({error})"


def _networks(file: Path, model: nn.Module, images: torch.Tensor, trust: Iterable[str]) -> Networks:
    header = read_header(file)
    gated = bool(header.gates)
    dense = plain(model) if gated else built(header, file.stat().st_size, trust) if header.surgery else model
    dense, one = dense.eval(), images[:1]
    whole, mean = meter(dense, one).dense, float(macs(model, images).mean())
    if not gated:
        missing = "" if header.surgery else "the checkpoint is dense: neither pruned nor gated"
        return Networks(model, dense, model if header.surgery else None, False, (mean, whole, mean), missing)
    if mean == whole:
        return Networks(model, dense, dense, True, (mean, whole, whole))
    try:
        static = prune(dense, one, Budget(macs=mean / whole), allocation="uniform", round_to=None).eval()
    except SecateurError as error:
        return Networks(model, dense, None, True, (mean, whole, mean), str(error))
    return Networks(model, dense, static, True, (mean, whole, meter(static, one).dense))


def _rows(networks: Networks, images: torch.Tensor, threads: int, repeats: int) -> list[Row]:
    """Measure every way that can run; the others say why not."""
    model, dense, static = networks.model, networks.dense, networks.static
    mean, whole, less = networks.macs
    makers: dict[str, tuple[float, Callable[[], Run]]] = {
        TORCH_DENSE: (whole, lambda: dense),
        ORT_DENSE: (whole, lambda: _compiled(dense, images, threads, "portable")),
        MASKS: (whole, lambda: model if networks.gated else _refused("no gates: there are no masks")),
        ENGINE: (mean, lambda: _compiled(model, images, threads, "engine")),
        PORTABLE: (mean, lambda: _compiled(model, images, threads, "portable")),
        TORCH_STATIC: (less, lambda: static or _refused(networks.missing)),
        ORT_STATIC: (
            less,
            lambda: _compiled(static, images, threads, "portable") if static else _refused(networks.missing),
        ),
    }
    runs, why = {}, {}
    for way, (_, make) in makers.items():
        try:
            runs[way] = make()
        except SecateurError as error:
            why[way] = str(error)
    times, gains = race(runs, images, {TORCH_DENSE, ORT_DENSE} & runs.keys(), repeats=repeats)
    rows = []
    for way, (work, _) in makers.items():
        if way in why:
            rows.append(Row(way, len(images), threads, why=why[way]))
            continue
        ms, gain = times[way], gains[way]
        rows.append(Row(way, len(images), threads, work, ms.value, ms.spread, gain.value, gain.spread, ms.n))
    return rows


def _compiled(model: nn.Module, images: torch.Tensor, threads: int, layer: str) -> Run:
    return runtime.compile(model, images, threads=threads, layer=layer).run or _refused("nothing was compiled")


def _refused(why: str) -> Any:
    raise MeasureError(why)


def text(result: Bench) -> str:
    """Return the tables, one per batch size."""
    load = result.machine["load"]
    lines = [f"{result.checkpoint} on {result.images}; {result.machine['processor']}, load {load:.1f}"]
    for size in dict.fromkeys(row.batch for row in result.rows):
        rows = [row for row in result.rows if row.batch == size]
        rounds, threads = max(row.rounds for row in rows), rows[0].threads
        lines.append(f"\nbatch {size}, {threads} thread{'s' * (threads > 1)}, median of {rounds} interleaved rounds")
        lines.append(f"{'':<36}{'ms':>10}{'+-':>8}{'speed-up':>10}{'+-':>6}{'MACs per image':>18}")
        for row in rows:
            if row.ms is None:
                lines.append(f"{row.way:<36}  not run: {row.why}")
            else:
                cells = f"{row.ms:>10.3f}{row.spread:>8.3f}{row.speedup:>10.2f}{row.speedup_spread:>6.2f}"
                lines.append(f"{row.way:<36}{cells}{row.macs:>18,.0f}")
    lines.append("\n+- is the quartile range; speed-up is over the fastest dense way, round by round.")
    return "\n".join(lines)
