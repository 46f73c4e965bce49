"""Gated networks on a GPU against the dense ones: ``python -m benchmarks.gpu --json FILE``.  Without one it says so.

One row per network, density and batch.  All candidates take turns in each round, each is waited for; numbers are
ratios of the smallest times and, in brackets, of the medians, to the faster of the dense network in eager mode and as a
CUDA graph.  Random weights, saliencies that vary with the input; TF32 as torch has it by default.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.engine import Run, curious, networks, timed
from secateur.runtime.gates import gate
from secateur.runtime.gpu import compile_cuda
from secateur.runtime.macs import macs


def waited(model: Any, x: torch.Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            model(x)
        torch.cuda.synchronize()

    return run


def row(name: str, model: nn.Module, x: torch.Tensor, density: float, rounds: int) -> dict[str, Any]:
    """Time the candidates of one network, density and batch."""
    gated = curious(gate(model, density, x[:1]).model, x)
    runs = {"dense": waited(model, x), "dense graph": waited(compile_cuda(model, x, graph=True), x)}
    runs["masked"] = waited(gated, x)
    runs["gathered"] = waited(compile_cuda(gated, x), x)
    runs["gathered graph"] = waited(compile_cuda(gated, x, graph=True), x)
    times = timed(runs, rounds)
    best = {key: float(np.min(value)) for key, value in times.items()}
    median = {key: float(np.median(value)) for key, value in times.items()}
    return {
        "network": name, "density": density, "batch": len(x), "rounds": rounds, "device": torch.cuda.get_device_name(),
        "limit": float(macs(model, x).sum() / macs(gated, x).sum()), "best_ms": best, "median_ms": median,
        "speedup_of_best": min(best["dense"], best["dense graph"]) / best["gathered graph"],
        "speedup": min(median["dense"], median["dense graph"]) / median["gathered graph"],
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--density", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing was measured.")
        return
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, (model, side) in networks().items():
        model = model.cuda()
        for batch in args.batch:
            for density in args.density:
                rows.append(row(name, model, torch.randn(batch, 3, side, side, device="cuda"), density, args.rounds))
                r = rows[-1]
                found = f"limit {r['limit']:5.2f}  x {r['speedup_of_best']:5.2f} ({r['speedup']:5.2f})"
                print(f"{name:10} d {density:4} batch {batch:3}  {found}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
