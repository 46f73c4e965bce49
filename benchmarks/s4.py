"""The Fisher reference system once, with its baselines: error against parameters.

    python -m benchmarks.s4 [--recipe recipes/s4_wrn16_2_cifar10.yaml] [--out runs/s4] [KEY=VALUE ...]

Runs the recipe (train, prune one channel per event), then with about as many parameters: the pruned architecture from
scratch, the network of lower depth (as published: whatever size it has), of lower width and with a bottleneck, and a
copy of the pruned profile on a wider network.  All train as long as the dense model.  Prints a table, writes
``error.json``, ``error.svg`` and ``compare.html``; the same command again continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.compare import compare, write
from secateur.folder import HISTORY, RECORDS, complete
from secateur.models.build import build
from secateur.recipe import load
from secateur.report.figures import standalone
from secateur.report.scatter import Point, scatter
from secateur.track.local import read

WHOLE = "prune={budget: {units: 1.0}, schedule: {name: once}, criterion: {name: magnitude}}"  # nothing is cut


def run(recipe: str, folder: Path, overrides: list[str]) -> Path:
    """Run, or continue; raises when the run fails."""
    if not complete(folder):
        words = [sys.executable, "-m", "secateur", "run", recipe, *overrides, "--out", str(folder)]
        words += ["--resume"] if folder.exists() else []
        print("$", shlex.join(words), flush=True)
        subprocess.run(words, check=True)
    return folder


def size(name: str, args: dict[str, Any]) -> int:
    """Return the number of parameters of a network."""
    return sum(p.numel() for p in build(name, **args).parameters())


def nearest(params: int, count: Callable[[float], int]) -> float:
    """Return the factor, in hundredths up to 1, with which a network comes nearest to ``params`` parameters."""
    return min((k / 100 for k in range(25, 101)), key=lambda factor: abs(count(factor) - params))


def baselines(recipe: str, overrides: list[str], pruned: Path, params: int) -> dict[str, list[str]]:
    """Return name -> overrides of the runs beside the pruned one."""
    chosen = load(recipe, overrides)
    name, args = chosen.model.name, dict(chosen.model.args)
    width = float(str(args["width"]))
    slim = nearest(params, lambda f: size(name, {**args, "width": width * f})) * width
    neck = nearest(params, lambda f: size(name, {**args, "bottleneck": f}))
    history = json.dumps(str((pruned / HISTORY).resolve()))
    anew = ["train.epochs=0", f"recover={{name: scratch, final_epochs: {chosen.train.epochs}}}"]
    wide = {**args, "width": width * 1.5}
    share = params / size(name, wide)
    trained = [WHOLE, "recover={name: none}"]

    def model(**changes: float) -> str:
        return f"model.args={json.dumps({**args, **changes})}"

    return {
        "scratch": [f"prune={{only: ['*.conv1'], plan: {history}, schedule: {{name: once}}}}", *anew],
        "depth": [model(depth=int(str(args["depth"])) - 6), *trained],
        "width": [model(width=round(slim, 3)), *trained],
        "bottleneck": [model(bottleneck=neck), *trained],
        "copied": [
            f"prune={{profile: {history}, schedule: {{name: once}}, criterion: {{name: random}}, "
            f"only: ['*.conv1'], round_to: null, min_units: 0, budget: {{params: {share:.4f}}}}}",
            model(width=wide["width"]),
            *anew,
        ],
    }


def figures(folder: Path, name: str) -> dict[str, Any]:
    """Return parameters and test error of the dense or pruned model of a run."""
    measured = next(r.data["measurements"] for r in read(folder / RECORDS) if r.stage == "measure")[name]
    values = {m["name"]: m["value"] for m in measured}
    return {"params": int(values["params"]), "error": 1 - values["test top1"], "n": 10_000}


def drawn(rows: dict[str, dict[str, Any]]) -> str:
    """Return test error against parameters as one SVG, the networks numbered in the order of ``rows``."""
    css = {"dense": "dense", "pruned and tuned": "pruned", "scratch": "scratch", "copied": "scratch"}
    ends = [
        Point(row["params"], row["error"], 0.0, (row["error"] * (1 - row["error"]) / row["n"]) ** 0.5, number,
              css.get(name, "random"), f"{name}: {row['error']:.2%}")
        for number, (name, row) in enumerate(rows.items(), 1)
    ]  # fmt: skip
    names = {"dense": "dense", "pruned": "pruned", "scratch": "pruned shape, new weights", "random": "reduced"}
    figure = scatter("test error against parameters", "parameters", ends, [], names)
    colours = "".join(
        f"circle.{name}{{fill:{colour}}}line.bar.{name}{{stroke:{colour}}}"
        for name, colour in {"dense": "#7a8796", "pruned": "#1f6feb", "scratch": "#7c3aed", "random": "#c2410c"}.items()
    )
    return standalone(figure).replace("</style>", f"{colours}</style>", 1) + "\n"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/s4_wrn16_2_cifar10.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/s4"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    pruned = run(options.recipe, options.out / "pruned", options.overrides)
    rows = {"dense": figures(pruned, "dense"), "pruned and tuned": figures(pruned, "pruned")}
    folders = [pruned]
    for name, words in baselines(options.recipe, options.overrides, pruned, rows["pruned and tuned"]["params"]).items():
        folders.append(run(options.recipe, options.out / name, [*options.overrides, *words]))
        rows[name] = figures(folders[-1], "pruned")
    print(f"{'network':<18} {'parameters':>12} {'test error':>11}")
    for name, row in rows.items():
        print(f"{name:<18} {row['params']:>12,} {row['error']:>10.2%}")
    points = [r.data for r in read(pruned / RECORDS) if r.stage == "checkpoint"]
    print("on the way (validation):", ", ".join(f"{p['params']:,}: {1 - p['top1']:.2%}" for p in points))
    options.out.joinpath("error.json").write_text(json.dumps({"rows": rows, "on the way": points}, indent=1))
    options.out.joinpath("error.svg").write_text(drawn(rows))
    write(compare(folders), options.out / "compare.html")
    print(f"page: {options.out / 'compare.html'}")


if __name__ == "__main__":
    main()
