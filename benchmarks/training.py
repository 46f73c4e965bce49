"""Training throughput beside the way of the reference implementations, interleaved in one process.

Usage: python -m benchmarks.training [--rounds 9] [--threads N] [--only wide_resnet s3 resnet20] [--json FILE]

Theirs: eager float32, images of a torchvision-like dataset transformed one by one in a DataLoader (the S4 system:
batch 128, reflected padding, crop, flip, 4 workers; S3: batch 32, no worker).  Ours: the loop of ``secateur run`` with
its defaults, alone, with evidence for Fisher and for both forms of Taylor (of every step, and "sparse": of
as many as a recipe takes by default of a large dataset), compiled, and with batches of 128 where theirs are smaller
("wide": what a recipe may choose; the time is that of as many images as one of their batches).  Images are random
bytes: speed does not depend on them.  Times are wall clock; a round runs every way once, and ratios are taken within a
round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

from secateur import resolve
from secateur.criteria import Criterion, Fisher, Taylor
from secateur.criteria.riding import Riding
from secateur.data import Dataset, Source, split
from secateur.graph.groups import trace
from secateur.models import MODELS
from secateur.recipe import loads
from secateur.session import costs
from secateur.stages import SPARSE
from secateur.train.devices import ALONE
from secateur.train.loop import Cursor, Point, Watch, _train_epoch, _Work
from secateur.train.precision import half_pays

EVIDENCE: dict[str, Criterion] = {"fisher": Fisher(), "taylor": Taylor(), "taylor elementwise": Taylor("elementwise")}
WIDE = 128
RATE = 1e-6  # the weights stay about where they are, so that every way does the same arithmetic
CIFAR = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Lambda(lambda x: F.pad(x[None], (4, 4, 4, 4), mode="reflect")[0]),
        transforms.ToPILImage(),
        transforms.RandomCrop(32),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    ]
)


@dataclass(frozen=True)
class Case:
    """A network with the training of its reference system; ``steps`` in one round."""

    args: dict[str, int]
    shape: tuple[int, int, int]
    recipe: str
    transform: Callable[[Image.Image], torch.Tensor]
    workers: int
    steps: int


SGD = f"{{batch_size: 128, optimizer: sgd, lr: {RATE}, weight_decay: 0.0005, epochs: 100000}}"
ADAM = f"{{batch_size: 32, optimizer: adam, lr: {RATE}, epochs: 100000}}"
CASES = {
    "wide_resnet": Case(
        {"depth": 16, "width": 2}, (3, 32, 32), f"train: {SGD}\ndata: {{augment: flip_crop}}", CIFAR, 4, 4
    ),
    "resnet20": Case({}, (3, 32, 32), f"train: {SGD}\ndata: {{augment: flip_crop}}", CIFAR, 4, 6),
    "s3": Case({}, (1, 28, 28), f"train: {ADAM}", transforms.ToTensor(), 0, 152),  # 38 batches of 128
}


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's datasets give them: an array, turned into a picture, transformed."""

    def __init__(self, images: np.ndarray, labels: list[int], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def made(case: Case, batch: int) -> Dataset:
    """Random images: so many that an epoch has the steps of a round."""
    train = case.steps * batch
    total = train + 2 * 16
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (total, *case.shape), dtype=torch.uint8, generator=drawn)
    source = Source("random", images, torch.randint(0, 10, (total,), generator=drawn), tuple("abcdefghij"), total - 16)
    return split(source, validation=16 / (total - 16), normalize=case.shape[0] == 3)


def network(name: str) -> nn.Module:
    """The network of a case with the same weights each time."""
    torch.manual_seed(0)
    return MODELS[name](**CASES[name].args)


