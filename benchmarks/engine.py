"""The fast engine against the fastest dense runtime: ``python -m benchmarks.engine --json FILE``.

All candidates take turns inside each round; a turn is three calls, the last of which counts, so that the caches are
not full of the others' weights.  A number is the median over rounds in milliseconds, ``best`` the smallest.  Random
weights, saliencies (FBS) and decisions (RNP) that vary with the input.  One row per network, gate, density, threads
and batch:

    network, gate ("fbs", "rnp"), density (of FBS; of RNP the fraction of dense multiply-accumulates), threads, batch,
    rounds, load (of the machine, one minute)
    dense_ms    {torch, torch.compile (``--compile``), onnxruntime, openvino: ms}, as far as they are installed
    fastest     which of them, by the median
    engine_dense_ms, engine_ms     the dense and the gated network in the engine
    portable_ms the gated network in ONNX Runtime (null where that is not installed)
    static_ms   {onnxruntime, engine: ms} of a statically pruned network of equal multiply-accumulates
    limit       ratio of multiply-accumulates, dense to gated
    speedup, speedup_of_best       fastest dense to engine: median of the ratios, and ratio of the smallest times
    of_static, of_static_of_best   the same for the static network in the engine to the gated one: 1 is equal speed
    best_ms     the smallest time of every candidate
    promise     the floor for ``speedup``, where there is one
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from secateur.models.cifarnet import cifarnet
from secateur.models.s0 import s0
from secateur.models.vgg import vgg
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import FBS, Steered, controller_for, deciding, gate
from secateur.runtime.gates.fbs import pooled
from secateur.runtime.macs import macs

Run = Callable[[], Any]
Row = dict[str, Any]
RNP = ("s0", "vgg16")
WARM = 2  # calls of a turn before the one that counts
PROMISE = {("resnet18", 0.5): 2.0, ("resnet18", 0.25): 3.1, ("cifarnet", 0.5): 3.2, ("cifarnet", 0.25): 10.0}
PROMISE |= {("vgg16", 0.5): 2.4, ("vgg16", 0.25): 6.0}


CHAINS = ((64, 56), (64, 32), (128, 28), (128, 16), (256, 14))  # the layers of 14 px and more of VGG-16 and ResNet-18


def chain(channels: int) -> nn.Module:
    """Five 3x3 Conv-BatchNorm-ReLU, all but the first of ``channels`` inputs, on maps of one size."""
    layers: list[nn.Module] = []
    for before in (3, *[channels] * 4):
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def networks(chains: bool) -> dict[str, tuple[nn.Module, int]]:
    """Network and image side by name; with ``chains`` one for each kind of layer instead."""
    if chains:
        return {f"{channels}x{side}": (chain(channels).eval(), side) for channels, side in CHAINS}
    found: dict[str, tuple[nn.Module, int]] = {"cifarnet": (cifarnet(), 32), "vgg16": (vgg(), 32), "s0": (s0(), 32)}
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


def steered(model: nn.Module, x: torch.Tensor) -> Steered:
    """Prefix gates and a controller whose decisions differ between layers and images."""
    prefixed = gate(model, None, x).model
    controller = controller_for(prefixed)
    with torch.no_grad():
        for layer in (*controller.encoders, controller.decoder):
            layer.weight.mul_(16)
    return Steered(prefixed, controller).eval()


def static(model: nn.Module, x: torch.Tensor, fraction: float) -> nn.Module:
    """The network with evenly narrower convolutions, cut to this fraction of its multiply-accumulates."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    graph = sc.trace(model, x[:1])
    scores = sc.score(graph, sc.criteria.Magnitude())
    plan = sc.allocate(scores, sc.Budget(macs=fraction), "uniform", round_to=None, freeze=linear[:-1])
    return sc.compact(graph, plan, verify=False).eval()


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
    return found | exported(model, x, threads, ("onnxruntime", "openvino"))


def exported(model: nn.Module, x: torch.Tensor, threads: int, runtimes: tuple[str, ...]) -> dict[str, Run]:
    """The network as an ONNX file in those of the runtimes that are installed."""
    found: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "network.onnx")
        if importlib.util.find_spec("onnx"):
            torch.onnx.export(model, (x,), file, dynamo=False)
        for name, start in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
            if name in runtimes and Path(file).exists() and importlib.util.find_spec(name):
                found[name] = start(file, x, threads)
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
            for _ in range(WARM):
                runs[name]()
            begin = time.perf_counter()
            runs[name]()
            times[name][number] = (time.perf_counter() - begin) * 1e3
    return times


