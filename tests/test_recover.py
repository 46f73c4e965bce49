"""Recovery: distillation, new or rewound weights, renewed statistics, a carried optimiser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import pipeline, recovery, resolve
from secateur.compact import take
from secateur.data import SOURCES, Dataset, split
from secateur.models import MODELS
from secateur.recipe import Recipe, loads
from secateur.session import Run
from secateur.track.local import read
from secateur.train.distil import divergence, last_weighted, similarity, taught
from secateur.train.loop import Epoch, Point, Settings, Watch, fit
from secateur.train.optimizers import OPTIMIZERS
from secateur.train.restart import begin_anew, cut_along, recalibrate
from secateur.types import RecipeError

TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
model: {name: small_cnn}
train: {epochs: 3, lr: 0.003, rate: cosine}
prune: {criterion: {samples: 100}, budget: {units: 0.5}, round_to: null}
measure: {repeats: 1, batch_sizes: [1]}
"""


def tiny(folder: Path, *overrides: str) -> Recipe:
    return loads(TINY, overrides=[f"out={json.dumps(str(folder))}", *overrides])


def digits() -> Dataset:
    return split(SOURCES["digits"](), limit=160)


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS["small_cnn"](image_size=8)


def halved(model: nn.Module) -> tuple[sc.Graph, nn.Module]:
    graph = sc.trace(model, torch.rand(4, 1, 8, 8))
    plan = sc.allocate(sc.score(graph, sc.criteria.Magnitude()), sc.Budget(units=0.5), round_to=None)
    return graph, sc.compact(graph, plan)


def plan(**options: object) -> Settings:
    return replace(Settings(1, 32, lambda p: OPTIMIZERS["sgd"](p, 0.05, 0.0, 0.9)), **options)


def test_the_divergence_is_the_formula() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
    assert float(divergence(ours, theirs, 3.0)) == pytest.approx(9 * float((p * (p / q).log()).sum(1).mean()))


def test_similarity_knows_no_widths_no_scale_and_no_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    assert float(similarity(x, 2 * x[:, torch.randperm(7)])) == pytest.approx(0, abs=1e-9)
    a = torch.randn(5, 3)
    g, h = (m @ m.T / (m @ m.T).norm(dim=1, keepdim=True) for m in (a, x))
    assert float(similarity(a, x)) == pytest.approx(float((g - h).square().sum() / 25))


def test_the_last_hidden_layer_is_what_the_classifier_reads() -> None:
    model = cnn()
    assert (
        model.get_submodule(last_weighted(model, torch.rand(2, 1, 8, 8)))
        is [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    )


def test_a_taught_step_has_the_gradient_of_the_formula_and_leaves_the_teacher_alone() -> None:
    data, teacher = digits(), cnn(1).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    _, student = halved(cnn())
    _, twin = halved(cnn())
    inputs, labels = data.batch(data.train[:32])
    with taught(student, teacher, inputs, temperature=2.0, mix=0.7, features=5.0) as guide:
        judge = guide(inputs)
        scores = student(inputs)
        judge(scores, nn.functional.cross_entropy(scores, labels)).backward()
    assert all(torch.equal(teacher.state_dict()[key], before[key]) for key in before)
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training
    assert not any(m._forward_pre_hooks for net in (student, teacher) for m in net.modules())
    hidden = lambda net, x: nn.Sequential(*list(net)[:-1])(x)  # noqa: E731
    scores = twin[-1](ours := hidden(twin, inputs))
    with torch.no_grad():
        answer = teacher.eval()[-1](theirs := hidden(teacher, inputs))
    loss = 0.3 * nn.functional.cross_entropy(scores, labels) + 0.7 * divergence(scores, answer, 2.0)
    (loss + 5 * similarity(ours, theirs)).backward()
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)  # pyrefly: ignore


def test_a_silent_teacher_changes_nothing_and_a_loud_one_does() -> None:
    data, teacher, ends = digits(), cnn(1), []
    for mix in (None, 0.0, 1.0):
        _, student = halved(cnn())
        if mix is None:
            fit(student, data, plan())
        else:
            with taught(student, teacher, data.batch(data.train[:4])[0], mix=mix) as guide:
                fit(student, data, plan(guide=guide))
        ends.append(nn.utils.parameters_to_vector(student.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2])


