"""Tracing leaves a model as it was, takes inputs of any structure, and says what failed where."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.trace import TAG
from secateur.types import TraceError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Everything(nn.Module):
    """Draws random numbers, counts its calls in a buffer, replaces a buffer, keeps tensors in odd places."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8))
        self.constant = torch.ones(8)
        self.held: dict[str, Any] = {}
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)) * self.constant + 0 * torch.rand(8) + 0 * torch.randn(())
        self.calls += 1
        self.last = h.mean(0).detach()
        self.held["h"] = [h]
        if self.fails:
            self.b(torch.rand(1, 9))
        return self.b(h)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_whether_it_runs_or_fails(fails: bool) -> None:
    model, x = Everything(fails), torch.rand(3, 4)
    model.train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    modes = [m.training for m in model.modules()]
    before, hooks = state(model), len(model._forward_hooks)
    torch.manual_seed(7)
    random.seed(7)
    generator = torch.random.get_rng_state()
    if fails:
        with pytest.raises(TraceError, match=r"module 'b'.*RuntimeError"):
            sc.trace(model, x)
    else:
        sc.trace(model, x)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (hooks, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in list(model.modules())[1:])
    assert not model.a.weight.requires_grad
    assert model.b.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_no_tensor_keeps_a_mark(fails: bool) -> None:
    model, x, held = Everything(fails), torch.rand(3, 4), []
    model.b.register_forward_hook(lambda m, args, out: held.append(out))
    try:
        sc.trace(model, x)
    except TraceError:
        assert fails
    tensors = [x, *model.parameters(), *model.buffers(), model.constant, *model.held.get("h", []), *held]
    assert not [t for t in tensors if hasattr(t, TAG)]
    copy.deepcopy(model.constant)


def test_tracing_again_gives_the_same_graph() -> None:
    model, x = Everything(), torch.rand(3, 4)
    first, second = sc.trace(model, x), sc.trace(model, x)
    assert first.fingerprint == second.fingerprint
    assert str(first).splitlines()[1:] == str(second).splitlines()[1:]


def test_fingerprints_tell_structures_apart_and_not_values() -> None:
    x = torch.rand(2, 4)
    first = sc.trace(small(), x).fingerprint
    assert sc.trace(small(), torch.rand(2, 4)).fingerprint == first
    wider = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    assert len({first, sc.trace(wider, x).fingerprint, sc.trace(other, x).fingerprint}) == 3


