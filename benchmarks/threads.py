"""One thread against two in the engine: ``python -m benchmarks.threads --json FILE``.

The engine alone: the threads of other runtimes spin for a while after each call and would take the second core, so
these rows do not come from ``benchmarks.engine``.  Batch 1, both take turns of three calls, the last of which counts.
One row per network and density (1: without gates): network, density, macs (computed), ms {1, 2} and best_ms {1, 2},
speedup (median of the ratios over the rounds), rounds, load.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.engine import WARM, curious, networks
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import gate
from secateur.runtime.macs import macs


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (model, side) in networks().items():
        x = torch.randn(1, 3, side, side)
        for density in (1.0, 0.5, 0.25):
            calm = torch.randn(4, *x.shape[1:])
            net = model if density == 1 else curious(gate(model, density, x).model, calm)
            engines = {threads: compile_engine(net, x, strict=True, threads=threads) for threads in (1, 2)}
            times: dict[int, list[float]] = {1: [], 2: []}
            for number in range(args.rounds):
                for threads in (1, 2) if number % 2 else (2, 1):
                    for _ in range(WARM):
                        engines[threads](x)
                    begin = time.perf_counter()
                    engines[threads](x)
                    times[threads].append((time.perf_counter() - begin) * 1e3)
            rows.append({
                "network": name, "density": density, "macs": float(macs(net, x)), "rounds": args.rounds,
                "ms": {threads: float(np.median(value)) for threads, value in times.items()},
                "best_ms": {threads: min(value) for threads, value in times.items()},
                "speedup": float(np.median(np.array(times[1]) / np.array(times[2]))), "load": os.getloadavg()[0],
            })  # fmt: skip
            row = rows[-1]
            print(f"{name:9} {density:5} {row['macs'] / 1e6:8.1f} MMAC  {row['ms'][1]:7.2f} ms {row['ms'][2]:7.2f} ms  "
                  f"{row['speedup']:.2f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
