"""Kernel masks from recipe to file: the S2a rule, zeros that hold under any optimiser, idle filters folded away."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from packed import write_packed
from pictures import write_folder
from secateur import masking, pipeline
from secateur.checkpoint import read_header
from secateur.granularity import left, masks, unit_shares, units
from secateur.infer import evaluate, open_model
from secateur.masking import fallen, proved
from secateur.recipe import Recipe, load, loads
from secateur.track.local import Log, read
from secateur.train.average import Average
from secateur.train.held import astray, held, zero_
from secateur.train.optimizers import OPTIMIZERS
from secateur.types import Budget, Plan, PlanError, RecipeError, VerificationError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("s2a_*.yaml"))
TINY = """
version: 1
name: kernels
device: cpu
threads: 1
data: {limit: 200}
model: {name: small_cnn, args: {widths: [8, 16]}}
train: {epochs: 1, lr: 0.02, optimizer: sgd, weight_decay: 0.01}
prune: {granularity: kernel, criterion: {name: magnitude, args: {p: inf}}, budget: {params: 0.4}, schedule: {steps: 2}}
recover: {epochs: 1, final_epochs: 2, carry_optimizer: true}
measure: {repeats: 1, batch_sizes: [1]}
"""


def tiny(folder: Path, *overrides: str) -> Recipe:
    return loads(TINY, overrides=[f"out={json.dumps(str(folder))}", *overrides])


def vgg() -> nn.Module:
    return sc.build("vgg", depth=11, width=0.125, in_channels=1, image_size=16, classes=4).train()


def kernel_masks(model: nn.Module, keep: float, shape: tuple[int, ...] = (2, 1, 16, 16)) -> dict[str, torch.Tensor]:
    graph = sc.trace(model, torch.rand(shape))
    scores = sc.score(units(graph, "kernel"), sc.criteria.Magnitude("inf"))
    return masks(graph, sc.allocate(scores, Budget(params=keep)))


# The S2a rule (acceptance check 13)


@pytest.mark.parametrize("percent", [0.1, 0.3, 0.6])
def test_acceptance_13_the_masks_are_those_of_one_threshold_over_all_weights(percent: float) -> None:
    """The reference procedure, written out: every weight carries the maximum of its kernel, one sorted list."""
    sizes = (7, 3, 1, 3, 1)
    model = nn.Sequential(*(nn.Conv2d(8, 8, k, padding=k // 2) for k in sizes), nn.Flatten(), nn.Linear(8 * 64, 3))
    convs = {f"{n}.weight": m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    spread = {n: w.abs().amax((2, 3), keepdim=True).expand_as(w) for n, w in convs.items()}
    every = torch.cat([s.flatten() for s in spread.values()]).sort().values
    threshold = every[int(percent * len(every))]
    found = kernel_masks(model, 1 - percent, (1, 8, 8, 8))
    differ = sum(int((found.get(n, torch.ones_like(s).bool()) != (s > threshold)).sum()) for n, s in spread.items())
    assert differ <= 49  # one kernel; it prunes what equals the threshold too, ties here go by index


def test_acceptance_13_nothing_everything_and_units_against_weights() -> None:
    graph = units(sc.trace(vgg(), torch.rand(2, 1, 16, 16)), "kernel")
    scores = sc.score(graph, sc.criteria.Magnitude("inf"))
    assert sc.allocate(scores, Budget(params=1.0)).keep == ()
    with pytest.raises(PlanError, match="in \\(0, 1\\]"):
        Budget(params=0.0)
    least = sc.allocate(scores, Budget(params=1e-4))
    assert all(len(kept) >= 1 for _, _, kept in least.keep)
    assert "almost empty" in " ".join(least.notes)
    assert not any("almost empty" in note for note in sc.allocate(scores, Budget(params=0.9)).notes)
    with pytest.raises(PlanError, match="zeros save no time"):
        sc.allocate(scores, Budget(macs=0.5))


def test_units_count_kernels_and_params_count_weights() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 7), nn.Conv2d(4, 49, 1))  # 4 kernels of 49 weights, 196 of one weight
    net[1].weight.data.mul_(1e-3)
    graph = units(sc.trace(net, torch.rand(1, 1, 9, 9)), "kernel")
    scores = sc.score(graph, sc.criteria.Magnitude("inf"))
    by_units, by_params = (dict(sc.allocate(scores, Budget(**{kind: 0.6})).achieved) for kind in ("units", "params"))
    assert by_units == pytest.approx({"units": 0.6, "params": (196 + 116) / 392})
    assert by_params["params"] == pytest.approx(0.6, abs=1 / 392)


def test_what_the_masks_leave_is_counted_as_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1, stride=2), nn.Flatten(), nn.LazyLinear(2)
    )
    x = torch.rand(2, 3, 8, 8)
    model(x)
    graph = sc.trace(model, x)
    plan = Plan(graph.fingerprint, (("0.weight", 12, (0, 5)), ("2.weight", 24, (1, 2, 3))), "kernel")
    dense = sum(p.numel() for p in model.parameters())
    params, macs = left(graph, plan)
    assert params == dense - 10 * 9 - 21
    assert macs == 2 * (2 * 9 * 64 + 3 * 16 + 96 * 2)
    grains = units(graph, "kernel")
    assert unit_shares(grains, "params") == pytest.approx([9 / dense, 1 / dense])
    assert unit_shares(grains, "macs") == pytest.approx(np.array([9 * 64, 16]) / (12 * 9 * 64 + 24 * 16 + 192))


def test_what_went_stays_away_whatever_the_new_scores_say() -> None:
    graph = units(sc.trace(vgg(), torch.rand(2, 1, 16, 16)), "kernel")
    first = sc.allocate(sc.score(graph, sc.criteria.Random(seed=1)), Budget(params=0.6))
    again = sc.score(graph, sc.criteria.Random(seed=2))
    nested = {name: set(kept) for name, _, kept in sc.allocate(fallen(again, first), Budget(params=0.3)).keep}
    assert all(nested[name] <= set(kept) for name, _, kept in first.keep)
    free = {name: set(kept) for name, _, kept in sc.allocate(again, Budget(params=0.3)).keep}
    assert not all(free[name] <= set(kept) for name, _, kept in first.keep)  # it would have come back


# Zeros that hold (acceptance check 12)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [(torch.rand(8, 1, 16, 16, generator=rng), torch.randint(4, (8,), generator=rng)) for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, average: Average | None = None) -> None:
    data = batches(20)
    for step in range(count):
        x, y = data[step % 20]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if average is not None:
            average.update(step)


def narrow() -> nn.Module:
    return sc.build("small_cnn", widths=[4, 8], classes=4).train()


MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{n: lambda p, make=make: make(p, 0.01, 0.01, 0.9) for n, make in OPTIMIZERS.items()},
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.01, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.01),
}


@pytest.mark.parametrize("name", MADE)
def test_acceptance_12_pruned_kernels_stay_exactly_zero_from_a_dense_state_on(name: str) -> None:
    model = narrow()
    dense = MADE[name](model.parameters())
    train(model, dense, 10)
    found = kernel_masks(model, 0.5)
    state = dense.state_dict()
    with held(model, found) as hold:
        optimizer = hold(MADE[name](model.parameters()))
        optimizer.load_state_dict(state)  # with momenta of weights that are gone
        average = Average(model, 0.9)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, 100, average)
        halfway, weights = copy.deepcopy(optimizer.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
        train(model, optimizer, 100, average)
    again = narrow()
    again.load_state_dict(weights)
    with held(again, found) as hold:
        other = hold(MADE[name](again.parameters()))
        other.load_state_dict(halfway)
        train(again, other, 100)
    assert sum(int((~m).sum()) for m in found.values()) > 100
    for tensors in (dict(model.named_parameters()), dict(again.named_parameters()), average.tensors):
        assert all(not tensors[n][~m].any() for n, m in found.items())
    assert all(
        (p != before[n])[found.get(n, torch.ones_like(p).bool())].float().mean() > 0.9
        for n, p in model.named_parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    remembered = [v for p in model.parameters() for v in optimizer.state[p].values() if v.shape == p.shape]
    assert remembered
    for n, m in found.items():
        values = [v for v in optimizer.state[dict(model.named_parameters())[n]].values() if v.shape == m.shape]
        assert all(not v[~m].any() for v in values)


def test_without_the_hold_a_dense_momentum_revives_them() -> None:
    """The defect of the reference: masking gradients alone is not enough."""
    model = narrow()
    optimizer = MADE["sgd"](model.parameters())
    train(model, optimizer, 10)
    found = kernel_masks(model, 0.5)
    zero_(model, found)
    train(model, optimizer, 1)
    assert max(astray(model, found).values()) > 0


class Noisy(torch.optim.SGD):
    """Langevin dynamics: it moves weights that have neither a gradient nor a momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(0.01 * torch.randn_like(weight))


