"""Units that go one by one while training goes on, their history, and what other runs make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from eroded import INSIDE, fresh, history_of, some, tiny, traced
from secateur import pipeline, resolve, stages, watching
from secateur.allocate import limited
from secateur.allocation import Global, Profile, stretched
from secateur.compact import compact
from secateur.criteria.wrappers import Costed
from secateur.history import Removal, shape_of
from secateur.mask import mask_
from secateur.measure import counts
from secateur.progressive import compose, remaining, whole
from secateur.score import score
from secateur.session import Run, prunable
from secateur.track.local import read
from secateur.train import loop
from secateur.types import Budget, Plan, PlanError, RecipeError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(tiny(tmp_path_factory.mktemp("s4") / "out"))


# The events


def test_every_event_takes_the_lowest_score_of_all_layers(finished: Path) -> None:
    """The live view of the masked model gives the scores of the model that was cut, unit by unit."""
    recipe = tiny(finished)
    graph = fresh(recipe)
    plan = some(graph, 0.6, empty=1)
    data = resolve.dataset(recipe.data, 0)
    batches = [data.batch(data.train[:32])]
    live = remaining(graph, plan, mask_(graph, plan))
    criteria = (sc.criteria.Fisher(), sc.criteria.Magnitude(1), Costed(sc.criteria.BNScale(), params=1.0))
    found = [score(live, criterion, batches) for criterion in criteria]
    sc.unmask_(graph)
    small = limited(sc.trace(compact(graph, plan), graph.args[0]), INSIDE)
    for seen, criterion in zip(found, criteria, strict=True):
        cut = score(small, criterion, batches)
        assert seen.values.keys() == cut.values.keys() == {"2.conv1", "3.conv1"}
        for name, values in cut.values.items():
            assert torch.allclose(seen.values[name], values, rtol=1e-4, atol=1e-10)
    seen = found[0]
    assert counts.params(live) == counts.params(small)
    assert counts.macs(live) == counts.macs(small)
    one = sc.allocate(seen, Budget(units=1 - 1 / prunable(live)), Global("none"), round_to=None)
    ((name, units, kept),) = one.keep
    (unit,) = set(range(units)) - set(kept)
    lowest = min(float(v.min()) for v in seen.values.values())
    assert float(seen.values[name][unit]) == lowest
    both = compose(graph, plan, one, Budget(units=0.5))
    (row,) = [r for r in both.keep if r[0] == name]
    before = next(r for r in plan.keep if r[0] == name)
    assert row[2] == tuple(k for place, k in enumerate(before[2]) if place != unit)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the largest weight of a unit that went, after every optimiser step."""
    seen: list[float] = []
    stepped = stages.Erosion.stepped

    def watching(self: Any, done: int) -> None:
        kept = self.run.plan.kept(self.run.dense)
        for name, axes in self.graph.axes.items():
            tensor = dict(self.model.named_parameters()).get(name)
            for axis, ids in enumerate(axes if tensor is not None else ()):
                if ids is not None and not kept[ids].all():
                    dead = tensor.detach().index_select(axis, torch.from_numpy(np.flatnonzero(~kept[ids])))
                    seen.append(float(dead.abs().max()))
        stepped(self, done)

    monkeypatch.setattr(stages.Erosion, "stepped", watching)
    return seen


def test_units_that_went_stay_at_zero_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    words = ["train.optimizer=adamw", "train.weight_decay=0.1", "train.clip_norm=1.0", "prune.schedule.units=3"]
    folder = pipeline.run(tiny(tmp_path / "out", *words))
    assert len(seen) > 50
    assert max(seen) == 0.0
    assert [r.event for r in history_of(folder).removals] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]


class Stop(KeyboardInterrupt):
    pass


