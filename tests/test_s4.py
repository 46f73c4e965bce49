"""The Fisher reference system: its acceptance checks, named by their numbers, and its recipes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from eroded import NETS, fresh, history_of, random_norms, some, tiny, traced
from packed import write_packed
from secateur import pipeline, resolve
from secateur.allocation import Global
from secateur.compact import compact
from secateur.graph.trace import tensors_in
from secateur.history import History
from secateur.infer import evaluate, open_model
from secateur.mask import mask_
from secateur.measure import counts
from secateur.models.build import build
from secateur.recipe import load
from secateur.score import score
from secateur.session import Screen, prunable
from secateur.track.local import read
from secateur.types import Budget, Graph, Plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("s4_*.yaml"))


def flat(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """All that the model returns, as one row of numbers; draws of the train mode are the same each time."""
    torch.manual_seed(0)
    return torch.cat([tensor.flatten() for tensor in tensors_in(model(inputs))])


def gradients(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    output = flat(model, inputs)
    output.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads


def assert_same_function(graph: Graph, plan: Plan) -> nn.Module:
    """Assert that the masked and the small model agree: eval and train outputs, gradients of what stays."""
    small = compact(graph, plan)
    inputs = torch.rand(6, *graph.args[0].shape[1:])
    model = mask_(graph, plan)
    with torch.no_grad():
        assert (flat(model.eval(), inputs) - flat(small.eval(), inputs)).abs().max() < 1e-5
    (wide, all_grads), (narrow, grads) = gradients(model, inputs), gradients(small, inputs)
    assert (wide - narrow).abs().max() < 1e-5
    kept = plan.kept(graph)
    for name, grad in grads.items():
        full = all_grads[name]
        for axis, ids in enumerate(graph.axes[name]):
            if ids is not None:
                full = full.index_select(axis, torch.from_numpy(np.flatnonzero(kept[ids])))
        assert (full - grad).abs().max() <= 1e-5 * max(1.0, float(full.abs().max())) if grad.numel() else True
    sc.unmask_(graph)
    return small


@pytest.mark.parametrize("empty", [0, 2])
@pytest.mark.parametrize("name", NETS)
def test_acceptance_07_masked_equals_compressed(name: str, empty: int) -> None:
    graph = traced(name)
    assert_same_function(graph, some(graph, 0.4, empty=empty))


OTHERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "vgg": ({"depth": 11, "width": 0.25}, (3, 32, 32)),
    "mlp": ({"in_channels": 1, "image_size": 8}, (1, 8, 8)),
    "s1_cnn": ({"image_size": 16}, (3, 16, 16)),
    "resnet20": ({}, (3, 16, 16)),
    "vae": ({"image_size": 16, "widths": [32, 24], "channels": [4, 8], "latent": 6}, (3, 16, 16)),
    "small_vae": ({"in_channels": 1, "image_size": 8, "widths": [32], "latent": 4}, (1, 8, 8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_acceptance_07_masked_equals_compressed_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a code of fewer units draws fewer numbers, so that those of equal seeds belong to other units
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 0.7))
    args, shape = OTHERS[name]
    graph = sc.trace(random_norms(build(name, **args)), torch.rand(4, *shape))
    plan = some(graph, 0.4)
    assert len(plan.keep) > 1
    assert_same_function(graph, plan)


@pytest.mark.parametrize(
    ("name", "args", "units", "params"),
    [
        ("wide_resnet", {"depth": 40}, 1344, 2_243_546),
        ("wide_resnet", {"depth": 16}, 448, 691_674),
        ("densenet", {"depth": 100}, 2304, 769_162),
    ],
)
def test_acceptance_08_totals_of_the_reference_networks(name: str, args: dict, units: int, params: int) -> None:
    graph = traced(name, size=8, **args)
    assert prunable(graph) == units
    assert counts.params(graph) == sum(p.numel() for p in graph.model.parameters()) == params
    assert all(group.vanishes for group in graph.groups if group.prunable)


def cost_of_blocks(model: nn.Module, mids: dict[str, int]) -> int:
    """The reference's formula: in mid k1^2 + mid out k2^2 + 2 in + 2 mid (+ projection) over all blocks."""
    total = 0
    for path, mid in mids.items():
        block: Any = model.get_submodule(path)
        wide, out = block.conv1.weight.shape[1], block.conv2.weight.shape[0]
        k1, k2 = block.conv1.kernel_size[0], block.conv2.kernel_size[0]
        total += wide * mid * k1**2 + mid * out * k2**2 + 2 * wide + 2 * mid
        shortcut = getattr(block, "shortcut", None)
        total += wide * out if shortcut is not None else 0
    return total


