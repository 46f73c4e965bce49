"""Random small networks: a random graph of image blocks, then a pooled, flattened or token head; seeded by one int."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.proving.random_blocks import IMAGE_BLOCKS, Block, Rng
from benchmarks.proving.random_tokens import TOKEN_BLOCKS

BATCH = 2


class Step(nn.Module):
    """Joins earlier feature maps (sum or concatenation) before its block runs."""

    def __init__(self, sources: list[int], join: str, block: Block) -> None:
        super().__init__()
        self.plan = {"sources": sources, "join": join}
        self.block = block

    def forward(self, maps: list[Tensor]) -> Tensor:
        parts = [maps[k] for k in self.plan["sources"]]
        x = torch.cat(parts, 1) if self.plan["join"] == "cat" else torch.stack(parts).sum(0)
        return self.block(x if len(parts) > 1 else parts[0])


class RandomNet(nn.Module):
    """Steps over the list of all feature maps so far, then a head, then (sometimes) more outputs."""

    def __init__(self, steps: list[Step], head: nn.Module, more: int | None) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.head = head
        self.plan = {"more": more}

    def forward(self, x: Tensor) -> Any:
        maps = [x]
        for step in self.steps:
            maps.append(step(maps))
        out = self.head(maps[-1])
        more = self.plan["more"]
        return out if more is None else {"out": out, "pooled": maps[more].mean((2, 3)), "n": 1}


class Tokens(nn.Module):
    """Token blocks over the pixels, then one token or their mean."""

    def __init__(self, blocks: list[Block], last: nn.Linear, how: str, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.last = last
        self.how = how
        if how == "class":
            self.extra = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if self.how == "class":
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1)
        x = self.blocks(x)
        return self.last(x.mean(1) if self.how == "mean" else x[:, 0])


def _draw(rng: Rng, kinds: tuple, c: int, size: int) -> Block:
    kinds = kinds if c > 1 else kinds[:1]
    while True:
        block = rng.choice(kinds)(rng, c, size)
        if block is not None:
            return block


def _step(rng: Rng, maps: list[tuple[int, int]]) -> Step:
    """The last map, sometimes joined with earlier ones of the same size."""
    (c, size), last = maps[-1], len(maps) - 1
    same = [k for k, (_, s) in enumerate(maps[:-1]) if s == size]
    draw = rng.random()
    if same and draw < 0.15 and c <= 12:
        other = rng.choice(same)
        if c + maps[other][0] <= 20:
            return Step([last, other], "cat", _draw(rng, IMAGE_BLOCKS, c + maps[other][0], size))
    equal = [k for k in same if maps[k][0] == c]
    if equal and draw < 0.4:
        return Step([last, rng.choice(equal)], "sum", _draw(rng, IMAGE_BLOCKS, c, size))
    return Step([last], "one", _draw(rng, IMAGE_BLOCKS, c, size))


def _tokens(rng: Rng, c: int, size: int) -> nn.Module:
    how = rng.choice(("mean", "first", "class"))
    t, width, blocks = size * size + (how == "class"), c, []
    for _ in range(rng.randint(1, 3)):
        block = _draw(rng, TOKEN_BLOCKS, width, t)
        width = block.shape["out"]
        blocks.append(block)
    return Tokens(blocks, nn.Linear(width, 3), how, c)


def _head(rng: Rng, c: int, size: int) -> nn.Module:
    kind = rng.choice(("pool", "flatten", "map", "literal", "tokens", "tokens", "tokens"))
    if kind == "pool":
        return Block(3, 1, lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), fc=nn.Linear(c, 3))
    if kind == "map":
        return nn.Conv2d(c, 3, 1)
    if kind == "tokens" and size <= 4:
        return _tokens(rng, c, size)
    inner = rng.choice((5, 8))
    parts = {"a": nn.Linear(4 * c, inner), "norm": nn.BatchNorm1d(inner), "b": nn.Linear(inner, 3)}
    if kind == "literal":
        return Block(3, 1, lambda m, x: m.b(m.norm(m.a(F.adaptive_avg_pool2d(x, 2).reshape(-1, 4 * c)))), **parts)
    return Block(
        3, 1, lambda m, x: m.b(F.relu(m.norm(m.a(m.pool(x).flatten(1))))), pool=nn.AdaptiveMaxPool2d(2), **parts
    )


def randomise(model: nn.Module) -> None:
    """Norm affines, biases and running statistics that differ from unit to unit."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() > 1:
                continue
            if "running_var" in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif name.endswith("weight"):
                tensor.copy_((0.5 + torch.rand_like(tensor)) * torch.randn_like(tensor).sign())
            elif not name.startswith("_"):
                tensor.copy_(0.3 * torch.randn_like(tensor))


def random_network(seed: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Return a random network in eval mode and its example input; equal seeds give equal networks."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = 4
        maps: list[tuple[int, int]] = [(3, size)]
        first = _draw(rng, IMAGE_BLOCKS[:2] + IMAGE_BLOCKS[4:6], 3, size)
        steps = [Step([0], "one", first)]
        maps.append((first.shape["out"], size))
        for _ in range(rng.randint(1, 5)):
            step = _step(rng, maps)
            steps.append(step)
            maps.append((step.block.shape["out"], step.block.shape["size"]))
        head = _head(rng, *maps[-1])
        more = rng.randrange(1, len(maps)) if rng.random() < 0.15 else None
        model = RandomNet(steps, head, more).to(dtype)
        randomise(model)
        x = torch.randn(BATCH, 3, size, size, dtype=dtype)
    return model.eval(), x
