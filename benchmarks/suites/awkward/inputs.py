"""Inputs, outputs, control flow, frozen parts and other ways of running a model."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, tokens, vector
from benchmarks.suites.awkward.conv import Head, stem


def body(width: int = 16) -> nn.Sequential:
    """Return two convolutions, pooled and flattened."""
    return nn.Sequential(stem(12), nn.Conv2d(12, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 6), torch.randint(0, 9, (n, 3))))
class ThreeInputs(nn.Module):
    """Image, table row and categories meet in one classifier."""

    def __init__(self):
        super().__init__()
        self.image, self.table, self.words = body(16), nn.Linear(6, 10), nn.Embedding(9, 4)
        self.fc1, self.fc2 = nn.Linear(16 + 10 + 12, 20), nn.Linear(20, 2)

    def forward(self, image, row, cats):
        z = torch.cat([self.image(image), F.relu(self.table(row)), self.words(cats).flatten(1)], dim=1)
        return self.fc2(F.relu(self.fc1(z)))


@awkward(lambda n: {"pixel_values": torch.randn(n, 3, 8, 8), "scale": torch.tensor(0.5), "labels": None})
class KeywordInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = body(), nn.Linear(16, 4)

    def forward(self, *, pixel_values: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.fc(self.body(pixel_values)) * scale
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


@awkward(lambda n: ({"x": torch.randn(n, 16), "side": [torch.randn(n, 4), (torch.randn(n, 4),)]},))
class NestedInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(16, 20), nn.Linear(4, 20), nn.Linear(4, 20), nn.Linear(20, 3)

    def forward(self, batch: dict[str, Any]):
        s, (t,) = batch["side"]
        return self.out(F.relu(self.a(batch["x"]) + self.b(s) + self.c(t)))


@awkward(lambda n: ([torch.randn(3, 6, 6) for _ in range(n)],))
class ListOfImages(nn.Module):
    """Images of a list are batched inside, as detectors do; a list of dicts comes out."""

    def __init__(self):
        super().__init__()
        self.body, self.box, self.cls = body(), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, images: list[torch.Tensor]):
        x = self.body(torch.stack([(i - i.mean()) / i.std() for i in images]))
        return [
            {"box": b, "score": s.max(), "label": s.argmax(), "id": i}
            for i, (b, s) in enumerate(zip(self.box(x), self.cls(x), strict=True))
        ]


@awkward(image())
class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.c = stem(16), nn.Conv2d(16, 24, 3)
        self.heads = nn.ModuleDict({"cls": nn.Linear(24, 5), "reg": nn.Linear(24, 1)})
        self.seg = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        f = self.stem(x)
        g = F.relu(self.c(f)).mean((2, 3))
        return self.heads["cls"](g), [self.heads["reg"](g).squeeze(-1), {"mask": self.seg(f)}], None, 3


@dataclass
class Prediction:
    """What DataclassOutput returns."""

    logits: torch.Tensor
    size: int
    extra: torch.Tensor | None = None


@awkward(image())
class DataclassOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = body(), nn.Linear(16, 4)

    def forward(self, x):
        return Prediction(self.fc(self.body(x)), x.shape[-1])


Pair = namedtuple("Pair", ["mean", "log_var"])


@awkward(vector())
class NamedTupleOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.mu, self.lv = nn.Linear(16, 24), nn.Linear(24, 6), nn.Linear(24, 6)

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        return Pair(self.mu(h), self.lv(h).clamp(-4, 4))


@awkward(image())
class HiddenLayerReturned(nn.Module):
    """The features of the first stage are an output: they stay, the rest can go."""

    def __init__(self):
        super().__init__()
        self.stem, self.c1, self.c2, self.head = stem(8), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 20, 3), Head(20)

    def forward(self, x):
        f = self.stem(x)
        return self.head(F.relu(self.c2(F.relu(self.c1(f))))), f


@awkward(image())
class FeaturePyramid(nn.Module):
    """Every level goes out; laterals are summed top-down."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = stem(8), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.l1, self.l2, self.l3 = nn.Conv2d(8, 10, 1), nn.Conv2d(12, 10, 1), nn.Conv2d(16, 10, 1)
        self.outs = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=1) for _ in range(3))

    def forward(self, x):
        c1 = self.c1(x)
        c2 = F.relu(self.c2(c1))
        p3 = self.l3(F.relu(self.c3(c2)))
        p2 = self.l2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        p1 = self.l1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return {str(i): o(p) for i, (o, p) in enumerate(zip(self.outs, (p1, p2, p3), strict=True))}