@pytest.mark.parametrize("name", NETS)
def test_acceptance_08_the_count_is_analytic_at_every_event(name: str) -> None:
    graph = traced(name)
    model, groups = graph.model, [g for g in graph.groups if g.prunable]
    mids = {g.name.removesuffix(".conv1"): g.units for g in groups}
    fixed = counts.params(graph) - cost_of_blocks(model, mids)
    rng = np.random.default_rng(0)
    order = rng.permutation([(g.name, k) for g in groups for k in range(g.units)]).tolist()
    gone: dict[str, set[int]] = {g.name: set() for g in groups}
    for event, (group, unit) in enumerate(order, 1):
        gone[group].add(int(unit))
        mids[group.removesuffix(".conv1")] -= 1
        rows = ((g.name, g.units, tuple(k for k in range(g.units) if k not in gone[g.name])) for g in groups)
        plan = Plan(graph.fingerprint, tuple(rows))
        expected = cost_of_blocks(model, mids) + fixed
        assert counts.params(graph, plan.kept(graph)) == expected
        if event % 40 == 0 or event == len(order):
            assert sum(p.numel() for p in compact(graph, plan, verify=False).parameters()) == expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(tiny(tmp_path_factory.mktemp("s4") / "out"))


def test_acceptance_09_replaying_the_history_gives_the_same_masks(finished: Path) -> None:
    history, graph = history_of(finished), fresh(tiny(finished))
    assert [r.event for r in history.removals] == list(range(1, 15))  # 14 of 28 channels, one by one
    plan = history.plan(graph)
    assert plan == replace(Plan.from_json((finished / "plan.json").read_text()), budget=None)
    zeros = {name: (p == 0) for name, p in mask_(graph, plan).named_parameters()}
    again = fresh(tiny(finished))
    for name, p in mask_(again, History.from_json(history.to_json()).plan(again)).named_parameters():
        assert torch.equal(p == 0, zeros[name])
    for r in history.removals:
        kept = history.until(r.event).plan(graph).kept(graph)
        assert r.params == counts.params(graph, kept)


def test_acceptance_09_file_n_holds_exactly_n_prunes(finished: Path) -> None:
    history, graph = history_of(finished), fresh(tiny(finished))
    files = sorted((finished / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[0]))
    assert [path.name for path in files] == [f"{n}_prunes.safetensors" for n in (4, 8, 12)]
    rows = {r.data["file"]: r.data for r in read(finished / "records.jsonl") if r.stage == "checkpoint"}
    for n, path in zip((4, 8, 12), files, strict=True):
        header, model = sc.checkpoint.read_header(path), sc.load(path)
        plan = header.plan
        assert plan is not None
        assert plan.keep == history.until(n).plan(graph).keep
        assert sum(units - len(kept) for _, units, kept in plan.keep) == n == header.extra["prunes"]
        assert header.proof is not None
        assert header.proof.ok
        assert {row.kind for row in header.proof.rows} == {"permutation", "compact"}
        left = sum(p.numel() for p in model.parameters())
        assert left == history.until(n).removals[-1].params == rows[path.name]["params"]
        quality, _ = evaluate(open_model(path), "validation")  # deployed
        assert quality.top1 == pytest.approx(rows[path.name]["top1"])


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("name", NETS)
def test_acceptance_10_masked_and_compressed_files_give_equal_bits(name: str, empty: int, tmp_path: Path) -> None:
    graph = traced(name)
    plan, inputs = some(graph, 0.5, empty=empty), torch.rand(3, 3, 16, 16)
    small, dense = compact(graph, plan).eval(), mask_(graph, plan).eval()
    for kind, model in (("masked", dense), ("compressed", small)):
        path = sc.save(model, tmp_path / f"{kind}.safetensors", plan=plan)
        with torch.no_grad():
            assert torch.equal(sc.load(path)(inputs), model(inputs))