def test_an_optimiser_that_moves_weights_by_itself_cannot_move_these() -> None:
    model = narrow()
    found = kernel_masks(model, 0.5)
    with held(model, found) as hold:
        train(model, hold(Noisy(model.parameters(), 0.01)), 3)
    assert not max(astray(model, found).values())


def test_a_kernel_that_stays_and_becomes_zero_goes_on_training() -> None:
    model = narrow()
    found = kernel_masks(model, 0.5)
    name, mask = next((n, m) for n, m in found.items() if m.any())
    stays = mask.nonzero()[0][:2]
    with held(model, found) as hold:
        optimizer = hold(MADE["sgd"](model.parameters()))
        model.get_parameter(name).data[stays[0], stays[1]] = 0
        train(model, optimizer, 3)
    assert model.get_parameter(name)[stays[0], stays[1]].all()
    train(model, optimizer, 3)  # after the block nothing is held any more
    assert max(astray(model, found).values()) > 0


def test_masked_gradients_do_not_count_in_the_norm_and_the_layout_does_not_matter() -> None:
    model = narrow()
    found = kernel_masks(model, 0.5)
    with held(model, found) as hold:
        model.to(memory_format=torch.channels_last)
        optimizer = hold(MADE["adamw"](model.parameters()))
        x, y = batches(1)[0]
        compiled = torch.compile(model, backend="aot_eager")
        F.cross_entropy(compiled(x), y).backward()
        assert all(not model.get_parameter(n).grad[~m].any() for n, m in found.items())
        optimizer.step()
    assert not max(astray(model, found).values())


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(tiny(tmp_path_factory.mktemp("kernels") / "out"))


