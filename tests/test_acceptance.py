"""Acceptance checks by their numbers: criteria on examples reckoned by hand, the Taylor pipeline, honesty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from handmade import data, small_graph
from secateur import pipeline, resolve, ship
from secateur.criteria import Evidence, Fisher, Magnitude, Normalised, Slice, Taylor
from secateur.infer import open_model, predict
from secateur.measure.task import evaluate
from secateur.recipe import loads
from secateur.score import score
from secateur.session import Screen
from secateur.track.local import read
from secateur.types import Graph, Group, Measurement, Site

# two samples of a map with two positions, and the gradients of each sample's own loss
A, G = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.5, -1.0], [2.0, 1.0]])


class Toy(nn.Module):
    """Units with two positions, consumed by a layer that does nothing: dL_n/da is what the loss says."""

    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.read = nn.Conv1d(units, units, 1, bias=False, groups=units).double()
        nn.init.ones_(self.read.weight)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.read(a)


def toy(criterion: object, reduction: str = "mean", sizes: tuple[int, ...] = (2,), repeat: int = 1) -> torch.Tensor:
    """Scores of the toy unit and of one without a gradient, over copies of its samples in batches of ``sizes``."""
    group = Group("unit", 0, 2, "channel", (), sites=(Site("read", 0, 1, np.arange(2)[:, None]),))
    a, g = (torch.stack(pair, 1).double().repeat(repeat, 1, 1) for pair in ((A, A), (G, 0 * G)))
    graph = Graph(Toy(), (a,), {}, (group,), {}, {}, (), "toy", 1, 0.0)
    batches = zip(a.split(sizes), g.split(sizes), strict=True)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        each = (model(batch[0]) * batch[1]).sum((1, 2))
        return each.mean() if reduction == "mean" else each.sum()

    return score(graph, criterion, batches, loss=loss, reduction=reduction).values["unit"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 7)])
def test_acceptance_01_fisher_in_closed_form(reduction: str, sizes: tuple[int, ...]) -> None:
    assert toy(Fisher(), reduction).tolist() == pytest.approx([9.5625, 0], rel=1e-6)
    assert toy(Fisher(), reduction, sizes, repeat=4).tolist() == pytest.approx([9.5625, 0], rel=1e-6)


def test_acceptance_02_fisher_ranks_like_the_true_increase_of_the_loss_in_any_order() -> None:
    torch.manual_seed(0)
    samples, width = 4000, 12
    features = torch.randn(samples, width) * torch.linspace(0.2, 3, width)[torch.randperm(width)]
    target = features @ torch.randn(width, 1) + torch.randn(samples, 1)
    readout = nn.Linear(width, 1, bias=False)
    readout.weight.data.copy_(torch.linalg.lstsq(features, target).solution.T)
    group = Group("units", 0, width, "neuron", (), sites=(Site("0", 0, 1, np.arange(width)[:, None]),))
    graph = Graph(nn.Sequential(readout), (features,), {}, (group,), {}, {}, (), "linear", 1, 0.0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    batches = list(zip(features.split(700), target.split(700), strict=True))
    fisher = score(graph, Fisher(), batches, loss=loss).values["units"]
    turned = score(graph, Fisher(), batches[::-1], loss=loss).values["units"]
    assert torch.equal(fisher.argsort(), turned.argsort())
    with torch.no_grad():
        base = loss(graph.model, (features, target))
        kept = 1 - torch.eye(width)
        truth = torch.stack([loss(graph.model, (features * row, target)) - base for row in kept])
    ranks = torch.stack([fisher, truth]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) >= 0.9


def test_acceptance_03_taylor_by_hand_and_of_nothing() -> None:
    assert toy(Taylor()).tolist() == pytest.approx([1.875, 0], rel=1e-6)
    assert toy(Taylor("elementwise")).tolist() == pytest.approx([2.125, 0], rel=1e-6)
    for form in ("paper", "elementwise"):
        graph = small_graph()
        with torch.no_grad():
            graph.model[3].weight[:, 2] = 0  # nothing flows back to filter 2 of the first layer
            graph.model[3].weight[1], graph.model[3].bias[1] = 0, -1.0  # the ReLU of filter 1 of the second is silent
        values = score(graph, Normalised(Taylor(form)), [data()]).values
        assert values["conv1"][2] == 0
        assert values["conv2"][1] == 0
        assert all(float(row.norm()) == pytest.approx(1, rel=1e-5) for row in values.values())
    silent = Evidence("g", torch.arange(3), unit_grads=torch.zeros(2, 3), positions=torch.ones(2))
    assert Normalised(Taylor())(silent).tolist() == [0, 0, 0]


def test_acceptance_04_the_gradient_of_a_gate_is_the_sum_of_activation_times_gradient() -> None:
    graph, (x, y) = small_graph(), data()
    net, gate = graph.model, torch.ones(8, requires_grad=True)
    hidden = net[2](net[1](net[0](x)))
    nn.functional.cross_entropy(net[3:](hidden * gate[None, :, None, None]), y, reduction="sum").backward()
    one = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    found: list[torch.Tensor] = []

    class Signed(Taylor):
        """Keeps what it was shown."""

        def each(self, evidence: Evidence) -> torch.Tensor:
            if evidence.group == "conv1":
                found.append(evidence.need("unit_grads"))
            return super().each(evidence)

    score(graph, Signed(), one)
    assert gate.grad is not None
    assert found[0].sum(0).allclose(gate.grad.double(), rtol=1e-4, atol=1e-7)


def test_acceptance_06_l1_takes_absolute_values() -> None:
    weights = Slice("w", "out", torch.tensor([[5.0, -5.0], [1.0, 1.0]]))
    strong, weak = Magnitude(1)(Evidence("g", torch.arange(2), (weights,)))
    assert (float(strong), float(weak)) == (10, 2)


# ---- the Taylor pipeline (24) and honesty (25): one small run of the reference network at its size

RECIPE = Path(__file__).parent.parent / "recipes" / "s3_fashion_mnist.yaml"
SMALL = [
    "data={name: digits, image_size: 28, limit: 128}",  # the digits enlarged to the images of the reference
    "train={epochs: 1, batch_size: 64}",
    "recover={name: finetune, epochs: 1}",
    "measure={repeats: 1, batch_sizes: [1, 64]}",
]
Ran = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, said = tmp_path_factory.mktemp("s3") / "run", []
    recipe = loads(RECIPE.read_text(), "s3", overrides=[f"out={json.dumps(str(folder))}", *SMALL])
    return pipeline.run(recipe, screen=Screen(line=said.append)), said


def stages(folder: Path, name: str) -> list[dict]:
    return [record.data for record in read(folder / "records.jsonl") if record.stage == name]


def test_acceptance_24_the_taylor_pipeline_ends_in_the_counts_of_the_reference(ran: Ran) -> None:
    folder, said = ran
    model = sc.load(folder / "pruned.safetensors")
    assert [sum(p.numel() for p in model[i].parameters()) for i in (0, 2, 4, 7)] == [10, 20, 57, 23_530]
    assert [sum(p.numel() for p in sc.load(folder / f"{n}.safetensors").parameters()) for n in ("dense", "pruned")] == [
        63_122,
        23_617,
    ]
    for name, counts in (
        ("model_summary", (20, 76, 296, 62_730, 63_122)),
        ("pruned_model_summary", (57, 23_530, 23_617)),
    ):
        text = (folder / f"{name}.txt").read_text()
        assert all(f" {count:,}\n" in text for count in counts)
    shares = ["group 0: 1 of 2 units removed (50.0%)", "group 2: 2 of 4 units removed (50.0%)"]
    assert {*shares, "group 4: 5 of 8 units removed (62.5%)"} <= set(said)
    epochs = stages(folder, "epoch")
    assert [row["step"] for row in epochs] == [0, 1]  # both phases
    assert all(row[key] > 0 for row in epochs for key in ("train_loss", "validation_loss", "validation_accuracy"))


def test_acceptance_24_the_pruned_model_predicts(ran: Ran, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "digit.png"
    Image.fromarray(np.zeros((28, 28), dtype=np.uint8)).save(path)
    (guess,) = predict(open_model(ran[0] / "pruned.safetensors"), [path])
    assert guess.name == str(guess.index)
    assert 0.1 <= guess.probability <= 1


def test_acceptance_25_the_three_sets_are_disjoint_and_the_cut_sees_no_test_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = loads(RECIPE.read_text(), "s3", overrides=[f"out={json.dumps(str(tmp_path / 'a'))}", *SMALL])
    split = resolve.dataset(recipe.data, recipe.seed)
    parts = [set(split.part(name).tolist()) for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(parts)
    # with every test image black and every test label 0, the plan and the trained weights are the same
    plain = pipeline.run(recipe)
    honest = resolve.dataset

    def spoilt(chosen: object, seed: int) -> object:
        found = honest(chosen, seed)
        found.source.images[found.test], found.source.labels[found.test] = 0, 0
        return found

    monkeypatch.setattr(resolve, "dataset", spoilt)
    other = pipeline.run(loads(RECIPE.read_text(), "s3", overrides=[f"out={json.dumps(str(tmp_path / 'b'))}", *SMALL]))
    assert (plain / "plan.json").read_text() == (other / "plan.json").read_text()
    one, two = (sc.load(folder / "pruned.safetensors").state_dict() for folder in (plain, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    figures = [stages(folder, "measure")[0]["measurements"]["pruned"] for folder in (plain, other)]
    test = [next(m["value"] for m in rows if m["name"] == "test loss") for rows in figures]
    assert test[0] != test[1]  # it was spoilt indeed


def test_acceptance_25_evaluation_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    evaluate(model, [(torch.ones(6, 1, 8, 8), torch.arange(6))])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_acceptance_25_latency_stands_next_to_the_macs(ran: Ran) -> None:
    (record,) = stages(ran[0], "measure")
    for name, macs in (("dense", 359_072), ("pruned", 87_024)):
        found = {row["name"]: row for row in record["measurements"][name]}
        assert found["macs"]["value"] == macs
        for size in (1, 64):
            assert found[f"latency batch {size}"]["value"] > 0
            assert found[f"latency batch {size}"]["unit"] == "ms"
    page = (ran[0] / "report.html").read_text()
    assert "latency batch 64" in page or "batch 64" in page


@pytest.mark.parametrize(("gain", "loud"), [(0.8, True), (1.7, False)])
def test_acceptance_25_a_cut_that_is_not_faster_says_so(
    gain: float, loud: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(dense: nn.Module, pruned: nn.Module, inputs: torch.Tensor, repeats: int) -> tuple[Measurement, ...]:
        n = len(inputs)
        rows = [("latency", 1.0, "ms"), ("latency", 1.0 / gain, "ms"), ("speed-up", gain, "times")]
        return tuple(Measurement(f"{a} batch {n}", v, unit, 1, 0.0, "cpu", "made up") for a, v, unit in rows)

    monkeypatch.setattr(ship, "compare", measured)
    folder = pipeline.run(loads(RECIPE.read_text(), "s3", overrides=[f"out={json.dumps(str(tmp_path / 'a'))}", *SMALL]))
    (record,) = stages(folder, "measure")
    assert [w.startswith("NOT FASTER: at batch") for w in record["warnings"]] == ([True, True] if loud else [])
    assert ("NOT FASTER" in (folder / "report.html").read_text()) == loud
