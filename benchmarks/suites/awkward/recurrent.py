"""Recurrent networks, in modules and unrolled by hand, and state-space scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, tokens
from benchmarks.suites.awkward.conv import stem


class Recurrent(nn.Module):
    """A projection, a recurrent module, and a classifier on what ``pick`` takes from its result."""

    def __init__(self, rnn: nn.Module, width: int, last: bool = True):
        super().__init__()
        self.inp, self.rnn, self.fc, self.last = nn.Linear(16, 12), rnn, nn.Linear(width, 3), last

    def forward(self, x):
        y, _ = self.rnn(F.relu(self.inp(x)))
        return self.fc(y[:, -1] if self.last else y)


@awkward(sequence())
def RNN():
    return Recurrent(nn.RNN(12, 16, batch_first=True, nonlinearity="relu"), 16)


@awkward(sequence())
def GRU():
    return Recurrent(nn.GRU(12, 16, batch_first=True), 16, last=False)


@awkward(sequence())
def LSTM():
    return Recurrent(nn.LSTM(12, 16, batch_first=True), 16)


@awkward(sequence())
def LSTMTwoLayersBidirectional():
    return Recurrent(nn.LSTM(12, 10, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1), 20)


@awkward(sequence())
def GRUTwoLayers():
    return Recurrent(nn.GRU(12, 10, num_layers=2, batch_first=True), 10)


@awkward(sequence(), cut=None)
def LSTMProjected():
    return Recurrent(nn.LSTM(12, 16, proj_size=8, batch_first=True), 8)


@awkward(lambda n: torch.randint(0, 20, (6, n)))
class LanguageModel(nn.Module):
    """Time first, hidden state by hand, last states of all layers used."""

    def __init__(self, width: int = 16, layers: int = 2):
        super().__init__()
        self.width, self.layers = width, layers
        self.embed, self.rnn = nn.Embedding(20, 12), nn.LSTM(12, width, layers)
        self.decoder, self.state = nn.Linear(width, 20), nn.Linear(layers * width, 4)

    def forward(self, ids):
        n = ids.size(1)
        p = self.embed.weight
        zero = p.new_zeros(self.layers, n, self.width), p.new_zeros(self.layers, n, self.width)
        y, (h, _) = self.rnn(self.embed(ids), zero)
        return self.decoder(y), self.state(h.transpose(0, 1).reshape(n, -1))


@awkward(sequence())
class CellUnrolled(nn.Module):
    def __init__(self, width: int = 14):
        super().__init__()
        self.width, self.cell, self.gru, self.fc = (
            width,
            nn.LSTMCell(16, width),
            nn.GRUCell(width, 10),
            nn.Linear(10, 3),
        )

    def forward(self, x):
        h = x.new_zeros(x.size(0), self.width)
        c, g = torch.zeros_like(h), x.new_zeros(x.size(0), 10)
        for t in range(x.size(1)):
            h, c = self.cell(x[:, t], (h, c))
            g = self.gru(h, g)
        return self.fc(g)


@awkward(sequence())
class GRUByHand(nn.Module):
    """Packed gates in one linear layer, chunked in three."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.width, self.x2h, self.h2h, self.fc = (
            width,
            nn.Linear(16, 3 * width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, 3),
        )

    def forward(self, x):
        h = torch.zeros(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        outs = []
        for step in x.unbind(1):
            xr, xi, xn = self.x2h(step).chunk(3, 1)
            hr, hi, hn = self.h2h(h).chunk(3, 1)
            r, i = torch.sigmoid(xr + hr), torch.sigmoid(xi + hi)
            n = torch.tanh(xn + r * hn)
            h = n + i * (h - n)
            outs.append(h)
        return self.fc(torch.stack(outs, 1)).sum(1)


@awkward(lambda n: torch.randn(n, 4, 3, 6, 6))
class ConvLSTM(nn.Module):
    def __init__(self, hidden: int = 8):
        super().__init__()
        self.hidden, self.conv, self.out = (
            hidden,
            nn.Conv2d(3 + hidden, 4 * hidden, 3, padding=1),
            nn.Conv2d(hidden, 2, 1),
        )

    def forward(self, x):
        b, t, _, h, w = x.shape
        state, cell = x.new_zeros(b, self.hidden, h, w), x.new_zeros(b, self.hidden, h, w)
        for k in range(t):
            i, f, o, g = torch.split(self.conv(torch.cat([x[:, k], state], dim=1)), self.hidden, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
        return self.out(state)


@awkward(image(3, 8))
class ConvThenRecurrent(nn.Module):
    """CRNN: columns of the feature map are the sequence; channels times height is the width."""

    def __init__(self):
        super().__init__()
        self.cnn, self.rnn, self.fc = (
            nn.Sequential(stem(8), nn.MaxPool2d(2)),
            nn.GRU(8 * 4, 12, bidirectional=True, batch_first=True),
            nn.Linear(24, 7),
        )

    def forward(self, x):
        f = self.cnn(x)
        b, c, h, w = f.size()
        y, _ = self.rnn(f.view(b, c * h, w).permute(0, 2, 1))
        return self.fc(y).log_softmax(2).permute(1, 0, 2)


@awkward(tokens(), cut=None)
class PackedSequence(nn.Module):
    """Lengths sort the batch; the packed LSTM is padded again."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(20, 12), nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, ids):
        lengths = torch.full((ids.size(0),), ids.size(1))
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.fc(y[:, -1])


@awkward(lambda n: (torch.randint(0, 20, (n, 5)), torch.randint(0, 20, (n, 4))))
class SeqToSeqAttention(nn.Module):
    """Encoder GRU, additive attention, decoder cell fed with the context."""

    def __init__(self):
        super().__init__()
        self.embed, self.enc, self.dec = nn.Embedding(20, 12), nn.GRU(12, 14, batch_first=True), nn.GRUCell(12 + 14, 14)
        self.wq, self.wk, self.v, self.out = nn.Linear(14, 10), nn.Linear(14, 10), nn.Linear(10, 1), nn.Linear(28, 20)

    def forward(self, src, tgt):
        keys, h = self.enc(self.embed(src))
        h, outs = h.squeeze(0), []
        for t in range(tgt.size(1)):
            a = self.v(torch.tanh(self.wq(h).unsqueeze(1) + self.wk(keys))).softmax(1)
            ctx = (a * keys).sum(1)
            h = self.dec(torch.cat([self.embed(tgt[:, t]), ctx], -1), h)
            outs.append(self.out(torch.cat([h, ctx], -1)))
        return torch.stack(outs, 1)


@awkward(sequence())
class SelectiveScan(nn.Module):
    """Mamba's block: convolution, data-dependent step, state in the last axis."""

    def __init__(self, d: int = 16, inner: int = 24, n: int = 4, rank: int = 3):
        super().__init__()
        self.inner, self.n, self.rank = inner, n, rank
        self.in_proj, self.conv = (
            nn.Linear(d, 2 * inner, bias=False),
            nn.Conv1d(inner, inner, 3, groups=inner, padding=2),
        )
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * n, bias=False), nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, n + 1).float()).repeat(inner, 1))
        self.D, self.out_proj, self.head = (
            nn.Parameter(torch.ones(inner)),
            nn.Linear(inner, d, bias=False),
            nn.Linear(d, 3),
        )

    def forward(self, u):
        x, z = self.in_proj(u).split(self.inner, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : u.size(1)].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.rank, self.n, self.n], -1)
        dt, a = F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        h, ys = x.new_zeros(x.size(0), self.inner, self.n), []
        for t in range(x.size(1)):
            h = torch.exp(dt[:, t, :, None] * a) * h + dt[:, t, :, None] * b[:, t, None, :] * x[:, t, :, None]
            ys.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        return self.head(u + self.out_proj((torch.stack(ys, 1) + self.D * x) * F.silu(z)))


