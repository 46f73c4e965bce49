"""How much room there is for decoded images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from secateur.types import DataError

SHARE = 0.5  # of the free memory that decoded images may take; the rest is for the model and the batches
GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GROUP_USE = Path("/sys/fs/cgroup/memory.current")


def neighbours() -> int:
    """Return how many processes of one run share this machine (``torchrun`` says so), this one included."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_memory() -> int:
    """Return the bytes that can be allocated without swapping, also inside a container with a limit.

    Of several processes of one run on this machine, each gets its part.
    """
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    system = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemAvailable" in system:
        bounds.append(int(system["MemAvailable"].split()[0]) * 1024)
    limit, use = _text(GROUP_LIMIT).strip(), _text(GROUP_USE).strip()
    if limit.isdigit() and use.isdigit():
        bounds.append(max(0, int(limit) - int(use)))
    return min(bounds) // neighbours()


def fits(count: int, shape: Sequence[int]) -> bool:
    """Return whether ``count`` images of ``shape`` (channels, height, width) fit the memory, in bytes of uint8."""
    return count * math.prod(shape) <= SHARE * free_memory()


def demand(where: object, count: int, shape: Sequence[int]) -> None:
    """Raise ``DataError`` when ``count`` images of ``shape`` do not fit the memory."""
    if not fits(count, shape):
        need, room = count * math.prod(shape) / 2**30, SHARE * free_memory() / 2**30
        raise DataError(
            f"{where}: {count:,} images of {'x'.join(map(str, shape))} take {need:.1f} GiB decoded, {room:.1f} GiB "
            "may be used here; set a smaller data.image_size, or unpack them into an image folder, which is streamed."
        )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
