"""Small whole models from other fields: generative, tables, scenes, flows, recommendation."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, tokens, vector
from benchmarks.suites.awkward.conv import stem


@awkward(image())
class VAE(nn.Module):
    def __init__(self, z: int = 6):
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mu, self.lv, self.start = nn.Linear(48, z), nn.Linear(48, z), nn.Linear(z, 48)
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x):
        h = self.enc(x)
        mu, lv = self.mu(h), self.lv(h)
        z = mu + torch.exp(0.5 * lv) * torch.randn_like(mu) if self.training else mu
        return self.dec(F.relu(self.start(z)).view(-1, 12, 2, 2)), mu, lv


@awkward(image())
class VectorQuantised(nn.Module):
    """Nearest code by argmin, straight-through gradient, code loss as an output."""

    def __init__(self, d: int = 6):
        super().__init__()
        self.enc, self.to_code = stem(10), nn.Conv2d(10, d, 1)
        self.codes = nn.Embedding(8, d)
        self.dec = nn.Sequential(nn.Conv2d(d, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 3, 1))

    def forward(self, x):
        z = self.to_code(self.enc(x)).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        w = self.codes.weight
        d = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ w.t() + w.pow(2).sum(1)
        q = self.codes(d.argmin(1)).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        return self.dec((z + (q - z).detach()).permute(0, 3, 1, 2)), loss


@awkward(vector(8))
class AffineCoupling(nn.Module):
    """RealNVP: the data passes through, only the networks inside can shrink."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 8)) for _ in range(2)
        )

    def forward(self, x):
        log_det = 0
        for net in self.nets:
            a, b = x.chunk(2, -1)
            s, t = net(a).split(4, -1)
            x = torch.cat([b * torch.exp(torch.tanh(s)) + t, a], -1)
            log_det = log_det + torch.tanh(s).sum(-1)
        return x, log_det


@awkward(image(4, 4))
class InvertibleMix(nn.Module):
    """Glow: actnorm with per-channel parameters, a square matrix with its log-determinant, coupling."""

    def __init__(self, c: int = 4):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.ones(1, c, 1, 1))
        self.w = nn.Parameter(torch.eye(c) + 0.1 * torch.randn(c, c))
        self.net = nn.Sequential(nn.Conv2d(c // 2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, c, 1))

    def forward(self, x):
        x = self.scale * (x + self.loc)
        x = F.conv2d(x, self.w.unsqueeze(2).unsqueeze(3))
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        return torch.cat([a, (b + t) * torch.sigmoid(s + 2)], 1), torch.slogdet(self.w)[1] + F.logsigmoid(s + 2).sum(
            (1, 2, 3)
        )


@awkward(lambda n: (torch.randn(n, 9, 3), torch.randn(n, 3)))
class RadianceField(nn.Module):
    """NeRF: positional encoding, skip connection that joins the input again, view-dependent colour."""

    def __init__(self, w: int = 24, freqs: int = 3):
        super().__init__()
        self.freqs, d = freqs, 3 + 6 * freqs
        self.layers = nn.ModuleList([nn.Linear(d, w), nn.Linear(w, w), nn.Linear(w + d, w), nn.Linear(w, w)])
        self.sigma, self.feature = nn.Linear(w, 1), nn.Linear(w, w)
        self.rgb1, self.rgb2 = nn.Linear(w + 3, w // 2), nn.Linear(w // 2, 3)

    def encode(self, x):
        return torch.cat([x] + [f(x * 2**k) for k in range(self.freqs) for f in (torch.sin, torch.cos)], -1)

    def forward(self, x, view):
        e = self.encode(x)
        h = e
        for i, layer in enumerate(self.layers):
            if i == 2:
                h = torch.cat([e, h], -1)
            h = F.relu(layer(h))
        h2 = torch.cat([self.feature(h), view[:, None].expand(-1, h.shape[1], -1)], -1)
        return torch.cat([torch.sigmoid(self.rgb2(F.relu(self.rgb1(h2)))), F.softplus(self.sigma(h))], -1)


@awkward(vector(2))
class SineNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(2, 20), nn.Linear(20, 20), nn.Linear(20, 1)])

    def forward(self, x):
        x = x.clone().requires_grad_(x.requires_grad)
        for i, layer in enumerate(self.net):
            x = torch.sin(3.0 * layer(x)) if i < 2 else layer(x)
        return x


@awkward(vector(6), cut=None)
class SplineLayer(nn.Module):
    """Kolmogorov-Arnold: a basis per edge, weights of three axes."""

    def __init__(self, sizes=(6, 10, 3), grid: int = 5):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, grid))
        self.base = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.spline = nn.ParameterList(torch.randn(b, a, grid) * 0.1 for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for base, spline in zip(self.base, self.spline, strict=True):
            basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2) * 4)
            x = base(F.silu(x)) + torch.einsum("nig,oig->no", basis, spline)
        return x


