"""Run one function in a process of its own, with a time and a memory limit; a crash is a value."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def preload(modules: list[str]) -> None:
    """Import ``modules`` once in the server that new processes are forked from (it never runs a model)."""
    _CONTEXT.set_forkserver_preload(modules)


def isolated(function: Callable[..., Any], *args: Any, timeout: float, memory: float) -> dict[str, Any]:
    """Return ``function(*args)`` (a JSON value) from a new process.

    ``timeout`` in seconds, ``memory`` in GB of address space.  A crash, a timeout or an exception becomes
    ``{"status": "error", "reason": ...}``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        process = _CONTEXT.Process(target=_child, args=(function, args, str(path), memory))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return {"status": "error", "reason": f"took more than {timeout:.0f} s"}
        if path.exists():
            return json.loads(path.read_text())
        return {"status": "error", "reason": f"the process died with exit code {process.exitcode}"}


def _child(function: Callable[..., Any], args: tuple[Any, ...], path: str, memory: float) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
    try:
        answer = function(*args)
    except BaseException as error:
        answer = {
            "status": "error",
            "reason": f"{type(error).__name__}: {error}"[:400],
            "trace": traceback.format_exc()[-1500:],
        }
    part = Path(path + ".part")
    part.write_text(json.dumps(answer))
    part.rename(path)
