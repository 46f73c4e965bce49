"""Evidence that rides on training steps: the same sums as the pass, in every way to train, and resumable."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from handmade import small_net
from secateur import resolve
from secateur.criteria import Costed, Criterion, Evidence, Fisher, Magnitude, Normalised, Taylor
from secateur.criteria.riding import Riding, Sums
from secateur.data import SOURCES, Source, split
from secateur.graph.groups import trace
from secateur.models import MODELS
from secateur.recipe import loads
from secateur.score import score
from secateur.train import loop
from secateur.train.loop import Settings, draw, fit, shuffled
from secateur.types import Graph, PlanError, RecipeError, Scores

CRITERIA = [Fisher(), Taylor(), Taylor("elementwise"), Costed(Normalised(Taylor()), macs=0.1)]


class Tied(nn.Module):
    """Units that are consumed twice by one layer, and once more by a weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.raw = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return nn.functional.linear(x.mean((2, 3)), self.raw)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Tied() if name == "tied" else MODELS[name](image_size=8)


def frozen(size: int = 32) -> Settings:
    return Settings(1, size, lambda p: torch.optim.SGD(p, 0.0))


def digits(limit: int = 150):  # 4 batches of 32 and one of 22
    return split(SOURCES["digits"](), limit=limit)


def ridden(graph: Graph, criterion: Criterion, settings: Settings | None = None, limit: int = 150) -> Scores:
    """Scores from one epoch of training."""

    point = fit(graph.model, digits(limit), replace(settings or frozen(), riding=Riding(graph, criterion)))
    assert point.evidence is not None
    return score(graph, criterion, sums=Sums.of(point.evidence))


def passed(graph: Graph, criterion: Criterion, limit: int = 150) -> Scores:
    """Scores from a pass over the same images; the batches of the tied network must be those of the training."""
    data = digits(limit)
    return score(graph, criterion, [data.batch(part) for part in shuffled(data.train, 32, draw(0, 0))])


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("name", ["s3", "mlp", "tied"])
def test_training_gives_the_scores_of_the_pass_where_the_weights_stand_still(name: str, criterion: Criterion) -> None:
    graph = trace(network(name), digits().batch(torch.arange(2))[0])
    one, two = ridden(graph, criterion), passed(graph, criterion)
    assert one.values.keys() == two.values.keys() != set()
    for group, values in two.values.items():
        assert torch.allclose(one.values[group], values, rtol=1e-5, atol=1e-5 * float(values.abs().max())), group


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(network("s3"), digits().batch(torch.arange(2))[0])
    whole = ridden(graph, Fisher())
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    parts = ridden(graph, Fisher())
    for group, values in whole.values.items():
        assert torch.allclose(values, parts.values[group], rtol=1e-6)


def test_a_small_last_batch_counts_by_its_images() -> None:
    """33 images in batches of 32: the last image has a batch of its own, with a gradient 32 times as large."""
    graph = trace(network("mlp"), digits().batch(torch.arange(2))[0])
    images = digits(34)
    data, labels = images.batch(images.train)
    even = score(graph, Fisher(), [(data[:17], labels[:17]), (data[17:], labels[17:])])
    riding = Riding(graph, Fisher())
    with riding:
        for part in (slice(0, 32), slice(32, 34)):
            riding.start(len(data[part]))
            nn.functional.cross_entropy(graph.model.train()(data[part]), labels[part]).backward()
            riding.take()
        riding.settle()
    uneven = score(graph, Fisher(), sums=riding.sums)
    for group, values in even.values.items():
        assert torch.allclose(values, uneven.values[group], rtol=1e-5)


def test_the_steps_are_those_without_a_rider_and_it_leaves_nothing_behind() -> None:

    models = [network("small_cnn"), network("small_cnn")]
    settings = Settings(2, 32, lambda p: torch.optim.SGD(p, 0.05), seed=3)
    graph = trace(models[1], digits().batch(torch.arange(2))[0])
    fit(models[0], digits(), settings)
    riding = Riding(graph, Fisher())
    fit(models[1], digits(), replace(settings, riding=riding))
    assert riding.sums.samples == 150  # the last epoch alone
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(module._forward_pre_hooks for module in models[1].modules())


