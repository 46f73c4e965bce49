"""The training loop, its optimisers and rates, and the state file."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.data import SOURCES, Dataset, Source, split
from secateur.measure.task import evaluate
from secateur.models import MODELS
from secateur.train import loop, resume
from secateur.train.average import Average
from secateur.train.layout import gradients_alike, laid_out, like_weights
from secateur.train.loop import Epoch, Point, Settings, TrainError, Watch, draw, fit, shuffled
from secateur.train.mixup import mixup
from secateur.train.optimizers import OPTIMIZERS
from secateur.train.rates import RATES, warmed
from secateur.train.resume import State, atomic_write, read_state, write_state
from secateur.types import CheckpointError


def data() -> Dataset:
    return split(SOURCES["digits"](), limit=160)


def plan(name: str = "adam", lr: float = 0.01, **options: object) -> Settings:
    return replace(Settings(2, 32, lambda p: OPTIMIZERS[name](p, lr, 1e-4, 0.9)), **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(MODELS["mlp"](image_size=8, widths=[16]), nn.Dropout(0.2))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_one_epoch_equals_a_loop_written_out(name: str) -> None:
    digits, settings = data(), plan(name, epochs=1, label_smoothing=0.1, rate=RATES["cosine"])
    model, twin = net()[0], net()[0]
    fit(model, digits, settings)
    optimizer = OPTIMIZERS[name](twin.parameters(), 0.01, 1e-4, 0.9)
    batches = shuffled(digits.train, 32, draw(0, 0))
    for number, indices in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * RATES["cosine"](number / len(batches))
        inputs, labels = digits.batch(indices)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(inputs), labels, label_smoothing=0.1).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_it_learns_and_reports_each_epoch() -> None:
    rows: list[Epoch] = []
    fit(net(), split(SOURCES["digits"]()), plan(epochs=5), watch=Watch(epoch=rows.append))
    assert [row.epoch for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1].quality.top1 > 0.85
    assert rows[-1].train["loss"] < rows[0].train["loss"]


def test_it_leaves_the_random_state_and_depends_on_its_seed_alone() -> None:
    models = [net(), net(), net()]
    for model, other, seed in zip(models, (1, 2, 3), (0, 0, 5), strict=True):
        torch.manual_seed(other)
        before = torch.random.get_rng_state()
        fit(model, data(), plan(seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
    weights = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_loss_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TrainError, match=r"loss is (nan|inf) in epoch 1"):
        fit(net(), data(), plan("sgd", lr=1e20))


def test_every_image_is_seen_once_and_a_last_batch_of_one_is_left_out() -> None:
    indices = torch.arange(100, 197)
    assert sorted(torch.cat(shuffled(indices, 32, 0)).tolist()) == indices[shuffled_kept(indices)].tolist()
    assert sorted(torch.cat(shuffled(indices, 30, 0)).tolist()) == indices.tolist()
    assert [len(b) for b in shuffled(indices, 32, 0)] == [32, 32, 32]
    assert len(shuffled(torch.tensor([4]), 32, 0)) == 1
    assert not torch.equal(torch.cat(shuffled(indices, 30, 0)), torch.cat(shuffled(indices, 30, 1)))


def shuffled_kept(indices: torch.Tensor) -> list[int]:
    """Positions of the images that stay when the last batch has one image."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return sorted(order[:96].tolist())


