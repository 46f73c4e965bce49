"""Gated models in checkpoints: saved, loaded without the class, refused when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from gated_nets import curious, lived, varied
from secateur.models.build import build
from secateur.runtime.gates import FBS, Layer, Steered, controller_for, gate, layers, put_, restore_, rows
from secateur.types import CheckpointError, PlanError

KWARGS = {"widths": [8, 8, 12, 12, 12, 16, 16, 16]}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_an_fbs_network_comes_back(tmp_path: Path) -> None:
    x = varied(3)
    model = curious(gate(lived(build("cifarnet", **KWARGS)), {"3": 0.5, "6": 0.3}, x, pooling="avg").model, x)
    model.get_submodule("3").gate.density = 0.25  # as a schedule does
    path = sc.save(model, tmp_path / "a.safetensors")
    again = sc.load(path)
    assert layers(again) == layers(model)
    assert layers(again)[0] == Layer("3", "4", 0.25, "avg")
    assert torch.equal(again(x), model(x))
    given = sc.load(path, model=build("cifarnet", **KWARGS))
    assert torch.equal(given(x), model(x))


@pytest.mark.parametrize("name", ["wide_resnet", "densenet", "mlp", "torchvision:mobilenet_v2"])
def test_gates_everywhere_come_back(name: str, tmp_path: Path) -> None:
    kwargs = {"wide_resnet": {"depth": 10, "width": 0.5}, "densenet": {"depth": 16, "growth": 4}}.get(name, {})
    x = varied(3, 1, 28, 28) if name == "mlp" else varied(3)
    model = lived(build(name, **kwargs))
    model = curious(gate(model, 0.5, x, everywhere=True, threshold="local").model, x)
    model.train()(x)
    again = sc.load(sc.save(model.eval(), tmp_path / "a.safetensors"))
    assert rows(again) == rows(model)
    assert layers(again)[0].threshold == "local"
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_files_of_before_name_no_threshold() -> None:
    assert Layer("0", "", 0.5).row() == {"conv": "0", "norm": "", "density": 0.5, "pooling": "l1", "groups": 4}
    for layer in (Layer("0", "", 0.5), Layer("0", "", 0.5, threshold="local")):
        assert Layer.of(layer.row()) == layer


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"follows": "1", "units": [[["0", 0, 9]]]}, "within that gate"),
        ({"follows": "1", "units": [[["0", 4, 5]]]}, "within that gate"),
        ({"follows": "1", "units": [[["2", 0, 8]]]}, "within that gate"),
        ({"follows": "1", "units": [[[None, 0, 10**12]]]}, "within that gate"),
        ({"follows": "1", "units": [[["0", -1, 8]]]}, "within that gate"),
        ({"follows": "1", "units": [[["0", 0, True]]]}, "within that gate"),
        ({"follows": "1", "units": []}, "within that gate"),
        ({"follows": "1", "units": "all"}, "within that gate"),
        ({"follows": "1", "units": [[["0", 0, 8]], [["0", 0, 4]]]}, "differ in length"),
        ({"follows": "1", "units": [[["0", 0, 4]]]}, "has 8 channels"),
        ({"follows": "3", "units": [[["0", 0, 8]]]}, "share masks"),
        ({"follows": "9", "units": [[["0", 0, 8]]]}, "share masks"),
        ({"follows": 1, "units": []}, "follows and units"),
        ({"follows": "1"}, "follows and units"),
    ],
)
def test_shared_masks_that_do_not_fit_are_refused(row: Any, why: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    put_(model, Layer("0", "", 0.5))
    with pytest.raises(PlanError, match=why):
        restore_(model, (row,))


def test_a_cut_and_gated_network_comes_back(tmp_path: Path) -> None:
    x = varied(2)
    dense = build("resnet20", width=8, depth=8)
    small = sc.prune(lived(dense), x, 0.5)
    model = curious(gate(small, 0.5, x).model, x)
    again = sc.load(sc.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(again(x), model(x))


def test_a_controller_travels_with_its_network(tmp_path: Path) -> None:
    x = varied(4, 3, 8, 8)
    model = gate(lived(build("s0", widths=[8, 8, 12, 4], image_size=8)), None, x, groups=3).model
    controller = controller_for(model, embed=8, hidden=12)
    for parameter in controller.parameters():
        nn.init.normal_(parameter)
    steered = Steered(model, controller).eval()
    assert not torch.equal(steered(x), model(x))
    again = sc.load(sc.save(steered, tmp_path / "a.safetensors"))
    assert isinstance(again, Steered)
    assert torch.equal(again(x), steered(x))
    again.bias = -100.0
    fewest = again(x)
    again.bias = 100.0
    torch.testing.assert_close(again(x), model(x))
    assert not torch.equal(fewest, again(x))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Layer("1", "", 0.5), "takes a convolution or Linear"),
        (Layer("nothing", "", 0.5), "takes a convolution or Linear"),
        (Layer("0", "2", 0.5), "its batch norm; found Conv2d and ReLU"),
        (Layer("0", "4", 0.5), "does not fit"),
        (Layer("0", "1", 1.5), "in .0, 1."),
        (Layer("0", "1", 0.5, "median"), "pooling must be"),
        (Layer("0", "1", None, groups=0), "groups"),
    ],
)
def test_gates_that_do_not_fit_are_refused(layer: Layer, why: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(PlanError, match=why):
        put_(model, layer)


def test_rows_of_strangers_are_refused() -> None:
    good = {"conv": "0", "norm": "", "density": None, "pooling": "l1", "groups": 4}
    assert Layer.of(good) == Layer("0", "", None)
    for bad in ({**good, "groups": True}, {**good, "density": "1"}, {**good, "conv": 3}, {"conv": "0"}, [], None):
        with pytest.raises(PlanError, match="gate"):
            Layer.of(bad)


def test_a_file_whose_gates_do_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = varied(2)
    model = gate(build("cifarnet", **KWARGS), 0.5, x).model
    wrong = tuple(replace(layer, conv=layer.norm).row() for layer in layers(model))
    monkeypatch.setattr("secateur.runtime.gates.rows", lambda inner: wrong)
    path = sc.save(model, tmp_path / "a.safetensors")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="gates do not fit"):
        sc.load(path)
    assert any(isinstance(module, FBS) for module in model.modules())
