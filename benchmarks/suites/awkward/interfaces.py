"""Parts of PyTorch's own interface that change weights, modules or tensors behind the model's back."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from benchmarks.suites.awkward.collect import awkward, image, sequence, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image(), cut=None)
def PrunedByMask():
    """torch.nn.utils.prune: weight_orig times weight_mask in a pre-hook."""
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), Head(16))
    prune.random_unstructured(model[2], "weight", amount=0.3)
    return model


@awkward(image(), cut=None)
def WeightNormOldStyle():
    """The deprecated weight norm: a plain attribute made by a pre-hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            torch.nn.utils.weight_norm(nn.Conv2d(3, 12, 3)),
            nn.ReLU(),
            torch.nn.utils.weight_norm(nn.Conv2d(12, 16, 3)),
            nn.ReLU(),
            Head(16),
        )


@awkward(image(), cut=None)
def SpectralNormOldStyle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            torch.nn.utils.spectral_norm(nn.Conv2d(3, 12, 3)),
            nn.ReLU(),
            torch.nn.utils.spectral_norm(nn.Conv2d(12, 16, 3)),
            nn.ReLU(),
            Head(16),
        )


class LoRALinear(nn.Linear):
    """A frozen layer and a low-rank update."""

    def __init__(self, a: int, b: int, rank: int = 4):
        super().__init__(a, b)
        self.weight.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(rank, a) * 0.2), nn.Parameter(torch.zeros(b, rank))
        self.scaling = 16 / rank

    def forward(self, x):
        return super().forward(x) + (x @ self.lora_a.T @ self.lora_b.T) * self.scaling


@awkward(sequence())
def LowRankAdapters():
    return nn.Sequential(LoRALinear(16, 24), nn.GELU(), LoRALinear(24, 20), nn.GELU(), nn.Linear(20, 3))


class Binarize(torch.autograd.Function):
    """Sign with a clipped straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


class BinaryConv(nn.Conv2d):
    """Binary weights scaled by their mean size per filter."""

    def forward(self, x):
        alpha = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, Binarize.apply(self.weight) * alpha, self.bias, self.stride, self.padding)


@awkward(image(), cut=None)
def BinaryWeights():
    return nn.Sequential(stem(12), BinaryConv(12, 16, 3), nn.BatchNorm2d(16), nn.Hardtanh(), Head(16))


class FakeQuantLinear(nn.Linear):
    """Learned step sizes per output channel, rounding with a straight-through gradient."""

    def __init__(self, a: int, b: int):
        super().__init__(a, b)
        self.step = nn.Parameter(torch.full((b, 1), 0.05))

    def forward(self, x):
        w = self.weight / self.step
        w = w + (w.round().clamp(-8, 7) - w).detach()
        return F.linear(x, w * self.step, self.bias)


@awkward(vector())
def QuantisationAware():
    return nn.Sequential(FakeQuantLinear(16, 24), nn.ReLU(), FakeQuantLinear(24, 12), nn.ReLU(), nn.Linear(12, 3))


@awkward(vector())
class FunctionalCall(nn.Module):
    """The inner model runs with changed parameters."""

    def __init__(self):
        super().__init__()
        self.net, self.gain = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        params = {name: p * self.gain for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, params, (x,))


@awkward(vector(), cut=None)
class VectorisedMap(nn.Module):
    """torch.vmap over samples, with weights that are shared."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(20, 16) * 0.2), nn.Parameter(torch.randn(3, 20) * 0.2)

    def forward(self, x):
        return torch.vmap(lambda row: self.w2 @ torch.tanh(self.w1 @ row))(x)