def bent() -> nn.Module:
    """A network whose activation of 0 is not 0: what reads a masked unit gets a gradient."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))


def test_they_stay_at_zero_from_the_first_step_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model={name: 'test_erode:bent'}", "prune.only=['0']", "recover.steps=4"]
    recipe = tiny(tmp_path / "out", *words)
    with monkeypatch.context() as patch:
        patch.setattr(watching, "SAVE_EVERY", 0.0)
        patch.setattr(loop, "CHECK_EVERY", 1)
        stop_at(patch, 7)
        with pytest.raises(Stop):
            pipeline.run(recipe)
    seen = watched(monkeypatch)
    pipeline.run(recipe, resume=True)
    assert len(seen) > 10
    assert max(seen) == 0.0


def stop_at(patch: pytest.MonkeyPatch, at: int) -> None:
    stepped = stages.Erosion.stepped

    def stopping(self: Any, done: int) -> None:
        stepped(self, done)
        if done == at:
            raise Stop

    patch.setattr(stages.Erosion, "stepped", stopping)


def stop_while_saving(patch: pytest.MonkeyPatch, at: int) -> None:
    """Stop with a history on the disk that is ahead of the state."""
    save, calls = Run.save_state, []

    def stopping(self: Run, *what: Any) -> None:
        calls.append(what)
        if self.stage == 1 and len(calls) > at:
            raise Stop
        save(self, *what)

    patch.setattr(Run, "save_state", stopping)


@pytest.mark.parametrize(
    ("stop", "at"), [(stop_at, 3), (stop_at, 17), (stop_while_saving, 13), (stop_while_saving, 14)]
)
def test_a_stop_between_events_ends_in_the_same_bits(
    stop: Any, at: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(watching, "SAVE_EVERY", 0.0)
        patch.setattr(loop, "CHECK_EVERY", 1)
        stop(patch, at)
        with pytest.raises(Stop):
            pipeline.run(recipe)
    assert not (tmp_path / "out" / "pruned.safetensors").exists()
    folder = pipeline.run(recipe, resume=True)
    names = ["pruned.safetensors", *(f"checkpoints/{n}_prunes.safetensors" for n in (4, 8, 12)), "history.json"]
    for name in names:
        if name.endswith("json"):
            assert (folder / name).read_text() == (finished / name).read_text()
            continue
        one, two = (sc.load(path / name).state_dict() for path in (folder, finished))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_random_control_goes_through_all_layers(tmp_path: Path) -> None:
    words = ["prune.criterion.name=random", "prune.budget={units: 0.4}", "recover.steps=1", "prune.save_every=100"]
    history = history_of(pipeline.run(tiny(tmp_path / "out", *words)))
    assert {r.group for r in history.removals[:9]} == {"1.conv1", "2.conv1", "3.conv1"}
    assert len({(r.group, r.unit) for r in history.removals}) == 17


def test_a_penalty_on_costs_takes_the_dear_units_first(tmp_path: Path) -> None:
    words = ["recover.steps=1", "prune.budget={units: 0.8}", "prune.save_every=100"]
    plain = pipeline.run(tiny(tmp_path / "a", *words))
    dear = pipeline.run(tiny(tmp_path / "b", *words, "prune.criterion.cost={params: 1000.0}"))
    # a channel of the last block costs 9 (8 + 16) + 2 parameters or more, of the first 9 (16 + 4) + 2
    left = [history_of(folder).removals[-1].params for folder in (plain, dear)]
    assert left[1] <= left[0]
    assert {r.group for r in history_of(dear).removals} == {"3.conv1"}


def test_scratch_from_a_history_and_from_a_plan(finished: Path, tmp_path: Path) -> None:
    common = ["prune={schedule: {name: once}, only: ['*.conv1'], plan: %s}", "recover={name: scratch, final_epochs: 1}"]
    folders = []
    for name, file in (("a", "history.json"), ("b", "plan.json")):
        words = [common[0] % json.dumps(str(finished / file)), common[1], "train.epochs=0"]
        folders.append(pipeline.run(tiny(tmp_path / name, *words)))
    for folder in folders:
        plan = Plan.from_json((folder / "plan.json").read_text())
        assert plan.keep == Plan.from_json((finished / "plan.json").read_text()).keep
        small, tuned = sc.load(folder / "pruned.safetensors"), sc.load(finished / "pruned.safetensors")
        assert [p.shape for p in small.parameters()] == [p.shape for p in tuned.parameters()]
        assert not torch.equal(small[1].conv1.weight, tuned[1].conv1.weight)  # pyrefly: ignore
        assert [r.stage for r in read(folder / "records.jsonl") if r.stage in ("cut", "epoch")] == ["cut", "epoch"]
    words = [common[0] % json.dumps(str(finished / "history.json")), "prune.events=3", common[1]]
    folder = pipeline.run(tiny(tmp_path / "c", *words))
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert sum(units - len(kept) for _, units, kept in plan.keep) == 3


def test_the_profile_of_a_pruned_network_fits_other_depths_widths_and_budgets(finished: Path, tmp_path: Path) -> None:
    path = json.dumps(str(finished / "history.json"))
    words = [
        f"prune={{schedule: {{name: once}}, only: ['*.conv1'], profile: {path}, round_to: null}}",
        "model.args={depth: 16, width: 0.5}",
        "recover={name: scratch, final_epochs: 1}",
        "train.epochs=0",
        "prune.budget={params: 0.6}",
    ]
    folder = pipeline.run(tiny(tmp_path / "out", *words))
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert dict(plan.achieved)["params"] == pytest.approx(0.6, abs=0.02)
    source = [share for _, share in history_of(finished).fractions()]
    found = {name: len(kept) / units for name, units, kept in plan.keep}
    shares = [found.get(f"{k}.conv1", 1.0) for k in range(1, 7)]
    expected = stretched(source, 6)
    scale = [a / b for a, b in zip(shares, expected, strict=True) if 0 < a < 1]
    assert max(scale) - min(scale) < 0.35  # one scale but for rounding: the groups have 8 to 32 units


def test_a_profile_keeps_its_proportions() -> None:
    graph = traced("wide_resnet", depth=16)
    names = [g.name for g in graph.groups if g.prunable]
    fractions = (0.5, 0.25, 1.0, 0.75, 0.125, 0.0)
    profile = Profile(tuple(zip(names, fractions, strict=True)))
    scores = score(graph, sc.criteria.Random())
    kept = Budget(units=sum(f * graph.group(n).units for f, n in zip(fractions, names, strict=True)) / 448)
    plan = sc.allocate(scores, kept, profile, round_to=None, min_units=0)
    assert {name: len(k) / units for name, units, k in plan.keep} == {
        n: f for n, f in zip(names, fractions, strict=True) if f < 1
    }
    half = sc.allocate(scores, Budget(units=kept.keep / 2), profile, round_to=None, min_units=0)
    assert {n: len(k) for n, _, k in half.keep} == {
        n: pytest.approx(f * graph.group(n).units / 2, abs=1) for n, f in zip(names, fractions, strict=True)
    }


def test_stretching_keeps_the_ends_and_the_mean() -> None:
    assert stretched((0.3, 0.6, 0.9), 3) == pytest.approx((0.3, 0.6, 0.9))
    assert np.mean(stretched((0.2, 0.4, 0.4, 0.2), 18)) == pytest.approx(0.3, abs=0.01)
    assert stretched((0.5,), 4) == (0.5, 0.5, 0.5, 0.5)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune.schedule={name: iterative, steps: 2}"], "goes with the schedule every"),
        (["recover.steps=null"], "how many optimiser steps"),
        (["prune.stop_drop=0.1"], "does nothing with prune.save_every"),
        (["prune.keep={'1.conv1': 0.5}"], "does nothing with prune.save_every"),
        (["prune.plan=x.json"], "prune.schedule"),
        (["prune.events=3"], "give that too"),
        (["prune.allocation=uniform"], "prune.normalise"),
        (["train.drops=[0.5, 1.5]"], "train.drops.1 = 1.5"),
        (["prune.min_units=-1"], "greater than or equal to 0"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune.only=['*.conv9']"], "matches no group"),
        (["model.args={depth: 12}"], "6n"),
        (["prune={plan: /no/such/file, schedule: {name: once}}"], "cannot be read"),
        (["prune={profile: pyproject.toml, schedule: {name: once}}"], "neither a plan nor a history"),
        (["prune.budget={units: 0.01}", "prune.min_units=2"], "can't be reached"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_written(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        pipeline.run(tiny(tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_groups_that_a_norm_mixes_are_refused(tmp_path: Path) -> None:
    words = ["model={name: 'test_erode:mixed'}", "prune.only=[]"]
    with pytest.raises(RecipeError, match=r"prune\.exact_only"):
        pipeline.run(tiny(tmp_path / "out", *words))
    folder = pipeline.run(tiny(tmp_path / "out", *words, "prune.exact_only=true", "prune.budget={units: 0.8}"))
    assert {r.group for r in history_of(folder).removals} == {"3"}


def mixed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


def test_a_plan_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    plan = json.dumps(str(finished / "history.json"))
    words = [f"prune={{schedule: {{name: once}}, plan: {plan}}}", "model.args={depth: 16}"]
    with pytest.raises(PlanError, match="for graph"):
        pipeline.run(tiny(tmp_path / "out", *words))


def damaged(text: str) -> Iterator[str]:
    head = json.loads(text)
    yield "{}"
    yield text[:-20]
    yield json.dumps({**head, "format": 2})
    yield json.dumps({**head, "removals": [{"event": 1}]})
    yield json.dumps({**head, "units": [["1.conv1"]]})


def test_a_damaged_history_is_an_error(finished: Path) -> None:
    text = (finished / "history.json").read_text()
    for bad in damaged(text):
        with pytest.raises(PlanError):
            shape_of(bad)
    graph = fresh(tiny(finished))
    history = history_of(finished)
    twice = replace(history, removals=(*history.removals, history.removals[0]))
    beyond = replace(history, removals=(Removal(1, "1.conv1", 99, 0.0, 0),))
    for wrong in (twice, beyond):
        with pytest.raises(PlanError, match="not there"):
            wrong.plan(graph)
    with pytest.raises(PlanError, match="14 events; 15"):
        history.until(15)
    assert history.until(0).plan(graph).keep == whole(graph).keep == ()