@awkward(image())
class IntermediateByHook(nn.Module):
    """A forward hook keeps features that the forward uses later."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, torch.Tensor] = {}
        self.a, self.b, self.c, self.head = stem(8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 12, 1), Head(12)
        self.a.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.kept["a"] = out

    def forward(self, x):
        y = F.relu(self.b(self.a(x)))
        return self.head(F.relu(self.c(torch.cat([self.kept["a"], y], 1))))


@awkward(image())
class BranchOnValue(nn.Module):
    """Data-dependent control flow on a Python bool and .item()."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = stem(12), nn.Conv2d(12, 16, 3), nn.Conv2d(12, 16, 5, padding=1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        steps = 1 + int(x.mean().abs().item() > 1e3)
        y = self.a(x) if x.abs().sum() > 0 else self.b(x)
        for _ in range(steps):
            y = F.relu(y)
        return self.head(y)


@awkward(image())
class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.exit1, self.more, self.exit2 = stem(12), Head(12), nn.Conv2d(12, 16, 3), Head(16)

    def forward(self, x, threshold: float = 1e9):
        x = self.stem(x)
        first = self.exit1(x)
        if first.softmax(-1).max().item() > threshold:
            return first
        return self.exit2(F.relu(self.more(x)))


@awkward(vector())
class LoopWithState(nn.Module):
    """A deep equilibrium iteration: until it hardly moves, at most eight times."""

    def __init__(self):
        super().__init__()
        self.inp, self.w, self.out = nn.Linear(16, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 3)

    def forward(self, x):
        u = self.inp(x)
        z = torch.zeros_like(u)
        for _ in range(8):
            new = torch.tanh(0.3 * self.w(z) + u)
            if torch.norm(new - z) < 1e-12:
                break
            z = new
        return self.out(z)


