"""The engine touches no byte outside its buffers: forbidden pages lie right behind (or before) each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from test_linear_gates import HEADS
from test_programs import NETS

TESTS = Path(__file__).parent
CODE = """
import ctypes, mmap, sys
import numpy as np, torch
torch.set_num_threads(1)
from random_nets import actions, network
from test_linear_gates import HEADS, classifier
from test_programs import gated
from secateur.runtime.engine import compile_engine
from secateur.runtime.engine.engine import Workspace

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
KEPT = []

def guarded(size, behind):
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    KEPT.append(memory)
    raw = np.frombuffer(memory, dtype=np.uint8)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(raw.ctypes.data + page * PAGE), PAGE, 0) == 0
    begin = (pages + 1) * PAGE - size if behind else PAGE
    return raw[begin : begin + size]

def tensor(like, behind):
    place = torch.from_numpy(guarded(like.nbytes, behind).view(np.float32)).reshape(like.shape)
    place.copy_(like)
    return place

empty = torch.empty
for seed in sys.argv[2:]:
    model, x = network(int(seed)) if seed.isdigit() else classifier(seed, 0.5) if seed in HEADS else gated(seed)
    engine = compile_engine(model, x, strict=True)
    chosen = actions(model, len(x))
    expected = engine(x, chosen) if chosen else engine(x)
    for behind in (True, False):
        space = guarded(len(engine._image), behind)
        engine._free[:] = [Workspace(engine._image, space)]
        torch.empty = lambda *size: tensor(torch.zeros(*size), behind)
        got = engine(tensor(x, behind), chosen) if chosen else engine(tensor(x, behind))
        torch.empty = empty
        assert engine._free[0].raw is space and torch.equal(got, expected), seed
    if sys.argv[1] == "overrun":
        engine.table[-1, 1 + 8] = 4  # the result is stored four bytes too far
        engine._free[:] = []
        torch.empty = lambda *size: tensor(torch.zeros(*size), True)
        engine(x, chosen) if chosen else engine(x)
print("clean")
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *args], capture_output=True, text=True, cwd=TESTS, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
def test_nothing_outside_the_buffers_is_touched() -> None:
    done = run("plain", *map(str, range(12)), *HEADS, *NETS)
    assert done.stdout.strip() == "clean", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
def test_the_forbidden_pages_notice() -> None:
    done = run("overrun", "1")
    assert done.returncode == -11, (done.returncode, done.stderr)
