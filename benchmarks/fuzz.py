"""Damage checkpoints and recipes in thousands of ways; only a clear error or an unharmed load may come out.

Usage: python benchmarks/fuzz.py [--n 5000] [--seed 0] [--json FILE]

Half the cases are checkpoints (small, tied, half-precision, of the registry and of transformers), half are
recipes and overrides.  Outcomes: ``refused`` (a SecateurError of one clear line or list), ``loaded`` (the
structure is that of the original; after blind damage the values too), and the two that must not occur:
``wrong`` and ``crashed``.  The process may take 6 GiB of address space beyond its start, so that a giant
allocation shows up as a crash.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.checkpoint import load, save
from secateur.models.build import build
from secateur.recipe import Recipe, loads
from secateur.types import CheckpointError, Plan, RecipeError

try:
    from benchmarks import mutate
except ImportError:  # run as a script
    import mutate  # type: ignore[no-redef]

HEADROOM = 6 * 2**30
RECIPE = """\
version: 1
name: fuzz
seed: 3
device: cpu
data:
  name: digits
  validation: 0.1
model:
  name: s3
  args: {widths: [2, 4, 8]}
train:
  epochs: 2
  lr: 1e-3
prune:
  criterion:
    name: taylor
  budget: {macs: 0.5}
  allocation: global
  schedule:
    name: iterative
    steps: 2
  freeze: ["fc*"]
measure:
  batch_sizes: [1, 8]
"""
OVERRIDES = [
    "train.lr=0.1",
    "prune.budget={units: 0.5}",
    "measure.batch_sizes=[1, 2]",
    "model.args.widths=[1,2]",
]


def originals(folder: Path) -> list[tuple[bytes, nn.Module]]:
    """Checkpoints to damage, and the models that they hold."""
    image, tokens = torch.rand(1, 1, 28, 28), torch.tensor([[1, 2, 3]])
    small = build("s3", widths=[4, 6, 8]).to(torch.bfloat16).float()
    graph = sc.trace(small, image)
    plan = Plan(
        graph.fingerprint,
        tuple((g.name, g.units, tuple(range(0, g.units, 2))) for g in graph.groups if g.prunable),
    )
    sizes = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 11,
        "n_positions": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    tied = build("transformers:GPT2LMHeadModel", config=sizes).to(torch.bfloat16)
    tied(tokens)
    models = [(sc.compact(graph, plan), plan), (tied, None), (build("mlp").half(), None)]
    return [(save(m, folder / "original.safetensors", plan=p).read_bytes(), m) for m, p in models]


def structure(model: nn.Module) -> dict[str, Any]:
    """Name -> shape of every parameter and buffer."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def values(model: nn.Module) -> dict[str, bytes]:
    """Name -> bytes of every parameter and buffer."""
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def try_file(raw: bytes, model: nn.Module, blind: bool, path: Path) -> tuple[str, str]:
    """Outcome and detail of loading damaged bytes."""
    path.write_bytes(raw)
    try:
        found = load(path)
    except CheckpointError as error:
        return clear(str(error), path)
    except BaseException as error:  # also panics of a native parser
        if isinstance(error, KeyboardInterrupt):
            raise
        return "crashed", f"{type(error).__name__}: {error}"
    if structure(found) != structure(model):
        return "wrong", "another structure"
    if blind and values(found) != values(model):
        return "wrong", "other values"
    return "loaded", ""


def try_recipe(text: str, overrides: list[str]) -> tuple[str, str]:
    """Outcome and detail of reading a damaged recipe."""
    try:
        found = loads(text, "fuzz.yaml", overrides)
    except RecipeError as error:
        return clear(str(error), Path("fuzz.yaml"))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "crashed", f"{type(error).__name__}: {error}"
    again = Recipe.model_validate(found.model_dump())
    return (
        ("loaded", "")
        if again == found and again.hash == found.hash
        else ("wrong", "not equal to its own values")
    )


def clear(message: str, path: Path) -> tuple[str, str]:
    """``refused`` when the message names its source and can be read in a terminal, else ``wrong``."""
    named = str(path) in message or "override" in message
    return ("refused", "") if named and 20 < len(message) < 20_000 else ("wrong", f"unclear: {message[:200]}")


def cases(n: int, seed: int, folder: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield (kind, outcome, detail, seconds) of ``n`` cases."""
    models = originals(folder)
    for number in range(n):
        draw = random.Random(f"{seed}-{number}")
        begin = time.perf_counter()
        if number % 2:
            raw, model = draw.choice(models)
            change = draw.choice(mutate.FILES)
            blind = change is not mutate.signed
            kind, result = (
                change.__name__,
                try_file(change(draw, raw), model, blind, folder / "case.safetensors"),
            )
        elif draw.random() < 0.8:
            damage = draw.choice(mutate.TEXTS)
            kind, result = damage.__name__, try_recipe(damage(draw, RECIPE), [])
        else:
            override = mutate.recipe_letters(draw, draw.choice(OVERRIDES))
            kind, result = "override", try_recipe(RECIPE, [override])
        yield kind, *result, time.perf_counter() - begin


def fuzz(n: int, seed: int) -> dict[str, Any]:
    """Return counts per kind and outcome, the failures, the slowest case and the peak of memory."""
    counts: dict[str, Counter[str]] = {}
    bad: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (kind, outcome, detail, seconds) in enumerate(cases(n, seed, Path(folder))):
            counts.setdefault(kind, Counter())[outcome] += 1
            slowest = max(slowest, seconds)
            if outcome in ("wrong", "crashed"):
                bad.append(f"case {number} of seed {seed}, {kind}: {outcome}: {detail[:300]}")
    total = sum(counts.values(), Counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "n": n,
        "seed": seed,
        "total": dict(total),
        "kinds": {kind: dict(found) for kind, found in sorted(counts.items())},
        "bad": bad,
        "slowest_seconds": round(slowest, 3),
        "peak_memory_mib": round(peak),
    }


def main() -> None:
    """Fuzz, print the table, write the JSON; exit 1 when anything was wrong or crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (start + HEADROOM, resource.RLIM_INFINITY))
    begin = time.perf_counter()
    found = fuzz(options.n, options.seed)
    for kind, outcomes in found["kinds"].items():
        print(f"{kind:<18}" + "".join(f"{name:>10} {count:>5}" for name, count in sorted(outcomes.items())))
    print(
        f"{'total':<18}" + "".join(f"{name:>10} {count:>5}" for name, count in sorted(found["total"].items()))
    )
    seconds = time.perf_counter() - begin
    print(f"{seconds:.0f} s, slowest case {found['slowest_seconds']} s, {found['peak_memory_mib']} MiB")
    print(*found["bad"], sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(bool(found["bad"]))


if __name__ == "__main__":
    main()