@awkward(sequence(6, 16))
class BooleanSelection(nn.Module):
    """Rows chosen by a mask that depends on the values, then scattered back."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        chosen = x.sum(-1) > x.sum(-1).median() - 1e9
        y = x.clone()
        y[chosen] = self.b(x[chosen])
        return self.out(y)


@awkward(image())
class PartlyFrozen(nn.Module):
    """A frozen backbone (no gradient, always in eval mode) below a new head."""

    def __init__(self):
        super().__init__()
        self.backbone = body()
        self.backbone.requires_grad_(False)
        self.fc1, self.fc2 = nn.Linear(16, 20), nn.Linear(20, 3)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            z = self.backbone(x)
        return self.fc2(F.relu(self.fc1(z.detach())))


@awkward(image())
def FullyFrozen():
    return nn.Sequential(body(), nn.Linear(16, 4)).requires_grad_(False)


@awkward(lambda n: torch.randn(n, 3, 8, 8, dtype=torch.float64))
def DoublePrecision():
    return nn.Sequential(body(), nn.Linear(16, 4)).double()


@awkward(lambda n: torch.randn(n, 3, 8, 8).to(memory_format=torch.channels_last))
def ChannelsLastMemory():
    return nn.Sequential(body(), nn.Linear(16, 4)).to(memory_format=torch.channels_last)


@awkward(lambda n: torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8))
class BytesIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = body(), nn.Linear(16, 4)

    def forward(self, x):
        y = self.fc(self.body(x.to(self.fc.weight.dtype).div(255)))
        return y.argmax(-1), y, x.shape[0]


@awkward(tokens())
class EmbeddingBags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.mean = nn.EmbeddingBag(20, 16, mode="sum"), nn.Embedding(20, 12, padding_idx=0)
        self.fc, self.out = nn.Linear(28, 20), nn.Linear(20, 3)

    def forward(self, ids):
        return self.out(F.relu(self.fc(torch.cat([self.bag(ids), self.mean(ids).mean(1)], -1))))


@awkward(tokens())
class OneHotLookup(nn.Module):
    """An embedding written as one-hot times a raw matrix, and gathered rows."""

    def __init__(self):
        super().__init__()
        self.table, self.pos, self.fc = (
            nn.Parameter(torch.randn(20, 16)),
            nn.Parameter(torch.randn(32, 16)),
            nn.Linear(16, 5),
        )

    def forward(self, ids):
        x = F.one_hot(ids, 20).to(self.table.dtype) @ self.table
        return self.fc(torch.relu(x + self.pos[torch.arange(ids.shape[1])] + F.embedding(ids, self.table)))


@awkward(lambda n: (torch.randn(n, 5, 3), (torch.rand(n, 5, 5) > 0.5).float()))
class GraphConvolution(nn.Module):
    """Dense adjacency times features, normalised by the degrees."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(3, 16), nn.Parameter(torch.randn(16, 12) * 0.3)
        self.a, self.out = nn.Parameter(torch.randn(2 * 12, 1)), nn.Linear(12, 2)

    def forward(self, x, adj):
        adj = adj + torch.eye(adj.size(-1), dtype=adj.dtype)
        adj = adj / adj.sum(-1, keepdim=True)
        h = F.relu(adj @ self.w1(x)) @ self.w2
        e = (h @ self.a[:12]) + (h @ self.a[12:]).transpose(1, 2)
        e = F.leaky_relu(e).masked_fill(adj == 0, -1e9).softmax(-1)
        return self.out(F.elu(e @ h))


@awkward(lambda n: (torch.randn(4 * n, 6), torch.randint(0, 4 * n, (2, 9 * n))))
class MessagePassing(nn.Module):
    """Edges gather from nodes and scatter back, no batch axis."""

    def __init__(self):
        super().__init__()
        self.node, self.edge, self.update, self.out = (
            nn.Linear(6, 16),
            nn.Linear(32, 20),
            nn.Linear(36, 16),
            nn.Linear(16, 2),
        )

    def forward(self, x, index):
        x = F.relu(self.node(x))
        src, dst = index
        m = F.relu(self.edge(torch.cat([x[src], x[dst]], -1)))
        agg = torch.zeros(x.size(0), m.size(1), dtype=m.dtype).scatter_add_(0, dst[:, None].expand(-1, m.size(1)), m)
        return self.out(x + self.update(torch.cat([x, agg], -1))).mean(0)


@awkward(lambda n: torch.randn(n, 3, 10))
class EdgeConvolution(nn.Module):
    """DGCNN: nearest neighbours from the features themselves."""

    def __init__(self, k: int = 4):
        super().__init__()
        self.k = k
        self.c1, self.c2, self.fc = nn.Conv2d(6, 12, 1), nn.Conv2d(24, 16, 1), nn.Linear(28, 3)

    def graph(self, x):
        b, c, n = x.shape
        idx = torch.cdist(x.transpose(1, 2), x.transpose(1, 2)).topk(self.k, largest=False)[1]
        flat = (idx + torch.arange(b).view(-1, 1, 1) * n).view(-1)
        near = x.transpose(2, 1).reshape(b * n, -1)[flat, :].view(b, n, self.k, c)
        mid = x.transpose(2, 1).reshape(b, n, 1, c).repeat(1, 1, self.k, 1)
        return torch.cat((near - mid, mid), dim=3).permute(0, 3, 1, 2)

    def forward(self, x):
        x1 = F.leaky_relu(self.c1(self.graph(x))).max(-1)[0]
        x2 = F.leaky_relu(self.c2(self.graph(x1))).max(-1)[0]
        return self.fc(torch.cat([x1, x2], 1).max(-1)[0])
