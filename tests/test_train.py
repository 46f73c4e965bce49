"""The training loop, its optimisers and rates, and the state file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.data import SOURCES, Dataset, Source, split
from secateur.models import MODELS
from secateur.train import resume
from secateur.train.loop import Cursor, Epoch, Settings, TrainError, Watch, fit, shuffled
from secateur.train.optimizers import OPTIMIZERS
from secateur.train.rates import RATES
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
    from secateur.train.loop import draw

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
    assert rows[-1].validation_accuracy > 0.85
    assert rows[-1].train_loss < rows[0].train_loss


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


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_resumes_from_the_state_file_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = net()
    fit(whole, data(), plan(name))
    part = net()
    path = tmp_path / "state.safetensors"

    class Stop(Exception):
        pass

    def save(cursor: Cursor, optimizer: torch.optim.Optimizer) -> None:
        write_state(path, State(0, 3, cursor, part.state_dict(), optimizer.state_dict(), "plan"))
        raise Stop

    with pytest.raises(Stop):
        fit(part, data(), plan(name), watch=Watch(save=save))
    state = read_state(path)
    assert (state.stage, state.records, state.cursor, state.plan) == (0, 3, Cursor(1), "plan")
    rest = net()
    rest.load_state_dict(state.model)
    fit(rest, data(), plan(name), begin=state.cursor, optimizer_state=state.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


@pytest.mark.parametrize("damage", [b"", b"hello", b"\xff" * 40])
def test_a_damaged_state_is_an_error(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match="not a readable run state"):
        read_state(path)


def test_a_truncated_state_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, State(0, 0, Cursor(), net().state_dict()))
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
    for rate in RATES.values():
        values = [rate(k / 100) for k in range(101)]
        assert values[0] == 1.0
        assert values == sorted(values, reverse=True)
        assert min(values) >= 0


def test_batch_norm_is_trained_and_evaluated_in_its_modes() -> None:
    images = torch.randint(0, 256, (65, 1, 8, 8), dtype=torch.uint8)
    digits = split(Source("x", images, torch.arange(65) % 3, ("a", "b", "c")), validation=0.2, test=0.2)
    model = MODELS["small_cnn"](classes=3, image_size=8)
    fit(model, digits, plan(batch_size=41))
    assert model.training
    assert int(model[1].num_batches_tracked) == 2
