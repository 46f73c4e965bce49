"""Pruning while training: events, exact totals, widths, equal warm-ups, and the question for a dataset."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur import pipeline, resolve
from secateur.choice import chosen
from secateur.cli import app
from secateur.during import event, stays
from secateur.recipe import Recipe, load, loads
from secateur.session import prunable
from secateur.stages import allocate
from secateur.track.local import read
from secateur.types import Plan, RecipeError

ROOT = Path(__file__).parent.parent
TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 120}
model: {name: mlp, args: {widths: [10, 6]}}
train: {optimizer: sgd, lr: 0.1, momentum: 0.9, batch_size: 32}
prune:
  criterion: {name: contribution, samples: 60}
  schedule: {name: during, total_epochs: 6, initial_iterations: 2, increment: 3, keep: 0.9}
measure: {repeats: 1, batch_sizes: [1]}
"""
ARMS = {
    "contribution": [],
    "random": ["prune.criterion={name: random}"],
    "worst": ["prune.criterion.worst=true"],
    "none": ["prune.schedule.keep=1"],
}


def scheduled(total: int, first: int, increment: int, *overrides: str) -> Recipe:
    when = f"{{name: during, total_epochs: {total}, inital_iterations: {first}, increment: {increment}, keep: 0.9}}"
    return loads(f"version: 1\nname: x\nprune: {{schedule: {when}}}", overrides=overrides)


def epochs(recipe: Recipe) -> list[int]:
    """Epochs of every phase, as the run would train them."""
    cuts = len(resolve.targets(recipe, 80))
    return [resolve.training(recipe, phase, last=phase == cuts).epochs for phase in range(cuts + 1)]


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        ((100, 30, 10), [30, 10, 10, 10, 10, 10, 10, 10]),
        ((100, 30, 15), [30, 15, 15, 15, 15, 10]),
        ((100, 100, 10), [100]),
        ((7, 0, 3), [0, 3, 3, 1]),
        ((5, 2, 50), [2, 3]),
    ],
)
def test_acceptance_22_events_and_exactly_so_many_epochs(schedule: tuple[int, int, int], phases: list[int]) -> None:
    total, first, increment = schedule
    found = epochs(scheduled(*schedule))
    assert found == phases
    assert sum(found) == total
    assert len(found) - 1 == len(range(first + 1, total + 1, increment))  # the events of the reference


@pytest.mark.parametrize(
    "widths",
    [
        [50, 45, 40, 36, 32, 28, 25, 22, 19, 17, 15, 13, 11],
        [30, 27, 24, 21, 18, 16, 14, 12, 10, 9, 8, 7, 6],
        [256, 230, 207, 186, 167, 150, 135, 121],
        [128, 115, 103, 92, 82, 73, 65, 58],
        [3, 2, 1, 1],
    ],
)
def test_acceptance_22_widths_of_the_reference(widths: list[int]) -> None:
    assert [stays(0.9, n) for n in widths[:-1]] == widths[1:]
    for before, after in pairwise(widths):  # removed where rank > max(1, 0.9 n)
        assert sum(10 * rank <= max(10, 9 * before) for rank in range(1, before + 1)) == after


def test_acceptance_22_the_network_shrinks_by_these_widths() -> None:
    recipe = scheduled(100, 30, 10, "prune.criterion.name=magnitude")
    net: nn.Module = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10))
    found = []
    for _ in range(8):
        found.append((net[0].out_features, net[2].out_features))
        graph = sc.trace(net, torch.rand(2, 20))
        plan = allocate(recipe, graph, sc.score(graph, resolve.criterion(recipe)), recipe.budget)
        assert not plan.notes
        net = sc.compact(graph, plan)
    assert found == list(zip([50, 45, 40, 36, 32, 28, 25, 22], [30, 27, 24, 21, 18, 16, 14, 12], strict=True))


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    for name, words in ARMS.items():
        pipeline.run(loads(TINY, overrides=words), folder / name)
    return folder


def test_acceptance_22_all_arms_share_the_warm_up_bit_for_bit(arms: Path, tmp_path: Path) -> None:
    first = load_file(arms / "contribution" / "dense.safetensors")
    for name in ARMS:
        other = load_file(arms / name / "dense.safetensors")
        assert all(torch.equal(first[key], other[key]) for key in first), name
    pipeline.run(loads(TINY), tmp_path / "first", shared=tmp_path / "shared")
    pipeline.run(loads(TINY, overrides=ARMS["worst"]), tmp_path / "worst", shared=tmp_path / "shared")
    assert len(list((tmp_path / "shared").glob("*.json"))) == 1  # trained once
    alone, taken = (load_file(place / "worst" / "pruned.safetensors") for place in (arms, tmp_path))
    assert all(torch.equal(alone[key], taken[key]) for key in alone)


def test_all_arms_train_equally_long_and_shrink_alike(arms: Path) -> None:
    for name in ARMS:
        rows = read(arms / name / "records.jsonl")
        assert [(r.data["step"], r.data["epoch"]) for r in rows if r.stage == "epoch"] == [
            (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0),
        ]  # fmt: skip
        kept = [[g["kept"] for g in r.data["groups"]] for r in rows if r.stage == "cut"]
        assert kept == ([[], []] if name == "none" else [[9, 5], [8, 4]])


