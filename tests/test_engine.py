"""The fast engine equals the masked reference, whatever the network, the input and the number of callers."""

from __future__ import annotations

import concurrent.futures
import os
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from gated_nets import curious, lived, varied
from random_nets import actions, margin, network
from secateur.models.cifar_resnet import resnet20
from secateur.models.cifarnet import cifarnet
from secateur.models.s0 import s0
from secateur.models.vgg import vgg
from secateur.runtime.engine import Engine, Fallback, compile_engine, native
from secateur.runtime.engine.convolve import FIELDS
from secateur.runtime.engine.driver import OPERATORS
from secateur.runtime.engine.tile import KINDS
from secateur.runtime.gates import acting, gate
from secateur.types import EngineError

NARROW = (8, 8, 12, 12, 12, 16, 16, 16)
WIDTHS = [16, 8] if native.lanes() == 16 else [8]


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    if not expected.numel():
        return 0.0
    assert expected.isfinite().all(), "the test network explodes"
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-20))


def check(seed: int, width: int | None = None, rich: bool = False) -> bool:
    """Does a random network run like its masks?  False: a choice was too close to call in float32."""
    model, x = network(seed, rich)
    engine = compile_engine(model, x, strict=True, width=width)
    assert isinstance(engine, Engine)
    chosen = actions(model, len(x))
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    error = off(engine(x, chosen) if chosen else engine(x), expected)
    if error > 1e-4 and margin(model, x) < 1e-5:
        return False
    assert error <= 1e-4, f"seed {seed}: off by {error}"
    return True


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_equal_their_masks(seed: int) -> None:
    check(seed, WIDTHS[seed % len(WIDTHS)])


@pytest.mark.parametrize("seed", range(1000, 1016))
def test_random_networks_with_other_activations_equal_their_masks(seed: int) -> None:
    check(seed, WIDTHS[seed % len(WIDTHS)], rich=True)


@pytest.mark.slow
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("part", range(10))
def test_500_random_networks(part: int, rich: bool) -> None:
    close = sum(not check(seed, WIDTHS[seed % len(WIDTHS)], rich) for seed in range(50 * part, 50 * part + 50))
    assert close <= 2


MODELS = {
    "cifarnet": lambda: cifarnet(widths=NARROW),
    "vgg": lambda: vgg(depth=11, width=0.2),
    "resnet20": lambda: resnet20(width=8, depth=8),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "s0": lambda: s0(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
def test_acceptance_17_sparse_execution_equals_the_masks(name: str, width: int, density: float) -> None:
    x = varied(3, 3, 64, 64) if name == "resnet18" else varied(3)
    model = curious(gate(lived(MODELS[name]()), density, x).model, x)
    engine = compile_engine(model, x, strict=True, width=width)
    with torch.no_grad():
        assert off(engine(x), model(x)) <= 1e-4


@pytest.mark.parametrize("name", ["resnet20", "s0"])
def test_prefixes_per_layer_and_sample(name: str) -> None:
    x = varied(5)
    done = gate(lived(MODELS[name]()), None, x, groups=4)
    engine = compile_engine(done.model, x, strict=True)
    for chosen in (actions(done.model, 5), {path: torch.full((5,), 4) for path in done.gated}):
        with acting(done.model, chosen), torch.no_grad():
            assert off(engine(x, chosen), done.model(x)) <= 1e-4
    with pytest.raises(EngineError, match="actions must name"):
        engine(x, {})


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Engine]:
    torch.manual_seed(3)
    x = varied(4)
    model = curious(gate(lived(resnet20(width=8, depth=8)), 0.5, x).model, x)
    return model, compile_engine(model, x, strict=True, threads=2)


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_any_batch(pair: tuple[nn.Module, Engine], batch: int) -> None:
    model, engine = pair
    x = varied(batch)
    with torch.no_grad():
        assert off(engine(x), model(x)) <= 1e-4


def test_inputs_of_other_types_and_strides(pair: tuple[nn.Module, Engine]) -> None:
    model, engine = pair
    x = varied(2)
    with torch.no_grad():
        expected = model(x)
        assert off(engine(x.to(memory_format=torch.channels_last)), expected) <= 1e-4
        assert off(engine(x.repeat_interleave(2, dim=3)[:, :, :, ::2]), expected) <= 1e-4
        assert off(engine(x.double().requires_grad_()), expected) <= 1e-4
        assert off(engine(x.half()), model(x.half().float())) <= 1e-4
    with pytest.raises(EngineError, match=r"compiled for \(B, 3, 32, 32\); got \(2, 3, 31, 32\)"):
        engine(x[:, :, 1:])


def test_nan_in_nan_out_and_nothing_stays_behind(pair: tuple[nn.Module, Engine]) -> None:
    _, engine = pair
    x = varied(1)
    bad = x.clone()
    bad[0, 0, 3, 3] = float("nan")
    before = engine(x)
    assert engine(bad).isnan().all()
    assert torch.equal(engine(x), before)


def test_several_threads_call_one_engine(pair: tuple[nn.Module, Engine]) -> None:
    _, engine = pair
    inputs = [varied(3) for _ in range(16)]
    expected = [engine(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(engine, inputs), expected, strict=True))


def test_the_model_is_left_as_it_was(pair: tuple[nn.Module, Engine]) -> None:
    x = varied(2)
    model = lived(resnet20(width=8, depth=8)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compile_engine(model, x, strict=True)
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_the_engine_does_not_know_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.rand(2, 3, 8, 8)
    engine = compile_engine(model, x)
    assert isinstance(engine, Fallback)
    assert "aten::gelu in '1'" in engine.reason
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))
    with pytest.raises(EngineError, match="gelu"):
        compile_engine(model, x, strict=True)


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 3, 8, 8)
    monkeypatch.setattr(Engine, "__call__", lambda self, x: torch.zeros(len(x), 4, 6, 6))
    engine = compile_engine(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    assert isinstance(engine, Fallback)
    assert "off by 1.0e+00" in engine.reason


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "secateur" / "engine"


def test_the_cache_is_private_and_checked(cache: Path) -> None:
    native.write("code", b"machine code")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert native.read("code") == b"machine code"
    file = cache / "code"
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], whole[::-1]):
        file.write_bytes(damaged)
        assert native.read("code") is None
    file.write_bytes(whole)
    file.chmod(0o622)
    assert native.read("code") is None
    file.chmod(0o600)
    cache.chmod(0o777)
    assert native.read("code") is None
    native.write("more", b"code")
    assert not (cache / "more").exists()
    cache.chmod(0o700)
    os.replace(file, cache / "real")
    file.symlink_to(cache / "real")
    assert native.read("code") is None


