"""What a gated model chooses: sums over batches against all masks at once, costs per class, entropies, rankings."""

from __future__ import annotations

import math
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from gated_nets import curious
from secateur.data import Dataset, Source, split
from secateur.models.s0 import s0
from secateur.runtime.gates import FBS, Steered, acting, controller_for, deciding, gate, watch
from secateur.runtime.gates.cost import meter
from secateur.runtime.usage import BINS, Histogram, Usage, usage
from secateur.types import DataError, PlanError


def coloured() -> Dataset:
    """100 images of 10 classes, each with a colour and a brightness of its own; 90 of them to test."""
    drawn = torch.Generator().manual_seed(1)
    noise, colours = torch.rand(100, 3, 8, 8, generator=drawn), torch.rand(100, 3, 1, 1, generator=drawn)
    source = Source("coloured", (noise * colours * 255).byte(), torch.arange(100) % 10, tuple("abcdefghij"), 10)
    return split(source, validation=0.5)


DATA = coloured()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return DATA.batch(DATA.test)


def boosted(density: float = 0.5) -> nn.Module:
    x = images()[0]
    plain = s0(image_size=8, widths=(8, 6, 8, 4), dropout=0.5)
    return curious(gate(plain, density, x).model, x)


def steered(*size: int) -> Steered:
    """Prefix gates under a controller of random weights, which looks at its inputs of ``size`` (8 x 8)."""
    size = size or (8, 8)
    model = gate(s0(image_size=size, widths=(8, 6, 8, 4), dropout=0.0), None, torch.rand(2, 3, *size)).model
    controller = controller_for(model, 8, 8)
    for parameter in controller.parameters():
        nn.init.normal_(parameter, 0, 0.1 if parameter.dim() == 1 else 5.0)
    return Steered(model, controller).eval()


def test_sums_over_batches_are_those_of_all_masks_at_once() -> None:
    model, (x, labels) = boosted().train(), images()
    found = usage(model, DATA, "test", size=32)
    assert model.training  # and nothing was dropped meanwhile
    with torch.no_grad(), watch(model.eval()) as choices:
        model(x)
    assert torch.equal(found.macs, meter(model, x)(choices, len(x)))
    assert torch.equal(found.labels, labels)
    assert [layer.path for layer in found.layers] == list(choices)
    for layer in found.layers:
        saliency, mask = choices[layer.path]
        assert layer.density == pytest.approx(float(mask.double().mean())) == 0.5
        assert (layer.groups, layer.actions) == ((), None)
        for label in range(10):
            torch.testing.assert_close(layer.use[label], mask[labels == label].double().mean(0))
        chances = [float(column.double().mean()) for column in mask.T]
        bits = [-sum(p * math.log2(p) for p in (on, 1 - on) if p) for on in chances]
        assert layer.entropy == pytest.approx(sum(bits) / len(bits))
        assert layer.saliency is not None
        assert counted(layer.saliency) == by_hand(saliency, mask, layer.saliency.top)
        assert layer.saliency.top / 2 <= saliency.max() < layer.saliency.top
    assert max(layer.entropy for layer in found.layers) > 0.1


def counted(histogram: Histogram) -> list[tuple[int, int]]:
    return list(zip(histogram.skipped.tolist(), histogram.computed.tolist(), strict=True))


def by_hand(saliency: torch.Tensor, mask: torch.Tensor, top: float) -> list[tuple[int, int]]:
    pairs = zip(saliency.flatten().tolist(), mask.flatten().tolist(), strict=True)
    bins = Counter((int(value / top * BINS), on) for value, on in pairs)
    return [(bins[place, False], bins[place, True]) for place in range(BINS)]


def test_the_size_of_the_batches_does_not_matter() -> None:
    model = boosted()
    bright = max(range(90), key=lambda place: float(images()[0][place].sum()))
    order = [*(place for place in range(90) if place != bright), bright]  # the largest saliencies come last
    data = Dataset(DATA.source, DATA.train, DATA.validation, DATA.test[order], DATA.mean, DATA.std)
    one, many = usage(model, data, "test", size=90), usage(model, data, "test", size=1)
    assert torch.equal(one.macs, many.macs)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert a.saliency is not None
        assert b.saliency is not None
        assert a.saliency.top == b.saliency.top
        assert counted(a.saliency) == counted(b.saliency)
        assert torch.equal(a.use, b.use)


