"""Random gated networks: kernels, strides, paddings, dilations, groups, pools, sums and concatenations at random."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from gated_nets import curious, lived, varied
from secateur.runtime.gates import FBS, Prefix, gate, watch
from secateur.types import PlanError


class Sum(nn.Module):
    """A residual block: branch plus shortcut, then ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


class Excite(nn.Module):
    """Squeeze and excitation: each channel times what the means over all of them say."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.gains = nn.Sequential(nn.Conv2d(channels, 5, 1), nn.ReLU(), nn.Conv2d(5, channels, 1), gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gains(x.mean((2, 3), keepdim=True))


class Cat(nn.Module):
    """A dense block: the input and what is made of it, side by side."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.branch(x)], dim=1)


def conv(rng: random.Random, before: int, after: int, **fixed: Any) -> list[nn.Module]:
    """Convolution with or without batch norm."""
    size = fixed.pop("kernel", rng.choice([1, 2, 3, 3, 3, 5]))
    groups = rng.choice([g for g in (1, 1, 2, before) if before % g == 0 and after % g == 0])
    given = {"stride": rng.choice([1, 1, 2, 3]), "padding": rng.randint(0, 2), "dilation": rng.choice([1, 1, 2])}
    norm = rng.random() < 0.8
    layer = nn.Conv2d(before, after, size, bias=not norm, groups=groups, **(given | fixed))
    return [layer, nn.BatchNorm2d(after)] if norm else [layer]


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Tanh, nn.LeakyReLU)


def block(rng: random.Random, before: int, rich: bool) -> tuple[list[nn.Module], int]:
    """One random stretch of a network and its number of channels; ``rich``: also of what few networks have."""
    after = rng.choice([3, 8, 13, 16, 24])
    kind = rng.choice(["plain", "plain", "plain", "pool", "sum", "sum", "cat", *(["excite"] * 2 if rich else [])])
    act = rng.choice(ACTIVATIONS) if rich else nn.ReLU
    if kind == "excite":
        return [Excite(before, rng.choice([nn.Sigmoid, nn.Hardsigmoid])())], before
    same = {"kernel": 3, "padding": 1, "stride": 1, "dilation": 1}
    if kind == "pool":
        size = rng.choice([2, 3])
        pool = nn.MaxPool2d(size, 2, rng.choice([0, 1]), ceil_mode=rng.random() < 0.3)
        return [pool if rng.random() < 0.6 else nn.AvgPool2d(size, rng.choice([1, 2]))], before
    if kind == "sum":
        stride = rng.choice([1, 2])
        inner = conv(rng, before, after, **(same | {"stride": stride}))
        last = before if stride == 1 and rng.random() < 0.6 else after
        inner += [act(), *conv(rng, after, last, **same)]
        plain = last == before and stride == 1
        way = nn.Identity() if plain else nn.Sequential(*conv(rng, before, last, kernel=1, padding=0, stride=stride))
        if not plain and way[0].dilation != (1, 1):
            way[0].dilation = (1, 1)
        return [Sum(nn.Sequential(*inner), way)], last
    if kind == "cat":
        return [Cat(nn.Sequential(*conv(rng, before, after, **same), act()))], before + after
    return [*conv(rng, before, after), act(), nn.Dropout(0.1)], after


def network(seed: int, rich: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A random gated network and three random images for it; see ``block`` for ``rich``."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels = rng.choice([1, 3, 4])
    x = varied(3, channels, rng.randint(7, 37), rng.randint(7, 37))
    layers: list[nn.Module] = []
    while len(layers) < 12:
        added, after = block(rng, channels, rich)
        try:
            with torch.no_grad():
                size = nn.Sequential(*layers, *added).eval()(x).shape
        except RuntimeError:  # the maps are too small for this block
            size = torch.Size([0])
        if 0 in size:
            break
        layers, channels = [*layers, *added], after
    head = rng.choice(["mean", "flat", "map"])
    with torch.no_grad():
        size = nn.Sequential(*layers).eval()(x).shape if layers else x.shape
    if head == "mean":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7)]
    if head == "flat":
        layers += [nn.Flatten(), nn.Linear(size[1:].numel(), 9), nn.ReLU(), nn.Linear(9, 4)]
    model = lived(nn.Sequential(*layers))
    density = rng.choice([0.25, 0.5, 0.8, 1.0, None])
    try:
        gated = gate(model, density, x, pooling=rng.choice(["l1", "avg", "max", "l2"]), groups=1 if density else 3)
    except PlanError:
        return model, x
    return curious(gated.model, x), x


def actions(model: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    """Random actions for the prefix gates of ``model``."""
    gates = {path.removesuffix(".gate"): m for path, m in model.named_modules() if isinstance(m, Prefix)}
    return {path: torch.randint(1, m.groups + 1, (batch,)) for path, m in gates.items()}


def margin(model: nn.Module, x: torch.Tensor) -> float:
    """How close the choice of any gate is: smallest distance of winner and loser, over the largest saliency."""
    ks = {path.removesuffix(".gate"): m.k for path, m in model.named_modules() if isinstance(m, FBS)}
    with watch(model) as choices, torch.no_grad():
        model(x)
    gaps = [1.0]
    for path, choice in choices.items():
        k = ks.get(path, choice.saliency.shape[1])
        if k < choice.saliency.shape[1]:
            top = choice.saliency.sort(dim=1, descending=True).values
            gap = (top[:, k - 1] - top[:, k]) / top[:, 0].clamp_min(1e-30)
            gaps += gap[top[:, k - 1] > 0].tolist()
    return min(gaps)