@pytest.mark.parametrize("name", [*NETS, "resnet20", "torchvision:resnet50", "torchvision:mobilenet_v3_small"])
def test_acceptance_11_whole_blocks_go(name: str, tmp_path: Path) -> None:
    """Every group that may vanish does, at once: function, counts, training, files and further cuts are right."""
    args = NETS.get(name, {})
    graph = sc.trace(random_norms(build(name, **args)).eval(), torch.rand(2, 3, 32, 32))
    gone = [g for g in graph.groups if g.vanishes]
    assert len(gone) >= 6
    plan = Plan(graph.fingerprint, tuple((g.name, g.units, ()) for g in gone))
    small = compact(graph, plan)  # which compares it with the masked model
    assert sum(p.numel() for p in small.parameters()) == counts.params(graph, plan.kept(graph))
    inputs = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(small(inputs[:1]), small(inputs[1:]))  # still a network
    small.train()(inputs).sum().backward()
    path, small = sc.save(small, tmp_path / "a.safetensors", plan=plan), small.eval()
    with torch.no_grad():
        assert torch.equal(sc.load(path)(inputs), small(inputs))
        assert torch.equal(copy.deepcopy(small)(inputs), small(inputs))
    again = sc.trace(small, inputs)
    assert counts.params(again) == counts.params(graph, plan.kept(graph))
    rest = sc.allocate(score(again, sc.criteria.Magnitude()), Budget(params=0.8), round_to=None)
    assert compact(again, rest)(inputs).shape == (2, small(inputs).shape[1])


def test_acceptance_11_the_guard_keeps_what_it_is_told_to() -> None:
    graph = traced("wide_resnet")
    scores = score(graph, sc.criteria.Magnitude(1))
    scores = replace(scores, values={k: v * (k != "3.conv1") for k, v in scores.values.items()})
    widths = {}
    for least in (0, 1, 3):
        plan = sc.allocate(scores, Budget(units=0.7), Global("none"), round_to=None, min_units=least)
        widths[least] = {name: len(kept) for name, _, kept in plan.keep}["3.conv1"]
        assert_same_function(graph, plan)
    assert widths == {0: 0, 1: 1, 3: 3}


def test_a_part_that_everything_passes_through_never_vanishes() -> None:
    for name, args in (("vgg", {"width": 0.25}), ("s3", {}), ("mlp", {})):
        graph = sc.trace(build(name, in_channels=3, image_size=32, **args), torch.rand(2, 3, 32, 32))
        assert not any(group.vanishes for group in graph.groups)
        scores = score(graph, sc.criteria.Magnitude())
        lowest = min(counts.params(graph, p.kept(graph)) / counts.params(graph) for p in [one_each(graph)])
        plan = sc.allocate(scores, Budget(params=max(lowest, 1e-6)), round_to=None, min_units=0)
        assert all(kept for _, _, kept in plan.keep)
    wide = sc.trace(build("wide_resnet", depth=10), torch.rand(2, 3, 32, 32))
    assert {g.name for g in wide.groups if g.prunable and not g.vanishes} == {"0", "1.conv2", "2.conv2", "3.conv2"}


def one_each(graph: Graph) -> Plan:
    return Plan(graph.fingerprint, tuple((g.name, g.units, (0,)) for g in graph.groups if g.prunable))


