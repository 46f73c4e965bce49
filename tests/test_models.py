"""The reference networks: their sizes to the last parameter, their arguments, and that all of them can be cut."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

import secateur as sc
import stored
from secateur.checkpoint import load, save
from secateur.measure.counts import macs, params
from secateur.models import MODELS
from secateur.models.build import ModelError, Spec, build, spec_of
from secateur.models.densenet import DenseLayer
from secateur.models.wide_resnet import WideBlock
from secateur.types import Graph, Plan

# The published totals of parameters.  The sources of the residual networks, VGG, the perceptrons, the small networks
# and the small autoencoder give none: tests further down count those from the widths, or from what a paper says.
PARAMETERS = {
    "wide_resnet": [({}, 2_243_546), ({"depth": 16}, 691_674), ({"bottleneck": 0.5}, 1_129_370)],
    "densenet": [({}, 769_162)],
    "vae": [
        ({}, 85_183_619),
        ({"widths": [1843, 3686]}, 75_152_559),
        ({"widths": [1658, 3317]}, 66_392_355),
        ({"widths": [1492, 2985]}, 58_761_335),
    ],
    "s3": [({}, 63_122), ({"widths": [1, 2, 3]}, 23_617)],
}
CIFARNET = (1_555_200, 33_177_600, 16_588_800, 33_177_600, 33_177_600, 14_155_776, 21_233_664, 21_233_664)

# Every network at its own image size; small enough to cut in a moment where the full one is in PARAMETERS.
SMALLER: dict[str, dict[str, Any]] = {
    "densenet": {"depth": 16},
    "wide_resnet": {"depth": 16, "width": 1.5},
    "vae": {"widths": [96, 64], "channels": [8, 16], "latent": 12},
    "resnet110": {"width": 8},
    "vgg": {"width": 0.25},
}


def total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(name: str, count: int = 1, **arguments: Any) -> torch.Tensor:
    """Random images of the size that builder ``name`` expects by default."""
    options = {key: option.default for key, option in inspect.signature(MODELS[name]).parameters.items()}
    size = (options | arguments)["image_size"]
    return torch.rand(count, (options | arguments)["in_channels"], size, size)


def convolutions(model: nn.Module, inputs: torch.Tensor) -> list[int]:
    """Multiplications of each convolution for one image: kernel weights times output positions."""
    found: list[int] = []

    def note(module: nn.Module, args: object, output: torch.Tensor) -> None:
        found.append(module.weight.numel() * output[0, 0].numel())  # type: ignore[operator,union-attr]

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return found


def linears(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def inside(graph: Graph, keep: float) -> Plan:
    """Keep about a fraction of the channels inside the blocks of a wide or dense network, but not evenly."""
    groups = [g for g in graph.groups if g.name.endswith("conv1")]
    kept = [range(int(keep * g.units) + number % 3) for number, g in enumerate(groups)]
    return Plan(graph.fingerprint, tuple((g.name, g.units, tuple(k)) for g, k in zip(groups, kept, strict=True)))


@pytest.mark.parametrize(("name", "arguments", "want"), [(n, a, t) for n, rows in PARAMETERS.items() for a, t in rows])
def test_parameters_are_those_of_the_reference(name: str, arguments: dict[str, Any], want: int) -> None:
    with torch.device("meta"):
        assert total(MODELS[name](**arguments)) == want


@pytest.mark.parametrize(
    ("name", "arguments", "blocks", "units"),
    [("wide_resnet", {}, 18, 1344), ("wide_resnet", {"depth": 16}, 6, 448), ("densenet", {}, 48, 2304)],
)
def test_channels_inside_blocks_are_those_of_the_reference(
    name: str, arguments: dict[str, Any], blocks: int, units: int
) -> None:
    graph = sc.trace(build(name, **arguments), images(name))
    groups = [g for g in graph.groups if g.name.endswith("conv1")]
    assert all(g.prunable and g.exact for g in groups)
    assert (len(groups), sum(g.units for g in groups)) == (blocks, units)


def test_m_cifarnet_costs_what_its_paper_says_layer_by_layer() -> None:
    model, x = build("cifarnet"), images("cifarnet")
    assert tuple(convolutions(model, x)) == CIFARNET
    assert macs(sc.trace(model, x)) == 174_301_824
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 1_293_888
    kinds = [type(m) for m in model if isinstance(m, nn.Conv2d | nn.Dropout)]
    assert [place for place, kind in enumerate(kinds) if kind is nn.Dropout] == [4, 8]  # behind the 4th and the 7th


@pytest.mark.parametrize(("depth", "want"), [(4, 27_058_176), (8, 288_018_432)])
def test_s0_multiplies_as_often_as_the_reference(depth: int, want: int) -> None:
    model, x = build("s0", depth=depth), images("s0")
    assert sum(convolutions(model, x)) == want
    assert macs(sc.trace(model, x)) == want + linears(model)


def test_s0_with_six_convolutions_fits_the_one_number_on_record() -> None:
    """51.2 million, by a count that charges the last convolution at the size behind the pool; widths are not given."""
    *first, last = convolutions(build("s0", depth=6), images("s0"))
    assert round((sum(first) + last / 4) / 1e6, 1) == 51.2
    *first, last = convolutions(build("s0", depth=4), images("s0"))  # the same count of the other two is on record
    assert sum(first) + last // 4 == 25_399_296
    *first, last = convolutions(build("s0", depth=8), images("s0"))
    assert sum(first) + last // 4 == 285_806_592


def test_s0_drops_out_as_the_reference_and_ends_in_512() -> None:
    for depth, chance in ((4, 0.3), (6, 0.1), (8, 0.1)):
        model = build("s0", depth=depth)
        found = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        assert found == [chance] * (depth + 1)
        assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)][1] == 512
    assert {m.p for m in build("s0", dropout=0).modules() if isinstance(m, nn.Dropout)} == {0}


def test_perceptrons_and_the_small_network_of_s1_have_the_widths_on_record() -> None:
    """The source gives widths, and that linear layers have no bias; no totals."""
    with torch.device("meta"):
        for widths, size, channels, classes in (
            ([50, 30], 28, 1, 10),
            ([512, 256], 32, 3, 10),
            ([512, 256, 128], 32, 3, 100),
        ):
            model = MODELS["mlp"](classes, channels, size, widths, bias=False)
            sizes = [channels * size * size, *widths, classes]
            assert total(model) == sum(a * b for a, b in itertools.pairwise(sizes))
            assert total(MODELS["mlp"](classes, channels, size, widths)) == total(model) + sum(sizes[1:])
        model = MODELS["s1_cnn"](100)
        assert [m.in_features for m in model if isinstance(m, nn.Linear)] == [2048, 256, 128]
        assert total(model) == 3 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 2048 * 256 + 256 * 128 + 128 * 100


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_residual_networks_are_those_of_the_paper_and_two_shortcuts(depth: int, millions: float) -> None:
    """Table 6 of He et al. gives two digits, for shortcuts without parameters."""
    model = build(f"resnet{depth}")
    shortcuts = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert f"{(total(model) - shortcuts) / 1e6:.2g}" == f"{millions:.2g}"
    kinds = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kinds) + 1 == depth
    assert [p.shape for p in model.parameters()] == [p.shape for p in build("resnet20", depth=depth).parameters()]


@pytest.mark.parametrize(("depth", "plan"), [
    (11, "64 M 128 M 256 256 M 512 512 M 512 512"),
    (13, "64 64 M 128 128 M 256 256 M 512 512 M 512 512"),
    (16, "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512"),
    (19, "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512"),
])  # fmt: skip
def test_vgg_has_the_columns_of_its_paper(depth: int, plan: str) -> None:
    """Table 1 of Simonyan and Zisserman, A B D E; totals of the form for small images are not in the sources."""
    with torch.device("meta"):
        model = MODELS["vgg"](depth=depth)
    layers = [m for m in model if isinstance(m, nn.MaxPool2d | nn.Conv2d)]
    found = [str(m.out_channels) if isinstance(m, nn.Conv2d) else "M" for m in layers]
    assert found == plan.split()
    widths = [3, *(int(w) for w in plan.split() if w != "M")]
    assert total(model) == sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths)) + 512 * 10 + 10


def test_reduced_baselines_shrink_what_they_say() -> None:
    with torch.device("meta"):
        wide, dense = MODELS["wide_resnet"], MODELS["densenet"]
        narrow = wide(depth=10, width=1, bottleneck=0.25)
        assert [m.conv1.out_channels for m in narrow if hasattr(m, "conv1")] == [4, 8, 16]
        assert [m.conv2.out_channels for m in narrow if hasattr(m, "conv2")] == [16, 32, 64]
        assert [m.conv1.out_channels for m in dense(depth=10, growth=8, bottleneck=0.5) if hasattr(m, "conv1")] == [
            16
        ] * 3
        assert [m.conv2.in_channels for m in dense(depth=10, interior=[3, 5, 7]) if hasattr(m, "conv1")] == [3, 5, 7]
        assert dense(depth=10, compression=1)[2].num_features == dense(depth=10, compression=1)[4].out_channels == 36
        widths = list(range(8, 21))
        assert [m.out_channels for m in MODELS["vgg"](widths=widths) if isinstance(m, nn.Conv2d)] == widths
        assert MODELS["vgg"](width=0.5)[0].out_channels == 32


def analytic(interior: Sequence[int], depth: int, width: int) -> int:
    """Parameters of a wide network: in*mid*9 + mid*out*9 + 2*in + 2*mid per block, projections, and the rest."""
    n, before, sum_ = (depth - 4) // 6, 16, 3 * 16 * 9
    for number, mid in enumerate(interior):
        after = 16 * width * 2 ** (number // n)
        sum_ += before * mid * 9 + mid * after * 9 + 2 * before + 2 * mid + before * after * (before != after)
        before = after
    return sum_ + 2 * before + before * 10 + 10


def test_the_profile_of_a_cut_network_builds_that_network() -> None:
    for name, arguments in (("wide_resnet", {"depth": 16, "width": 2}), ("densenet", {"depth": 16, "growth": 6})):
        x = images(name)
        graph = sc.trace(build(name, **arguments), x)
        small = sc.compact(graph, inside(graph, 0.4))
        profile = [m.conv1.out_channels for m in small if hasattr(m, "conv1")]  # type: ignore[union-attr]
        again = build(name, **arguments, interior=profile)
        again.load_state_dict(small.state_dict())
        torch.testing.assert_close(again.eval()(x), small.eval()(x))
        if name == "wide_resnet":
            assert total(again) == total(small) == analytic(profile, 16, 2)
            assert len(set(profile)) > 3


def test_blocks_activate_before_they_convolve() -> None:
    """A block whose first batch norm gives nothing positive adds nothing: x stays, a convolved shortcut is zero."""
    x = torch.randn(2, 16, 8, 8)
    for block, want in (
        (WideBlock(16, 4, 16, 1, 0.0), x),
        (WideBlock(16, 4, 32, 2, 0.0), torch.zeros(2, 32, 4, 4)),
        (DenseLayer(16, 4, 6, 0.0), torch.cat([x, torch.zeros(2, 6, 8, 8)], 1)),
    ):
        assert not torch.equal(block(x), want)
        block.bn1.weight.data.zero_()
        block.bn1.bias.data.fill_(-1)
        assert torch.equal(block(x), want)
        block.bn1.bias.data.fill_(1)
        block.bn2.weight.data.zero_()
        block.bn2.bias.data.fill_(-1)
        if not getattr(block, "shortcut", None):
            assert torch.equal(block(x), want)
    wide, dense = build("wide_resnet", depth=10), build("densenet", depth=10)
    for model in (wide, dense):
        assert [type(m) for m in model][-5:] == [nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [type(m) for m in dense][2:6] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.AvgPool2d]
    assert [tuple(m.weight.shape[1:]) for m in dense if isinstance(m, nn.Conv2d)] == [(3, 3, 3), (36, 1, 1), (30, 1, 1)]


def test_dropout_stands_between_the_convolutions_of_a_block() -> None:
    for name in ("wide_resnet", "densenet"):
        model = build(name, depth=10, dropout=0.4)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.4] * 3
        x = images(name, 2)
        torch.manual_seed(0)
        first = model.train()(x)
        assert not torch.allclose(first, model(x))
        assert [m.p for m in build(name, depth=10).modules() if isinstance(m, nn.Dropout)] == [0] * 3


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_cut_and_proved_at_its_own_size(name: str, tmp_path: Path) -> None:
    model = build(name, **SMALLER.get(name, {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # not 0 and 1, as in a network that was trained
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    x = images(name, 3)
    graph = sc.trace(model, x[:1])
    if name not in ("resnet32", "resnet56", "resnet110"):  # resnet20 with more of its blocks
        sc.verify(graph)
    small = sc.prune(model, x[:1], keep=0.5)
    assert macs(sc.trace(small, x[:1])) < 0.51 * macs(graph)  # the nearest that whole channels allow
    assert params(sc.trace(small, x[:1])) == total(small) < total(model)
    for network in (model, small):
        assert [t.shape for t in stored.outputs(network, x)] == [t.shape for t in stored.outputs(model, x)]
        found = load(save(network, tmp_path / "a.safetensors"))
        assert stored.same(stored.outputs(network, x), stored.outputs(found, x))
        assert spec_of(found) == Spec(name, SMALLER.get(name, {}))
    out = small.train()(x)
    (out if isinstance(out, torch.Tensor) else out.images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("vae", "vgg", "resnet110")])
def test_networks_take_other_images(name: str) -> None:
    arguments = {"in_channels": 2, "image_size": [24, 16]} | (
        {"depth": 16} if name in ("densenet", "wide_resnet") else {}
    )
    model = build(name, **arguments)
    assert stored.outputs(model, torch.rand(3, 2, 24, 16))[0].shape == ((3, 2, 24, 16) if "vae" in name else (3, 10))


@pytest.mark.parametrize("size", [28, 32])
def test_an_autoencoder_draws_its_code_in_training_only(size: int) -> None:
    model, x = build("small_vae", image_size=size, widths=[32], latent=4), images("small_vae", 16, image_size=size)
    codes: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, given: codes.append(given[0]))
    out = model.eval()(x)
    mean, log_variance = model.encode(x)
    assert torch.equal(codes.pop(), mean)
    assert out.images.shape == x.shape
    assert mean.shape == log_variance.shape == (16, 4)
    prior, posterior = Normal(0.0, 1.0), Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(out.kl, kl_divergence(posterior, prior).sum(1), rtol=1e-5, atol=1e-6)
    model.train()
    model.log_variance = nn.Linear(32, 4)
    model.log_variance.weight.data.zero_()
    model.log_variance.bias.data.copy_(torch.tensor([-4.0, 0, 2, 4]))
    for _ in range(100):
        model(x)
    noise = torch.stack(codes) - mean
    torch.testing.assert_close(noise.std((0, 1)), torch.tensor([-2.0, 0, 1, 2]).exp(), rtol=0.1, atol=0)
    assert noise.mean((0, 1)).abs().lt(torch.tensor([0.02, 0.1, 0.3, 0.8])).all()


@pytest.mark.parametrize("size", [28, 32])
def test_an_autoencoder_learns(size: int) -> None:
    model = build("small_vae", image_size=size, widths=[32], latent=4)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    target = (torch.arange(16) % 2).float()[:, None, None, None].expand(16, 1, size, size)  # all black or all white
    losses = []
    for _ in range(80):
        out = model(target)
        loss = F.binary_cross_entropy(out.images, target, reduction="sum") + out.kl.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 <= out.images.min() <= out.images.max() <= 1
    assert min(losses) < 0.5 * losses[0]  # a code that says nothing stays at log 2 per pixel, where it starts


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("wide_resnet", {"depth": 18}, "6n . 4 with n >= 1; got 18"),
        ("densenet", {"depth": 4}, "6n . 4 with n >= 1; got 4"),
        ("densenet", {"depth": 10, "interior": [1, 2]}, "each of the 3 blocks; got 2"),
        ("densenet", {"depth": 10, "interior": [1, 2, 0]}, r"at least 1; got \[1, 2, 0\]"),
        ("wide_resnet", {"bottleneck": 0.01}, "at least 1; got"),
        ("wide_resnet", {"bottleneck": 0.5, "interior": [1] * 18}, "not both"),
        ("vgg", {"depth": 12}, "one of .11, 13, 16, 19.; got 12"),
        ("vgg", {"image_size": 8}, "at least 16 x 16; got 8"),
        ("vgg", {"widths": [8]}, "13 numbers"),
        ("vgg", {"width": 0.5, "widths": [8] * 13}, "width be left out"),
        ("cifarnet", {"widths": [8]}, "8 numbers, one per convolution; got 1"),
        ("s0", {"depth": 5}, "one of .4, 6, 8.; got 5"),
        ("resnet20", {"depth": 21}, "6n . 2 with n >= 1; got 21"),
        ("vae", {"image_size": 30}, "multiples of 4; got 30 x 30"),
        ("small_vae", {"widths": []}, "at least one number"),
    ],
)
def test_wrong_values_are_explained(name: str, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        build(name, **arguments)
