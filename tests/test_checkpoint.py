"""What is saved comes back: values, ties, kinds, layouts, structure, and nothing half-written."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
import stored
from secateur.checkpoint import load, read_header, save
from secateur.models.build import build
from secateur.types import Check, CheckpointError, Measurement, Proof

IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
TOKENS = torch.tensor([[1, 5, 2, 9]])
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
}
BUILT = {
    "s3": ({}, IMAGE[:, :1, :28, :28]),
    "torchvision:resnet18": ({"num_classes": 10}, IMAGE),
    "torchvision:shufflenet_v2_x0_5": ({}, IMAGE),
    "timm:convnext_atto": ({"num_classes": 5}, IMAGE),
    "transformers:BertModel": ({"config": BERT}, TOKENS),
    "stored:net": ({"width": 16, "activation": "gelu"}, IMAGE[0, 0, :5, :4]),
}
REMOTE = """
import sys, torch
sys.path.insert(0, {tests!r})
import stored
from secateur.checkpoint import load
torch.set_num_threads(1)
for path in sys.argv[1:]:
    inputs = torch.load(path + ".in", weights_only=True)
    torch.save(stored.outputs(load(path, trust=["stored"]), inputs), path + ".out")
"""


def test_models_of_every_source_load_in_a_new_process_dense_and_small(tmp_path: Path) -> None:
    want = {}
    for number, (spec, (kwargs, inputs)) in enumerate(BUILT.items()):
        dense = build(spec, **kwargs)
        for kind, model in (("dense", dense), ("small", stored.halved(dense, inputs))):
            path = save(model, tmp_path / f"{number}-{kind}.safetensors")
            torch.save(inputs, f"{path}.in")
            want[path] = stored.outputs(model, inputs)
    code = REMOTE.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, want)], check=True, timeout=240)
    for path, outputs in want.items():
        assert stored.same(outputs, torch.load(f"{path}.out", weights_only=True)), path


def test_a_masked_model_keeps_its_zeros(tmp_path: Path) -> None:
    model = build("s3")
    inputs = IMAGE[:, :1, :28, :28]
    graph = sc.trace(model, inputs)
    sc.mask_(graph, stored.every_second(graph))
    found = load(save(model, tmp_path / "a.safetensors"))
    assert (found[0].weight == 0).any()
    assert stored.same(stored.outputs(model, inputs), stored.outputs(found, inputs))


def test_a_model_cut_twice_loads_onto_its_first_dense_form(tmp_path: Path) -> None:
    inputs = IMAGE[:, :1, :28, :28]
    small = build("s3", widths=[8, 8, 8])
    for step in (0, 1, 0):  # each cut leaves the other groups as they are
        graph = sc.trace(small, inputs)
        plan = stored.every_second(graph)
        small = sc.compact(graph, dataclasses.replace(plan, keep=plan.keep[step : step + 1]))
    found = load(save(small, tmp_path / "a.safetensors"))
    assert [m.out_channels for m in found.modules() if isinstance(m, nn.Conv2d)] == [2, 4, 8]
    assert stored.same(stored.outputs(small, inputs), stored.outputs(found, inputs))


def test_the_header_keeps_what_it_is_given(tmp_path: Path) -> None:
    model = build("s3")
    graph = sc.trace(model, IMAGE[:, :1, :28, :28])
    plan = stored.every_second(graph)
    proof = Proof((Check("0", "permutation", float("nan"), 1e-5, True),))
    took = (Measurement("latency", 1.5, "ms", 30, float("inf"), "cpu", "median"),)
    path = save(model, tmp_path / "a.safetensors", plan=plan, proof=proof, measurements=took, recipe="ab12",
                extra={"classes": ["zero", "één"], "mean": [0.5]})  # fmt: skip
    header = read_header(path)
    assert (header.plan, header.measurements, header.recipe) == (plan, took, "ab12")
    assert header.proof is not None
    assert header.proof.rows[0].group == "0"
    assert header.proof.rows[0].error != header.proof.rows[0].error  # nan
    assert header.extra == {"classes": ["zero", "één"], "mean": [0.5]}
    assert header.spec == "s3"
    assert header.versions["torch"]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = build("torchvision:resnet18", num_classes=2)
    first, second = (save(model, tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second


class Kinds(nn.Module):
    """A tensor of every kind, shape and layout that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            self.register_buffer(
                str(dtype).replace(".", "_"), torch.linspace(-2, 2, 6).to(dtype).reshape(2, 3)
            )
        for dtype in (
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.uint16,
        ):
            self.register_buffer(str(dtype).replace(".", "_"), torch.arange(4).to(dtype))
        self.complex = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.complex128).conj(), requires_grad=False)
        self.scalar, self.empty = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.zeros(0, 4))
        self.strided = nn.Parameter(torch.randn(6, 4).t()[::2])
        self.special = nn.Parameter(torch.tensor([float("nan"), float("inf"), -0.0]))
        self.whole = nn.Parameter(torch.randn(4))
        self.twin = nn.Parameter(self.whole.data)
        self.part = nn.Parameter(self.whole.data[1:3])
        self.last = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.last.bias.requires_grad_(False)