class Stop(Exception):
    """Stands for a kill right after the state is on the disk."""


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_resumes(make: Callable[[], nn.Module], settings: Settings, path: Path, step: int = 0) -> None:
    """Stop after epoch 1 (``step``: at that step of epoch 2), continue from the file alone, compare the bits."""
    whole, part, rest = make(), make(), make()
    fit(whole, data(), settings)

    def save(point: Point) -> None:
        if (point.cursor.epoch, point.cursor.step) == (1, step):
            write_state(path, State(0, 3, point, part.state_dict(), "plan"))
            raise Stop

    with pytest.raises(Stop):
        fit(part, data(), settings, watch=Watch(save=save, due=lambda: bool(step)))
    state = read_state(path)
    assert (state.stage, state.records, state.plan) == (0, 3, "plan")
    rest.load_state_dict(state.model)
    fit(rest, data(), settings, begin=state.point)
    assert same(whole, rest)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_resumes_from_the_state_file_to_the_same_bits(name: str, tmp_path: Path) -> None:
    check_resumes(net, plan(name), tmp_path / "state.safetensors")


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"mixup": 0.4}, {"ema": 0.99, "mixup": 0.2}], ids=str)
def test_averages_and_blends_resume_to_the_same_bits(
    options: dict[str, float], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY", 3)
    for make in (net, cnn):
        check_resumes(make, plan(**options), tmp_path / "state.safetensors", step)


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return MODELS["small_cnn"](image_size=8)


class Viewing(nn.Module):
    """A network whose code takes the usual order of the numbers for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(
    "options", [{"channels_last": True}, {"autocast": torch.bfloat16}, {"channels_last": True, "ema": 0.9}], ids=str
)
def test_layouts_and_types_resume_to_the_same_bits(
    options: dict[str, object], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY", 3)
    check_resumes(cnn, plan(**options), tmp_path / "state.safetensors", step)


def test_the_layout_changes_the_last_digits_at_most_and_is_put_back() -> None:
    models = [cnn(), cnn(), cnn()]
    for model, chosen in zip(models, (False, True, None), strict=True):
        seen: list[bool] = []
        handle = model[3].register_forward_pre_hook(
            lambda m, args: seen.append(m.weight.is_contiguous(memory_format=torch.channels_last))
        )
        fit(model, data(), plan("sgd", epochs=1, channels_last=chosen))
        handle.remove()
        assert set(seen) == {chosen is not False}
        assert all(p.is_contiguous() for p in model.parameters())
    plain, last, auto = (nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert torch.allclose(plain, last, atol=1e-4)
    assert torch.equal(last, auto)


@pytest.mark.parametrize("end", [nn.Flatten(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_gradients_come_back_in_the_order_of_the_values(end: nn.Module) -> None:
    def gradient(held: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        relu, seen = nn.ReLU(), []
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), relu, end, nn.LazyLinear(3))
        model(inputs)
        model.to(memory_format=torch.channels_last)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with gradients_alike(model, inputs) if held else contextlib.nullcontext():
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            handle = relu.register_forward_hook(lambda module, args, out: (out.register_hook(seen.append), None)[1])
            model(inputs.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        handle.remove()
        assert not any(len(module._forward_hooks) for module in model.modules())
        return seen[0], model[0].weight.grad

    inputs = torch.rand(8, 1, 8, 8)
    (value, weight), (plain, other) = gradient(True), gradient(False)
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert not plain.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(value, plain)
    assert torch.allclose(weight, other, rtol=1e-5)


def test_auto_layout_asks_the_model() -> None:
    inputs = torch.rand(2, 1, 8, 8)
    wide, viewing = cnn(), Viewing()
    assert laid_out(wide, inputs)
    assert not wide[3].weight.is_contiguous()
    assert not laid_out(net(), inputs)  # no convolution
    assert not laid_out(viewing, inputs)  # refuses the other layout
    assert viewing.conv.weight.stride() == (9, 9, 3, 1)
    fit(Viewing(), data(), plan(epochs=1, channels_last=None))
    with pytest.raises(RuntimeError, match="view"):
        fit(Viewing(), data(), plan(epochs=1, channels_last=True))


def test_bfloat16_is_of_the_products_alone() -> None:
    model, seen = cnn(), []
    model[0].register_forward_hook(lambda m, args, out: seen.append((m.training, m.weight.dtype, out.dtype)))
    fit(model, data(), plan(epochs=1, autocast=torch.bfloat16))
    assert set(seen) == {(True, torch.float32, torch.bfloat16), (False, torch.float32, torch.float32)}


def test_compiled_training_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = functools.partial(torch.compile, backend="eager")  # traces and guards, but no compiler runs
    monkeypatch.setattr(torch, "compile", eager)
    one, two = net()[0], net()[0]
    fit(one, data(), plan(epochs=2))
    fit(two, data(), plan(epochs=2, compiled=True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert same(one, two)


@pytest.mark.slow
def test_compiled_training_is_the_same_to_rounding() -> None:
    one, two = net()[0], net()[0]
    fit(one, data(), plan("sgd", epochs=1))
    fit(two, data(), plan("sgd", epochs=1, compiled=True))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_average_is_the_recurrence_and_is_what_is_kept() -> None:
    digits, settings = data(), plan(epochs=1)
    raw, kept, twin = net()[0], net()[0], net()[0]
    fit(raw, digits, settings)
    rows: list[Epoch] = []
    fit(kept, digits, replace(settings, ema=0.5), watch=Watch(epoch=rows.append))
    optimizer = OPTIMIZERS["adam"](twin.parameters(), 0.01, 1e-4, 0.9)
    average = [p.detach().double() for p in twin.parameters()]
    for number, indices in enumerate(shuffled(digits.train, 32, draw(0, 0))):
        inputs, labels = digits.batch(indices)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(inputs), labels).backward()
        optimizer.step()
        d = min(0.5, (1 + number) / (10 + number))
        average = [d * a + (1 - d) * p.detach().double() for a, p in zip(average, twin.parameters(), strict=True)]
    for mean, weights, own, unaveraged in zip(
        average, kept.parameters(), twin.parameters(), raw.parameters(), strict=True
    ):
        assert torch.allclose(mean, weights.double(), atol=1e-6)
        assert torch.equal(own, unaveraged)
        assert not torch.equal(own, weights)
    assert rows[0].quality.loss == pytest.approx(evaluate(kept, digits.batches("validation", 256)).loss)


def test_an_average_shows_itself_and_gives_the_weights_back() -> None:
    model = MODELS["small_cnn"](image_size=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    average = Average(model, 0.9)
    model(torch.rand(4, 1, 8, 8))  # moves the running statistics and counts the batch
    average.update(0)
    assert int(average.tensors["1.num_batches_tracked"]) == 1
    moved = {key: value.clone() for key, value in model.state_dict().items()}
    expected = before["1.running_mean"] * 0.1 + moved["1.running_mean"] * 0.9
    with average.shown():
        assert torch.allclose(model[1].running_mean, expected)
    assert all(torch.equal(model.state_dict()[key], moved[key]) for key in moved)


def test_mixup_blends_images_and_labels_alike() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.eye(6), torch.arange(6)  # image i is the one-hot vector of its label
    mixed, targets = mixup(inputs, labels, 6, 0.7)
    assert torch.equal(mixed, targets)
    assert bool((targets.argmax(1) == labels).all())
    assert not torch.equal(targets, inputs)
    assert torch.allclose(targets.sum(1), torch.ones(6))


def test_mixup_learns_and_its_draws_are_those_of_the_step() -> None:
    rows: list[Epoch] = []
    first, second, plain = net(), net(), net()
    fit(first, data(), plan(mixup=0.3), watch=Watch(epoch=rows.append))
    torch.manual_seed(99)
    fit(second, data(), plan(mixup=0.3))
    fit(plain, data(), plan())
    assert same(first, second)
    assert not same(first, plain)
    assert rows[1].train["loss"] < rows[0].train["loss"]


def test_top5_is_told_where_there_are_more_than_five_classes() -> None:
    rows: list[Epoch] = []
    fit(net(), data(), plan(epochs=1), watch=Watch(epoch=rows.append))
    assert rows[0].train["accuracy"] < rows[0].train["top5"] < 1
    assert rows[0].quality.top1 < rows[0].quality.top5 < 1
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    three = split(Source("x", images, torch.arange(60) % 3, ("a", "b", "c")))
    fit(MODELS["mlp"](classes=3, image_size=8), three, plan(epochs=1), watch=Watch(epoch=rows.append))
    assert (rows[1].train["top5"], rows[1].quality.top5) == (None, None)


@pytest.mark.parametrize("damage", [b"", b"hello", b"\xff" * 40])
def test_a_damaged_state_is_an_error(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match="not a readable run state"):
        read_state(path)


def test_a_truncated_state_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, State(0, 0, Point(), net().state_dict()))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError):
        read_state(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_rates_start_at_one_and_never_rise() -> None:
    for name in RATES.keys() - {"one_cycle"}:
        values = [RATES[name](k / 100) for k in range(101)]
        assert values[0] == 1.0
        assert values == sorted(values, reverse=True)
        assert min(values) >= 0


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    for k in range(101):  # theirs reaches the top one step early: pct_start * total_steps - 1
        assert RATES["one_cycle"](k / 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.03)
        optimizer.step()
        if k < 100:
            theirs.step()


@pytest.mark.parametrize("name", list(RATES))
def test_a_warm_rate_rises_to_the_first_value_and_then_runs_through(name: str) -> None:
    warm, rate = warmed(RATES[name], 0.2), RATES[name]
    rise = [warm(k / 100) for k in range(21)]
    assert rise == sorted(rise)
    assert (rise[0], rise[20]) == pytest.approx((0.01 * rate(0.0), rate(0.0)))
    assert [warm(0.2 + 0.8 * k / 10) for k in range(11)] == pytest.approx([rate(k / 10) for k in range(11)])
    assert warmed(rate, 0.0) is rate


def test_batch_norm_is_trained_and_evaluated_in_its_modes() -> None:
    images = torch.randint(0, 256, (65, 1, 8, 8), dtype=torch.uint8)
    digits = split(Source("x", images, torch.arange(65) % 3, ("a", "b", "c")), validation=0.2, test=0.2)
    model = MODELS["small_cnn"](classes=3, image_size=8)
    fit(model, digits, plan(batch_size=41))
    assert model.training
    assert int(model[1].num_batches_tracked) == 2


def test_loaded_momenta_lie_like_their_weights() -> None:
    weight = nn.Parameter(torch.rand(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = OPTIMIZERS["adam"]([weight], 0.1, 0.0, 0.9)
    momentum = torch.rand(4, 3, 3, 3)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": momentum}
    like_weights(optimizer)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert torch.equal(optimizer.state[weight]["exp_avg"], momentum)


def test_steps_end_within_an_epoch_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def rate(progress: float) -> float:
        seen.append(progress)
        return 1.0

    rows: list[Epoch] = []
    end = fit(net(), data(), plan(epochs=99, steps=8, rate=rate), watch=Watch(epoch=rows.append))
    assert end.optimizer is not None
    assert {int(state["step"]) for state in end.optimizer["state"].values()} == {8}  # 5 batches, then 3
    assert seen == pytest.approx([k / 8 for k in range(8)])
    assert [row.epoch for row in rows] == [0, 1]
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    check_resumes(net, plan(steps=9, ema=0.9, rate=RATES["cosine"]), tmp_path / "state.safetensors", step=2)
