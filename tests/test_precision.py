"""Where bfloat16 is chosen: by the device and the network, never by a clock."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur import resolve
from secateur.models import MODELS
from secateur.recipe import loads
from secateur.train import precision
from secateur.train.precision import WORTH, half_pays

CPU = torch.device("cpu")


@pytest.mark.parametrize("present", [True, False])
def test_a_cpu_needs_instructions_and_a_network_that_gains(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_instructions", lambda: present)
    plain, single = MODELS["s3"](), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    assert half_pays(plain, CPU, WORTH) is present
    assert not half_pays(plain, CPU, WORTH - 1)
    assert not half_pays(single, CPU, 100 * WORTH)
    assert not half_pays(MODELS["mlp"](), CPU, 100 * WORTH)


@pytest.mark.parametrize(("word", "half", "found"), [
    ("auto", True, torch.bfloat16), ("auto", False, None), ("float32", True, None), ("bfloat16", False, torch.bfloat16),
])  # fmt: skip
def test_the_recipe_has_the_last_word(word: str, half: bool, found: torch.dtype | None) -> None:
    recipe = loads(f"version: 1\nname: x\ntrain: {{precision: {word}}}")
    assert resolve.training(recipe, 0, half=half).autocast == found