def test_every_kind_shape_and_layout_survives(tmp_path: Path) -> None:
    model = Kinds()
    path = save(model, tmp_path / "a.safetensors")
    found = load(path, model=Kinds())
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        other = found.get_parameter(name) if isinstance(tensor, nn.Parameter) else found.get_buffer(name)
        assert (other.dtype, other.shape, other.requires_grad) == (
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
        )
        if tensor.numel():
            left, right = tensor.detach().resolve_conj().contiguous(), other.detach().contiguous()
            assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)), name
    assert found.last.weight.is_contiguous(memory_format=torch.channels_last)
    assert not found.last.weight.is_contiguous()
    found.whole.data.zero_()
    assert found.twin.abs().sum() > 0  # memory of its own
    path.write_bytes(b"\0" * path.stat().st_size)
    assert found.scalar.item() == 3.0  # not a window on the file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_file_wins(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build("s3").to(dtype)
    found = load(save(model, tmp_path / "a.safetensors"))
    assert {p.dtype for p in found.parameters()} == {dtype}
    inputs = IMAGE[:, :1, :28, :28].to(dtype)
    assert stored.same(stored.outputs(model, inputs), stored.outputs(found, inputs))


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = stored.Tied()
    model.offset += torch.arange(7.0)
    model.cache = torch.ones(2)
    path = save(model, tmp_path / "a.safetensors")
    assert read_header(path).aliases == {"head.weight": "embed.weight"}
    found = load(path, trust=["stored"])
    assert found.head.weight is found.embed.weight
    assert torch.equal(found.cache, model.cache)
    assert stored.same(stored.outputs(model, TOKENS % 7), stored.outputs(found, TOKENS % 7))
    assert "offset" not in found.state_dict()


def test_ties_follow_the_file_not_the_model(tmp_path: Path) -> None:
    free = stored.Tied()
    free.head.weight = nn.Parameter(free.head.weight.detach() + 1)
    found = load(save(free, tmp_path / "a.safetensors"), model=stored.Tied())
    assert found.head.weight is not found.embed.weight
    assert torch.equal(found.head.weight, free.head.weight)
    assert torch.equal(found.embed.weight, free.embed.weight)
    tied = load(save(stored.Tied(), tmp_path / "b.safetensors"), model=free)
    assert tied.head.weight is tied.embed.weight


def test_recurrent_networks_use_the_loaded_weights(tmp_path: Path) -> None:
    model = nn.LSTM(3, 4)
    found = load(save(model, tmp_path / "a.safetensors"), model=nn.LSTM(3, 4))
    assert stored.same(stored.outputs(model, IMAGE[0, 0, :5, :3]), stored.outputs(found, IMAGE[0, 0, :5, :3]))


def test_the_callers_model_and_random_state_stay_as_they_were(tmp_path: Path) -> None:
    path = save(stored.net(), tmp_path / "a.safetensors")
    mine = stored.net()
    before = copy.deepcopy(mine.state_dict())
    state = torch.random.get_rng_state()
    found = load(path, model=mine)
    load(save(build("s3"), tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"\(6,\) in the file and \(8,\)"):
        load(path, model=stored.net(8))
    assert found is not mine
    assert mine.training
    assert not found.training
    assert all(torch.equal(before[name], value) for name, value in mine.state_dict().items())
    build("s3")
    torch.random.set_rng_state(state)
    load(tmp_path / "b.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_meta_model_gets_its_values_from_the_file(tmp_path: Path) -> None:
    model = stored.net()
    with torch.device("meta"):
        bare = stored.net()
    found = load(save(model, tmp_path / "a.safetensors"), model=bare)
    assert stored.same(stored.outputs(model, IMAGE[0, 0, :2, :4]), stored.outputs(found, IMAGE[0, 0, :2, :4]))


def test_wrapped_models_are_saved_without_their_wrapper(tmp_path: Path) -> None:
    model = stored.net()
    for number, wrapped in enumerate((nn.DataParallel(model), torch.compile(model))):
        found = load(save(wrapped, tmp_path / f"{number}.safetensors"), model=stored.net())
        assert torch.equal(found[0].weight, model[0].weight)


def test_lightly_trained_small_models_train_on(tmp_path: Path) -> None:
    inputs = IMAGE[:, :1, :28, :28]
    found = load(save(stored.halved(build("s3"), inputs), tmp_path / "a.safetensors")).train()
    found(inputs).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in found.parameters())
