"""Gates wherever a plan would cut: any traced graph, layers that share masks, what is left dense and why."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import secateur as sc
from gated_nets import curious, lived, varied
from secateur.models.build import build
from secateur.runtime.gates import Follower, Gated, Gating, acting, gate, watch
from secateur.runtime.gates.cost import meter
from secateur.runtime.gates.fbs import quota
from secateur.runtime.macs import macs
from secateur.types import PlanError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Separable(nn.Module):
    """Depthwise with a bias, with a batch norm, with two outputs per input; a grouped convolution; a linear head."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), act())
        self.deep = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice, self.after = nn.Conv2d(6, 12, 3, groups=6, bias=False), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.act = act()
        self.head = nn.Sequential(nn.Linear(8 * 9, 10), nn.BatchNorm1d(10), act(), nn.Dropout(0.1), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.deep(self.stem(x))))
        x = self.act(self.grouped(self.after(self.twice(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


class Shuffled(nn.Module):
    """Branches that are split, concatenated and shuffled, with a squeeze-and-excitation behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.deep, self.norm = nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.left, self.right = nn.Conv2d(5, 4, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = x.view(len(x), 2, 6, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        x = self.norm(self.deep(x)).relu()
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        one, two = x.split([5, 7], 1)
        return (self.left(one) + self.right(two)).mean((2, 3))


class Preactivated(nn.Module):
    """Residual blocks of BN-ReLU-Conv: the batch norm in front of a block sees the sum of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(norm(x).relu())
        return self.head(self.norms[2](x).relu().mean((2, 3)))


class Tokens(nn.Module):
    """A convolution with its output as tokens; the first layer norm mixes channels, the neurons behind it don't."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(x + self.two(nn.functional.gelu(self.one(self.norm(x))))).mean(1)


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 5, 3),
        nn.BatchNorm3d(5),
        nn.SiLU(),
        nn.Conv3d(5, 6, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 8, 2),
    )


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 5, 3),
        nn.BatchNorm1d(5),
        nn.ELU(),
        nn.Conv1d(5, 6, 3, groups=1),
        nn.Hardtanh(),
        nn.Flatten(),
        nn.Linear(6 * 8, 2),
    )


def vision(name: str, **given: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the initialisation of GoogLeNet
            return getattr(torchvision.models, name)(weights=None, num_classes=5, **given)

    return make


IMAGE = (3, 32, 32)
SMALL = {  # model, shape of a sample, gated layers, layers that share masks, a reason for each other layer
    "separable": (Separable, (3, 16, 16), 3, 4, {"head.4": "output"}),
    "hardswish": (lambda: Separable(nn.Hardswish), (3, 16, 16), 3, 4, {"head.4": "output"}),
    "shuffled": (Shuffled, (3, 8, 8), 3, 2, {"up": "sigmoid", "left": "output", "right": "output"}),
    "preactivated": (Preactivated, (3, 8, 8), 3, 3, {"head": "output"}),
    "tokens": (Tokens, (3, 16, 16), 2, 0, {"patch": "layer_norm", "head": "output"}),
    "volume": (volume, (2, 4, 4, 4), 2, 0, {"6": "output"}),
    "signal": (signal, (2, 12), 2, 0, {"6": "output"}),
    "mlp": (lambda: build("mlp", image_size=8, in_channels=1), (1, 8, 8), 2, 0, None),
    "cifarnet": (lambda: build("cifarnet", widths=[8] * 8), IMAGE, 8, 0, {"28": "output"}),
    "s0": (lambda: build("s0", widths=[8, 8, 6, 4]), IMAGE, 5, 0, {"17": "output"}),
    "vgg": (lambda: build("vgg", depth=11, width=0.1), IMAGE, 8, 0, {"30": "output"}),
    "densenet": (lambda: build("densenet", depth=16, growth=4), IMAGE, None, None, None),
    "wide_resnet": (lambda: build("wide_resnet", depth=10, width=0.5), IMAGE, None, None, None),
}
VISION = {
    "resnet18": (vision("resnet18"), 20, 0),
    "resnet50": (vision("resnet50"), 53, 0),
    "mobilenet_v2": (vision("mobilenet_v2"), 35, 34),
    "mobilenet_v3_small": (vision("mobilenet_v3_small"), 33, 22),
    "efficientnet_b0": (vision("efficientnet_b0"), 49, 32),
    "densenet121": (vision("densenet121"), 120, 62),
    "regnet_y_400mf": (vision("regnet_y_400mf"), 69, 0),
    "shufflenet_v2_x0_5": (vision("shufflenet_v2_x0_5"), 37, 38),
    "convnext_tiny": (vision("convnext_tiny"), 18, 0),
    "squeezenet1_1": (vision("squeezenet1_1"), 25, 0),
    "googlenet": (vision("googlenet", transform_input=False), 57, 0),
}


def equal_when_everything_is_computed(model: nn.Module, x: Tensor) -> None:
    for density in (1.0, None):
        done = gate(model, density, x, everywhere=True, groups=2)
        with torch.no_grad():
            expected, got = model(x), done.model(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def only_what_is_chosen(done: Gating, x: Tensor, density: float) -> None:
    """Exactly ceil(d C) winners; zeros where a gate or a shared mask says so; the meter counts real zeros only."""
    model = curious(done.model, x)
    count = meter(model, x)
    zeros: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    owners = {path: m for path, m in model.named_modules() if isinstance(m, Gated | Follower)}
    for term in count.terms:
        owner = owners.get(term.path)
        work = model.get_submodule(term.path) if owner is None else getattr(owner, "conv", None) or owner.layer

        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, path: str = term.path) -> None:
            last = isinstance(module, nn.Linear)
            zeros[path] = (_silent(args[0], last), _silent(out, last))

        hooks.append(work.register_forward_hook(see))
    outs: dict[str, Tensor] = {}
    for path, owner in owners.items():
        hooks.append(owner.register_forward_hook(lambda m, a, out, path=path: outs.update({path: out.clone()})))
    with watch(model) as choices, torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    masks = {path: choice.mask for path, choice in choices.items()}
    assert set(masks) == set(done.gated)
    for path, mask in masks.items():
        assert mask.sum(1).tolist() == [quota(density, mask.shape[1])] * len(x)
        assert _silent(outs[path], isinstance(owners[path].conv, nn.Linear))[~mask].all()
    for path in [path for path, owner in owners.items() if isinstance(owner, Follower)]:
        mask = owners[path].flow.mask(masks, len(x))
        assert mask is not None
        assert not mask.all()
        assert _silent(outs[path], False)[~mask].all()
    for term in count.terms:
        before = term.before.mask(masks, len(x))
        if before is not None:
            assert zeros[term.path][0][~before].all(), f"{term.path} reads what is counted as skipped"
    assert bool((count(choices, len(x)) < count.dense).all())


def _silent(x: Tensor, last: bool) -> Tensor:
    """Which channels (B, C) are exactly zero."""
    return ~(x.movedim(-1, 1) if last else x).reshape(len(x), x.shape[-1 if last else 1], -1).any(2)


@pytest.mark.parametrize("name", SMALL)
def test_gates_on_any_traced_graph(name: str) -> None:
    make, shape, gates, sharing, reasons = SMALL[name]
    model, x = lived(make()), varied(2, *shape) if len(shape) == 3 else torch.randn(2, *shape)
    equal_when_everything_is_computed(model, x)
    done = gate(model, 0.5, x, everywhere=True)
    assert gates is None or len(done.gated) == gates
    assert sharing is None or len(done.sharing) == sharing
    assert reasons is None or {path for path, _ in done.dense} == set(reasons)
    assert all((reasons or {}).get(path, "") in why for path, why in done.dense)
    only_what_is_chosen(done, x, 0.5)


@pytest.mark.parametrize("name", VISION)
def test_gates_on_the_networks_of_torchvision(name: str) -> None:
    make, gates, sharing = VISION[name]
    model, x = lived(make()), varied(2, 3, 64, 64)
    equal_when_everything_is_computed(model, x)
    done = gate(model, 0.5, x, everywhere=True)
    assert (len(done.gated), len(done.sharing)) == (gates, sharing)
    words = ("output of the model", "sigmoid", "layer_norm", "depthwise", "as_strided", "does not run")
    assert all(any(word in why for word in words) for _, why in done.dense)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = [path for path in done.sharing if isinstance(model.get_submodule(path), nn.Conv2d)]
    assert len(layers) == gates + len(done.dense) + len(convolutions)  # nothing is left out without a word
    only_what_is_chosen(done, x, 0.5)


def test_without_everywhere_only_chains_have_gates() -> None:
    model, x = lived(Separable()), varied(2, 3, 16, 16)
    done = gate(model, 0.5, x)
    assert done.gated == ("stem.0", "deep", "grouped")
    assert done.sharing == ()
    reasons = dict(done.dense)
    assert "everywhere" in reasons["head.0"]
    with pytest.raises(PlanError, match="everywhere"):
        gate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 0.5, torch.rand(2, 4))


def test_outputs_stay_whole_behind_an_activation_too() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    done = gate(net, 0.5, torch.rand(2, 3, 6, 6), everywhere=True)
    assert done.gated == ("0",)
    assert dict(done.dense) == {"2": "its values are an output of the model"}


@pytest.mark.parametrize("pooling", ["l1", "avg", "max", "l2"])
def test_a_vector_is_its_own_pool(pooling: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 6)
    model = curious(gate(net, 0.5, x, everywhere=True, pooling=pooling).model, x)
    with watch(model) as choices:
        model(x)
    seen = x if pooling in ("avg", "max") else x.abs()
    torch.testing.assert_close(choices["0"].saliency, model.get_submodule("0.gate.predictor")(seen).relu())


def test_tokens_share_the_choice_of_their_sample() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(3, 7, 6)
    model = curious(gate(net, 0.25, x, everywhere=True).model, x)
    with watch(model) as choices:
        model(x)
    assert choices["0"].mask.shape == (3, 8)
    torch.testing.assert_close(choices["0"].saliency, model.get_submodule("0.gate.predictor")(x.abs().mean(1)).relu())
    assert macs(model, x).tolist() == [7 * (6 * 2 + 2 * 2)] * 3


def test_a_batch_that_is_not_of_samples_is_left_dense() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.flatten(0, 1)).relu().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

    with pytest.raises(PlanError, match="per sample"):
        gate(Frames(), 0.5, torch.rand(2, 3, 3, 4, 4), everywhere=True)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_gates_on_a_compacted_network(name: str) -> None:
    x = varied(2, 3, 64, 64)
    small = sc.prune(lived(VISION[name][0]()), x, 0.5)
    equal_when_everything_is_computed(small, x)
    done = gate(small, 0.5, x, everywhere=True)
    assert len(done.gated) >= 20
    only_what_is_chosen(done, x, 0.5)


def test_a_copy_of_a_gated_model_has_masks_of_its_own() -> None:
    x = varied(4, 3, 8, 8)
    model = curious(gate(lived(Preactivated()), 0.5, x, everywhere=True).model, x)
    expected = model(x)
    twin = copy.deepcopy(model)
    boards = [{id(m.board) for m in one.modules() if isinstance(m, Gated | Follower)} for one in (model, twin)]
    assert len(boards[0]) == len(boards[1]) == 1
    assert boards[0] != boards[1]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(x)
    assert torch.equal(twin(x), expected)


def test_several_threads_run_one_gated_model() -> None:
    inputs = [varied(size, 3, 8, 8) for size in (1, 2, 3, 5)]
    model = curious(gate(lived(Preactivated()), 0.5, inputs[-1], everywhere=True).model, inputs[-1])
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            wrong.extend(number for _ in range(20) if not torch.equal(model(inputs[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prefixes_decide_about_what_follows_too() -> None:
    x = varied(3, 3, 16, 16)
    done = gate(lived(Separable()), None, x, everywhere=True, groups=2)
    actions = {path: torch.tensor([1, 2, 1]) for path in done.gated}
    seen: dict[str, Tensor] = {}
    done.model.get_submodule("norm").register_forward_hook(lambda m, a, out: seen.update(out=out.clone()))
    with acting(done.model, actions), torch.no_grad():
        done.model(x)
    assert _silent(seen["out"], False).tolist() == [[False] * 3 + [True] * 3, [False] * 6, [False] * 3 + [True] * 3]


def test_what_learns_is_what_is_computed() -> None:
    x = varied(4, 3, 16, 16)
    model = curious(gate(lived(Separable()), 0.5, x, everywhere=True).model, x).train()
    with watch(model) as choices:
        model(x[:1].expand(4, -1, -1, -1)).square().sum().backward()
    idle = ~choices["stem.0"].mask.any(0)
    for layer in (model.get_submodule("stem.0").conv, model.deep.layer, model.norm.layer):
        assert not layer.weight.grad[idle].any()
        assert layer.weight.grad[~idle].any()