def test_recalibrated_statistics_are_those_of_the_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 2)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [torch.randn(8, 3) + 2, torch.randn(8, 3) * 3]
    assert recalibrate(model, batches) == 1
    norm = model[1]
    assert torch.allclose(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-5)
    assert (norm.momentum, model.training, norm.training, model[0].training) == (0.3, True, True, True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert recalibrate(nn.Linear(2, 2), batches) == 0


def test_new_weights_have_the_deviation_of_a_network_of_that_size() -> None:
    def wide(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 800), nn.BatchNorm1d(800), nn.ReLU(), nn.Linear(800, 400), nn.ReLU(), nn.Linear(400, 10)
        )

    graph = sc.trace(wide(0), torch.rand(4, 64))
    plan = sc.allocate(sc.score(graph, sc.criteria.Magnitude()), sc.Budget(units=0.2), round_to=None)
    small = sc.compact(graph, plan)
    small(torch.rand(8, 64))  # moves the running statistics
    old = small[3].weight.detach().clone()
    begin_anew(small, wide(7), cut=True)
    for layer in (small[0], small[3], small[5]):
        law = (3 * layer.in_features) ** -0.5  # torch's Linear: uniform within 1 / sqrt(inputs)
        assert float(layer.weight.detach().std()) == pytest.approx(law, rel=0.08)
        assert float(layer.weight.detach().abs().max()) <= layer.in_features**-0.5 * 1.0001
        assert float(layer.bias.detach().abs().max()) <= layer.in_features**-0.5 * 1.0001
    assert not torch.equal(small[3].weight, old)
    assert int(small[1].num_batches_tracked) == 0
    assert torch.equal(small[1].running_mean, torch.zeros_like(small[1].running_mean))
    assert torch.equal(small[1].weight, torch.ones_like(small[1].weight))


def test_weights_are_cut_along_like_the_model() -> None:
    model = cnn()
    graph, small = halved(model)
    found = cut_along(small, {name: value.clone() for name, value in graph.model.state_dict().items()}, cut=True)
    assert all(torch.equal(found[name], value) for name, value in small.state_dict().items())


def rows(folder: Path, stage: str) -> list[dict]:
    return [dict(r.data) for r in read(folder / "records.jsonl") if r.stage == stage]


