"""Image folders: how they are read, cached, streamed, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pictures import cut_short, picture, write_folder
from secateur.data import Source, dataset, memory, open_source, split
from secateur.data import decode as decoding
from secateur.data import files as filing
from secateur.data.streamed import Held, Streamed
from secateur.types import DataError


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def slow(paths: list[Path], size: int) -> torch.Tensor:
    """The obvious way: open, cut the middle square, scale, one after the other."""
    images = [ImageOps.fit(Image.open(p).convert("RGB"), (size, size), Image.Resampling.BILINEAR) for p in paths]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filing, "CACHE_FROM", 1)
    monkeypatch.setattr(filing, "CHUNK", 3)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)


@pytest.mark.parametrize("held", ["val", "validation", "test"])
def test_the_layout_of_imagenet(held: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 4, held: 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    picture(tmp_path / "train" / "dog" / "deeper" / "x.PNG", seed=7)
    picture(tmp_path / "train" / "dog" / "._0.jpg")
    source = open_source("imagefolder", str(tmp_path), image_size=8)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0] * 4 + [1] * 5 + [0] * 2 + [1] * 2
    assert source.test_from == 9
    paths = [tmp_path / "train" / "cat" / f"{i}.jpg" for i in range(4)]
    assert torch.equal(source.images[:4], slow(paths, 8))
    assert torch.equal(source.images[9:11], slow([tmp_path / held / "cat" / f"{i}.jpg" for i in range(2)], 8))
    assert everything(tmp_path).count(filing.CACHE) == 0


def test_class_folders_alone_are_split_and_test_goes_before_val(tmp_path: Path) -> None:
    plain = open_source("imagefolder", str(write_folder(tmp_path / "plain", {"": 9})), image_size=6)
    assert plain.test_from is None
    data = split(plain, validation=0.25, test=0.25)
    parts = [set(data.part(name).tolist()) for name in ("train", "validation", "test")]
    assert set.union(*parts) == set(range(18))
    assert sum(map(len, parts)) == 18
    both = open_source(
        "imagefolder", str(write_folder(tmp_path / "both", {"train": 3, "val": 2, "test": 1})), image_size=6
    )
    assert len(both.images) == 8  # 6 of train, 2 of test: val is left alone


def test_images_keep_their_size_when_they_share_one(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "train" / "a" / f"{i}.png", seed=i, size=(11, 7))
    source = open_source("imagefolder", str(tmp_path))
    assert source.images.shape == (3, 3, 7, 11)
    picture(tmp_path / "train" / "a" / "9.png", size=(7, 11))
    with pytest.raises(DataError, match=r"1 of 4 images .*a/9.png \(7x11 pixels, others have 11x7.*data.image_size"):
        open_source("imagefolder", str(tmp_path))


def test_large_jpegs_are_decoded_small_and_turned_as_the_camera_says(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.jpg", seed=3, size=(400, 300))
    exact = slow([path], 16)[0].int()
    assert 0 < (torch.tensor(decoding.pixels(str(path), "RGB", 16)).int() - exact).abs().float().mean() < 1
    turned = tmp_path / "b.jpg"
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.save(turned, exif=exif, quality=95)
        with Image.open(turned) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(decoding.pixels(str(turned), "RGB").transpose(1, 2, 0), upright)
        small = np.asarray(Image.fromarray(upright).resize((16, 16), box=middle(upright)))
        found = decoding.pixels(str(turned), "RGB", 16).transpose(1, 2, 0)
        assert np.abs(found.astype(int) - small).mean() < 3, orientation


def middle(pixels: np.ndarray) -> tuple[float, float, float, float]:
    height, width, _ = pixels.shape
    left, top = max(0, width - height) / 2, max(0, height - width) / 2
    return left, top, width - left, height - top


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(DataError, match=r"pixels of kind I;16"):
        open_source("imagefolder", str(tmp_path))


def broken_train(root: Path) -> None:
    (root / "train").rename(root / "Train")


def lonely_val(root: Path) -> None:
    (root / "val" / "bird").mkdir()


def empty_class(root: Path) -> None:
    (root / "train" / "bird").mkdir()


def flat_val(root: Path) -> None:
    for path in sorted((root / "val").rglob("*.jpg")):
        path.unlink()
    for path in (root / "val").iterdir():
        path.rmdir()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (broken_train, "holds val but no train"),
        (lonely_val, "val has classes that .*train lacks: bird"),
        (empty_class, "class folders without images: train/bird; fill or remove"),
        (flat_val, "val holds no class folders"),
    ],
)
def test_a_wrong_layout_is_named(damage: object, part: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 2, "val": 1})
    damage(tmp_path)  # pyrefly: ignore
    with pytest.raises(DataError, match=part):
        open_source("imagefolder", str(tmp_path), image_size=8)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        open_source("imagefolder")
    with pytest.raises(DataError, match="is not a folder"):
        open_source("imagefolder", str(tmp_path / "none"), download=True)
    with pytest.raises(DataError, match="neither train nor class folders"):
        open_source("imagefolder", str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train holds no class folders"):
        open_source("imagefolder", str(tmp_path))


@pytest.mark.parametrize("cache", [False, True])
def test_broken_images_are_counted_and_named_and_nothing_is_left(
    cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filing, "CACHE_FROM", 1 if cache else 10**9)
    monkeypatch.setattr(filing, "CHUNK", 3)
    write_folder(tmp_path, {"train": 9, "val": 2})
    for i in range(7):
        cut_short(tmp_path / "train" / "dog" / f"{i}.jpg")
    (tmp_path / "train" / "cat" / "3.jpg").write_text("not an image")
    before = everything(tmp_path)
    with pytest.raises(DataError) as caught:
        open_source("imagefolder", str(tmp_path), image_size=8)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: 8 of 22 images cannot be decoded: train/cat/3.jpg (no image file), ")
    assert "train/dog/0.jpg (image file is truncated" in message
    assert message.endswith(" and 3 more; fetch them again or remove them.")
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("cached")
def test_decoded_images_are_kept_beside_and_renewed_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"train": 4, "val": 2})
    first = open_source("imagefolder", str(tmp_path), image_size=8)
    (file,) = (tmp_path / filing.CACHE).iterdir()
    calls: list[int] = []
    plain = filing.fill
    monkeypatch.setattr(filing, "fill", lambda out, *a, **k: (calls.append(len(out)), plain(out, *a, **k))[1])
    again = open_source("imagefolder", str(tmp_path), image_size=8)
    assert torch.equal(first.images, again.images)
    assert calls == []  # nothing was decoded
    again.images[0] = 0  # stays in memory
    assert torch.equal(open_source("imagefolder", str(tmp_path), image_size=8).images, first.images)
    changed = picture(tmp_path / "train" / "cat" / "0.jpg", seed=77)
    new = open_source("imagefolder", str(tmp_path), image_size=8)
    assert torch.equal(new.images[0], slow([changed], 8)[0])
    (renewed,) = (tmp_path / filing.CACHE).iterdir()
    assert renewed != file
    kept = new.images[:].clone()
    os.utime(changed, ns=(1, 1))  # the same size, written at another time
    open_source("imagefolder", str(tmp_path), image_size=8)
    (later,) = (tmp_path / filing.CACHE).iterdir()
    assert later != renewed
    np.save(later, np.zeros((1, 3, 8, 8), dtype=np.uint8))  # nor is a foreign one
    assert torch.equal(open_source("imagefolder", str(tmp_path), image_size=8).images, kept)
    later.write_bytes(later.read_bytes()[:-9])  # a cut file is not used
    assert torch.equal(open_source("imagefolder", str(tmp_path), image_size=8).images, kept)


@pytest.mark.usefixtures("cached")
def test_the_memory_will_do_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"train": 4, "val": 2})
    before = everything(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    source = open_source("imagefolder", str(tmp_path), image_size=8)
    assert torch.equal(source.images[:4], slow([tmp_path / "train" / "cat" / f"{i}.jpg" for i in range(4)], 8))
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("workers", [0, 2])
def test_what_does_not_fit_is_streamed_and_is_the_same(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"train": 9, "val": 3})
    data = split(with_workers(open_source("imagefolder", str(tmp_path), image_size=8), workers), normalize=True)
    assert isinstance(data.source.images, Streamed)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    whole = split(open_source("imagefolder", str(tmp_path), image_size=8), normalize=True)
    assert isinstance(whole.source.images, torch.Tensor)
    assert (data.mean, data.std, data.shape) == (whole.mean, whole.std, whole.shape)
    state = torch.get_rng_state()
    for part in ("train", "validation", "test"):
        assert torch.equal(data.part(part), whole.part(part))
        for ours, theirs in zip(data.batches(part, 4), whole.batches(part, 4), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing
    some = torch.tensor([5, 0, 23])
    assert all(map(torch.equal, data.batch(some), whole.batch(some)))
    assert data.to(torch.device("cpu")).source.images.device.type == "cpu"


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_of_a_stream_is_named(workers: int, tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 6, "val": 2})
    data = split(with_workers(open_source("imagefolder", str(tmp_path), image_size=8), workers))
    path = cut_short(tmp_path / "val" / "dog" / "1.jpg")
    for read in (lambda: list(data.batches("test", 3)), lambda: data.batch(data.test)):
        with pytest.raises(DataError, match=rf"1 of \d images cannot be decoded: {path} \(image file is truncated"):
            read()


def with_workers(source: Source, workers: int) -> Source:
    from dataclasses import replace

    assert isinstance(source.images, Streamed)
    reader = replace(source.images.reader, workers=workers)  # pyrefly: ignore
    return replace(source, images=replace(source.images, reader=reader))


def test_images_that_the_device_has_no_room_for_come_in_batches() -> None:
    source = open_source("digits")
    assert isinstance(source.images, torch.Tensor)
    held = Source(
        "digits",
        Streamed(Held(source.images), len(source.images), (1, 8, 8)),
        source.labels,
        source.classes,
        white=source.white,
    )
    one, two = split(held, normalize=True), split(source, normalize=True)
    assert (one.mean, one.std) == (two.mean, two.std)
    for ours, theirs in zip(one.batches("test", 100), two.batches("test", 100), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_dataset_moves_to_a_small_device_without_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = split(open_source("digits"))
    assert isinstance(data.to(torch.device("cpu")).source.images, torch.Tensor)
    monkeypatch.setattr(dataset, "_room", lambda images, device: False)
    moved = data.to(torch.device("cpu"))
    assert isinstance(moved.source.images, Streamed)
    assert moved.shape == data.shape
    assert all(map(torch.equal, moved.batch(data.test), data.batch(data.test)))


def test_the_threads_of_fill_agree_with_one(tmp_path: Path) -> None:
    paths = [str(picture(tmp_path / f"{i}.jpg", seed=i)) for i in range(150)]
    cut_short(Path(paths[3]))
    cut_short(Path(paths[140]))
    outs = [np.zeros((150, 3, 5, 5), dtype=np.uint8) for _ in range(2)]
    found = [decoding.fill(out, paths, "RGB", resize=True, threads=n) for out, n in zip(outs, (1, 4), strict=True)]
    assert found[0] == found[1]
    assert [i for i, _ in found[0]] == [3, 140]
    assert np.array_equal(*outs)
    assert outs[0][149].any()
