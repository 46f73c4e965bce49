"""Kill a prune-and-recover run at random moments with SIGKILL; every resumed run must end in the same file.

    python -m benchmarks.kills [--n 20] [--seed 0] [--recipe recipes/quickstart.yaml] [--json FILE] [KEY=VALUE ...]

One run goes through undisturbed.  Each of the others is killed after a random share of that run's time, resumed,
killed again with even odds, and resumed to the end; SHA-256 of ``dense.safetensors``, ``pruned.safetensors`` and
``plan.json`` must equal those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

FILES = ("dense.safetensors", "pruned.safetensors", "plan.json")
START = 2.0  # seconds before which the program is still importing


def command(options: argparse.Namespace, folder: Path, resume: bool) -> list[str]:
    words = [sys.executable, "-m", "secateur", "run", options.recipe, *options.overrides, "--out", str(folder)]
    return [*words, "--resume"] if resume and folder.exists() else words


def killed(words: list[str], after: float) -> bool:
    """Start, kill after so many seconds; False when it had ended before."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def finish(words: list[str]) -> str:
    """Run to the end; return the error, if any."""
    done = subprocess.run(words, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr or done.stdout)[-400:]


def digests(folder: Path) -> dict[str, str]:
    found = {name: folder / name for name in FILES}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.exists() else "missing" for n, p in found.items()}


def trial(options: argparse.Namespace, folder: Path, seconds: float, rng: random.Random) -> dict[str, object]:
    """Kill once or twice, resume to the end; say where it was killed."""
    at = [rng.uniform(START, seconds)]
    if rng.random() < 0.5:
        at.append(rng.uniform(START, seconds))
    struck = [killed(command(options, folder, resume=True), after) for after in at]
    error = finish(command(options, folder, resume=True)) if struck[-1] else ""
    records = folder / "records.jsonl"
    return {
        "killed_after_s": [round(x, 2) for x in at],
        "struck": struck,
        "records": len(records.read_text().splitlines()) if records.exists() else 0,
        "error": error,
        "digests": digests(folder),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for the recipe")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        if error := finish(command(options, Path(place, "whole"), resume=False)):
            raise SystemExit(error)
        seconds = time.perf_counter() - begin
        wanted = digests(Path(place, "whole"))
        rows = [trial(options, Path(place, str(k)), seconds, rng) for k in track(range(options.n), "kills")]
    same = sum(row["digests"] == wanted for row in rows)
    result = {"n": options.n, "seed": options.seed, "identical": same, "undisturbed_s": round(seconds, 2), "rows": rows}
    struck = sum(bool(x) for row in rows for x in row["struck"])  # type: ignore[attr-defined]
    print(f"{same} of {options.n} runs, killed {struck} times in all, end in the same {', '.join(FILES)}")
    if options.json:
        options.json.write_text(json.dumps({**result, "kills": struck}, indent=1) + "\n")
    return int(same != options.n)


if __name__ == "__main__":
    raise SystemExit(main())