def test_a_run_masks_holds_saves_and_says_so(finished: Path) -> None:
    plan = Plan.from_json((finished / "plan.json").read_text())
    header = read_header(finished / "pruned.safetensors")
    assert header.plan is not None
    assert header.plan.keep == plan.keep
    assert plan.granularity == "kernel"
    model = sc.load(finished / "pruned.safetensors")
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    zero, total = sum(int((w == 0).sum()) for w in convs), sum(w.numel() for w in convs)
    assert abs(zero / total - 0.6) < 9 / total
    first = Plan.from_json((finished / "plans" / "step_1.json").read_text())
    later = {name: set(kept) for name, _, kept in plan.keep}
    assert all(later[name] <= set(kept) for name, _, kept in first.keep)
    records = {r.stage: r.data for r in read(finished / "records.jsonl")}
    measured = {m["name"]: m for m in records["measure"]["measurements"]["pruned"]}
    dense = sum(p.numel() for p in model.parameters())
    assert measured["params"]["value"] == dense
    assert measured["unmasked params"]["value"] == dense - zero
    assert "theory" in measured["unmasked macs"]["how"]
    assert any("MASKS SAVE NO TIME" in line for line in records["measure"]["warnings"])
    proof = json.loads((finished / "proof.json").read_text())
    assert proof["ok"]
    assert {row["kind"] for row in proof["rows"]} == {"masked", "held"}
    page = (finished / "report.html").read_text()
    assert "every masked weight is exactly zero" in page
    assert "parameters that are not masked" in page


