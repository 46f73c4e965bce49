"""Accuracy and latency: the figures, and that measuring changes nothing."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from secateur.measure.latency import compare, latency, race
from secateur.measure.summary import layers, table
from secateur.measure.task import evaluate
from secateur.types import MeasureError, Measurement


def test_accuracy_is_that_of_a_plain_loop() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5))
    inputs, labels = torch.randn(53, 6), torch.randint(0, 8, (53,))
    found = evaluate(model, zip(inputs.split(10), labels.split(10), strict=True))
    scores = model[0](inputs).detach()
    losses = nn.functional.cross_entropy(scores, labels, reduction="none").double()
    order = scores.argsort(1, descending=True)
    assert found.n == 53
    assert found.loss == pytest.approx(float(losses.mean()))
    assert found.loss_spread == pytest.approx(float(losses.std(correction=0)))
    assert found.top1 == pytest.approx(float((order[:, 0] == labels).float().mean()))
    assert found.top5 == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).float().mean()))


def test_evaluation_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    evaluate(model, [(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5).long())])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_fewer_than_five_classes_and_other_outputs() -> None:
    found = evaluate(nn.Identity(), [(torch.eye(3), torch.arange(3))])
    assert (found.top1, found.top5) == (1.0, None)
    with pytest.raises(MeasureError, match=r"shape \(n, classes\)"):
        evaluate(nn.Identity(), [(torch.rand(2, 3, 4), torch.arange(2))])
    with pytest.raises(MeasureError, match="at least one batch"):
        evaluate(nn.Identity(), [])


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        time.sleep(self.seconds)
        return x


def test_latency_is_in_milliseconds_per_call_and_the_slower_model_is_slower() -> None:
    models = {"dense": Sleeper(0.02).train(), "pruned": Sleeper(0.005)}
    found = latency(models, torch.zeros(2, 1), repeats=5)
    assert 19 < found["dense"].value < 60
    assert 4.9 < found["pruned"].value < 40
    assert (found["dense"].unit, found["dense"].n) == ("ms", 5)
    assert "batch 2" in found["dense"].how
    assert models["dense"].training


def test_the_speed_up_is_the_median_of_paired_rounds() -> None:
    dense, pruned, gain = compare(Sleeper(0.02), Sleeper(0.005), torch.zeros(2, 1), repeats=1)
    assert gain.value == pytest.approx(dense.value / pruned.value)
    assert (gain.unit, gain.n, gain.name) == ("times", 1, "speed-up batch 2")
    assert gain.value > 1


def test_fast_calls_are_timed_many_at_once_and_the_time_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sleeper(0.0)
    monkeypatch.setattr("secateur.measure.latency.time.perf_counter", lambda: model.calls * 0.0005)
    found = latency({"a": model}, torch.zeros(1), repeats=2, warmup=1)["a"]
    assert model.calls == 1 + 2 * 8  # a sample fills 4 ms with calls of 0.5 ms
    assert found.value == pytest.approx(0.5)


@pytest.mark.parametrize(("count", "repeats"), [(0, 3), (1, 0)])
def test_latency_needs_models_and_repeats(count: int, repeats: int) -> None:
    with pytest.raises(MeasureError, match="repeats >= 1"):
        latency({str(i): nn.Identity() for i in range(count)}, torch.zeros(1), repeats=repeats)


def test_a_measurement_needs_its_unit_and_n() -> None:
    with pytest.raises(MeasureError):
        Measurement("latency", 1.0, "", 3, 0.1, "cpu", "how")
    with pytest.raises(MeasureError):
        Measurement("latency", 1.0, "ms", 0, 0.1, "cpu", "how")


def test_the_summary_counts_shared_parameters_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    rows = layers(tied, torch.zeros(1, 4))
    assert [(row.name, row.kind, row.output, row.params) for row in rows] == [
        ("0", "Linear", (1, 4), 20),
        ("2", "Linear", (1, 4), 4),
    ]
    assert "total                                                                                24" in table(
        rows, {"total": 24}
    )


def test_a_race_is_against_the_fastest_dense() -> None:
    ways = {"slow": Sleeper(0.006), "fast": Sleeper(0.003), "callable": lambda x: time.sleep(0.0015)}
    taken, gains = race(ways, torch.rand(2, 1), {"slow", "fast"}, repeats=5)
    assert taken["slow"].value > taken["fast"].value > taken["callable"].value
    assert gains["fast"].value == pytest.approx(1)
    assert gains["slow"].value < 1 < gains["callable"].value
    assert "fast / this" in gains["callable"].how