def test_the_worst_arm_removes_what_the_other_keeps(arms: Path) -> None:
    """At the first event, on equal weights: 9 of 10 and 5 of 6 units stay, so one of each goes."""
    gone = {}
    for name in ("contribution", "worst"):
        plan = Plan.from_json((arms / name / "plans" / "step_1.json").read_text())
        gone[name] = {group: set(range(units)) - set(kept) for group, units, kept in plan.keep}
    assert all(len(units) == 1 for units in gone["contribution"].values())
    assert all(gone["contribution"][group] != gone["worst"][group] for group in gone["worst"])


def test_momentum_goes_along(tmp_path: Path) -> None:
    """The memory of the optimiser is all that differs."""
    assert loads(TINY).recover.carry_optimizer
    words = ["recover.carry_optimizer=false"]
    pipeline.run(loads(TINY, overrides=words), tmp_path / "fresh")
    pipeline.run(loads(TINY), tmp_path / "carried")
    fresh, carried = (load_file(tmp_path / name / "pruned.safetensors") for name in ("fresh", "carried"))
    assert any(not torch.equal(fresh[key], carried[key]) for key in fresh)


def test_without_events_it_is_plain_training(tmp_path: Path) -> None:
    words = ["prune.schedule={name: during, total_epochs: 3, initial_iterations: 3, keep: 0.9}"]
    folder = pipeline.run(loads(TINY, overrides=words), tmp_path / "none")
    assert [r.stage for r in read(folder / "records.jsonl")].count("epoch") == 3
    dense, pruned = (load_file(folder / f"{name}.safetensors") for name in ("dense", "pruned"))
    assert all(torch.equal(dense[key], pruned[key]) for key in dense)


def test_events_go_on_when_nothing_is_left_to_cut(tmp_path: Path) -> None:
    words = ["model.args.widths=[3]", "train.lr=0.01"]
    words += ["prune.schedule={name: during, total_epochs: 5, initial_iterations: 1, increment: 1, keep: 0.5}"]
    folder = pipeline.run(loads(TINY, overrides=words), tmp_path / "run")
    cuts = [r.data["groups"] for r in read(folder / "records.jsonl") if r.stage == "cut"]
    assert [[g["kept"] for g in groups] for groups in cuts] == [[1], [1], [1], [1]]
    assert prunable(sc.trace(sc.load(folder / "pruned.safetensors"), torch.rand(2, 1, 8, 8))) == 0


def test_frozen_groups_stay_and_a_budget_can_stand_for_keep(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    graph = sc.trace(net, torch.rand(2, 4))
    recipe = scheduled(9, 3, 3, "prune.freeze=['0']", "prune.criterion.name=magnitude")
    plan = allocate(recipe, graph, sc.score(graph, resolve.criterion(recipe)), recipe.budget)
    assert [(name, len(kept)) for name, _, kept in plan.keep] == [("2", 9)]
    assert not plan.notes
    assert event(graph.groups, 0.9, ["0"])[0].units == pytest.approx(29 / 30)
    text = "version: 1\nname: x\nprune: {budget: {macs: 0.25}, schedule: {name: during, increment: 35}}"
    assert resolve.targets(loads(text), 100) == pytest.approx((0.5, 0.25))
    assert loads(text).prune.allocation == "global"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train.epochs=4"], "train.epochs = 4: the schedule during makes it 2; leave it out"),
        (["recover.epochs=4"], "makes it 3"),
        (["recover.steps=4"], "counts epochs"),
        (["recover.name=none"], "finetune or distil"),
        (["prune.budget={macs: 0.5}"], "leave it out"),
        (["prune.allocation=global"], "makes it 'uniform'"),
        (["prune.keep={'*': 0.5}"], "one keep for all groups"),
        (["prune.schedule.initial_iterations=7"], "must be at most total_epochs = 6"),
        (["prune.schedule.name=once"], "belongs to the schedule during"),
        (["prune.schedule={name: during, initial_iterations: 100}"], "no event that could reach it"),
        (["prune.schedule.increment=0"], "greater than or equal to 1"),
        (["prune.schedule.inital_iterations=1"], "unknown key"),
        (["prune.criterion.evidence=training", "train.compile=true"], "contribution does not ride on compiled steps"),
    ],
)
def test_what_the_schedule_decides_is_not_said_twice(words: list[str], part: str) -> None:
    with pytest.raises(RecipeError, match="problem") as caught:
        loads(TINY, overrides=words)
    assert part in str(caught.value)


def test_a_written_recipe_is_the_same_recipe(arms: Path) -> None:
    for name, words in ARMS.items():
        assert load(arms / name / "recipe.yaml").hash == loads(TINY, overrides=words).hash


S1 = ROOT / "recipes" / "s1"
NAMES = ["mnist", "fashion_mnist", "cifar10", "cifar100"]


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES, 1)))
def test_the_dataset_is_asked_for_by_number_or_name(number: int, name: str) -> None:
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return str(number)

    want = S1.with_name(f"s1_{name}.yaml")
    assert chosen(S1, [], ask) == chosen(S1.with_suffix(".yaml"), [], lambda _: name) == want
    assert chosen(S1, [f"data.name={name}"], None) == want
    assert f"{number}  {name}" in asked[0]
    assert load(want).data.name == name


def test_without_a_terminal_it_says_what_to_do() -> None:
    result = CliRunner().invoke(app, ["run", str(S1)])
    assert result.exit_code == 1
    assert "data.name=mnist" in result.stderr
    with pytest.raises(RecipeError, match="'5' is none of the datasets"):
        chosen(S1, [], lambda _: "5")
    with pytest.raises(RecipeError, match="'digits' is none"):
        chosen(S1, ["data.name=digits"], None)
    assert chosen(Path("nowhere.yaml"), [], None) == Path("nowhere.yaml")
