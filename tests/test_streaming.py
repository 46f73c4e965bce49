"""Contribution that rides on training: the pass over the same samples, in train mode, resumable, and no disturbance."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import pipeline, resolve
from secateur.criteria import Contribution, Criterion, Normalised, Worst
from secateur.criteria.riding import Riding, Sums
from secateur.criteria.streaming import Streaming, rider
from secateur.data import SOURCES, split
from secateur.graph.groups import trace
from secateur.models import MODELS
from secateur.recipe import loads
from secateur.score import score
from secateur.session import Screen
from secateur.train import loop
from secateur.train.loop import Point, Settings, Watch, draw, fit, shuffled
from secateur.types import Graph, PlanError, RecipeError
from test_contribution import triple

BOTH = Contribution()


def digits(limit: int = 150):  # 4 batches of 32 and one of 22
    return split(SOURCES["digits"](), limit=limit)


def network(name: str) -> Graph:
    torch.manual_seed(0)
    extra = {"in_channels": 1} if name == "s1_cnn" else {}
    return trace(MODELS[name](image_size=8, **extra), digits().batch(torch.arange(2))[0])


def settings(lr: float = 0.0, epochs: int = 1) -> Settings:
    return Settings(epochs, 32, lambda p: torch.optim.SGD(p, lr))


def ridden(graph: Graph, criterion: Criterion = BOTH, every: int = 1, how: Settings | None = None) -> Sums:
    point = fit(graph.model, digits(), replace(how or settings(), riding=rider(graph, criterion, every)))
    assert point.evidence is not None
    return Sums.of(point.evidence)


@pytest.mark.parametrize("criterion", [BOTH, Contribution(1, 0), Contribution(0, 1), Worst(Normalised(BOTH))], ids=repr)
@pytest.mark.parametrize("every", [1, 3])
def test_training_gives_the_scores_of_the_pass_over_the_same_samples(criterion: Criterion, every: int) -> None:
    graph = network("s1_cnn")
    data = digits()
    parts = [part[::every] for part in shuffled(data.train, 32, draw(0, 0))]
    two = score(graph, criterion, [data.batch(part) for part in parts])
    sums = ridden(graph, criterion, every)
    one = score(graph, criterion, sums=sums)
    assert sums.samples == sum(len(part) for part in parts)
    assert one.values.keys() == two.values.keys() == {group.name for group in graph.groups if group.prunable}
    for group, values in two.values.items():
        assert torch.allclose(one.values[group], values, rtol=1e-4, atol=1e-6), group


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = network("s1_cnn")
    whole = ridden(graph, every=4)
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    parts = ridden(graph, every=4)
    assert whole.samples == parts.samples == 4 * 8 + 6
    for group, row in whole.streamed.items():
        for name, values in row.items():
            assert torch.allclose(values, parts.streamed[group][name], rtol=1e-6), (group, name)


def test_what_is_sent_forward_in_train_mode_counts() -> None:
    """Behind a batch norm, dropout and an activation function: the values of this batch, by its own statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 5)
    )
    x = torch.randn(16, 1, 8, 8)
    graph = trace(net, x)
    sent: list[torch.Tensor] = []
    net[5].register_forward_pre_hook(lambda module, args: sent.append(args[0].detach()))
    with Streaming(graph, BOTH, 1) as riding:
        riding.start(16)
        net.train()(x).sum().backward()
        riding.take()
        net.eval()(10 * x)  # validation: not watched
        riding.settle()
    (group,) = (group for group in graph.groups if group.prunable)
    mean, top = triple(sent[0], net[5].weight.detach())
    assert (sent[0] == 0).float().mean() > 0.5
    assert torch.allclose(riding.sums.streamed[group.name]["contributions"], mean.double(), rtol=1e-4, atol=1e-7)
    assert torch.allclose(riding.sums.streamed[group.name]["contribution_max"], top.double(), rtol=1e-4, atol=1e-7)


def test_the_last_epoch_alone_counts_and_the_steps_are_those_without_a_rider() -> None:
    one, two = network("small_cnn"), network("small_cnn")
    fit(one.model, digits(), settings(0.05, 2))
    sums = ridden(two, every=1, how=settings(0.05, 2))
    assert sums.samples == 150
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(module._forward_pre_hooks for module in two.model.modules())


def test_a_stop_within_the_watched_epoch_resumes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    graph = network("s1_cnn")
    whole = ridden(graph, every=2, how=settings(0.05, 2))

    again = network("s1_cnn")
    saved: list[tuple[Point, dict[str, torch.Tensor]]] = []

    def save(point: Point) -> None:
        state = {name: tensor.clone() for name, tensor in again.model.state_dict().items()}
        saved.append((replace(point, evidence={k: v.clone() for k, v in (point.evidence or {}).items()}), state))

    how = replace(settings(0.05, 2), riding=rider(again, BOTH, 2))
    fit(again.model, digits(), how, watch=Watch(save=save, due=lambda: True))
    point, state = next((p, s) for p, s in saved if (p.cursor.epoch, p.cursor.step) == (1, 4))
    assert Sums.of(point.evidence or {}).samples == 64

    later = network("s1_cnn")
    later.model.load_state_dict(state)
    end = fit(later.model, digits(), replace(settings(0.05, 2), riding=rider(later, BOTH, 2)), begin=point)
    sums = Sums.of(end.evidence or {})
    assert sums.samples == whole.samples
    assert sums.streamed.keys() == whole.streamed.keys() == {g.name for g in graph.groups if g.prunable}
    for group, row in whole.streamed.items():
        assert all(torch.equal(values, sums.streamed[group][name]) for name, values in row.items()), group


TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
model: {name: mlp, args: {widths: [10, 6]}}
train: {optimizer: sgd, lr: 0.05}
prune:
  criterion: {name: contribution, evidence: training, every: 2}
  schedule: {name: during, total_epochs: 4, initial_iterations: 2, increment: 1, keep: 0.8}
measure: {batch_sizes: [1], repeats: 2}
"""


def test_a_run_gathers_anew_before_each_event_and_needs_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Riding | Streaming | None] = []

    def kept(*args: object) -> Riding | Streaming | None:
        made.append(rider(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("secateur.stages.rider", kept)
    monkeypatch.setattr(sys.modules["secateur.score"], "gather", lambda *args: pytest.fail("there was a pass"))
    pipeline.run(loads(TINY), tmp_path / "run", screen=Screen())
    batches = [len(part) for part in shuffled(digits(200).train, 32, 0)]
    assert [one.sums.samples for one in made if one] == [sum(-(-n // 2) for n in batches)] * 2  # not after the last


@dataclass(frozen=True)
class Mixed(Criterion):
    """Reads both kinds."""

    @property
    def evidence(self) -> frozenset[str]:
        return frozenset({"contributions", "unit_grads"})


def test_who_rides_how() -> None:
    graph = network("mlp")
    assert isinstance(rider(graph, BOTH), Streaming)
    assert isinstance(rider(graph, resolve.criterion(loads("{version: 1, name: x}"))), Riding)
    assert rider(graph, resolve.criterion(loads("{version: 1, name: x, prune: {criterion: {name: random}}}"))) is None
    with pytest.raises(PlanError, match="not both"):
        rider(graph, Mixed())
    with pytest.raises(RecipeError, match="compiled"):
        loads(TINY, overrides=["train.compile=true"])
