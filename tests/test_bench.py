"""``secateur bench``: every way to run a network, side by side, or why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import secateur as sc
from gated_nets import curious, lived, varied
from secateur import bench
from secateur.checkpoint import read_header
from secateur.cli import app
from secateur.models.cifar_resnet import resnet20
from secateur.models.s0 import s0
from secateur.pipeline import run
from secateur.recipe import loads
from secateur.runtime.gates import FBS, Follower, Gated, Steered, controller_for, gate
from secateur.runtime.plain import plain

TINY = """
version: 1
name: tiny_bench
threads: 1
data: {limit: 120}
model: {name: cifarnet, args: {widths: [8, 8, 8, 8, 8, 8, 8, 8]}}
train: {epochs: 1, batch_size: 32, lr: 0.01}
prune: {budget: {units: 0.8}, schedule: {name: once}}
fbs: {densities: [0.5], epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""
WAYS = [
    bench.TORCH_DENSE, bench.ORT_DENSE, bench.MASKS, bench.ENGINE, bench.PORTABLE, bench.TORCH_STATIC, bench.ORT_STATIC,
]  # fmt: skip


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(loads(TINY), tmp_path_factory.mktemp("bench") / "run")


def test_a_gated_run(done: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = call(done, "--batch-size", 1, "--batch-size", 3, "--repeats", 3, "--json", file)
    assert result.exit_code == 0, result.output
    assert "gated.safetensors on test images of digits" in result.stdout
    assert all(result.stdout.count(f"\n{way} ") == 2 for way in WAYS)
    found = rows(file)
    assert [(row["way"], row["batch"]) for row in found] == [(way, size) for size in (1, 3) for way in WAYS]
    assert not any(row["why"] for row in found)
    macs = {row["way"]: row["macs"] for row in found}
    assert macs[bench.ENGINE] == macs[bench.PORTABLE] < 0.5 * macs[bench.TORCH_DENSE]
    assert macs[bench.ORT_STATIC] == pytest.approx(macs[bench.ENGINE], rel=0.03)
    for size in (1, 3):
        dense = [row["speedup"] for row in found if row["batch"] == size and row["way"].endswith(", dense")]
        assert max(dense) == pytest.approx(1)
        assert all(row["ms"] > 0 and row["rounds"] == 3 for row in found if row["batch"] == size)


def test_a_pruned_and_a_dense_checkpoint(done: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert call(done / "pruned.safetensors", "--batch-size", 2, "--repeats", 1, "--json", file).exit_code == 0
    found = {row["way"]: row for row in rows(file)}
    assert found[bench.MASKS]["why"] == "no gates: there are no masks"
    assert found[bench.ENGINE]["macs"] == found[bench.TORCH_STATIC]["macs"] < found[bench.TORCH_DENSE]["macs"]
    assert call(done / "dense.safetensors", "--batch-size", 2, "--repeats", 1, "--json", file).exit_code == 0
    found = {row["way"]: row for row in rows(file)}
    assert "neither pruned nor gated" in found[bench.ORT_STATIC]["why"]
    assert found[bench.ENGINE]["ms"] > 0


def test_a_steered_checkpoint_and_data_that_is_gone(done: Path, tmp_path: Path) -> None:
    extra: Any = dict(read_header(done / "gated.safetensors").extra)
    extra["data"] = {"name": "folder", "root": str(tmp_path / "nothing")}
    model = sc.build("s0", in_channels=1, image_size=8, widths=[8, 8, 12, 12])
    inner = gate(model, None, torch.rand(1, 1, 8, 8)).model
    inner._secateur_spec = model._secateur_spec
    controller = controller_for(inner, embed=4, hidden=4)
    with torch.no_grad():
        controller.decoder.bias.copy_(torch.tensor([9.0, 0, 0, 0]))  # the first group alone
    file = sc.save(Steered(inner, controller), tmp_path / "rnp.safetensors", extra=extra)
    result = call(file, "--batch-size", 2, "--repeats", 1, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "on random images (" in result.stdout
    found = {row["way"]: row for row in rows(tmp_path / "rows.json")}
    assert found[bench.PORTABLE]["ms"] > 0
    assert found[bench.PORTABLE]["macs"] < 0.5 * found[bench.TORCH_DENSE]["macs"]


def test_a_way_that_cannot_run_says_why(done: Path) -> None:
    hidden = "import sys; sys.modules['llvmlite'] = sys.modules['onnxruntime'] = None; from secateur.cli import main; "
    words = ["secateur", "bench", str(done), "--batch-size", "1", "--repeats", "1"]
    code = f"{hidden}sys.argv = {words!r}; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = {line.partition("  ")[0]: line for line in found.stdout.splitlines()}
    assert "pip install secateur[engine]" in lines[bench.ENGINE]
    assert all("pip install secateur[portable]" in lines[way] for way in (bench.ORT_DENSE, bench.ORT_STATIC))
    assert "not run" not in lines[bench.MASKS]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder, "holds no gated.safetensors, pruned.safetensors or dense.safetensors"),
        (lambda folder: folder / "none.safetensors", "there is no such file"),
        (lambda folder: sc.save(sc.build("s3"), folder / "a.safetensors"), "does not say what its inputs"),
    ],
)
def test_mistakes_are_told(make: Any, told: str, tmp_path: Path) -> None:
    result = call(make(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert told in result.stderr


def mobile() -> nn.Sequential:
    """A depthwise convolution between two others, and a linear layer that is gated, too."""
    first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    depthwise = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()]
    return nn.Sequential(
        *first, *depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )


@pytest.mark.parametrize("kind", [{"density": 0.5}, {"density": None}, {"density": 0.5, "everywhere": True}])
@pytest.mark.parametrize("make", [lambda: resnet20(width=8, depth=8), lambda: s0(widths=[8, 8, 12, 12]), mobile])
def test_a_plain_network_is_the_gated_one_that_computes_all(make: Any, kind: dict[str, Any]) -> None:
    x = varied(2)
    gated = curious(gate(lived(make()), example=x, **kind).model, x)
    for module in gated.modules():
        if isinstance(module, FBS):
            module.enabled = False
    ungated = plain(gated)
    assert not any(isinstance(module, Gated | Follower) for module in ungated.modules())
    with torch.no_grad():
        torch.testing.assert_close(ungated(x), gated(x), rtol=1e-4, atol=1e-5)