@awkward(sequence())
class DiagonalRecurrence(nn.Module):
    """A linear recurrent unit by cumulative sums in the log domain."""

    def __init__(self, width: int = 20):
        super().__init__()
        self.v, self.f, self.out, self.h0 = (
            nn.Linear(16, width),
            nn.Linear(16, width),
            nn.Linear(width, 3),
            nn.Parameter(torch.rand(1, 1, width)),
        )

    def forward(self, x):
        f = F.logsigmoid(self.f(x))
        c = f.cumsum(1)
        v = torch.sigmoid(self.v(x)).log() + F.logsigmoid(-self.f(x))
        h = torch.cat([self.h0.log().expand(x.size(0), -1, -1), v - c], 1).logcumsumexp(1)[:, 1:] + c
        return self.out(h.exp())


@awkward(sequence(8, 16))
class TemporalConvolution(nn.Module):
    """TCN: dilated causal convolutions with a chomp, weights and residual."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(16, 20, 1)
        self.convs = nn.ModuleList([nn.Conv1d(16, 20, 3, padding=2), nn.Conv1d(20, 20, 3, padding=4, dilation=2)])
        self.fc = nn.Linear(20, 3)

    def forward(self, x):
        x = x.transpose(1, 2)
        res = self.down(x)
        for conv in self.convs:
            x = F.relu(conv(x)[:, :, : -conv.padding[0]].contiguous())
        return self.fc(F.relu(x + res)[:, :, -1])


@awkward(sequence())
class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.h, self.t, self.out = nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        x = self.inp(x)
        t = torch.sigmoid(self.t(x))
        return self.out(torch.lerp(x, F.relu(self.h(x)), t))