def test_a_controller_chooses_actions_and_they_have_an_entropy() -> None:
    model, (x, labels) = steered(), images()
    found = usage(model, DATA, "test", size=32)
    with torch.no_grad(), watch(model) as choices:
        model(x)
    assert torch.equal(found.macs, meter(model, x)(choices, len(x)))
    with torch.no_grad(), deciding(model.model, model.controller) as episode, watch(model.model) as choices:
        model.model(x)
    count = meter(model.model, x)
    assert (found.macs > count(choices, len(x))).all()  # the controller works too
    assert found.dense == count.dense
    assert [layer.path for layer in found.layers] == list(choices)
    first, *others = found.layers
    assert first.entropy == 0.0
    assert first.actions is not None
    assert first.actions.tolist() == [0, 0, 0, 1]
    for place, layer in enumerate(others):
        chances = [float((episode.actions[:, place] == action).double().mean()) for action in (1, 2, 3, 4)]
        assert layer.actions is not None
        assert layer.actions.tolist() == pytest.approx(chances)
        assert layer.entropy == pytest.approx(-sum(p * math.log2(p) for p in chances if p))
        assert layer.saliency is None
    assert max(layer.entropy for layer in others) > 0.5
    assert others[0].groups == (2, 3, 5, 6)
    assert found.ranked
    cheapest, dearest = found.extremes(3)
    ranking = sorted(range(90), key=lambda place: (float(found.macs[place]), place))
    assert cheapest.tolist() == ranking[:3]
    assert dearest.tolist() == sorted(range(90), key=lambda place: (-float(found.macs[place]), place))[:3]
    rows = found.per_class
    for label in range(10):
        mine = [float(spent) for spent, truth in zip(found.macs, labels, strict=True) if truth == label]
        expected = (len(mine), sum(mine) / len(mine), min(mine), max(mine))
        assert tuple(float(rows[key][label]) for key in ("n", "mean", "min", "max")) == pytest.approx(expected)


def test_equal_work_for_all_images_is_no_ranking() -> None:
    found = usage(boosted(), DATA, "test")
    assert len(found.macs.unique()) == 1
    assert not found.ranked
    all_on = usage(boosted(1.0), DATA, "test")
    assert all_on.dense == float(all_on.macs[0]) > found.macs[0]
    assert [layer.entropy for layer in all_on.layers] == [0.0] * 4


def test_costs_near_each_other_are_no_ranking() -> None:
    for most, ranked in ((100.5, False), (102.0, True)):
        macs = torch.tensor([100.0, most, 100.0], dtype=torch.float64)
        assert Usage((), macs, torch.tensor([0, 0, 0]), ("a",), 400.0).ranked is ranked


def test_a_class_without_images_has_no_costs() -> None:
    found = Usage((), torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor([2, 2]), ("a", "b", "c"), 8.0)
    assert found.per_class["n"].tolist() == [0, 0, 2]
    assert found.per_class["mean"][2] == 4.0
    assert all(found.per_class[key][:2].isnan().all() for key in ("mean", "min", "max"))


def test_saliencies_that_are_all_zero_and_gates_that_are_off() -> None:
    model = boosted()
    for module in model.modules():
        if isinstance(module, FBS):
            nn.init.constant_(module.predictor.weight, -1.0)
            nn.init.constant_(module.predictor.bias, -1.0)
    layer = usage(model, DATA, "test").layers[0]
    assert layer.saliency is not None
    assert layer.saliency.top == 0.0
    assert (int(layer.saliency.computed[0]), int(layer.saliency.skipped[0])) == (90 * 4, 90 * 4)


def test_fixed_actions_are_heard_too() -> None:
    model = steered().model
    with acting(model, {"3": torch.full((90,), 2)}):
        found = {layer.path: layer for layer in usage(model, DATA, "test", size=90).layers}
    assert found["3"].density == 0.5
    assert found["3"].use[:, :3].eq(1).all()
    assert found["3"].use[:, 3:].eq(0).all()


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llvmlite")
    monkeypatch.setenv("HOME", str(tmp_path))  # machine code is kept there
    text = (Path(__file__).parent.parent / "docs" / "engine.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "example.py").write_text("".join(blocks))
    after = runpy.run_path(str(tmp_path / "example.py"))
    assert [layer.entropy for layer in after["found"].layers] == [0.0] * 8


def test_mistakes_are_told() -> None:
    plain = s0(image_size=8, widths=(4, 4, 4, 4))
    with pytest.raises(PlanError, match="no gates"):
        usage(plain, DATA, "test")
    empty = Dataset(DATA.source, DATA.train, DATA.validation, DATA.test[:0], DATA.mean, DATA.std)
    with pytest.raises(DataError, match="no images"):
        usage(boosted(), empty, "test")
