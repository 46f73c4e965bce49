"""The fast engine against the fastest dense runtime: ``python -m benchmarks.engine --json FILE``.

One row per network, density, threads and batch.  All candidates take turns inside each round; a number is the median
over rounds in milliseconds, ``best`` the smallest.  Random weights, saliencies that vary with the input.  The
speed-up is the ratio to the fastest of torch eager, torch.compile (``--compile``), ONNX Runtime and OpenVINO in the
same run, as far as they are installed; ``limit`` is the ratio of multiply-accumulates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.models.cifarnet import cifarnet
from secateur.models.vgg import vgg
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import FBS, gate
from secateur.runtime.gates.fbs import pooled
from secateur.runtime.macs import macs

Run = Callable[[], Any]
PROMISE = {("resnet18", 0.5): 2.0, ("resnet18", 0.25): 3.1, ("cifarnet", 0.5): 3.2, ("cifarnet", 0.25): 10.0}
PROMISE |= {("vgg16", 0.5): 2.4, ("vgg16", 0.25): 6.0}


def networks() -> dict[str, tuple[nn.Module, int]]:
    """Network and image side by name."""
    found: dict[str, tuple[nn.Module, int]] = {"cifarnet": (cifarnet(), 32), "vgg16": (vgg(), 32)}
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import resnet18

        found["resnet18"] = (resnet18(), 224)
    return {name: (model.eval(), side) for name, (model, side) in found.items()}


@torch.no_grad()
def curious(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give every predictor weights that move its saliencies by about a half over ``x``."""

    def calibrate(gate: FBS, args: Any) -> None:
        nn.init.normal_(gate.predictor.weight)
        seen = pooled(args[0], gate.pooling) @ gate.predictor.weight.T
        gate.predictor.weight.div_(2 * seen.std().clamp_min(1e-6))

    handles = [m.register_forward_pre_hook(calibrate) for m in model.modules() if isinstance(m, FBS)]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return model


def dense_runtimes(model: nn.Module, x: torch.Tensor, threads: int, compiled: bool) -> dict[str, Run]:
    """The dense network in every runtime that is installed."""

    def eager() -> None:
        with torch.no_grad():
            model(x)

    found: dict[str, Run] = {"torch": eager}
    if compiled:
        fast = torch.compile(model)

        def run() -> None:
            with torch.no_grad():
                fast(x)

        found["torch.compile"] = run
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "dense.onnx")
        if importlib.util.find_spec("onnx"):
            torch.onnx.export(model, (x,), file, dynamo=False)
        if Path(file).exists() and importlib.util.find_spec("onnxruntime"):
            found["onnxruntime"] = _onnxruntime(file, x, threads)
        if Path(file).exists() and importlib.util.find_spec("openvino"):
            found["openvino"] = _openvino(file, x, threads)
    return found


def _onnxruntime(file: str, x: torch.Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name, image = session.get_inputs()[0].name, x.numpy()
    return lambda: session.run(None, {name: image})


def _openvino(file: str, x: torch.Tensor, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    image = x.numpy()
    return lambda: request.infer([image], share_inputs=True)


def timed(runs: dict[str, Run], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of every candidate in every round, taking turns."""
    times = {name: np.empty(rounds) for name in runs}
    for run in runs.values():
        run()
        run()
    for number in range(rounds):
        for name in runs if number % 2 else reversed(runs):
            begin = time.perf_counter()
            runs[name]()
            times[name][number] = (time.perf_counter() - begin) * 1e3
    return times


def row(name: str, model: nn.Module, x: torch.Tensor, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, batch and number of threads: one per density."""
    runs = dense_runtimes(model, x, threads, args.compile)
    whole = compile_engine(model, x, strict=True, threads=threads)
    runs["engine dense"] = lambda: whole(x)
    limits = {}
    for density in args.density:
        gated = curious(gate(model, density, x).model, torch.randn(4, *x.shape[1:]))
        engine = compile_engine(gated, x, strict=True, threads=threads)
        runs[f"engine {density}"] = lambda engine=engine: engine(x)
        limits[density] = float(macs(model, x).sum() / macs(gated, x).sum())
    times = timed(runs, args.rounds)
    median = {key: float(np.median(value)) for key, value in times.items()}
    best = {key: float(np.min(value)) for key, value in times.items()}
    dense = [key for key in runs if not key.startswith("engine")]
    fastest, quickest = (min(dense, key=which.get) for which in (median, best))  # type: ignore[arg-type]
    rows = []
    for density in args.density:
        mine = f"engine {density}"
        rows.append({
            "network": name, "density": density, "threads": threads, "batch": len(x), "rounds": args.rounds,
            "dense_ms": {key: median[key] for key in dense}, "engine_dense_ms": median["engine dense"],
            "engine_ms": median[mine], "limit": limits[density], "fastest": fastest,
            "speedup": float(np.median(times[fastest] / times[mine])), "best_ms": best,
            "speedup_of_best": best[quickest] / best[mine], "promise": PROMISE.get((name, density)),
            "load": os.getloadavg()[0],
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network", nargs="*", default=None)
    parser.add_argument("--density", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--batch", nargs="*", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    print(f"{'network':10} {'d':>5} {'thr':>3} {'batch':>5} {'dense ms':>18} {'engine':>8} {'limit':>6} {'x':>6} "
          f"{'x best':>6} {'promise':>7}")  # fmt: skip
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, (model, side) in networks().items():
            for batch in args.batch if args.network is None or name in args.network else []:
                rows += row(name, model, torch.randn(batch, 3, side, side), threads, args)
                for r in rows[-len(args.density) :]:
                    dense = f"{r['dense_ms'][r['fastest']]:.2f} {r['fastest']}"
                    print(f"{name:10} {r['density']:5} {threads:3} {batch:5} {dense:>18} {r['engine_ms']:8.2f} "
                          f"{r['limit']:6.2f} {r['speedup']:6.2f} {r['speedup_of_best']:6.2f} {r['promise'] or '':>7}",
                          flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
