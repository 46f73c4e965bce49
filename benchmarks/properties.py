"""Random networks x random plans: every promise of the core, counted over thousands of them.

    python -m benchmarks.properties [--n 2000] [--seed 0] [--jobs N] [--json FILE]

Each network is judged by ``benchmarks/proving/properties.py``: permutation proof, masked == compact (also on another
batch and in train mode), gradients, plan round trip, an empty plan, twice = once, unmask, deep copies.  The trial cut
that would freeze a wrongly grouped family is switched off: here such a group has to show.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from collections import Counter
from pathlib import Path

from rich.progress import track

from benchmarks.proving.properties import KINDS, check


def judge(seed: int) -> tuple[int, list[tuple[str, str]], Counter[str]]:
    """Check one network in a worker process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed, counts = check(seed)
    return seed, failed, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="networks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first network")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin, total, failures = time.perf_counter(), Counter[str](), list[tuple[int, str, str]]()
    with multiprocessing.get_context("forkserver").Pool(options.jobs) as pool:
        seeds = range(options.seed, options.seed + options.n)
        for seed, failed, counts in track(pool.imap_unordered(judge, seeds, 4), "networks", options.n):
            total += counts
            failures += [(seed, kind, message) for kind, message in failed]
    result = {
        "n": options.n,
        "seed": options.seed,
        "failed": dict(Counter(kind for _, kind, _ in failures)),
        "failures": sorted(failures)[:50],
        "promises": list(KINDS),
        "counts": dict(sorted(total.items())),
        "seconds": round(time.perf_counter() - begin, 1),
        "python": platform.python_version(),
        "cpus": multiprocessing.cpu_count(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