class Odd(nn.Module):
    """A block with everything that a channel of zeros must get through, and a constant at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 10, 3, stride=2, padding="valid", dilation=2)
        self.norm, self.act = nn.BatchNorm2d(10), nn.PReLU(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.up = nn.ConvTranspose2d(10, 6, 4, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.sigmoid(self.depthwise(self.act(self.norm(self.a(x)))))
        y = self.up(nn.functional.max_pool2d(y, 2))
        y = nn.functional.interpolate(y, x.shape[2:])
        return self.head((x + y).mean((2, 3)))


def test_what_a_hollow_block_leaves_is_its_constant() -> None:
    net = Odd().eval()
    random_norms(net)
    graph = sc.trace(net, torch.rand(2, 3, 20, 20))
    (group,) = [g for g in graph.groups if g.vanishes]
    assert group.units == 10
    plan = Plan(graph.fingerprint, ((group.name, 10, ()),))
    small = compact(graph, plan)
    inputs = torch.rand(5, 3, 20, 20)
    with torch.no_grad():
        x = net.stem(inputs)
        expected = net.head((x + net.up.bias[:, None, None]).mean((2, 3)))
        assert (small(inputs) - expected).abs().max() < 1e-6
    small.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        small(inputs).sum().backward()
    bias = small.up.bias
    assert isinstance(bias, nn.Parameter)
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0


# The recipes


def test_the_recipes_are_the_reference_settings() -> None:
    wide, dense = (load(ROOT / "recipes" / f"{name}.yaml") for name in ("s4_wrn40_2", "s4_densenet_bc100"))
    rate = resolve.training(wide, 0).rate
    assert [wide.train.lr * rate(epoch / 200) for epoch in (0, 59.9, 60, 120, 160)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.004, 0.0008]
    )
    rate = resolve.training(dense, 0).rate
    assert [dense.train.lr * rate(epoch / 300) for epoch in (0, 150, 225)] == pytest.approx([0.1, 0.01, 0.001])
    assert 1344 - round(wide.budget.keep * 1344) == 1300
    assert 2304 - round(dense.budget.keep * 2304) == 2260
    assert (wide.train.batch_size, wide.train.weight_decay, wide.recover.lr) == (128, 5e-4, 8e-4)
    assert (dense.train.batch_size, dense.train.weight_decay, dense.recover.lr) == (64, 1e-4, 1e-3)
    assert wide.recover.steps == dense.recover.steps == wide.prune.save_every == dense.prune.save_every == 100


SMALL = {"wide_resnet": {"depth": 10, "width": 0.5}, "densenet": {"depth": 10, "growth": 4}}


def two_steps(path: Path, tmp_path: Path, **model: Any) -> None:
    recipe = load(path)
    write_packed(tmp_path / "cifar10", size=32, mode="RGB")
    args = json.dumps(model or recipe.model.args)
    words = [
        f"data.root={json.dumps(str(tmp_path))}", f"out={json.dumps(str(tmp_path / 'out'))}", f"model.args={args}",
        "device=cpu", "threads=1", "train.epochs=1", "train.compile=false", "prune.schedule.units=100000",
        "recover.steps=2", "prune.criterion.samples=8", "measure={batch_sizes: [1], repeats: 1}", "data.limit=16",
    ]  # fmt: skip
    folder = pipeline.run(load(path, words), screen=Screen())
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert dict(plan.achieved)["units"] == pytest.approx(recipe.budget.keep, abs=0.01)
    assert len(history_of(folder).removals) == sum(units - len(kept) for _, units, kept in plan.keep)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_run_for_two_steps(path: Path, tmp_path: Path) -> None:
    two_steps(path, tmp_path, **SMALL[load(path).model.name])


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_they_do_with_their_own_networks(path: Path, tmp_path: Path) -> None:
    two_steps(path, tmp_path)
