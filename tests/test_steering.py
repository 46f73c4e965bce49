"""Runtime neural pruning in a run: rounds, records, checkpoints, resume, budgets, mistakes in recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur import steering
from secateur.infer import evaluate, open_model, set_budget, set_density
from secateur.pipeline import run
from secateur.recipe import Recipe, loads
from secateur.runtime.budget import bias_for
from secateur.runtime.gates import Steered
from secateur.runtime.gates.cost import meter
from secateur.track.local import read
from secateur.types import CheckpointError, PlanError, RecipeError

TINY = """
version: 1
name: tiny_rnp
threads: 1
data: {limit: 160}
model: {name: s0, args: {widths: [8, 8, 8, 4], dropout: 0.0}}
train: {epochs: 1, batch_size: 32, optimizer: sgd, lr: 0.01, rate: one_cycle}
prune: {budget: {units: 1}, schedule: {name: once}}
rnp: {rounds: 2, policy_steps: 6, backbone_steps: 3, embed: 8, hidden: 8, penalty: -3, policy_lr: 0.05,
  budgets: [0.9, 0.7]}
measure: {repeats: 2, batch_sizes: [1]}
"""


def recipe(*overrides: str) -> Recipe:
    return loads(TINY, overrides=overrides)


def rows(folder: Path, stage: str) -> list[Any]:
    return [record.data for record in read(folder / "records.jsonl") if record.stage == stage]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe(), tmp_path_factory.mktemp("steering") / "run")


def test_a_run_trains_in_rounds_and_ships_network_and_controller(done: Path) -> None:
    (gates,), told, (measured,) = rows(done, "gates"), rows(done, "round"), rows(done, "measure")
    assert len(gates["gated"]) == 4
    assert [row["round"] for row in told] == [1, 2]
    assert told[0]["epsilon"] == pytest.approx(0.1)  # annealed over half of the updates
    model = sc.load(done / "gated.safetensors")
    assert isinstance(model, Steered)
    found = {row["name"]: row for row in measured["measurements"]["gated"]}
    assert found["macs"]["value"] < meter(model, torch.rand(1, 1, 8, 8)).dense
    assert evaluate(open_model(done / "gated.safetensors"))[0].figures()["top1"] == found["test top1"]["value"]
    (choices,) = rows(done, "choices")
    assert choices["mean"] == pytest.approx(found["macs"]["value"])
    assert choices["dense"] == gates["macs"]
    assert [layer["path"] for layer in choices["layers"]] == [row["path"] for row in gates["gated"]]
    assert all(sum(layer["actions"]) == pytest.approx(1, abs=2e-3) for layer in choices["layers"])
    page = (done / "report.html").read_text()
    assert "At run time" in page
    assert "How many channels the images compute" in page
    assert not (done / "ungated.safetensors").exists()


@pytest.mark.parametrize("order", ["criterion", "given"])
def test_channels_are_put_in_the_order_of_the_criterion_before_they_form_groups(order: str, tmp_path: Path) -> None:
    still = ["rnp.rounds=1", "rnp.backbone_steps=0", "rnp.budgets=[]", "recover.epochs=0"]
    folder = run(recipe(*still, "prune.criterion={name: magnitude}", f"rnp.order={order}"), tmp_path / "run")
    sizes = {
        name: load_file(folder / f"{name}.safetensors")[key].flatten(1).norm(dim=1)
        for name, key in (("dense", "0.weight"), ("gated", "model.0.conv.weight"))
    }
    best = sizes["dense"].sort(descending=True).values if order == "criterion" else sizes["dense"]
    torch.testing.assert_close(sizes["gated"], best)


def test_one_model_serves_several_budgets(done: Path) -> None:
    (measured,) = rows(done, "measure")
    large, small = measured["budgets"]
    model = sc.load(done / "gated.safetensors")
    assert isinstance(model, Steered)
    whole = meter(model.model, torch.rand(1, 1, 8, 8)).dense
    assert small["macs"] < large["macs"] <= 1.02 * 0.9 * whole  # found on validation images, told of test images
    reader = open_model(done / "gated.safetensors")
    assert set_budget(reader, 0.7) == pytest.approx(small["bias"], abs=1e-3)
    assert evaluate(reader)[0].figures()["top1"] == small["top1"]
    with pytest.raises(PlanError, match="the first groups alone"):
        bias_for(model, [torch.rand(4, 1, 8, 8)], 0.01)


def test_what_has_no_such_dial_is_told(done: Path) -> None:
    with pytest.raises(CheckpointError, match="no controller"):
        set_budget(open_model(done / "dense.safetensors"), 0.5)
    with pytest.raises(CheckpointError, match="no gates of FBS"):
        set_density(open_model(done / "gated.safetensors"), 0.5)


@pytest.mark.parametrize("after", ["prefixes", "a round"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    after: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stopping(*args: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        if after == "prefixes":
            patch.setitem(steering.STAGES, steering.ROUNDS, stopping)
        else:
            real = steering.Interleaved.round_
            patch.setattr(steering.Interleaved, "round_", lambda self: stopping() if self.rounds else real(self))
        with pytest.raises(Stop):
            run(recipe(), tmp_path / "run")
    torch.rand(3)
    folder = run(recipe(), tmp_path / "run", resume=True)
    one, two = load_file(done / "gated.safetensors"), load_file(folder / "gated.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(folder, "measure")[0]["budgets"] == rows(done, "measure")[0]["budgets"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rnp.penalty=0.1", "rnp.penalty"),
        ("rnp.groups=1", "rnp.groups"),
        ("rnp.groups=9", "it has too few channels for 9 groups"),
        ("rnp.round=5", "did you mean 'rounds'"),
        ("fbs.epochs=1", "give fbs or rnp, not both"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, PlanError), match=told):
        run(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()
