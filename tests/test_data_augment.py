"""Augmentation: each image by its own draw, and exactly what the words say."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.data.augment import AUGMENTATIONS, crop, cutout, flip, light, resized_crop, zero_crop


@pytest.mark.parametrize("name", [name for name, step in AUGMENTATIONS.items() if step is not None])
def test_every_augmentation_is_seeded_and_keeps_shape_and_input(name: str) -> None:
    step = AUGMENTATIONS[name]
    assert step is not None
    images = torch.rand(1, 3, 12, 16).expand(32, 3, 12, 16).contiguous()
    before = images.clone()
    torch.manual_seed(3)
    one = step(images)
    torch.manual_seed(3)
    two = step(images)
    assert torch.equal(one, two)
    assert torch.equal(images, before)
    assert one.shape == images.shape
    assert bool(one.isfinite().all())
    assert len({image.numpy().tobytes() for image in one}) >= 2
    assert not torch.equal(step(images), one)


@pytest.mark.parametrize("step", [crop, zero_crop])
def test_crops_are_windows_of_the_padded_image(step: object) -> None:
    image = torch.rand(1, 2, 6, 6)
    mode = "reflect" if step is crop else "constant"
    padded = torch.nn.functional.pad(image, (4,) * 4, mode=mode)
    windows = {
        w.numpy().tobytes()
        for w in padded.unfold(2, 6, 1).unfold(3, 6, 1)[0].permute(1, 2, 0, 3, 4).reshape(-1, 2, 6, 6)
    }
    moved = step(image.expand(2000, 2, 6, 6))  # pyrefly: ignore
    assert {m.numpy().tobytes() for m in moved} == windows  # all 81 places, and no other


def test_reflection_goes_no_further_than_a_small_image() -> None:
    assert crop(torch.rand(4, 1, 3, 5)).shape == (4, 1, 3, 5)


def test_cutout_hides_one_square_around_any_pixel() -> None:
    images = torch.ones(4000, 3, 8, 8)
    hidden = cutout(images) == 0
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    rows, columns = hidden[:, 0].any(2), hidden[:, 0].any(1)
    assert torch.equal(hidden[:, 0], rows[:, :, None] & columns[:, None, :])  # a rectangle
    assert set(rows.sum(1).tolist()) == {2, 3, 4}  # 4 of 8, cut at the border
    share = hidden.float().mean((0, 1))
    expected = torch.tensor([min(8, r + 3) - max(0, r - 1) for r in range(8)]) / 8
    assert (share - expected[:, None] * expected[None, :]).abs().max() < 0.04


def test_the_parts_of_resized_crops() -> None:
    """Coordinates as images tell which part was taken: areas uniform, ratios log-uniform, all inside."""
    size = 64
    line = (torch.arange(size) + 0.5) / size
    images = torch.stack([line.expand(size, size), line[:, None].expand(size, size)])[None].expand(4000, 2, size, size)
    taken = resized_crop(images)
    assert float(taken.min()) > 0
    assert float(taken.max()) < 1
    step = taken[:, 0, 32, 33] - taken[:, 0, 32, 32], taken[:, 1, 33, 32] - taken[:, 1, 32, 32]
    width, height = step[0] * size, step[1] * size
    assert float(width.max()) <= 1 + 1e-3
    free = (width < 0.999) & (height < 0.999)
    ratio = (width / height)[free].log()
    assert float(ratio.abs().max()) <= math.log(4 / 3) + 1e-2
    area = (width * height)[free]
    assert 0.079 < float(area.min()) < 0.1
    middle = taken.mean((2, 3))
    assert (middle.mean(0) - 0.5).abs().max() < 0.02
    assert (taken[:, 0, 0] - taken[:, 0, 63]).abs().max() < 1e-5  # upright
    whole = resized_crop(images[:3], area=(1.0, 1.0), ratio=1.0)
    assert (whole - images[:3]).abs().max() < 1e-5


def test_light_is_the_same_for_normalised_inputs() -> None:
    images = torch.rand(16, 3, 9, 9)
    shift, width = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.1
    torch.manual_seed(1)
    plain = light(images)
    torch.manual_seed(1)
    assert torch.allclose(light((images - shift) / width), (plain - shift) / width, atol=1e-5)
    factor = plain.std((2, 3)) / images.std((2, 3))
    assert torch.allclose(factor[:, 0], factor[:, 2], atol=1e-5)
    assert 0.6 <= float(factor.min()) < 0.8
    assert 1.2 < float(factor.max()) <= 1.4


def test_flip_takes_half() -> None:
    images = torch.arange(4.0).expand(2000, 1, 1, 4)
    mirrored = flip(images)[:, 0, 0, 0] == 3
    assert 900 < int(mirrored.sum()) < 1100
