"""Damaged, foreign and hostile checkpoints: one clear error, no code run, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import stored
from secateur import checkpoint
from secateur.checkpoint import load, read_header, save
from secateur.models.build import build
from secateur.types import CheckpointError

IMAGE = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(stored.halved(build("s3", widths=[8, 8, 8]), IMAGE), tmp_path / "a.safetensors")


def refused(path: Path, match: str, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, **options)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 5_000, -1])
def test_a_file_cut_short(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "cut short|incomplete|not a readable", model=stored.net())


def test_files_of_other_kinds(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "not a file")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x80\x02}q\x00." * 100)
    refused(path, "no safetensors file")
    torch.save(stored.net().state_dict(), path)
    refused(path, "no safetensors file")
    save_file(stored.net().state_dict(), path)
    refused(path, "not of secateur")
    save_file(stored.net().state_dict(), path, metadata={"secateur": "[" * 100_000})
    refused(path, "cannot be read")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}" * 50)
    refused(path, "no safetensors file")
    path.chmod(0)
    if os.getuid():
        refused(path, "Permission")


def test_every_flipped_byte_of_the_values_is_found(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in (start, start + 37, len(whole) - 1):
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(broken)
        assert read_header(path).spec == "s3"
        refused(path, "tensors were changed")


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (lambda h: h.update(format=2), "install a newer"),
    "unknown field": (lambda h: h.update(code="import os"), "code"),
    "type of a field": (lambda h: h.update(kwargs=[1]), "kwargs"),
    "no spec": (lambda h: h.update(spec=None), "pass the dense model as model="),
    "unknown name": (lambda h: h.update(spec="s33"), "no model is called 's33'; nearest: s3"),
    "other model": (lambda h: h.update(spec="mlp", kwargs={}), "does not fit|file has"),
    "other widths": (lambda h: h["kwargs"].update(widths=[8, 8, 2]), "cuts|surgery"),
    "misspelt option": (lambda h: h["kwargs"].update(width=3), "unexpected keyword"),
    "endless width": (lambda h: h["kwargs"].update(widths=[8, 8, 10**9]), "far more than the file"),
    "endless depth": (lambda h: h["kwargs"].update(widths=[1] * 300_000), "far more than the file"),
    "no surgery": (lambda h: h.update(surgery=None), "in the file and"),
    "empty surgery": (lambda h: h.update(surgery={}), "surgery"),
    "surgery on nothing": (lambda h: h["surgery"]["shapes"].append(["9.weight", [1]]), "no such tensor"),
    "wider surgery": (lambda h: h["surgery"]["shapes"].append(["0.bias", [10**12]]), "cuts '0.bias'"),
    "surgery on a method": (
        lambda h: h["surgery"]["attributes"].append(["0", "forward", 1, False]),
        "forward",
    ),
    "surgery on __class__": (
        lambda h: h["surgery"]["attributes"].append(["0", "__class__", 1, False]),
        "__class__",
    ),
    "tie to nothing": (lambda h: h["aliases"].update({"0.weight": "nowhere"}), "does not hold"),
    "extra name": (lambda h: h["aliases"].update({"nowhere": "0.weight"}), "the file has, but not the model"),
    "pairs that are none": (lambda h: h.update(pairs=["0.weight"]), "pairs of reals|complex"),
    "plan of nonsense": (lambda h: h.update(plan={"keep": 3}), "plan"),
    "measurement of nothing": (lambda h: h.update(measurements=[{"name": "x"}]), "measurements.0"),
    "another look": (lambda h: h["modules"].update({"0": "Conv1d()"}), r"Conv1d\(\) in the file"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_edited_with_skill(path: Path, name: str) -> None:
    edit, match = EDITS[name]
    refused(stored.edited(path, edit), match)


def test_a_header_edited_without_skill(path: Path) -> None:
    stored.edited(path, lambda h: h.update(recipe="other"), sign=False)
    with pytest.raises(CheckpointError, match="header was changed"):
        read_header(path)


@pytest.mark.parametrize(
    "spec", ["os:system", "subprocess:run", "stored:net", "posix:abort", "evil_module:f"]
)
def test_nothing_is_imported_without_trust(path: Path, spec: str) -> None:
    message = refused(stored.edited(path, lambda h: h.update(spec=spec, kwargs={})), "trust=")
    assert repr(spec.partition(":")[0]) in message
    assert "evil_module" not in sys.modules


def test_trust_is_by_whole_names(tmp_path: Path) -> None:
    path = save(build("stored:net", width=8), tmp_path / "a.safetensors")
    refused(path, "trust=", trust=["store", "stored.more", ""])
    with pytest.raises(CheckpointError, match="trust takes a list"):
        load(path, trust="stored")
    assert load(path, trust=["stored"])[0].out_features == 8
    assert load(path, model=stored.net(8))[0].out_features == 8


@pytest.mark.parametrize(
    ("spec", "kwargs"),
    [
        ("timm:hf-hub:someone/model", {}),
        ("timm:local-dir:/tmp/x", {}),
        ("timm:resnet18", {"checkpoint_path": "/tmp/x.pth"}),
        ("timm:resnet18", {"pretrained": True}),
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("transformers:BertModel", {"config": {"attn_implementation": "someone/kernel"}}),
        ("transformers:BertModel", {"config": {"_attn_implementation_internal": "someone/kernel"}}),
        ("transformers:DetrModel", {"config": {"use_pretrained_backbone": True}}),
        ("transformers:AutoModel", {}),
        ("transformers:pipeline", {"config": {}}),
    ],
)
def test_a_file_cannot_make_the_libraries_fetch_or_run_anything(path: Path, spec: str, kwargs: dict) -> None:
    refused(stored.edited(path, lambda h: h.update(spec=spec, kwargs=kwargs)), "fetch|no model")


def test_a_model_changed_after_it_was_built_is_noticed(tmp_path: Path) -> None:
    model = build("stored:net")
    model[1] = nn.GELU()  # no tensor tells this
    path = save(model, tmp_path / "a.safetensors")
    refused(path, r"GELU\(approximate='none'\) in the file, ReLU\(\) as built", trust=["stored"])
    assert isinstance(load(path, model=model)[1], nn.GELU)
    stored.edited(path, lambda h: h["versions"].update(torch="1.0"))
    with pytest.warns(UserWarning, match="saved with"):
        load(path, trust=["stored"])


def test_a_model_of_another_shape_or_kind(path: Path, tmp_path: Path) -> None:
    refused(path, "surgery does not fit", model=stored.net())
    plain = save(stored.net(), tmp_path / "b.safetensors")
    refused(plain, "first '2.bias'", model=nn.Sequential(nn.Linear(4, 6)))
    refused(
        plain, "the model has, but the file does not", model=nn.Sequential(*stored.net(), nn.Linear(3, 3))
    )
    whole = nn.Sequential(*stored.net())
    whole[0].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int32), requires_grad=False)
    refused(plain, "torch.float32 in the file and torch.int32", model=whole)
    refused(plain, "no shape yet", model=nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(CheckpointError, match="device 'nowhere'"):
        load(plain, model=stored.net(), device="nowhere")


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    odd = nn.Linear(2, 2)
    odd.register_buffer("table", torch.empty(2, dtype=torch.int1))
    with pytest.raises(CheckpointError, match=r"'table' is a Tensor \(torch.strided, torch.int1"):
        save(odd, path)
    stateful = nn.Linear(2, 2)
    stateful.__class__ = type("Stateful", (nn.Linear,), {"get_extra_state": lambda self: {"a": 1}})
    cases = [
        (meta, "meta device"),
        (sparse, "plain dense"),
        (stateful, "extra state"),
        (nn.LazyLinear(2), "no shape"),
    ]
    for model, match in cases:
        with pytest.raises(CheckpointError, match=match):
            save(model, path)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(nn.Linear(2, 2), path, extra={"a": object()})
    with pytest.raises(CheckpointError, match="recipe"):
        save(nn.Linear(2, 2), path, recipe=3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"[Ii]s the folder there"):
        save(nn.Linear(2, 2), tmp_path / "no" / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint if step == "save_file" else os, step, full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(stored.net(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupt_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save(stored.net(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from torch import nn; from secateur.checkpoint import save\n"
        "from secateur.types import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: save(nn.Linear(300, 300), sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "was not saved" in found.stdout, found
    assert not list(tmp_path.iterdir())


def test_reading_the_header_reads_no_tensors(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_header(path)
    assert json.loads(header.to_text())["surgery"]["shapes"]