@awkward(lambda n: (torch.randn(n, 8), torch.randn(n, 4)))
class HyperNetwork(nn.Module):
    """Weights of one layer come from another network."""

    def __init__(self):
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8 * 6 + 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x, context):
        p = self.hyper(context)
        w, b = p[:, :48].view(-1, 6, 8), p[:, 48:]
        return self.out(torch.relu((w @ x.unsqueeze(-1)).squeeze(-1) + b))


@awkward(lambda n: (torch.randint(0, 10, (n, 4)), torch.randn(n, 5)))
class FactorisationMachine(nn.Module):
    """DeepFM: pairwise interactions by the square of sums, a deep part on the same embeddings."""

    def __init__(self, d: int = 6):
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(10, d) for _ in range(4))
        self.first = nn.ModuleList(nn.Embedding(10, 1) for _ in range(4))
        self.deep = nn.Sequential(nn.Linear(4 * d + 5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids, dense):
        e = torch.stack([m(ids[:, i]) for i, m in enumerate(self.embeds)], 1)
        fm = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        linear = sum(m(ids[:, i]) for i, m in enumerate(self.first))
        return torch.sigmoid(linear + fm + self.deep(torch.cat([e.flatten(1), dense], 1)))


@awkward(vector(12))
class CrossNetwork(nn.Module):
    """DCN: x0 * (w x) + x, joined with a deep part."""

    def __init__(self, d: int = 12):
        super().__init__()
        self.inp, self.ws = nn.Linear(12, d), nn.ParameterList(torch.randn(d, 1) * 0.3 for _ in range(2))
        self.bs = nn.ParameterList(torch.zeros(d) for _ in range(2))
        self.deep, self.out = nn.Sequential(nn.Linear(d, 16), nn.ReLU()), nn.Linear(d + 16, 1)

    def forward(self, x):
        x0 = x = self.inp(x)
        for w, b in zip(self.ws, self.bs, strict=True):
            x = x0 * (x @ w) + b + x
        return self.out(torch.cat([x, self.deep(x0)], 1))


@awkward(lambda n: (torch.randint(0, 30, (n,)), torch.randint(0, 40, (n,))))
class MatrixFactorisation(nn.Module):
    def __init__(self, d: int = 12):
        super().__init__()
        self.user, self.item = nn.Embedding(30, d), nn.Embedding(40, d)
        self.bu, self.bi = nn.Embedding(30, 1), nn.Embedding(40, 1)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(1) + self.bu(u).squeeze(-1) + self.bi(i).squeeze(-1)


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.rand(n)))
class DiffusionUNet(nn.Module):
    """Time embedding added as a bias, group norms, attention in the middle, skip connections by concat."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.c, self.time = c, nn.Sequential(nn.Linear(c, 32), nn.SiLU(), nn.Linear(32, c))
        self.inp, self.n1, self.c1 = nn.Conv2d(3, c, 3, padding=1), nn.GroupNorm(4, c), nn.Conv2d(c, c, 3, padding=1)
        self.down, self.n2 = nn.Conv2d(c, c, 3, 2, 1), nn.GroupNorm(4, c)
        self.qkv, self.proj = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)
        self.up, self.out = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(2 * c, 3, 3, padding=1)

    def forward(self, x, t):
        half = self.c // 2
        f = torch.exp(-math.log(1000) * torch.arange(half, dtype=x.dtype) / half) * t[:, None]
        emb = self.time(torch.cat([f.cos(), f.sin()], -1))
        x = self.inp(x)
        h = x + self.c1(F.silu(self.n1(x) + emb[..., None, None]))
        d = self.down(h)
        b, c, hh, ww = d.shape
        q, k, v = self.qkv(self.n2(d).reshape(b, c, -1)).chunk(3, 1)
        a = torch.einsum("bct,bcs->bts", q * (c**-0.25), k * (c**-0.25)).softmax(-1)
        d = d + self.proj(torch.einsum("bts,bcs->bct", a, v)).reshape(b, c, hh, ww)
        return self.out(torch.cat([self.up(F.interpolate(d, scale_factor=2)), h], 1))


@awkward(image())
class QueryDecoder(nn.Module):
    """DETR: learned queries attend to flattened features with a positional parameter."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.backbone, self.conv = stem(12), nn.Conv2d(12, d, 1)
        self.decoder = nn.TransformerDecoderLayer(d, 2, 24, dropout=0.0)
        self.queries, self.row = nn.Parameter(torch.rand(5, d)), nn.Parameter(torch.rand(8, d // 2))
        self.col = nn.Parameter(torch.rand(8, d // 2))
        self.cls, self.box = nn.Linear(d, 4), nn.Linear(d, 4)

    def forward(self, x):
        h = self.conv(self.backbone(x))
        H, W = h.shape[-2:]
        pos = (
            torch.cat([self.col[:W].unsqueeze(0).repeat(H, 1, 1), self.row[:H].unsqueeze(1).repeat(1, W, 1)], dim=-1)
            .flatten(0, 1)
            .unsqueeze(1)
        )
        h = self.decoder(
            self.queries.unsqueeze(1).repeat(1, x.size(0), 1), pos + 0.1 * h.flatten(2).permute(2, 0, 1)
        ).transpose(0, 1)
        return {"logits": self.cls(h), "boxes": self.box(h).sigmoid()}


@awkward(image())
class Capsules(nn.Module):
    """Primary capsules, squash, routing by agreement with raw four-axis weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.prim = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, stride=2)
        self.w = nn.Parameter(torch.randn(1, 8, 3, 5, 4) * 0.2)

    @staticmethod
    def squash(x):
        n = (x**2).sum(-1, keepdim=True)
        return n / (1 + n) * x / (n.sqrt() + 1e-8)

    def forward(self, x):
        u = self.squash(self.prim(F.relu(self.conv(x))).view(x.size(0), -1, 4))
        u_hat = (self.w @ u[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros_like(u_hat[..., :1])
        for _ in range(2):
            v = self.squash((b.softmax(2) * u_hat).sum(1, keepdim=True))
            b = b + (u_hat * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@awkward(lambda n: torch.randn(n, 7, 3))
class SetTransformer(nn.Module):
    """Sum pooling of a set, and pooling by attention of a learned seed."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.phi, self.seed = (
            nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, d)),
            nn.Parameter(torch.randn(1, 2, d)),
        )
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.rho = nn.Sequential(nn.Linear(3 * d, 20), nn.ReLU(), nn.Linear(20, 2))

    def forward(self, x):
        h = self.phi(x)
        s, _ = self.attn(self.seed.repeat(x.size(0), 1, 1), h, h)
        return self.rho(torch.cat([h.sum(1), s.reshape(x.size(0), -1)], 1))


@awkward(tokens())
class MemoryNetwork(nn.Module):
    """Keys and values of a learned memory, read with a softmax, added to the stream."""

    def __init__(self, d: int = 12, slots: int = 9):
        super().__init__()
        self.embed, self.keys = nn.Embedding(20, d), nn.Parameter(torch.randn(slots, d))
        self.values, self.out = nn.Parameter(torch.randn(slots, d)), nn.Linear(d, 20)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            x = x + (x @ self.keys.t()).softmax(-1) @ self.values
        return self.out(x)


@awkward(vector(6))
class NeuralODE(nn.Module):
    """Euler and midpoint steps of one field, with time joined as a feature."""

    def __init__(self, d: int = 12):
        super().__init__()
        self.inp, self.f1, self.f2, self.out = nn.Linear(6, d), nn.Linear(d + 1, 20), nn.Linear(20, d), nn.Linear(d, 2)

    def field(self, t, x):
        return self.f2(torch.tanh(self.f1(torch.cat([x, torch.full_like(x[:, :1], t)], 1))))

    def forward(self, x):
        x = self.inp(x)
        for k in range(3):
            half = x + 0.1 * self.field(0.2 * k, x)
            x = x + 0.2 * self.field(0.2 * k + 0.1, half)
        return self.out(x)


@awkward(sequence(6, 16))
class Conformer(nn.Module):
    """Half-step feed-forward, attention, GLU convolution with batch norm, post-norm."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.ff1 = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 32), nn.SiLU(), nn.Linear(32, d))
        self.n, self.attn = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.nc, self.p1, self.dw = nn.LayerNorm(d), nn.Conv1d(d, 2 * d, 1), nn.Conv1d(d, d, 3, padding=1, groups=d)
        self.bn, self.p2, self.post = nn.BatchNorm1d(d), nn.Conv1d(d, d, 1), nn.LayerNorm(d)
        self.inp, self.out = nn.Linear(16, d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.inp(x)
        x = x + 0.5 * self.ff1(x)
        y = self.n(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = F.glu(self.p1(self.nc(x).transpose(1, 2)), dim=1)
        return self.out(self.post(x + self.p2(F.silu(self.bn(self.dw(y)))).transpose(1, 2)))