def test_each_third_batch_can_be_enough() -> None:
    graph = trace(network("small_cnn"), digits().batch(torch.arange(2))[0])
    seen: list[tuple[int, int]] = []

    class Noting(Riding):
        def start(self, samples: int) -> None:
            seen.append((len(seen), samples))
            super().start(samples)

    riding = Noting(graph, Fisher(), every=3)
    fit(graph.model, digits(), Settings(2, 32, lambda p: torch.optim.SGD(p, 0.05), riding=riding))
    assert len(seen) == 10
    assert [step for step, samples in seen if samples] == [6, 9]  # of 5 to 9, the last epoch
    assert riding.sums.samples == sum(samples for _, samples in seen) < 150


@pytest.mark.parametrize("steps", [3, 7, 12])
def test_as_many_steps_as_an_epoch_has_are_watched_at_most(steps: int) -> None:
    graph = trace(network("mlp"), digits().batch(torch.arange(2))[0])
    riding = Riding(graph, Taylor())
    fit(graph.model, digits(160), Settings(9, 32, lambda p: torch.optim.SGD(p, 0.1), steps=steps, riding=riding))
    assert riding.sums.samples == 32 * min(steps, 5)


def test_bfloat16_and_channels_last_give_the_same_scores_to_their_precision() -> None:

    graph = trace(network("s3"), digits().batch(torch.arange(2))[0])
    exact = ridden(graph, Fisher())
    half = ridden(graph, Fisher(), replace(frozen(), autocast=torch.bfloat16, channels_last=True))
    for group, values in exact.values.items():
        assert torch.allclose(half.values[group], values, rtol=0.05, atol=0.02 * float(values.max())), group


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_give_the_evidence_in_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    torch.compiler.reset()
    graph = trace(network("s3"), digits().batch(torch.arange(2))[0])
    settings = replace(frozen(), compiled=True, epochs=2)  # the first epoch is compiled without slots
    one, two = ridden(graph, Taylor(), settings), passed(graph, Taylor())
    for group, values in two.values.items():
        assert torch.allclose(one.values[group], values, rtol=1e-4, atol=1e-5 * float(values.max())), group


def test_layers_before_the_first_weight_that_learns_are_seen() -> None:
    graph = trace(network("s3"), digits().batch(torch.arange(2))[0])
    two = passed(graph, Fisher())
    for parameter in list(graph.model.parameters())[:4]:
        parameter.requires_grad_(False)
    one = ridden(graph, Fisher())
    for group, values in two.values.items():
        assert torch.allclose(one.values[group], values, rtol=1e-5), group


def test_activations_are_seen_too() -> None:

    @dataclass(frozen=True)
    class Loud(Criterion):
        """Mean activation."""

        @property
        def evidence(self) -> frozenset[str]:
            return frozenset({"activations"})

        def each(self, evidence: Evidence) -> torch.Tensor:
            return evidence.need("activations")

    graph = trace(network("s3"), digits().batch(torch.arange(2))[0])
    one, two = ridden(graph, Loud()), passed(graph, Loud())
    for group, values in two.values.items():
        assert torch.allclose(one.values[group], values, rtol=1e-5), group


def test_sums_without_a_sample_are_an_error() -> None:
    graph = trace(small_net(), torch.zeros(2, 3, 4, 4))
    with pytest.raises(PlanError, match="no samples"):
        score(graph, Fisher(), sums=Sums())
    assert score(graph, Magnitude(), sums=Sums()).values  # it reads none


def test_every_prunable_group_of_the_network_is_watched() -> None:
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    data = split(Source("x", images, torch.arange(40) % 10, tuple("abcdefghij")))
    graph = trace(network("s3"), data.batch(torch.arange(2))[0])
    riding = Riding(graph, Fisher())
    assert {group.name for group in riding.groups} == {group.name for group in graph.groups if group.prunable}


@pytest.mark.parametrize(
    "words",
    [
        ["train.epochs=0"],
        ["recover.name=none", "prune.schedule={name: iterative, steps: 2}"],
        ["recover.epochs=0", "prune.schedule={name: iterative, steps: 2}"],
    ],
)
def test_a_recipe_without_training_before_a_cut_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="gathered in the training"):
        loads("version: 1\nname: x\n", overrides=["prune.criterion.evidence=training", *words])
    assert (
        resolve.criterion(loads("version: 1\nname: x\n", overrides=["prune.criterion.evidence=training"])) == Taylor()
    )


def test_sums_come_back_from_their_tensors(tmp_path: Path) -> None:
    sums = Sums(7, {"a.b": torch.rand(3, dtype=torch.float64)})
    back = Sums.of(sums.tensors())
    assert back.samples == 7
    assert torch.equal(back.values["a.b"], sums.values["a.b"])
