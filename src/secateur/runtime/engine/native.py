"""Machine code of this computer: compile once, keep the object file in the user's own cache.

A cache entry is native code, so it is loaded only when it lies in a folder of the user that nobody else can write,
and the SHA-256 in its first bytes fits the rest.  Anything else is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding as llvm

from secateur.runtime.engine.driver import source
from secateur.types import EngineError

DIGEST = 32


@functools.cache
def lanes() -> int:
    """Return the floats per vector: 16 with AVX-512, 8 with AVX2; raises ``EngineError`` without either."""
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")):
        return 16
    if features.get("avx2") and features.get("fma"):
        return 8
    raise EngineError(f"the engine needs AVX2 and FMA; {llvm.get_host_cpu_name()} lacks them. Run the model itself.")


@functools.cache
def functions(width: int) -> tuple[Any, Any]:
    """Return the compiled ``run`` and ``help`` of ``driver.source`` for vectors of ``width`` floats."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine, key = _machine(width)
    text = source(width, llvm.get_process_triple())
    name = hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
    code = read(name)
    if code is None:
        code = _compile(machine, text)
        write(name, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _KEPT.append(engine)
    kinds = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int64]
    run = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address("run"))
    return run, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("help"))


_KEPT: list[Any] = []  # code lives as long as its compiler


def _machine(width: int) -> tuple[Any, str]:
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    if width == 16:
        features += ",-prefer-256-bit"
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
    return machine, f"{triple} {cpu} {features} llvmlite {llvmlite.__version__} rolled {llvm.llvm_version_info}"


def _compile(machine: Any, text: str) -> bytes:
    module = llvm.parse_assembly(text)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(3)
    tuning.loop_unrolling = False  # tiles fill the registers; unrolled, they spill
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def folder() -> Path:
    """Return the folder of the cache (below XDG_CACHE_HOME, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "secateur" / "engine"


def read(name: str) -> bytes | None:
    """Return the object code stored under ``name``; None when it is not there, damaged, or could be another's."""
    place = folder()
    try:
        if not (_own(place.lstat()) and _own((place / name).lstat())):
            return None
        content = (place / name).read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST], content[DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(name: str, code: bytes) -> None:
    """Store object code; where that is not possible, it is compiled again next time."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(place.lstat()):
            return
        handle, temporary = tempfile.mkstemp(dir=place)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, place / name)
    except OSError:
        return


def _own(found: os.stat_result) -> bool:
    """Belongs to this user, no link, and nobody else may write."""
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022