def test_evaluate_reads_the_masked_file(finished: Path) -> None:
    measured = next(r.data for r in read(finished / "records.jsonl") if r.stage == "measure")["measurements"]
    quality, _ = evaluate(open_model(finished / "pruned.safetensors"))
    assert {m["name"]: m["value"] for m in measured["pruned"]}["test top1"] == pytest.approx(quality.top1)


def test_training_goes_on_from_the_file_with_its_masks(finished: Path) -> None:
    path = finished / "pruned.safetensors"
    model, plan = sc.load(path).train(), read_header(path).plan
    assert plan is not None
    found = masks(sc.trace(model, torch.rand(8, 1, 8, 8)), plan)
    with held(model, found) as hold:
        optimizer = hold(MADE["adamw"](model.parameters()))
        F.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8)).backward()
        optimizer.step()
    assert not max(astray(model, found).values())


class Stop(KeyboardInterrupt):
    """Stands for a kill at a chosen moment."""


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (3, []),
        (5, []),
        (5, ["train.ema=0.9", "train.mixup=0.2", "train.optimizer=adamw", "train.channels_last=true"]),
        (4, ["recover={name: rewind, rewind: 0}", "prune.granularity=weight"]),
        (5, ["recover={name: scratch, epochs: 1, final_epochs: 1}", "prune.criterion={name: random}"]),
    ],
)
def test_a_masked_run_that_was_stopped_ends_in_the_same_bits(
    at: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run(tiny(tmp_path / "whole", *options))
    append, count = Log.append, 0

    def stopping(self: Log, stage: str, **data: object) -> object:
        nonlocal count
        count += stage in ("epoch", "cut")
        if count == at and stage in ("epoch", "cut"):
            raise Stop
        return append(self, stage, **data)

    recipe = tiny(tmp_path / "stopped", *options)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", stopping)
        with pytest.raises(Stop):
            pipeline.run(recipe)
    other = pipeline.run(recipe, resume=True)
    assert (whole / "pruned.safetensors").read_bytes() == (other / "pruned.safetensors").read_bytes()
    plan = read_header(other / "pruned.safetensors").plan
    model = sc.load(other / "pruned.safetensors")
    assert plan is not None
    assert proved(sc.trace(model, torch.rand(8, 1, 8, 8)), plan).ok


def test_a_weight_that_came_back_is_an_error() -> None:
    model = narrow()
    graph = sc.trace(model, torch.rand(2, 1, 16, 16))
    plan = sc.allocate(sc.score(units(graph, "kernel"), sc.criteria.Magnitude()), Budget(units=0.5))
    with pytest.raises(VerificationError, match="are not zero"):
        proved(graph, plan)


def test_channels_alone_can_be_asked_for(tmp_path: Path) -> None:
    options = ["model={name: s1_cnn}", "data.image_size=28", "prune.granularity=channel", "prune.budget={units: 0.5}"]
    with pytest.raises(PlanError, match="no prunable unit of granularity 'head'"):
        pipeline.run(tiny(tmp_path / "a", *options, "prune.granularity=head"))
    folder = pipeline.run(tiny(tmp_path / "b", *options, "train.epochs=0", "recover={name: none}"))
    kinds = {
        g["name"]: g["kind"] for r in read(folder / "records.jsonl") if r.stage == "model" for g in r.data["groups"]
    }
    cut = [name for name, _, _ in Plan.from_json((folder / "plan.json").read_text()).keep]
    assert {kinds[name] for name in cut} == {"channel"}
    assert "neuron" in kinds.values()


def test_a_budget_of_macs_is_refused_with_the_recipe() -> None:
    with pytest.raises(RecipeError, match="masks of kernels save no time"):
        loads(TINY, overrides=["prune.budget={macs: 0.5}"])


def test_a_run_writes_the_smaller_model_and_it_can_be_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroed = masking.fold

    def emptied(graph: Any) -> Any:
        graph.model[3].weight.data[:, 2] = 0  # no fine-tuning of a second empties a filter by itself
        return zeroed(graph)

    monkeypatch.setattr(masking, "fold", emptied)
    folder = pipeline.run(tiny(tmp_path / "out", "prune.budget={params: 0.8}", "recover={name: none}"))
    row = next(r.data for r in read(folder / "records.jsonl") if r.stage == "folded")
    assert sum(row["removed"].values()) > 0
    quality, _ = evaluate(open_model(folder / "compact.safetensors"), "validation")
    assert quality.top1 == pytest.approx(row["validation"]["top1"])
    assert "compact.safetensors" in (folder / "report.html").read_text()


# The shipped recipes


SMALL = {
    "s2a_vgg16_bn_imagenet": "{name: vgg, args: {width: 0.125}}",
    "s2a_resnet50_imagenet": "{name: resnet20, args: {width: 4}}",
    "s2a_vgg_cifar10": "{name: vgg, args: {depth: 16, width: 0.125}}",
}


def two_steps(path: Path, tmp_path: Path, *overrides: str) -> None:
    recipe = load(path)
    assert recipe.prune.granularity == "kernel"
    assert (recipe.budget, recipe.prune.allocation) == (Budget(params=0.7), "global")
    folder, batch = recipe.data.name == "imagefolder", 32
    if folder:
        write_folder(tmp_path, {"train": 8, "val": 2})
        overrides, batch = (*overrides, "data.image_size=32", "data.validation=0.2"), 8
    else:
        write_packed(tmp_path / recipe.data.name, size=32, mode="RGB")
        overrides = (*overrides, "train.epochs=1", "train.warmup=0")
    out = pipeline.run(load(path, [
        f"data.root={json.dumps(str(tmp_path))}", f"out={json.dumps(str(tmp_path / 'out'))}", "device=cpu", "threads=1",
        "model.checkpoint=null", f"train.batch_size={batch}", "recover.final_epochs=1",
        "measure={batch_sizes: [1], repeats: 1}", *overrides,
    ]))  # fmt: skip
    plan = read_header(out / "pruned.safetensors").plan
    assert plan is not None
    assert dict(plan.achieved)["params"] == pytest.approx(0.7, abs=1e-3)
    assert [r.data["step"] for r in read(out / "records.jsonl") if r.stage == "epoch"] == [0, 1][folder:]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_reference_run_for_two_steps(path: Path, tmp_path: Path) -> None:
    two_steps(path, tmp_path, f"model={SMALL[path.stem]}")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_they_do_with_their_own_networks(path: Path, tmp_path: Path) -> None:
    two_steps(path, tmp_path)


def test_there_are_recipes_for_all_three() -> None:
    assert {path.stem for path in RECIPES} == {"s2a_vgg16_bn_imagenet", "s2a_resnet50_imagenet", "s2a_vgg_cifar10"}


def test_the_masks_of_a_copy_are_its_own() -> None:
    model = narrow()
    graph = sc.trace(model, torch.rand(2, 1, 16, 16))
    plan = sc.allocate(sc.score(units(graph, "kernel"), sc.criteria.Magnitude()), Budget(units=0.5))
    other = narrow()
    zero_(other, masks(replace(graph, model=other), plan))
    assert proved(replace(graph, model=other), plan).ok
    assert not any((p == 0).any() for p in model.parameters() if p.dim() == 4)
