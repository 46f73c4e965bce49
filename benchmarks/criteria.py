"""Criteria against the truth: rank correlation with the measured loss increase, accuracies, overhead.

Usage: python benchmarks/criteria.py [--seeds 3] [--epochs 20] [--json FILE]

The truth is an oracle: each unit of a converged network is masked alone, and the loss on the scored samples
is taken again.  Spearman's rank correlation is given within each group (mean over groups), over all units
with the scores as they are, and over all units after the mean normalisation that the global allocation
applies.  The same oracle on held-out samples, which the criteria have not seen, is given beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from secateur.allocate import allocate
from secateur.allocation import Allocation, Global, Isomorphic, Uniform
from secateur.criteria import REGISTRY, Criterion, Fisher, Magnitude, Taylor
from secateur.data import SOURCES, Dataset, split
from secateur.mask import masked
from secateur.score import score
from secateur.types import Budget, Graph, Plan, Scores

CRITERIA: tuple[Criterion, ...] = (
    *(kind() for kind in REGISTRY.values()),
    Taylor("elementwise"),
    Magnitude(p=1),
)
SPLITS: tuple[Allocation, ...] = (Uniform(), Global("mean"), Global("l2"), Global("none"), Isomorphic())
KEEPS = (0.8, 0.6, 0.4)
BAR = 0.8
Batch = tuple[torch.Tensor, torch.Tensor]


def network(seed: int) -> nn.Sequential:
    """Three convolutions with batch norm and two linear layers: 144 units that may go."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after, pool in ((1, 16, False), (16, 32, True), (32, 32, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(net: nn.Sequential, data: Batch, epochs: int, size: int = 64, rate: float = 0.05) -> None:
    inputs, targets = data
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(inputs) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(size)[: len(inputs) // size]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[index]), targets[index]).backward()
            optimizer.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def measure(net: nn.Module, data: Batch) -> tuple[float, float]:
    """Return the loss and the accuracy."""
    output = net(data[0])
    hits = (output.argmax(1) == data[1]).float().mean()
    return float(nn.functional.cross_entropy(output, data[1])), float(hits)


def oracle(graph: Graph, sets: list[Batch]) -> dict[str, torch.Tensor]:
    """Return group -> increase of the loss on each set (sets, units) when one unit is masked."""
    base = [measure(graph.model, data)[0] for data in sets]
    found = {}
    for group in graph.groups:
        rows = []
        for unit in range(group.units if group.prunable else 0):
            stay = tuple(i for i in range(group.units) if i != unit)
            with masked(graph, Plan(graph.fingerprint, ((group.name, group.units, stay),))) as net:
                rows.append([measure(net, data)[0] - before for data, before in zip(sets, base, strict=True)])
        if rows:
            found[group.name] = torch.tensor(rows).T
    return found


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values.numpy(), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    return float(np.corrcoef(ranks)[0, 1]) if all(np.ptp(r) > 0 for r in ranks) else 0.0


def correlations(scores: Scores, truth: dict[str, torch.Tensor], which: int) -> dict[str, float]:
    values = scores.values
    names = [name for name in truth if name in values]
    real = {name: truth[name][which] for name in names}
    pooled = torch.cat([real[name] for name in names])
    mean = torch.cat([values[name] / values[name].abs().mean().clamp_min(1e-30) for name in names])
    return {
        "within groups": statistics.mean(spearman(values[name], real[name]) for name in names),
        "all units, as they are": spearman(torch.cat([values[name] for name in names]), pooled),
        "all units, mean normalised": spearman(mean, pooled),
    }


def compare(seed: int, epochs: int, data: Dataset) -> dict:
    """Train one network; return its state, the correlations of each criterion, and accuracies after cuts."""
    seen, unseen = data.batch(data.part("train")), data.batch(data.part("test"))
    net = network(seed)
    train(net, seen, epochs)
    graph = sc.trace(net, seen[0][:2])
    truth = oracle(graph, [seen, unseen])
    state = {"train": measure(net, seen), "test": measure(net, unseen)}
    rows, cuts = {}, {}
    for criterion in CRITERIA:
        scores = score(graph, criterion, [seen])
        rows[repr(criterion)] = {
            "scored samples": correlations(scores, truth, 0),
            "held-out samples": correlations(scores, truth, 1),
        }
        cuts[repr(criterion)] = {repr(how): after(scores, how, unseen) for how in SPLITS}
    return {"seed": seed, "loss and accuracy": state, "correlations": rows, "accuracy after masks": cuts}


def after(scores: Scores, how: Allocation, data: Batch) -> dict[str, float]:
    """Return the accuracy of the masked network at each budget, without any recovery."""
    found = {}
    for keep in KEEPS:
        plan = allocate(scores, Budget(macs=keep), how, round_to=None)
        with masked(scores.graph, plan) as net:
            found[f"macs={keep}"] = measure(net, data)[1]
    return found


def overhead(model: nn.Module, batch: Batch, repeats: int) -> dict:
    """Return the seconds of a plain training step and of scoring one batch, interleaved, and ratios."""
    graph = sc.trace(model, batch[0][:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    jobs: dict[str, Callable[[], object]] = {"training step": step}
    for criterion in (Taylor(), Taylor("elementwise"), Fisher(), Magnitude()):
        jobs[repr(criterion)] = lambda criterion=criterion: score(graph, criterion, [batch])
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(repeats + 2):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if round_ >= 2:  # two rounds of warm-up
                seconds[name].append(time.perf_counter() - begin)
    plain = statistics.median(seconds["training step"])
    found = {}
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        found[name] = {
            "seconds": middle,
            "spread": max(taken) - min(taken),
            "n": len(taken),
            "ratio": middle / plain,
        }
    return found


def summary(runs: list[dict]) -> dict:
    """Return the means over seeds, and the lowest value over seeds."""
    table: dict = {}
    for criterion, sets in runs[0]["correlations"].items():
        table[criterion] = {
            part: {
                kind: {"mean": statistics.mean(v), "lowest": min(v)}
                for kind, v in ((k, [r["correlations"][criterion][part][k] for r in runs]) for k in kinds)
            }
            for part, kinds in sets.items()
        }
    return table


def rounded(value: Any) -> Any:
    """Return ``value`` with its floats cut to four digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(table: dict, runs: list[dict], cost: dict) -> None:
    """Print the correlations, the accuracies after masks, and the overhead."""
    print(f"{'criterion':<48} {'within':>8} {'as is':>8} {'mean n.':>8} {'held out, within':>18}")
    for criterion, sets in table.items():
        row = [cell["mean"] for cell in sets["scored samples"].values()]
        held = sets["held-out samples"]["within groups"]["mean"]
        print(f"{criterion:<48} {row[0]:>8.3f} {row[1]:>8.3f} {row[2]:>8.3f} {held:>18.3f}")
    print(f"\n{'accuracy after masks, mean over budgets':<48} " + " ".join(f"{h!r:>28}" for h in SPLITS))
    for criterion in table:
        cells = [
            [v for r in runs for v in r["accuracy after masks"][criterion][repr(h)].values()] for h in SPLITS
        ]
        print(f"{criterion:<48} " + " ".join(f"{statistics.mean(c):>28.3f}" for c in cells))
    for name, rows in cost.items():
        print(f"\n{name}")
        for job, row in rows.items():
            print(f"  {job:<46} {row['seconds'] * 1e3:>8.1f} ms, {row['ratio']:.2f} of a training step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = split(SOURCES["digits"](), normalize=True)
    runs = [compare(seed, options.epochs, data) for seed in range(options.seeds)]
    table = summary(runs)
    cost = {
        "digits network, batch 64": overhead(network(0), data.batch(data.part("train")[:64]), options.repeats)
    }
    try:
        import torchvision

        images = torch.randn(16, 3, 64, 64), torch.randint(0, 1000, (16,))
        cost["resnet18, batch 16 of 64 x 64"] = overhead(
            torchvision.models.resnet18(), images, options.repeats
        )
    except ImportError:
        print("torchvision is not installed: no overhead on resnet18")
    show(table, runs, cost)
    low = [
        table[c]["scored samples"]["within groups"]["lowest"] for c in ("Taylor(form='paper')", "Fisher()")
    ]
    verdict = "met" if min(low) >= BAR else "MISSED"
    print(f"\nwithin groups, lowest seed: Taylor {low[0]:.3f}, Fisher {low[1]:.3f}; bar {BAR}: {verdict}")
    if options.json:
        head = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "device": "cpu",
        }
        head |= {"data": f"digits: {len(data.train)} training, {len(data.test)} test images"}
        head |= {"epochs": options.epochs, "bar": BAR, "verdict": verdict}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = rounded({**head, "summary": table, "overhead": cost, "runs": runs})
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
