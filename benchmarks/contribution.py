"""Cost of contribution evidence on the CIFAR network of train-time pruning, beside a plain epoch in the same process.

Usage: python -m benchmarks.contribution [--root ../shared/data] [--images 6400] [--repeats 7] [--json FILE]

A plain epoch is forward, backward and SGD step over all images.  Beside it, in turn: an evidence pass over all images,
over an eighth of them, and epochs on whose steps the evidence rides as ``prune.criterion.evidence: training`` has it,
from all samples of every batch and from each eighth (``prune.criterion.every``, 8 unless given).  Ratios are
extra seconds over those of the plain epoch, median over rounds; rank correlations are with the scores of all images.
The reference's own way, a loop over samples and next units, is timed on a small layer, values compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks.criteria import spearman
from secateur.criteria import Contribution, ratios
from secateur.criteria.shares import Shares
from secateur.criteria.streaming import Streaming
from secateur.data import open_source, split
from secateur.models import MODELS
from secateur.score import score
from secateur.train.loop import CHECK_EVERY

BATCH = 128
MEAN, TOP = Contribution(1, 0), Contribution(0, 1)
BAR = 0.15
Batches = list[tuple[Tensor, Tensor]]


def epoch(net: nn.Module, batches: Batches, riding: Streaming | None = None) -> None:
    """Train once over the batches, plain SGD as in the reference; ``riding`` is served as the training loop does."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step, (inputs, labels) in enumerate(batches, 1):
        if riding:
            riding.start(len(labels))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(inputs), labels).backward()
        if riding:
            riding.take()
        optimizer.step()
        if riding and (step % CHECK_EVERY == 0 or step == len(batches)):
            riding.settle()


def ways(graph: sc.Graph, batches: Batches) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return name -> a run, which returns the scores it came to."""
    eighth = batches[::8]

    def ride(every: int) -> dict[str, Tensor]:
        with Streaming(graph, MEAN, every) as riding:
            epoch(graph.model, batches, riding)
        return dict(score(graph, MEAN, sums=riding.sums).values)

    def plain() -> dict[str, Tensor]:
        epoch(graph.model, batches)
        return {}

    return {
        "plain epoch": plain,
        "pass over all": lambda: dict(score(graph, MEAN, batches).values),
        "pass over an eighth": lambda: dict(score(graph, MEAN, eighth).values),
        "training, all samples": lambda: ride(1),
        "training, each eighth": lambda: ride(8),
        "maximum, an eighth": lambda: dict(score(graph, TOP, eighth).values),
    }


def measured(graph: sc.Graph, batches: Batches, repeats: int) -> list[dict]:
    """Time all ways in turn; return one row for each, with its ratio to the plain epoch of the same round."""
    runs = ways(graph, batches)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    rows = []
    for name, found in seconds.items():
        plain = seconds["plain epoch"]
        extra = [(a - b if name.startswith("training") else a) / b for a, b in zip(found, plain, strict=True)]
        rows.append({"way": name, "cpu_seconds": statistics.median(found), "range": [min(found), max(found)]})
        rows[-1]["extra_over_plain"] = 0.0 if name == "plain epoch" else statistics.median(extra)
        rows[-1]["extra_range"] = [min(extra), max(extra)]
    return rows


def agreement(graph: sc.Graph, batches: Batches) -> dict[str, dict[str, float]]:
    """Rank correlation per group of the scores of part of the samples with those of all, on fixed weights."""
    groups = [group for group in graph.groups if group.prunable]
    whole = score(graph, MEAN, batches).values
    part = score(graph, MEAN, batches[::8]).values
    with Shares(graph, groups, MEAN.evidence, every=8) as shares, torch.no_grad():
        for inputs, _ in batches:
            graph.model.eval()(inputs)
    eighth = {group.name: shares.read(group)["contributions"] for group in groups}
    return {
        "pass over an eighth": {name: spearman(part[name], whole[name]) for name in whole},
        "training, each eighth": {name: spearman(eighth[name], whole[name]) for name in whole},
    }


def loops(a: Tensor, w: Tensor) -> Tensor:
    """The reference's own way: for each sample and each next unit, the shares of all units; their mean (P,)."""
    total = torch.zeros(a.shape[1])
    for f in range(len(a)):
        for j in range(len(w)):
            products = w[j].abs() * a[f].abs()
            total += products / products.sum()
    return total / (len(a) * len(w))


def reference(samples: int, units: int, following: int, repeats: int) -> dict:
    """Time the loops beside two matrix products."""
    a, w = torch.rand(samples, units) + 0.01, torch.randn(following, units)
    slow, fast = [], []
    for _ in range(repeats):
        begin = time.process_time()
        theirs = loops(a, w)
        middle = time.process_time()
        sums, inverse = ratios.shares(ratios.magnitude(a), ratios.magnitude(w))
        fast.append(time.process_time() - middle)
        slow.append(middle - begin)
        torch.testing.assert_close(sums / inverse.numel(), theirs, rtol=1e-4, atol=1e-7)
    seconds = {"loops_s": statistics.median(slow), "products_s": statistics.median(fast)}
    return {"samples": samples, "units": units, "next_units": following, **seconds} | {
        "times_faster": seconds["loops_s"] / seconds["products_s"]
    }


def main() -> None:
    """Run, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = split(open_source("cifar10", options.root), limit=options.images, normalize=True)
    batches = [data.batch(part) for part in data.train.split(BATCH)]
    net = MODELS["s1_cnn"]()
    for _ in range(3):
        epoch(net, batches)
    graph = sc.trace(net, batches[0][0][:4])
    agrees = agreement(graph, batches)
    rows = measured(graph, batches, options.repeats)
    for row in rows:
        kept = "" if not row["extra_over_plain"] else f"{row['extra_over_plain']:6.3f} of a plain epoch"
        print(f"{row['way']:26s} {row['cpu_seconds']:7.2f} s {kept}", flush=True)
    for name, found in agrees.items():
        print(f"rank correlation with all samples, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
    small = reference(200, 50, 30, options.repeats)
    print(f"loops over 200 samples x 30 next units: {small['loops_s']:.3f} s, {small['times_faster']:.0f} times ours")
    if options.json:
        record = {
            "n": options.repeats,
            "how": "median CPU seconds of one thread, ways in turn in one process; ratios within a round",
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "model": "s1_cnn",
            "images": len(data.train),
            "batch": BATCH,
            "bar": BAR,
            "rows": rows,
            "rank_correlation_with_all_samples": agrees,
            "reference_loops": small,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