def theirs(name: str, data: Dataset, batch: int) -> Callable[[], None]:
    """Return what runs the steps of a round in the way of the reference system."""
    case, model = CASES[name], network(name)
    images = data.source.images[data.train].permute(0, 2, 3, 1).numpy()
    pictures = Pictures(
        images.squeeze(-1) if images.shape[-1] == 1 else images, data.source.labels.tolist(), case.transform
    )
    kept = {"persistent_workers": True} if case.workers else {}
    loader = torch.utils.data.DataLoader(pictures, batch, shuffle=True, num_workers=case.workers, **kept)
    make: dict[bool, Callable[[], torch.optim.Optimizer]] = {
        True: lambda: torch.optim.Adam(model.parameters(), RATE),
        False: lambda: torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4),
    }
    optimizer, criterion = make[name == "s3"](), nn.CrossEntropyLoss()

    def endless() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()
    model.train()

    def run() -> None:
        for _ in range(case.steps):
            inputs, labels = next(batches)
            loss = criterion(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # both sum it up for printing

    return run


def ours(
    name: str,
    data: Dataset,
    criterion: Criterion | None,
    half: bool,
    compiled: bool = False,
    every: int = 1,
    batch: int | None = None,
) -> Callable[[], None]:
    """Return what runs an epoch of our loop, with evidence for ``criterion``; ``batch``: another than the recipe's."""
    case, model = CASES[name], network(name)
    settings = resolve.training(loads(f"version: 1\nname: x\n{case.recipe}"), 0, half=half)
    settings = replace(settings, compiled=compiled, batch_size=batch or settings.batch_size)
    riding = None
    if criterion is not None:
        riding = Riding(trace(model, data.batch(data.train[:8])[0]), criterion, every=every)
        riding.__enter__()
        settings = replace(settings, riding=riding)
    work = _Work(model, data, settings, Point(), Watch(), ALONE)
    work.laid_out().__enter__()
    epoch = 0

    def run() -> None:
        nonlocal epoch
        if riding is not None:
            work.total = (epoch + 1) * work.per_epoch  # evidence is gathered in the last epoch: let each be that
        _train_epoch(work, Cursor(epoch))
        epoch += 1

    return run


def loading(name: str, data: Dataset) -> Callable[[], None]:
    """Return what makes the inputs of a round: gathered, scaled, augmented."""
    settings = resolve.training(loads(f"version: 1\nname: x\n{CASES[name].recipe}"), 0)
    parts = list(data.train.split(settings.batch_size))

    def run() -> None:
        for inputs, _ in data.stream(parts):
            if settings.augment is not None:
                settings.augment(inputs)

    return run


def measured(name: str, rounds: int) -> dict[str, object]:
    """Return the record of one case, after a round that is not counted."""
    case = CASES[name]
    batch = loads(f"version: 1\nname: x\n{case.recipe}").train.batch_size
    data = made(case, batch)
    graph = trace(network(name), data.batch(data.train[:8])[0])
    half, wide = (half_pays(graph.model, torch.device("cpu"), costs(graph)["macs"] * size) for size in (batch, WIDE))
    ways = {"theirs": theirs(name, data, batch), "ours": ours(name, data, None, half)}
    ways |= {key: ours(name, data, criterion, half) for key, criterion in EVIDENCE.items()}
    if case.steps >= 2 * SPARSE:
        ways |= {f"{key}, sparse": ours(name, data, chosen, half, every=SPARSE) for key, chosen in EVIDENCE.items()}
    ways["compiled"] = ours(name, data, None, half, compiled=True)
    ways["compiled, fisher"] = ours(name, data, Fisher(), half, compiled=True)
    if batch < WIDE:
        ways["wide"] = ours(name, data, None, wide, batch=WIDE)
    ways["loading"] = loading(name, data)
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for number in range(rounds + 1):
        for key, way in ways.items():
            begin = time.perf_counter()
            way()
            if number:
                seconds[key].append((time.perf_counter() - begin) / case.steps)
    row: dict[str, object] = {"model": name, "batch": batch, "bfloat16": half, "steps_per_round": case.steps}
    row["ms_per_step"] = {key: spread([1e3 * s for s in values]) for key, values in seconds.items()}
    row["images_per_s"] = {key: batch / statistics.median(seconds[key]) for key in ("theirs", "ours")}
    row["times_faster"] = spread(ratios(seconds["theirs"], seconds["ours"]))
    gathering = [key for key in ways if key.split(",")[0] in EVIDENCE]
    row["evidence_cost"] = {k: spread([r - 1 for r in ratios(seconds[k], seconds["ours"])]) for k in gathering}
    row["times_faster_compiled"] = spread(ratios(seconds["theirs"], seconds["compiled"]))
    row["fisher_cost_compiled"] = spread([r - 1 for r in ratios(seconds["compiled, fisher"], seconds["compiled"])])
    if "wide" in ways:
        row["times_faster_wide"] = spread(ratios(seconds["theirs"], seconds["wide"]))
    row["loading_share"] = spread(ratios(seconds["loading"], seconds["ours"]))
    return row


def ratios(one: list[float], two: list[float]) -> list[float]:
    """One over two, round by round."""
    return [a / b for a, b in zip(one, two, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Run, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of the CPU kernels, both sides (default: torch's)")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for name in options.only:
        row = measured(name, options.rounds)
        rows.append(row)
        ms, cost = row["ms_per_step"], row["evidence_cost"]
        print(f"{name}, batch {row['batch']}, {'bfloat16' if row['bfloat16'] else 'float32'}, {options.rounds} rounds")
        for key, value in ms.items():
            print(f"  {key:20s} {value['median']:9.3f} ms per step  ({value['min']:.3f} to {value['max']:.3f})")
        faster, share = row["times_faster"], row["loading_share"]
        print(f"  {faster['median']:.2f} times their speed ({faster['min']:.2f} to {faster['max']:.2f}), ", end="")
        wide = f", batches of {WIDE} {row['times_faster_wide']['median']:.2f}" if "times_faster_wide" in row else ""
        print(f"with compile: true {row['times_faster_compiled']['median']:.2f}{wide}")
        for key, value in cost.items():
            print(f"  evidence, {key}: {value['median']:+.1%} of a step ({value['min']:+.1%} to {value['max']:+.1%})")
        print(f"  data: {share['median']:.1%} of a step ({share['min']:.1%} to {share['max']:.1%})", flush=True)
    if options.json:
        record = {
            "n": options.rounds,
            "how": "wall clock per step, all ways interleaved in one process; ratios within a round; median, min, max",
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
