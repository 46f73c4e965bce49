"""What an epoch of training costs before and after the cuts of a run.

Usage: python -m benchmarks.epochs RUN [RUN ...] [--rounds 7] [--limit 5000] [--json FILE]

Each RUN is the folder of a finished run.  Its dense and its pruned network train an epoch each in turns, in one
process, with the recipe's own settings and ``--limit`` training images, validation included.  CPU seconds of one
thread, so that other work on the machine counts less; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from secateur import resolve
from secateur.checkpoint import load
from secateur.folder import DENSE, PRUNED, RECIPE
from secateur.measure.counts import macs
from secateur.recipe import load as load_recipe
from secateur.session import traced
from secateur.train.loop import fit
from secateur.train.precision import half_pays


def measured(folder: Path, rounds: int, limit: int) -> dict[str, object]:
    """Return the CPU seconds of an epoch, and the ratio pruned / dense: median, smallest, largest."""
    recipe = load_recipe(folder / RECIPE)
    data = resolve.dataset(recipe.data.model_copy(update={"limit": limit}), recipe.seed)
    models = {name: load(folder / file) for name, file in (("dense", DENSE), ("pruned", PRUNED))}
    graph = traced(models["dense"], data)
    half = half_pays(graph.model, torch.device("cpu"), macs(graph) / len(graph.args[0]) * recipe.train.batch_size)
    settings = replace(resolve.training(recipe, 0, half=half), epochs=1, compiled=False)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            begin = time.process_time()
            fit(model, data, settings)
            if number:
                seconds[name].append(time.process_time() - begin)
    ratios = [a / b for a, b in zip(seconds["pruned"], seconds["dense"], strict=True)]
    row = {"run": f"{recipe.data.name}, {recipe.model.name}", "images": len(data.train)}
    return row | {
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(folder, options.rounds, options.limit) for folder in options.runs]
    for row in rows:
        ratio, cpu = row["ratio"], row["cpu_seconds"]
        print(
            f"{row['run']}: an epoch of {row['images']:,} images takes {ratio['median']:.2f} of the dense network's",
            end="",
        )
        print(f" ({ratio['min']:.2f} to {ratio['max']:.2f}); {cpu['dense']:.2f} and {cpu['pruned']:.2f} CPU seconds")
    if options.json:
        how = "CPU seconds of one thread, dense and pruned in turns in one process; ratios within a round"
        facts = {"n": options.rounds, "how": how, "machine": platform.machine(), "torch": torch.__version__}
        record = {**facts, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