def test_a_damaged_entry_is_compiled_again(cache: Path) -> None:
    width = WIDTHS[-1]
    native.functions.cache_clear()
    native.functions(width)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:100])
    native.functions.cache_clear()
    native.functions(width)
    assert file.read_bytes() == good


def test_two_threads_share_the_convolutions_of_one_sample() -> None:
    x = varied(1)
    model = curious(gate(lived(resnet20(width=12, depth=8)), 0.5, x).model, varied(4))  # 6, 12, 24 outputs
    one, two = (compile_engine(model, x, strict=True, threads=threads) for threads in (1, 2))
    expected = one(x)
    with torch.no_grad():
        assert off(expected, model(x)) <= 1e-4
    assert all(torch.equal(two(x), expected) for _ in range(20))


def test_maps_whose_rows_cannot_touch() -> None:
    """8 pixels are half a vector, but the second convolution widens the map."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2), nn.ReLU()]
    x = varied(2, 3, 8, 8)
    model = nn.Sequential(*layers, nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        assert off(compile_engine(model, x, strict=True)(x), model(x)) <= 1e-4


@pytest.mark.skipif(native.lanes() < 16, reason="these tiles need AVX-512")
@pytest.mark.parametrize(("side", "kind"), [(2, "corner"), (4, "quad")])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_small_maps_have_tiles_of_their_own(side: int, kind: str, density: float) -> None:
    """Numbers of outputs that no tile height divides, two groups, a residual sum."""
    x = varied(3, 3, side, side)
    convolution = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    block = nn.Sequential(convolution(22, 22, groups=2), nn.BatchNorm2d(22), nn.ReLU(), convolution(22, 22))
    layers = [convolution(3, 22), nn.BatchNorm2d(22), nn.ReLU(), Around(block), nn.ReLU(), nn.Conv2d(22, 5, 1)]
    model = curious(gate(lived(nn.Sequential(*layers)), density, x).model, x)
    engine = compile_engine(model, x, strict=True)
    assert isinstance(engine, Engine)
    used = engine.table[:, 1 + FIELDS.index("kind")][engine.table[:, 0] == list(OPERATORS).index("convolve")]
    assert used.tolist() == [KINDS.index(kind)] * 3 + [0]
    with torch.no_grad():
        assert off(engine(x), model(x)) <= 1e-4


class Around(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)
