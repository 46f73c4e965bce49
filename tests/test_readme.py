"""What the README shows works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from secateur.cli import app
from secateur.recipe import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def test_the_library_example_runs(tmp_path: Path) -> None:
    code = blocks("python")[0]
    code += (
        "count = lambda m: sum(p.numel() for p in m.parameters())\n"
        "print(count(model), count(small), count(same), count(half), proof.ok)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    model, small, same, half, ok = done.stdout.split()[-5:]
    assert int(small) == int(same) < int(model)
    assert int(half) < int(model)
    assert ok == "True"


def test_the_example_of_run_time_pruning_runs(tmp_path: Path) -> None:
    code = blocks("python")[1] + "print(fast.layer)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "torch.Size([1, 10])" in done.stdout
    assert done.stdout.split()[-1] in ("engine", "portable", "reference")


def test_the_commands_exist_and_the_recipes_load() -> None:
    lines = [line for block in blocks("") for line in block.splitlines() if "secateur " in line]
    assert len(lines) > 8
    for line in lines:
        words = line.split("#")[0].removeprefix("uv run ").split()
        assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0
        known = CliRunner().invoke(app, [words[1], "--help"]).stdout
        assert all(word in known for word in words if word.startswith("--"))
    load(ROOT / "recipes" / "quickstart.yaml")


def test_the_files_it_names_are_there() -> None:
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_its_numbers_are_those_of_the_records() -> None:
    rows = re.findall(r"\| \[(\w+)\]\((docs/results/[\w.]+)\) \|(.*)\|", README)
    assert rows
    for name, path, cells in rows:
        records = [json.loads(line) for line in (ROOT / path).read_text().splitlines()]
        stages = {record["stage"]: record for record in records}
        assert stages["run"]["recipe"]["name"] == name
        found = {
            kind: {m["name"]: m["value"] for m in items} for kind, items in stages["measure"]["measurements"].items()
        }
        dense, pruned = found["dense"], found["pruned"]
        expected = [
            f"{dense['test top1']:.2%} -> {pruned['test top1']:.2%}",
            f"{dense['params']:,.0f} -> {pruned['params']:,.0f}",
            f"{dense['macs']:,.0f} -> {pruned['macs']:,.0f}",
        ]
        expected += [f"{pruned[f'speed-up batch {size}']:.2f}" for size in (1, 64)]
        for part in expected:
            assert part in cells, part