def test_rewinding_goes_back_to_the_weights_and_the_rate_of_that_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[dict[str, torch.Tensor]] = []
    began: list[tuple[nn.Module, dict[str, torch.Tensor], Point]] = []
    mark, begin = recovery.mark, recovery.begin

    def marking(run: Run, model: nn.Module, point: Point) -> None:
        if (point.cursor.epoch, point.cursor.step) == (1, 0):
            marked.append({key: value.clone() for key, value in model.state_dict().items()})
        mark(run, model, point)

    def beginning(run: Run, model: nn.Module, step: int, point: Point) -> Point:
        found = begin(run, model, step, point)
        began.append((model, {key: value.clone() for key, value in model.state_dict().items()}, found))
        return found

    monkeypatch.setattr(recovery, "mark", marking)
    monkeypatch.setattr(recovery, "begin", beginning)
    folder = pipeline.run(tiny(tmp_path / "out", "recover={name: rewind, rewind: 1}", "prune.schedule.steps=2"))
    assert len(marked) == 1
    assert len(began) == 2
    for model, state, point in began:
        slices = model.__dict__["_secateur"].slices
        assert (point.cursor.epoch, point.cursor.step) == (1, 0)
        assert all(torch.equal(state[key], take(marked[0][key], slices.get(key, ()))) for key in state)
    epochs = rows(folder, "epoch")
    assert [(row["step"], row["epoch"]) for row in epochs] == [
        (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip
    rate = {(row["step"], row["epoch"]): row["rate"] for row in epochs}
    assert all(rate[step, epoch] == rate[0, epoch] for step in (1, 2) for epoch in (1, 2))
    assert not (folder / "rewind.safetensors").exists()


def test_scratch_trains_as_long_or_as_much_as_the_dense_model() -> None:
    one = loads(TINY, overrides=["recover.name=scratch"])
    work = loads(TINY, overrides=["recover={name: scratch, scratch: compute, epochs: 5}"])
    assert resolve.training(one, 1, last=True, left=0.25).epochs == 3
    assert resolve.training(work, 2, last=True, left=0.25).epochs == 12
    assert resolve.training(work, 1, last=False, left=0.5).epochs == 5


def test_scratch_begins_with_weights_that_knew_nothing(tmp_path: Path) -> None:
    folder = pipeline.run(tiny(tmp_path / "out", "recover={name: scratch, lr: 1e-12}"))
    after, recovered = rows(folder, "cut")[0]["after"], rows(folder, "recovered")[0]
    assert after["top1"] > recovered["top1"]
    assert recovered["top1"] < 0.35
    assert len([row for row in rows(folder, "epoch") if row["step"] == 1]) == 3


def test_distillation_runs_and_recalibration_is_recorded(tmp_path: Path) -> None:
    folder = pipeline.run(tiny(tmp_path / "out", "recover={name: distil, epochs: 2, recalibrate: 99}"))
    found = rows(folder, "recalibrated")[0]
    assert (found["norms"], found["batches"], found["step"]) == (3, 7, 1)  # 200 images: 6 batches of 32 and one of 8
    losses = [row["train_loss"] for row in rows(folder, "epoch") if row["step"] == 1]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimiser_goes_on_with_the_momenta_of_what_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[sc.Graph, nn.Module, Point, Point]] = []
    carried = recovery.carried

    def noting(run: Run, graph: sc.Graph, cut: nn.Module, small: nn.Module, step: int, point: Point) -> Point:
        found.append((graph, cut, point, carried(run, graph, cut, small, step, point)))
        return found[-1][-1]

    monkeypatch.setattr(recovery, "carried", noting)
    pipeline.run(
        tiny(
            tmp_path / "out", f"train.optimizer={name}", "train.lr=0.001", "prune.schedule.steps=2",
            "recover={carry_optimizer: true, lr: 1e-4}",
        )
    )  # fmt: skip
    assert len(found) == 2
    for graph, cut, before, after in found:
        slices = cut.__dict__["_secateur"].slices
        names = [n for n, _ in graph.model.named_parameters()]
        assert before.optimizer is not None
        assert after.optimizer is not None
        assert after.optimizer["param_groups"][0]["lr"] == 1e-4
        for index, parameter in enumerate(names):
            old, new = before.optimizer["state"][index], after.optimizer["state"][index]
            assert old.keys() == new.keys()
            for key, value in old.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    assert torch.equal(new[key], take(value, slices.get(parameter, ())))


def test_without_carrying_each_recovery_starts_with_a_new_optimiser(tmp_path: Path) -> None:
    plain = pipeline.run(tiny(tmp_path / "a"))
    carried = pipeline.run(tiny(tmp_path / "b", "recover.carry_optimizer=true"))
    one, two = (sc.load(f / "pruned.safetensors").state_dict() for f in (plain, carried))
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_a_cut_that_keeps_everything_leaves_the_dense_model_alone(tmp_path: Path) -> None:
    folder = pipeline.run(tiny(tmp_path / "out", "prune.budget={units: 1.0}", "recover.name=distil"))
    one, two = (sc.load(folder / f"{name}.safetensors").state_dict() for name in ("dense", "pruned"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    dense = rows(folder, "measure")[0]["measurements"]["dense"]
    told = next(m["value"] for m in dense if m["name"] == "validation top1")
    assert told == pytest.approx(rows(folder, "dense")[0]["top1"])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("recover={name: rewind, rewind: 3}", "recover.rewind = 3: must be less than train.epochs = 3"),
        ("recover={name: scratch, final_epochs: 0}", "new weights must be trained"),
        ("recover={name: scratch, carry_optimizer: true}", "does nothing with scratch"),
        ("recover={name: rewind, recalibrate: 2}", "does nothing with rewind"),
        ("recover={name: none, steps: 2}", "recover.steps = 2: does nothing with none"),
        ("recover={steps: 2, warmup: 0.5}", "counts epochs"),
        ("prune={schedule: {name: every}}", "prune.round_to: the schedule every takes units one by one"),
        ("prune={schedule: {name: every}, budget: {macs: 0.5}, round_to: null}", "give budget.units"),
    ],
)
def test_what_does_not_go_together_is_named(override: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        loads(TINY, overrides=[override])


def test_figures_of_a_taught_epoch_are_told() -> None:
    told: list[Epoch] = []
    data, student = digits(), halved(cnn())[1]
    with taught(student, cnn(1), data.batch(data.train[:4])[0], features=1.0) as guide:
        fit(student, data, plan(guide=guide, ema=0.9, mixup=0.2), watch=Watch(epoch=told.append))
    assert told[0].train["loss"] > 0