class Takes(nn.Module):
    """Two inputs and an option, in whatever structure the test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(10, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, words: Any, more: Any = None, scale: float = 1.0) -> Tensor:
        if isinstance(words, dict):
            words, more = words["words"], words["more"][0]
        return self.b(torch.relu(self.table(words) + self.a(more) * scale))


WORDS, MORE = torch.tensor([[1, 2, 3]]), torch.rand(1, 3, 3)


@pytest.mark.parametrize(
    "inputs",
    [
        (WORDS, MORE),
        (WORDS, MORE, 2.0),
        {"words": WORDS, "more": MORE},
        ({"words": WORDS, "more": [MORE, None]},),
    ],
    ids=["tuple", "tuple with a number", "keywords", "nested"],
)
def test_inputs_of_any_structure(inputs: Any) -> None:
    (group,) = [g for g in sc.trace(Takes(), inputs).groups if g.prunable]
    rows = [(m.tensor, m.axis, m.role) for m in group.members]
    assert rows == [
        ("table.weight", 1, "out"), ("a.weight", 0, "out"), ("a.bias", 0, "along"), ("b.weight", 1, "in")
    ]  # fmt: skip


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None
    count: int


class Returns(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.a, self.b, self.shape = nn.Linear(4, 8), nn.Linear(8, 2), shape

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        y = self.b(h)
        if self.shape == "hidden":
            return {"y": [y, {"deep": (h, None)}], "n": 3}
        return Answer(y, h if self.shape == "hidden in a dataclass" else None, 2)


@pytest.mark.parametrize(
    ("shape", "frozen"), [("hidden", True), ("hidden in a dataclass", True), ("logits only", False)]
)
def test_outputs_are_found_in_any_structure(shape: str, frozen: bool) -> None:
    group = sc.trace(Returns(shape), torch.rand(2, 4)).group("a")
    assert (group.frozen == "output of the model (axis 1)") is frozen
    assert group.prunable is not frozen


def test_wrapped_models_are_unwrapped() -> None:
    model, x = small(), torch.rand(2, 4)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        graph = sc.trace(wrapped, x)
        assert graph.model is model
        assert graph.group("0").prunable


def test_a_distributed_model_is_unwrapped(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small()
        assert sc.trace(nn.parallel.DistributedDataParallel(model), torch.rand(2, 4)).model is model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_are_refused_or_pass_as_a_part() -> None:
    with pytest.raises(TraceError, match="pass the eager model"):
        sc.trace(torch.jit.script(small()), torch.rand(2, 4))
    mixed = nn.Sequential(nn.Linear(4, 8), torch.jit.script(nn.ReLU()), nn.Linear(8, 2))
    graph = sc.trace(mixed, torch.rand(2, 4))
    assert graph.group("0").units == 8
    assert sc.verify(graph).ok


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("not a model", torch.rand(1), r"torch.nn.Module, got str; pass the model itself"),
        (small(), torch.rand(2, 5), r"module '0'.*Check that model\(\*example_inputs\) runs"),
        (small(), {"x": torch.rand(2, 4)}, r"unexpected keyword argument 'x'"),
        (small(), (), r"missing 1 required positional argument"),
        (nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), torch.rand(2, 4), r"1\.weight.*run the model once"),
    ],
    ids=["no module", "wrong width", "wrong keyword", "no input", "lazy"],
)
def test_failures_name_the_module_and_the_remedy(model: Any, inputs: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        sc.trace(model, inputs)


def test_models_without_parameters_have_no_groups() -> None:
    graph = sc.trace(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(1, 2, 3))
    assert (graph.groups, graph.units, sc.verify(graph).rows) == ((), 0, ())


def test_tied_tensors_have_one_name_and_aliases() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    graph = sc.trace(model, torch.rand(2, 4))
    assert graph.aliases == {"2.weight": "0.weight"}
    assert "2.weight" not in graph.axes


def test_every_axis_with_units_is_an_array_of_ids() -> None:
    graph = sc.trace(small(), torch.rand(2, 4))
    rows = {k: [None if a is None else a.tolist() for a in axes] for k, axes in graph.axes.items()}
    out, hidden, given = graph.group("2"), graph.group("0"), graph.group("0#2")
    ids = {g.name: list(range(g.offset, g.offset + g.units)) for g in (out, hidden, given)}
    assert rows == {
        "0.weight": [ids["0"], ids["0#2"]], "0.bias": [ids["0"]], "2.weight": [ids["2"], ids["0"]], "2.bias": [ids["2"]]
    }  # fmt: skip
    assert sorted(np.concatenate(list(ids.values()))) == list(range(graph.units))


class Aux(nn.Module):
    """A branch that only runs in train mode, like the auxiliary classifiers of Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return (self.b(h), self.aux(h)) if self.training else self.b(h)


def test_a_branch_that_did_not_run_is_not_cut_blindly() -> None:
    graph = sc.trace(Aux(), torch.rand(2, 4))
    unused = [g for g in graph.groups if any(m.tensor.startswith("aux") and m.role == "out" for m in g.members)]
    assert not [g.name for g in unused if g.prunable]
    for group in graph.groups:
        if group.prunable:
            plan = sc.Plan(graph.fingerprint, ((group.name, group.units, (0, 1)),))
            small = sc.compact(graph, plan)
            assert [t.shape for t in small.train()(torch.rand(5, 4))] == [(5, 2), (5, 3)]