def rows_of(name: str, model: nn.Module, x: torch.Tensor, threads: int, args: argparse.Namespace) -> list[Row]:
    """The rows of one network, batch and number of threads: one per density, and one of RNP."""
    runs = dense_runtimes(model, x, threads, args.compile)
    dense = list(runs)
    whole = compile_engine(model, x, strict=True, threads=threads)
    runs["engine dense"] = lambda: whole(x)
    whole_macs, cases = float(macs(model, x).sum()), []
    for kind in [*(args.density if name != "s0" else []), *(["rnp"] if name in RNP else [])]:
        if kind == "rnp":
            gated = steered(model, x)
            with deciding(gated.model, gated.controller):  # the controller itself is not counted
                spent = macs(gated.model, x)
        else:
            gated = curious(gate(model, kind, x).model, torch.randn(4, *x.shape[1:]))
            spent = macs(gated, x)
        limit = whole_macs / float(spent.sum())
        small = static(model, x, 1 / limit)
        engines = compile_engine(gated, x, strict=True, threads=threads), compile_engine(small, x, threads=threads)
        for label, engine in zip((f"engine {kind}", f"static {kind} engine"), engines, strict=True):
            runs[label] = lambda engine=engine: engine(x)
        for runtime, run in exported(small, x, threads, ("onnxruntime",)).items():
            runs[f"static {kind} {runtime}"] = run
        if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
            from secateur.runtime.portable import compile_portable

            runs[f"portable {kind}"] = partial(compile_portable(gated, x, threads=threads), x)
        cases.append((kind, limit))
    rounds = max(5, args.rounds // len(x))
    times = timed(runs, rounds)
    about = {"network": name, "threads": threads, "batch": len(x), "rounds": rounds, "load": os.getloadavg()[0]}
    return [about | figures(times, dense, kind, limit) | {"promise": PROMISE.get((name, kind))}
            for kind, limit in cases]  # fmt: skip


def figures(times: dict[str, np.ndarray], dense: list[str], kind: float | str, limit: float) -> Row:
    """What the times say about one gated network."""
    median = {key: float(np.median(value)) for key, value in times.items()}
    best = {key: float(np.min(value)) for key, value in times.items()}
    fastest, quickest = (min(dense, key=lambda key: which[key]) for which in (median, best))
    mine, other = f"engine {kind}", f"static {kind} engine"
    begin = f"static {kind} "
    return {
        "gate": "rnp" if kind == "rnp" else "fbs", "density": 1 / limit if kind == "rnp" else kind, "limit": limit,
        "dense_ms": {key: median[key] for key in dense}, "fastest": fastest,
        "engine_dense_ms": median["engine dense"], "engine_ms": median[mine],
        "portable_ms": median.get(f"portable {kind}"),
        "static_ms": {key.removeprefix(begin): median[key] for key in times if key.startswith(begin)},
        "speedup": float(np.median(times[fastest] / times[mine])), "speedup_of_best": best[quickest] / best[mine],
        "of_static": float(np.median(times[other] / times[mine])), "of_static_of_best": best[other] / best[mine],
        "best_ms": best,
    }  # fmt: skip


def line(row: Row) -> str:
    """One line of the table."""
    dense = f"{row['dense_ms'][row['fastest']]:.2f} {row['fastest']}"
    still = f"{row['static_ms'].get('onnxruntime', float('nan')):.2f}"
    return (f"{row['network']:9} {row['gate']:4} {row['density']:5.2f} {row['threads']:3} {row['batch']:5} {dense:>18} "
            f"{row['engine_dense_ms']:8.2f} {row['engine_ms']:7.2f} {row['portable_ms'] or 0:8.2f} {still:>9} "
            f"{row['limit']:6.2f} {row['speedup']:6.2f} {row['speedup_of_best']:6.2f} {row['promise'] or '':>7} "
            f"{row['of_static']:9.2f} {row['of_static_of_best']:6.2f}")  # fmt: skip


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network", nargs="*", default=None)
    parser.add_argument("--density", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--threads", nargs="*", type=int, default=[1], help="of two see benchmarks.threads")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=50, help="of batch 1; fewer of larger ones")
    parser.add_argument("--chains", action="store_true", help="chains of equal layers in the place of whole networks")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    rows: list[Row] = []
    print(f"{'network':9} {'gate':4} {'d':>5} {'thr':>3} {'batch':>5} {'dense ms':>18} {'engine d':>8} {'engine':>7} "
          f"{'portable':>8} {'static':>9} {'limit':>6} {'x':>6} {'best':>6} {'promise':>7} {'of static':>9} "
          f"{'best':>6}")  # fmt: skip
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, (model, side) in networks(args.chains).items():
            for batch in args.batch if args.network is None or name in args.network else []:
                found = rows_of(name, model, torch.randn(batch, 3, side, side), threads, args)
                print("\n".join(map(line, found)), flush=True)
                rows += found
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