@awkward(sequence())
class GroupedSdpa(nn.Module):
    """scaled_dot_product_attention with fewer key heads, and a boolean mask."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 2, 8).permute(2, 0, 3, 1, 4)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@awkward(sequence())
class FunctionalAttention(nn.Module):
    """F.multi_head_attention_forward on raw parameters."""

    def __init__(self, d: int = 16, heads: int = 2):
        super().__init__()
        self.d, self.heads = d, heads
        self.w, self.b = nn.Parameter(torch.randn(3 * d, d) * 0.2), nn.Parameter(torch.zeros(3 * d))
        self.proj, self.up, self.out = nn.Linear(d, d), nn.Linear(d, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            self.d,
            self.heads,
            self.w,
            self.b,
            None,
            None,
            False,
            0.0,
            self.proj.weight,
            self.proj.bias,
            self.training,
        )
        return self.out(F.relu(self.up(y))).transpose(0, 1)


@awkward(image())
class PreHookChangesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(12), nn.Conv2d(24, 16, 3), Head(16)
        self.b.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], -args[0]], 1),))

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x))))


@awkward(image())
class HookChangesOutput(nn.Module):
    """A forward hook scales the output per channel with a parameter of another module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(12), nn.Conv2d(12, 16, 3), Head(16)
        self.scale = nn.Parameter(torch.ones(16))
        self.b.register_forward_hook(functools.partial(self.apply_scale))

    def apply_scale(self, module, args, out):
        return out * self.scale.view(1, -1, 1, 1)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x))))


@awkward(image())
class ModulesByName(nn.Module):
    """Layers looked up by constructed names, a list of lambdas between them."""

    def __init__(self):
        super().__init__()
        for i, (a, b) in enumerate([(3, 8), (8, 12), (12, 16)]):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, padding=1))
        self.acts = [F.relu, torch.tanh, lambda t: t * t.sigmoid()]
        self.head = Head(16)

    def forward(self, x):
        for i in range(3):
            x = self.acts[i](getattr(self, f"conv{i}")(x))
        return self.head(x)


@awkward(image())
class NestedContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "main": nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)]),
                    "skip": nn.Conv2d(a, b, 1) if a != b else nn.Identity(),
                }
            )
            for a, b in ((3, 12), (12, 12), (12, 16))
        )
        self.scales = nn.ParameterDict({f"s{i}": torch.ones(c, 1, 1) for i, c in enumerate((12, 12, 16))})
        self.head = Head(16)

    def forward(self, x):
        for i, stage in enumerate(self.stages):
            y = x
            for layer in stage["main"]:
                y = layer(y)
            x = F.relu(stage["skip"](x) + y * self.scales[f"s{i}"])
        return self.head(x)


class CountingSequential(nn.Sequential):
    """A Sequential that returns what it saw on the way."""

    def forward(self, x):
        seen = []
        for module in self:
            x = module(x)
            seen.append(x)
        return x, seen


@awkward(image())
class SubclassedSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.c = CountingSequential(stem(8), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()), nn.Conv2d(20, 10, 1)
        self.head = Head(10)

    def forward(self, x):
        y, seen = self.body(x)
        return self.head(F.relu(self.c(torch.cat([y, seen[0]], 1))))


def _gate(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(g) + x.mean() * 0


with warnings.catch_warnings():  # deprecated, and still in models people have
    warnings.simplefilter("ignore", FutureWarning)
    scripted_gate = torch.jit.script(_gate)


@awkward(image())
class ScriptedFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.head = stem(12), nn.Conv2d(12, 12, 1), Head(12)

    def forward(self, x):
        x = self.a(x)
        return self.head(scripted_gate(x, self.g(x)))


@awkward(image())
class ShadowWeights(nn.Module):
    """An exponential average of a weight kept in a buffer and used in eval mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(12), nn.Conv2d(12, 16, 3, bias=False), Head(16)
        self.register_buffer("shadow", self.b.weight.detach().clone())

    def forward(self, x):
        x = self.a(x)
        if self.training:
            self.shadow.mul_(0.9).add_(self.b.weight.detach(), alpha=0.1)
            return self.head(F.relu(self.b(x)))
        return self.head(F.relu(F.conv2d(x, self.shadow)))


@awkward(vector())
class Ensemble(nn.Module):
    """Members of one class with stacked weights, applied with a batched product."""

    def __init__(self, members: int = 3):
        super().__init__()
        nets = [nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4)) for _ in range(members)]
        params, _ = torch.func.stack_module_state(nets)
        self.params = nn.ParameterDict(
            {k.replace(".", "_"): nn.Parameter(v.detach().clone()) for k, v in params.items()}
        )

    def forward(self, x):
        p = self.params
        h = F.relu(torch.einsum("bi,moi->mbo", x, p["0_weight"]) + p["0_bias"][:, None])
        return (torch.einsum("mbi,moi->mbo", h, p["2_weight"]) + p["2_bias"][:, None]).mean(0)
