"""What a gated model chooses, as a record of a run and on its page."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur import choosing
from secateur.data import Dataset, split
from secateur.report import render
from secateur.report.bars import BOTTOM, HIGH, TOP, bars
from secateur.report.heat import heat
from secateur.runtime.usage import LayerUsage, Usage, usage
from secateur.types import Record
from test_report import Closed, records
from test_usage import DATA, boosted, steered


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def told(model: torch.nn.Module, data: Dataset = DATA) -> dict[str, Any]:
    """The record that a run of ``model`` would write."""
    found: dict[str, Any] = {}
    log = SimpleNamespace(append=lambda stage, **row: found.update(row, stage=stage))
    recipe = SimpleNamespace(train=SimpleNamespace(batch_size=32))
    choosing.tell(SimpleNamespace(data=data, log=log, recipe=recipe), model)  # type: ignore[arg-type]
    assert found.pop("stage") == "choices"
    return json.loads(json.dumps(found, allow_nan=False))


def page(row: dict[str, Any], classes: tuple[str, ...] = DATA.classes) -> str:
    """The page of a run with gates and this record."""
    rows = records()
    next(r for r in rows if r.stage == "data").data["classes"] = list(classes)
    gates = Record("gates", {"macs": row["dense"], "gated": row["layers"], "dense": []}, 1020.0)
    return render([*rows, gates, Record("choices", row, 1021.0)])


def test_the_record_says_what_was_used() -> None:
    model = steered()
    row, found = told(model), usage(model, DATA, "test")
    assert (row["n"], row["part"], row["dense"]) == (90, "test", found.dense)
    for layer, seen in zip(row["layers"], found.layers, strict=True):
        assert layer["density"] == pytest.approx(seen.density, abs=1e-4)
        assert layer["entropy"] == pytest.approx(seen.entropy, abs=1e-4)
        assert layer["always"] == sum(bool(column.eq(1).all()) for column in seen.use.T)
        assert seen.actions is not None
        assert layer["actions"] == pytest.approx(seen.actions.tolist(), abs=1e-3)
    for drawn in row["maps"]:
        seen = next(layer for layer in found.layers if layer.path == drawn["path"])
        assert drawn["of"] == "groups"
        assert np.allclose(drawn["use"], seen.use[:, [size - 1 for size in seen.groups]], atol=6e-3)
    assert "0" not in [drawn["path"] for drawn in row["maps"]]  # always computed whole: no map
    costs = found.per_class
    for one in row["per_class"]:
        assert one["mean"] == float(costs["mean"][one["class"]])


def test_maps_are_of_few_layers_and_few_classes_those_that_differ_most() -> None:
    layers = []
    for number in range(9):
        use = torch.full((30, 4), 0.5, dtype=torch.float64)
        use[10:12] += number / 20  # of layer 8 by 0.4
        use[3] = torch.nan
        layers.append(LayerUsage(str(number), use, use.nanmean(0)))
    costs, labels = torch.ones(30, dtype=torch.float64), torch.arange(30)
    found = choosing.summary(Usage(tuple(layers), costs, labels, ("x",) * 30, 2.0))
    assert [row["path"] for row in found["maps"]] == ["8", "7", "6", "5", "4", "3"]
    first = found["maps"][0]
    assert len(first["classes"]) == choosing.ROWS
    assert {10, 11} < set(first["classes"])
    assert 3 not in first["classes"]
    assert first["use"][first["classes"].index(10)] == [0.9] * 4
    assert json.dumps(found, allow_nan=False)
    flat = replace(layers[0], use=torch.full((30, 4), 0.3, dtype=torch.float64))
    assert choosing.summary(Usage((flat,), costs, labels, ("x",) * 30, 2.0))["maps"] == []


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_the_cheapest_and_dearest_images_are_those_of_the_data() -> None:
    model = steered()
    data = split(DATA.source, validation=0.5, normalize=True)
    row, found = told(model, data), usage(model, data, "test")
    for name, places in zip(("cheapest", "dearest"), found.extremes(8), strict=True):
        images = row["extremes"][name]
        assert [one["image"] for one in images] == places.tolist()
        for one in images:
            index = int(data.test[one["image"]])
            assert isinstance(data.source.images, torch.Tensor)
            assert (pixels(one["png"]) == data.source.images[index].permute(1, 2, 0).numpy()).all()
            assert one["class"] == int(data.source.labels[index])
            assert one["macs"] == float(found.macs[one["image"]])


def test_large_images_are_shown_small() -> None:
    big = torch.nn.functional.interpolate(DATA.source.images.float(), (40, 80)).byte()  # type: ignore[union-attr]
    row = told(steered(40, 80), split(replace(DATA.source, images=big), validation=0.5))
    assert pixels(row["extremes"]["dearest"][0]["png"]).shape == (32, 64, 3)


def test_the_page_shows_what_a_controller_chose() -> None:
    row = told(steered())
    text = page(row)
    parser = Closed()
    parser.feed(text)
    assert parser.open == []
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert len(parser.links) == 16
    for words in (
        "At run time",
        "The cheapest images",
        "MACs of each class",
        "Which groups of channels",
        "groups 1 to 4",
    ):
        assert words in text, words
    dearest = max(row["per_class"], key=lambda one: one["mean"])
    table = text[text.index("MACs of each class") :]
    assert table.index(f"<td>{DATA.classes[dearest['class']]}</td>") == table.index("<td>")
    assert "Saliencies" not in text


def test_the_page_ranks_nothing_where_all_cost_the_same() -> None:
    row = told(boosted())
    assert row["extremes"] is None
    text = page(row)
    assert f"Every one of the 90 test images costs the same, {row['most']:,.0f} MACs" in text
    for words in ("cheapest", "dearest", "MACs of each class", "groups"):
        assert words not in text[text.index("At run time") : text.index("<h2>Proof")], words
    assert text.count("saliencies of ") == 4
    near = page({**row, "least": row["most"] * 0.999})
    assert "too near each other" in near
    assert "MACs of each class" in near
    assert "cheapest" not in near


def test_names_of_classes_are_escaped() -> None:
    text = page(told(steered()), tuple(f"<i>{number}" for number in range(10)))
    assert "<i>" not in text
    assert "&lt;i&gt;4" in text


def test_bars_stand_on_each_other_and_one_that_towers_is_cut() -> None:
    svg = bars("t", {"on": [1, 2], "off": [1, 0]}, [])
    rows = dict(re.findall(r'<path class="(\w+)" d="([^"]*)"', svg))
    floor, full = HIGH - BOTTOM, HIGH - BOTTOM - TOP
    lows_highs = {css: re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", path) for css, path in rows.items()}
    assert [(float(a), float(b)) for a, b in lows_highs["on"]] == [(floor, floor - full / 2), (floor, floor - full)]
    assert [(float(a), float(b)) for a, b in lows_highs["off"]] == [(floor - full / 2, floor - full)]
    cut = bars("t", {"off": [80, 10, 10], "on": [0, 0, 0]}, [], cut=True)
    assert ">80 %</text>" in cut
    heights = [floor - float(top) for top in re.findall(r"V([\d.]+)h", cut)]
    assert heights == pytest.approx([full, full / 1.1, full / 1.1], abs=0.1)
    assert "%" not in bars("t", {"on": [80, 10, 10]}, [])
    assert "%" not in bars("t", {"on": [80, 0, 0]}, [], cut=True)  # nothing beside it to see
    assert bars("t", {"on": [0, 0]}, []) == ""


def test_cells_of_a_map_have_the_shade_of_their_share() -> None:
    table = [[1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.52, 1.0, 0.0, 0.0, 0.04]]
    svg = heat("t", ["a", "a name that is long"], table, "below")
    paths = dict(re.findall(r'<path class="heat" opacity="([\d.]+)" d="([^"]*)"', svg))
    assert paths == {"1": "M0 0h2v1h-2zM3 1h1v1h-1z", "0.5": "M2 0h1v1h-1zM1 1h2v1h-2z"}
    assert "a name that is…" in svg
    assert " %<" not in svg
    told = heat("t", ["a"], [[0.9, 0.1]], "below")
    assert [(css, share) for css, share in re.findall(r'middle (\w+)"[^>]*>(\d+) %', told)] == [
        ("dark", "90"),
        ("light", "10"),
    ]
    assert heat("t", [], [], "below") == ""
