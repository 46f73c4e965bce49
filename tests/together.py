"""What several processes compute together: the cases, run by tests/test_distributed.py alone and under torchrun."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.criteria import Fisher, Taylor
from secateur.data import SOURCES, Dataset, split
from secateur.data.augment import AUGMENTATIONS
from secateur.models import MODELS
from secateur.train.devices import Team, TeamError, joined, quality
from secateur.train.distil import taught
from secateur.train.loop import Epoch, Settings, Watch, fit
from secateur.train.optimizers import OPTIMIZERS

BATCH = 32


def data(limit: int = 167) -> Dataset:
    """Digits; the last of six batches has seven images."""
    return split(SOURCES["digits"](), limit=limit)


def plan(name: str = "adam", **options: object) -> Settings:
    return replace(Settings(2, BATCH, lambda p: OPTIMIZERS[name](p, 0.003, 1e-4, 0.9), seed=3), **options)


def plain() -> nn.Module:
    return MODELS["s3"](classes=10, in_channels=1, image_size=8)


class Function(nn.Module):
    """Batch norm as a function, without running statistics or weights, then without images' positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.spare = nn.Conv2d(1, 6, 3), nn.Linear(6, 10), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.batch_norm(self.conv(x), None, None, training=True))
        return self.fc(F.batch_norm(x.mean((2, 3)), None, None, training=True))


def normed() -> nn.Module:
    """No bias before a batch norm: Adam would blow up the rounding of a gradient that is zero but for rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 16, bias=False), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def small() -> nn.Module:
    """Statistics over many positions, so that one image is enough for them."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], Settings]] = {
    "plain": (plain, plan()),
    "normed": (normed, plan()),
    "function": (Function, plan("sgd")),
    "resnet": (lambda: MODELS["resnet20"](classes=10, in_channels=1), plan("sgd", epochs=1, clip_norm=1.0)),
    "blended": (normed, plan(mixup=0.4, ema=0.9, augment=AUGMENTATIONS["flip_resized_crop_light"])),
    "shifted": (normed, plan(augment=AUGMENTATIONS["flip_crop_cutout"], channels_last=True)),
    "half": (normed, plan("sgd", epochs=1, autocast=torch.bfloat16)),
    "three": (normed, plan("sgd", batch_size=3, steps=9)),
    "one": (small, plan("sgd", batch_size=1, steps=9, mixup=0.4)),  # leaves the second process without an image
    "few steps": (plain, plan("rmsprop", steps=8)),
}


def trained(team: Team, name: str, limit: int = 167) -> tuple[nn.Module, list[Epoch]]:
    make, settings = CASES[name]
    torch.manual_seed(1)
    model, rows = make(), []
    fit(model, data(limit), settings, watch=Watch(epoch=rows.append), team=team)
    return model, rows


def distilled(team: Team) -> nn.Module:
    torch.manual_seed(2)
    student, teacher, digits = normed(), plain(), data()
    with taught(student, teacher, digits.batch(digits.train[:2])[0], features=100.0, whole=team.whole) as guide:
        fit(student, digits, plan(epochs=1, guide=guide, label_smoothing=0.1), team=team)
    return student


def scored(model: nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    """Scores of two criteria, and a plan, of a trained model."""
    digits = data()
    graph = sc.trace(model, digits.batch(digits.train[:4])[0])
    found, text = {}, ""
    for criterion in (Taylor(), Fisher()):
        scores = sc.score(graph, criterion, (digits.batch(part) for part in digits.train.split(64)))
        found |= {f"{criterion.name} {group}": torch.as_tensor(values) for group, values in scores.values.items()}
        text += sc.allocate(scores, sc.Budget(units=0.5)).to_json()
    return found, text


def everything(team: Team) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """All tensors and figures that must not depend on the number of processes."""
    tensors: dict[str, torch.Tensor] = {}
    figures: dict[str, object] = {}
    for name in CASES:
        model, rows = trained(team, name)
        tensors |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
        figures[name] = [{k: v for k, v in row.record().items() if k != "seconds"} for row in rows]
        if name in ("plain", "normed"):
            values, figures[f"{name} plan"] = scored(model)
            tensors |= {f"score {name}/{key}": value for key, value in values.items()}
        if name == "plain":
            figures["quality"] = [asdict(quality(model, data(), "test", size, team)) for size in (50, 300, 1000)]
    tensors |= {f"distilled/{key}": value for key, value in distilled(team).state_dict().items()}
    return tensors, figures


def refusals(team: Team) -> list[str]:
    """Messages of what must fail in every process."""
    told = []
    for text, stop in ((f"{min(team.rank, 1)}", False), ("same", True)):
        try:
            team.same(text, "the number")
            team.decided(lambda stop=stop: 1 / 0 if stop else "")
        except (TeamError, ZeroDivisionError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined() as team:
        tensors, figures = everything(team)
        told = refusals(team)
        own = Path(folder) / f"only-{team.rank}"
        own.write_text("x" * 5000)
        with team.copy_of(folder / "only-0") as path, team.copy_of(folder / "nothing") as none:
            copied = [len(path.read_text()), none.exists()]
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        parameters[0].grad = torch.full((2,), float(team.rank + 1))
        if team.lead:
            parameters[1].grad = torch.ones(2)
        team.add_gradients(parameters)
        grads = [None if p.grad is None else p.grad.tolist() for p in parameters]
    left = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / f"{team.rank}.safetensors")
    report = {"figures": figures, "told": told, "copied": copied, "grads": grads, "size": team.size, "left": left}
    (folder / f"{team.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
