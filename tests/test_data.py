"""Datasets: what is read, how it is split, and what is refused."""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from packed import png, write_packed
from secateur.data import SOURCES, Source, split
from secateur.data.augment import crop, flip
from secateur.types import DataError


def test_digits_are_the_uci_digits() -> None:
    source = SOURCES["digits"]()
    assert source.images.shape == (1797, 1, 8, 8)
    assert torch.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(source.images.max()) == 16
    raw = source.images.numpy().tobytes() + source.labels.to(torch.uint8).numpy().tobytes()
    notice = resources.files("secateur.data").joinpath("digits.txt").read_text()
    assert hashlib.sha256(raw).hexdigest() in notice
    assert "CC BY 4.0" in notice


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("test_from", [None, 60])
def test_sets_are_disjoint_and_cover_everything(seed: int, test_from: int | None) -> None:
    images = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
    data = split(Source("x", images, torch.zeros(100).long(), ("a",), test_from), seed=seed, validation=0.25)
    parts = [set(part.tolist()) for part in (data.train, data.validation, data.test)]
    assert set.union(*parts) == set(range(100))
    assert sum(map(len, parts)) == 100
    if test_from is not None:
        assert parts[2] == set(range(60, 100))


def test_the_test_set_is_the_same_for_every_seed_and_the_validation_set_is_not() -> None:
    one, two, again = (split(SOURCES["digits"](), seed=seed) for seed in (0, 1, 0))
    assert torch.equal(one.test, two.test)
    assert not torch.equal(one.validation, two.validation)
    assert torch.equal(one.train, again.train)


def test_normalisation_is_of_the_training_images_alone() -> None:
    source = SOURCES["digits"]()
    data = split(source, normalize=True, limit=500)
    inputs, _ = data.batch(data.train)
    assert len(inputs) == 500
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(inputs.std(correction=0)) == pytest.approx(1, abs=1e-5)
    plain, labels = split(source).batch(torch.tensor([5]))
    assert torch.equal(plain[0], source.images[5] / 16)
    assert labels.tolist() == [source.labels[5]]


def test_batches_run_over_a_part_in_order() -> None:
    data = split(SOURCES["digits"]())
    labels = torch.cat([labels for _, labels in data.batches("test", 100)])
    assert torch.equal(labels, data.source.labels[data.test])


def test_an_empty_set_is_refused() -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="validation set is empty"):
        split(Source("x", images, torch.zeros(3).long(), ("a",)), validation=0.01, test=0.4)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1], [0, 1]])
def test_labels_must_fit(labels: list[int]) -> None:
    with pytest.raises(DataError, match="label"):
        Source("x", torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), ("a", "b"))


@pytest.mark.parametrize(
    ("name", "size", "mode"), [("fashion_mnist", 28, "L"), ("mnist", 28, "L"), ("cifar10", 32, "RGB")]
)
def test_packed_folders(name: str, size: int, mode: str, tmp_path: Path) -> None:
    write_packed(tmp_path / name, size=size, mode=mode)
    for root in (tmp_path, tmp_path / name):
        source = SOURCES[name](str(root))
        assert source.images.shape == (80, 3 if mode == "RGB" else 1, size, size)
        assert source.test_from == 60
        assert source.classes[3] == "class 3"
    from io import BytesIO

    from PIL import Image

    first = np.asarray(Image.open(BytesIO(png(size, mode, 0))))
    assert np.array_equal(source.images[0].permute(1, 2, 0).numpy().squeeze(), first)
    assert torch.equal(source.images[60], source.images[0])  # the test part starts with the same seed


def damaged(folder: Path, how: str) -> None:
    path = folder / "test.parquet"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "foreign":
        path.write_text("hello")
    elif how == "columns":
        pq.write_table(pa.table({"picture": [1], "label": [1]}), path)
    elif how == "labels":
        pq.write_table(pa.table({"image": [{"bytes": png(28, "L", 0)}], "label": ["cat"]}), path)
    elif how == "floats":
        pq.write_table(pa.table({"image": [{"bytes": png(28, "L", 0)}], "label": [1.5]}), path)
    elif how == "image":
        pq.write_table(pa.table({"image": [{"bytes": png(28, "L", 0)[:99]}], "label": [1]}), path)
    elif how == "no image":
        pq.write_table(
            pa.table({"image": pa.array([{"bytes": None}], pa.struct([("bytes", pa.binary())])), "label": [1]}),
            path,
        )
    elif how == "size":
        pq.write_table(pa.table({"image": [{"bytes": png(9, "L", 0)}], "label": [1]}), path)
    elif how == "empty":
        pq.write_table(pq.read_table(path).slice(0, 0), path)


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "missing"),
        ("truncated", "truncated"),
        ("foreign", "no parquet file"),
        ("columns", "needs a column 'image'"),
        ("labels", "integer column 'label'"),
        ("floats", "integer column 'label'"),
        ("image", r"1 of 1 images cannot be decoded: row 0 \(image file is truncated\)"),
        ("no image", r"row 0 \(no image file\)"),
        ("size", "sizes must agree"),
        ("empty", "holds no images"),
    ],
)
def test_a_damaged_folder_is_named(how: str, part: str, tmp_path: Path) -> None:
    write_packed(tmp_path / "mnist")
    damaged(tmp_path / "mnist", how)
    with pytest.raises(DataError, match=part) as caught:
        SOURCES["mnist"](str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        SOURCES["mnist"]()
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "no"))):
        SOURCES["mnist"](str(tmp_path / "no"))
    with pytest.raises(DataError, match="download=true"):
        SOURCES["mnist"](str(tmp_path))


def test_torchvision_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    class Fake:
        classes = ("a", "b")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            self.data = np.full((4 if train else 2, 32, 32, 3), 7 if train else 9, dtype=np.uint8)
            self.targets = [0, 1] * (2 if train else 1)

        def __len__(self) -> int:
            return len(self.data)

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    source = SOURCES["cifar10"](str(tmp_path))
    assert source.images.shape == (6, 3, 32, 32)
    assert source.test_from == 4
    assert int(source.images[5].max()) == 9
    small = SOURCES["cifar10"](str(tmp_path), False, 16)
    assert small.images.shape == (6, 3, 16, 16)
    assert set(small.images.flatten().tolist()) == {7, 9}


def test_each_image_of_a_batch_is_augmented_by_its_own_draw() -> None:
    images = torch.rand(1, 3, 8, 8).expand(64, 3, 8, 8)
    mirrored = (flip(images) == images[0].flip(-1)).flatten(1).all(1)
    assert 0 < int(mirrored.sum()) < 64
    moved = crop(images, 2)
    assert moved.shape == images.shape
    assert len({image.numpy().tobytes() for image in moved}) > 8
    padded = torch.nn.functional.pad(images[:1], (2,) * 4, mode="reflect")
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
    assert all(any(torch.equal(image, window) for window in windows) for image in moved)
