"""The census: judge every model of every suite after half of the units of every group are cut.

    python -m benchmarks.census [--suite NAME ...] [--only PATTERN] [--json FILE] [--jobs N]
        [--timeout S] [--again | --retry]

Each model is judged in a process of its own (``benchmarks/judging``) and its checkpoint loaded in another.  Rows
already in the JSON are kept unless ``--again`` (all) or ``--retry`` (those that failed).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.judging import isolate
from benchmarks.judging.tables import bars, table
from benchmarks.suites import SUITES, cases, find

PRELOAD = ["torch", "numpy", "benchmarks.judging.judge"]
LIBRARIES = {
    "timm": ["timm", "benchmarks.suites.timm_families"],
    "transformers": [
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "benchmarks.suites.transformers_text",
    ],
    "awkward": ["torchvision", "benchmarks.suites.awkward"],
}


def judge_one(suite: str, name: str, folder: str) -> dict[str, Any]:
    """Judge one case; runs in a process of its own."""
    from benchmarks.judging.judge import judge

    return judge(find(suite, name), Path(folder))


def judge_peer(suite: str, name: str, folder: str) -> dict[str, Any]:
    """Judge Torch-Pruning's plain use on one case; runs in a process of its own."""
    from benchmarks.judging.peer import judge_peer as judge

    return judge(find(suite, name))


def reload_one(suite: str, name: str, folder: str) -> dict[str, Any]:
    """Load the checkpoint of one case; runs in a process of its own."""
    from benchmarks.judging.judge import reloaded

    return reloaded(find(suite, name), Path(folder))


def row_of(suite: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the finished row of one case."""
    limits = {"timeout": options.timeout, "memory": options.memory}
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            return isolate.isolated(judge_peer, suite, name, folder, **limits)
        row = isolate.isolated(judge_one, suite, name, folder, **limits)
        if row["status"] == "right":
            row.update(isolate.isolated(reload_one, suite, name, folder, **limits))
        return row


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Judge what is missing in the JSON file and return all results."""
    path = Path(options.json)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    lock = threading.Lock()
    isolate.preload(PRELOAD + [m for s in options.suite for m in LIBRARIES.get(s, ["torchvision"])])

    def wanted(row: dict[str, Any] | None) -> bool:
        return row is None or options.again or (options.retry and row["status"] in ("wrong", "error"))

    def one(suite: str, name: str) -> None:
        row = row_of(suite, name, options)
        with lock:
            results.setdefault(suite, {})[name] = row
            write(path, results)
            print(
                f"{suite:15} {name:44} {row['status']:7} {row.get('seconds', 0):7.1f} s  {row.get('reason', '')[:120]}",
                flush=True,
            )

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(one, suite, case.name)
            for suite in options.suite
            for case in cases(suite)
            if fnmatch.fnmatch(case.name, options.only) and wanted(results.get(suite, {}).get(case.name))
        ]
        for job in jobs:
            job.result()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to judge, e.g. 'resnet*'")
    parser.add_argument("--json", default="", metavar="FILE", help="default: docs/results/census.json")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (each takes one core)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one model")
    parser.add_argument("--memory", type=float, default=14, help="GB for one model")
    parser.add_argument("--again", action="store_true", help="judge models again that have a row")
    parser.add_argument("--retry", action="store_true", help="judge models again that are wrong or in error")
    parser.add_argument("--peer", action="store_true", help="judge Torch-Pruning's plain use instead")
    options = parser.parse_args()
    options.suite = options.suite or list(SUITES)
    options.json = options.json or ("docs/results/census-peer.json" if options.peer else "docs/results/census.json")
    results = run(options)
    for suite in options.suite:
        print(table(suite, results.get(suite, {})))
    print(bars(results))


if __name__ == "__main__":
    main()
