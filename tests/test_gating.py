"""Run-time pruning in a run: stages, records, checkpoints, resume, mistakes in recipes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur import gating, resolve
from secateur.infer import evaluate, open_model
from secateur.pipeline import run
from secateur.recipe import Recipe, loads
from secateur.runtime.gates import FBS, layers, watch
from secateur.track.local import read
from secateur.types import RecipeError

TINY = """
version: 1
name: tiny_fbs
threads: 1
data: {limit: 120}
model: {name: cifarnet, args: {widths: [8, 8, 8, 8, 8, 8, 8, 8]}}
train: {epochs: 1, batch_size: 32, lr: 0.01}
prune: {budget: {units: 1}, schedule: {name: once}}
fbs: {densities: [1.0, 0.5], epochs: 1, alone: 1, layers: {"0": 1.0}}
measure: {repeats: 2, batch_sizes: [1]}
"""


def recipe(*overrides: str) -> Recipe:
    return loads(TINY, overrides=overrides)


def rows(folder: Path, stage: str) -> list[Any]:
    return [record.data for record in read(folder / "records.jsonl") if record.stage == stage]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe(), tmp_path_factory.mktemp("gating") / "run")


def test_a_run_lowers_the_density_and_ships_the_gated_model(done: Path) -> None:
    (gates,), steps = rows(done, "gates"), rows(done, "gated")
    assert [row["path"] for row in gates["gated"]] == ["0", "3", "6", "9", "13", "16", "19", "23"]
    assert [row["density"] for row in steps] == [1.0, 0.5]
    assert steps[0]["macs"] == gates["macs"]
    model = sc.load(done / "gated.safetensors")
    assert [layer.density for layer in layers(model)] == [1.0] + [0.5] * 7
    with watch(model) as choices, torch.no_grad():
        model(torch.rand(2, 1, 8, 8))
    assert {path: int(choice.mask.sum()) for path, choice in choices.items()} == {
        "0": 16,
        **dict.fromkeys(list(choices)[1:], 8),
    }
    (measured,) = rows(done, "measure")
    found = {row["name"]: row for row in measured["measurements"]["gated"]}
    assert found["macs"]["value"] == pytest.approx(steps[1]["macs"])
    (choices,) = rows(done, "choices")
    assert choices["mean"] == choices["most"] == found["macs"]["value"]
    assert [(row["path"], row["density"]) for row in choices["layers"]] == [
        (row["path"], 1.0 if row["path"] == "0" else 0.5) for row in gates["gated"]
    ]
    quality, _ = evaluate(open_model(done / "gated.safetensors"))
    assert quality.figures()["top1"] == found["test top1"]["value"]
    assert len(rows(done, "epoch")) == 1 + 1 + 2
    assert not (done / "ungated.safetensors").exists()
    assert [row["density"] for row in measured["densities"]] == [1.0, 0.5]
    assert measured["densities"][1]["top1"] == found["test top1"]["value"]
    first = sc.load(done / "densities" / "1.safetensors")
    assert {layer.density for layer in layers(first)} == {1.0}
    assert (
        evaluate(open_model(done / "densities" / "1.safetensors"))[0].figures()["top1"]
        == measured["densities"][0]["top1"]
    )
    page = (done / "report.html").read_text()
    assert "At run time" in page
    assert "Channels computed in each layer" in page
    assert f"{steps[1]['macs']:,.0f}" in page


def test_gates_alone_leave_the_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def looked(stage: Any) -> Any:
        def run_stage(run: Any, model: Any, step: int, point: Any) -> Any:
            seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
            after = stage(run, model, step, point)
            seen["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}
            return after

        return run_stage

    monkeypatch.setitem(gating.STAGES, gating.ALONE, looked(gating.alone))
    run(recipe("fbs.densities=[0.5]"), tmp_path / "run")
    moved = {name for name, value in seen["after"].items() if not torch.equal(value, seen["before"][name])}
    assert moved
    assert all(".gate.predictor." in name for name in moved)


@pytest.mark.parametrize("stage", [gating.ON, gating.ALONE, gating.LOWER])
def test_a_run_that_was_stopped_among_its_gates_ends_like_one_that_was_not(
    stage: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stopping(*args: Any) -> Any:
        real(*args)
        raise Stop

    real = gating.STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setitem(gating.STAGES, stage, stopping)
        with pytest.raises(Stop):
            run(recipe(), tmp_path / "run")
    torch.rand(3)
    folder = run(recipe(), tmp_path / "run", resume=True)
    one, two = load_file(done / "gated.safetensors"), load_file(folder / "gated.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["macs"] for row in rows(folder, "gated")] == [row["macs"] for row in rows(done, "gated")]


EVERYWHERE = (
    "model={name: mlp, args: {widths: [12, 9]}}",
    "fbs={densities: [1.0, 0.5], everywhere: true, threshold: local, layers: {'1': 0.75}}",
)


def test_gates_everywhere_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stopping(*args: Any) -> Any:
        if args[2] == 2:
            raise Stop
        return real(*args)

    folder = run(recipe(*EVERYWHERE), tmp_path / "whole")
    (gates,) = rows(folder, "gates")
    model = sc.load(folder / "gated.safetensors")
    assert [row["path"] for row in gates["gated"]] == [layer.conv for layer in layers(model)]
    assert {layer.threshold for layer in layers(model)} == {"local"}
    assert [layer.density for layer in layers(model)] == [0.75, 0.5]
    real = gating.STAGES[gating.LOWER]
    with monkeypatch.context() as patch:
        patch.setitem(gating.STAGES, gating.LOWER, stopping)
        with pytest.raises(Stop):
            run(recipe(*EVERYWHERE), tmp_path / "again")
    again = run(recipe(*EVERYWHERE), tmp_path / "again", resume=True)
    one, two = load_file(folder / "gated.safetensors"), load_file(again / "gated.safetensors")
    assert any(name.endswith(".level") for name in one)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gates_that_share_masks_in_a_run(tmp_path: Path) -> None:
    words = ("model={name: wide_resnet, args: {depth: 10, width: 0.5}}", "prune.budget={units: 0.5}")
    folder = run(recipe(*words, "fbs={densities: [0.5], everywhere: true}"), tmp_path / "run")
    (gates,) = rows(folder, "gates")
    assert gates["sharing"] == ["2.bn1", "3.bn1", "4"]
    quality, _ = evaluate(open_model(folder / "gated.safetensors"))
    (measured,) = rows(folder, "measure")
    found = {row["name"]: row for row in measured["measurements"]["gated"]}
    assert quality.figures()["top1"] == found["test top1"]["value"]


def test_gates_go_on_what_a_cut_left(tmp_path: Path) -> None:
    folder = run(recipe("prune.budget={units: 0.5}", "fbs.densities=[0.5]", "fbs.alone=0"), tmp_path / "run")
    (gates,), (model,) = rows(folder, "gates"), rows(folder, "model")
    assert gates["macs"] < 0.5 * model["macs"]
    small, gated = sc.load(folder / "pruned.safetensors"), sc.load(folder / "gated.safetensors")
    assert gated[3].conv.weight.shape == small[3].weight.shape
    assert any(isinstance(module, FBS) for module in gated.modules())


def test_gates_go_on_what_is_left_when_the_cuts_stop_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.measure.accuracy.Classification.drop", lambda self, before, after: 1.0)
    words = ("prune.budget={units: 0.5}", "prune.schedule={name: iterative, steps: 2}", "prune.stop_drop=0.5")
    folder = run(recipe(*words, "fbs.densities=[0.5]", "fbs.alone=0"), tmp_path / "run")
    assert len(rows(folder, "cut")) == len(rows(folder, "stopped")) == 1
    (gates,), (model,), (step,) = rows(folder, "gates"), rows(folder, "model"), rows(folder, "gated")
    assert gates["macs"] == model["macs"]  # the cut was taken back
    assert step["macs"] < 0.5 * gates["macs"]
    assert layers(sc.load(folder / "gated.safetensors"))[1].density == 0.5


def test_the_names_of_the_reference(done: Path, tmp_path: Path) -> None:
    given = recipe("fbs={density: 0.5, initial: 0.02, reset_epochs: false}").fbs
    assert given is not None
    assert (given.densities, given.lr) == ((0.5,), 0.02)
    words = (f"fbs={{load: '{done / 'gated.safetensors'}', density: 0.4, epochs: 1}}", "train.epochs=0")
    with pytest.raises(RecipeError, match="does not hold this network"):
        run(recipe(f"fbs.load='{done / 'dense.safetensors'}'"), tmp_path / "run")
    gated = load_file(done / "gated.safetensors")
    seen: list[dict[str, torch.Tensor]] = []
    real = gating.STAGES[gating.LOWER]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            gating.STAGES,
            gating.LOWER,
            lambda run, model, *rest: seen.append(copy.deepcopy(model.state_dict())) or real(run, model, *rest),
        )
        run(recipe(*words), tmp_path / "run")
    assert all(torch.equal(gated[name], seen[0][name]) for name in gated)


def test_one_fall_of_the_rate_over_all_densities() -> None:
    chosen = recipe("fbs.reset_epochs=false", "train.rate=cosine")
    first, second = (resolve.gating(chosen, 1, 1, False, number).rate for number in (0, 1))
    assert [first(0.0), first(1.0), second(0.0), second(1.0)] == pytest.approx([1.0, 0.5, 0.5, 0.0])
    assert resolve.gating(recipe("train.rate=cosine"), 1, 1, False, 1).rate(0.0) == 1.0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("fbs.layers={nothing: 0.5}", "fbs.layers: 'nothing' names no layer with a gate"),
        ("fbs.densities=[]", "fbs.densities"),
        ("fbs.densities=[0.5, 1.5]", "fbs.densities"),
        ("fbs.densitys=[0.5]", "did you mean 'densities'"),
        ("fbs.pooling=median", "fbs.pooling"),
        ("fbs.threshold=global", "fbs.threshold"),
        ("model={name: mlp}", "everywhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        run(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()
