"""Cost of the surgery: trace + group + plan + compact beside Torch-Pruning, interleaved in one process.

Usage: python -m benchmarks.surgery [--repeats 3] [--limit 120] [--json FILE]

Prints the median seconds of both and their ratio per model, the curve over depth (seconds against operators), and
the peak of extra memory over the parameters' size, measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

import secateur as sc

SET = ("resnet50", "vit_b_16", "convnext_tiny", "densenet121", "swin_t", "mobilenet_v2")
CURVE = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "densenet169", "densenet201")


def ours(name: str) -> tuple[float, int, int]:
    """Seconds of our chain (weights built outside the clock), number of operators, parameters left."""
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    begin = time.perf_counter()
    graph = sc.trace(model, x)
    plan = sc.allocate(sc.score(graph, sc.criteria.Magnitude()), sc.Budget(units=0.5), "uniform")
    small = sc.compact(graph, plan, verify=False)
    seconds = time.perf_counter() - begin
    return seconds, graph.operators, sum(p.numel() for p in small.parameters())


def theirs(name: str) -> float:
    """Seconds of Torch-Pruning, plain use: build its graph, rank by magnitude, prune half of each group."""
    import torch_pruning as tp

    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    heads = {}
    if name == "vit_b_16":
        heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    begin = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[last],
        num_heads=heads,
    )  # fmt: skip
    pruner.step()
    return time.perf_counter() - begin


def too_slow(name: str, limit: float) -> bool:
    """Does the peer need more than ``limit`` seconds (in a process of its own, which is stopped then)?"""
    code = f"import torch; torch.set_num_threads(1); from benchmarks.surgery import theirs; theirs({name!r})"
    try:
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return True
    return False


def memory(name: str) -> float:
    """Peak resident memory of the surgery beyond the model, over the bytes of its parameters."""
    code = f"""
import threading, time, torch, torchvision, secateur as sc
torch.set_num_threads(1)
page = 4096
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page
def surgery(m, x):
    g = sc.trace(m, x)
    plan = sc.allocate(sc.score(g, sc.criteria.Magnitude()), sc.Budget(units=0.5), "uniform")
    return sc.compact(g, plan, verify=False)
x = torch.rand(1, 3, 224, 224)
surgery(torchvision.models.get_model("resnet18", weights=None).eval(), x)
m = torchvision.models.get_model({name!r}, weights=None).eval()
with torch.no_grad():
    m(x)
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
small = surgery(m, x)
done = True
thread.join()
print((peak - before) / sum(q.numel() * q.element_size() for q in m.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=120, help="seconds after which the peer is stopped")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    ours("resnet18"), theirs("resnet18")  # warm both libraries up
    for name in SET:
        mine, peer = [], []
        stopped = too_slow(name, options.limit)
        for _ in range(options.repeats):
            mine.append(ours(name)[0])
            peer.append(options.limit if stopped else theirs(name))
        row = {
            "model": name,
            "secateur_s": statistics.median(mine),
            "torch_pruning_s": statistics.median(peer),
            "torch_pruning_stopped": stopped,  # then its seconds are a lower bound
            "secateur_range": [min(mine), max(mine)],
            "torch_pruning_range": [min(peer), max(peer)],
            "extra_memory_over_parameters": memory(name),
        }
        row["ratio"] = row["secateur_s"] / row["torch_pruning_s"]
        rows.append(row)
        print(
            f"{name:16s} secateur {row['secateur_s']:6.2f} s  torch-pruning {'>' if stopped else ' '}"
            f"{row['torch_pruning_s']:6.2f} s  "
            f"ratio {row['ratio']:5.2f}  extra memory {row['extra_memory_over_parameters']:.2f} x parameters",
            flush=True,
        )
    done = [r for r in rows if not r["torch_pruning_stopped"]]
    total, finished = (sum(r["torch_pruning_s"] for r in x) / sum(r["secateur_s"] for r in x) for x in (rows, done))
    print(f"summed: at least {total:.1f} times faster; over the models that the peer finished: {finished:.1f}")
    curve = []
    for name in CURVE:
        runs = [ours(name)[:2] for _ in range(options.repeats)]
        seconds = statistics.median(r[0] for r in runs)
        curve.append({"model": name, "operators": runs[0][1], "seconds": seconds})
        print(
            f"{name:16s} {runs[0][1]:6d} operators {seconds:6.2f} s {1e3 * seconds / runs[0][1]:6.2f} ms each",
            flush=True,
        )
    if options.json:
        record = {
            "n": options.repeats,
            "how": "median seconds, models interleaved with the peer in one process, one thread, verify off",
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "rows": rows,
            "times_faster_summed": total,
            "times_faster_summed_where_finished": finished,
            "limit_s": options.limit,
            "curve": curve,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
