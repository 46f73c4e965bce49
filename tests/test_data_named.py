"""CIFAR-100, CelebA and Hugging Face datasets from small stand-ins, and the real packed folders where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from packed import png, write_packed
from pictures import cut_short, picture
from secateur.data import FORMS, SOURCES, known, memory, open_source, split
from secateur.data.augment import AUGMENTATIONS
from secateur.recipe import loads
from secateur.sections import Data
from secateur.types import DataError, RecipeError

REAL = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data")  # beside the checkout


def write_shard(
    path: Path, numbers: range, *, label: str = "label", image: str = "image", mode: str = "RGB", hf: bool = True
) -> None:
    """Write a parquet file as the hub does: ``numbers`` seed the images, labels are ``number % 3``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {
        image: {"_type": "Image"},
        label: {"_type": "ClassLabel", "names": ["x", "y", "z"]},
        "id": {"_type": "Value", "dtype": "int64"},
    }
    table = pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            image: [{"bytes": png(8, mode, n), "path": f"{n}.png"} for n in numbers],
            label: pa.array([n % 3 for n in numbers], pa.int64()),
        }
    )
    about = {"huggingface": json.dumps({"info": {"features": features}})} if hf else None
    pq.write_table(table.replace_schema_metadata(about), path)


def test_a_size_scales_every_source(tmp_path: Path) -> None:
    write_packed(tmp_path / "mnist")
    small = open_source("mnist", str(tmp_path), image_size=14)
    large = open_source("mnist", str(tmp_path))
    means = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert small.images.shape == (80, 1, 14, 14)
    assert (small.images.float() - means).abs().mean() < 40  # noise of deviation 74, smoothed
    assert abs(float(small.images.float().mean() - large.images.float().mean())) < 2
    digits = open_source("digits", image_size=32)
    assert digits.images.shape == (1797, 1, 32, 32)
    assert int(digits.images.max()) == 16
    corner = torch.nn.functional.interpolate(
        open_source("digits").images[:5].float(), (32, 32), mode="bilinear", antialias=True
    )
    assert torch.equal(digits.images[:5], corner.round().byte())


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 6)):
        path = tmp_path / "cifar100" / f"{part}.parquet"
        write_shard(path, range(count), label="fine_label", image="img")
        table = pq.read_table(path)
        pq.write_table(table.append_column("coarse_label", pa.array([0] * count)), path)
    source = SOURCES["cifar100"](str(tmp_path))
    assert source.classes == ("x", "y", "z")
    assert source.labels.tolist() == [n % 3 for n in (*range(12), *range(6))]
    assert source.test_from == 12


def test_cifar100_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    with pytest.raises(DataError, match=r"neither cifar100/train.parquet nor whole torchvision files of CIFAR100"):
        open_source("cifar100", str(tmp_path))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"damaged")  # its checksum is not the published one
    with pytest.raises(DataError, match="not found or corrupted"):
        open_source("cifar100", str(tmp_path))

    def refuse(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(DataError, match="no network"):
        open_source("cifar100", str(tmp_path), download=True)


def write_celeba(root: Path, count: int = 12) -> Path:
    home = root / "celeba"
    header = "Male Smiling Young"
    rows = [f"{i:06}.jpg {1 if i % 2 else -1:2} {1 if i % 3 else -1:2} -1" for i in range(count)]
    for i in range(count):
        picture(home / "img_align_celeba" / f"{i:06}.jpg", seed=i, size=(18, 22))
    (home / "list_attr_celeba.txt").write_text("\n".join([str(count), header, *rows]) + "\n")
    (home / "list_eval_partition.txt").write_text("".join(f"{i:06}.jpg {i % 4 % 3}\n" for i in range(count)))
    return home


def test_celeba_in_torchvisions_layout(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    source = open_source("celeba", str(tmp_path), image_size=10)
    train, test = [i for i in range(12) if i % 4 != 2], [2, 6, 10]
    assert source.labels.tolist() == [int(i % 3 != 0) for i in (*train, *test)]
    assert (source.test_from, source.classes) == (9, ("not Smiling", "Smiling"))
    assert source.images.shape == (12, 3, 10, 10)
    male = open_source("celeba:Male", str(tmp_path / "celeba"), image_size=10)
    assert male.labels.tolist() == [i % 2 for i in (*train, *test)]
    assert male.classes[1] == "Male"
    assert torch.equal(male.images, source.images)


def test_celeba_in_parquet_files(tmp_path: Path) -> None:
    for part, count in (("train", 8), ("test", 4)):
        path = tmp_path / "celeba" / f"{part}.parquet"
        write_shard(path, range(count), hf=False)
        table = pq.read_table(path).drop_columns(["label"])
        pq.write_table(table.append_column("Male", pa.array([n % 2 == 0 for n in range(count)])), path)
    source = open_source("celeba:Male", str(tmp_path))
    assert source.labels.tolist() == [1, 0] * 6
    with pytest.raises(DataError, match="integer column 'Smiling'; found id, image, Male"):
        open_source("celeba", str(tmp_path))


def cut_list(home: Path) -> None:
    path = home / "list_attr_celeba.txt"
    path.write_text(path.read_text()[:-20])


def no_part(home: Path) -> None:
    (home / "list_eval_partition.txt").write_text("000000.jpg 0\n")


def no_image(home: Path) -> None:
    (home / "img_align_celeba" / "000004.jpg").unlink()


def broken_image(home: Path) -> None:
    cut_short(home / "img_align_celeba" / "000005.jpg")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut_list, "list_attr_celeba.txt is truncated or damaged"),
        (no_part, "no part 0, 1 or 2 for 000001.jpg"),
        (no_image, "1 of 12 images cannot be decoded: img_align_celeba/000004.jpg .*No such file"),
        (broken_image, r"img_align_celeba/000005.jpg \(image file is truncated"),
        (lambda home: (home / "list_attr_celeba.txt").unlink(), "neither celeba/train.parquet nor celeba/list_attr"),
        (lambda home: (home / "list_eval_partition.txt").unlink(), "list_eval_partition.txt cannot be read"),
    ],
)
def test_damaged_celeba_is_named(damage: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    damage(write_celeba(tmp_path))
    with pytest.raises(DataError, match=part):
        open_source("celeba", str(tmp_path))


def test_an_unknown_attribute_is_named(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    with pytest.raises(DataError, match="no attribute 'Happy'; it has Male, Smiling, Young"):
        open_source("celeba:Happy", str(tmp_path))


@pytest.mark.parametrize(
    "layout", ["{}.parquet", "data/{}-{:05}-of-00002.parquet", "plain_text/{}-{:05}-of-00002.parquet"]
)
@pytest.mark.parametrize("hf", [True, False])
def test_a_local_folder_of_parquet_files(layout: str, hf: bool, tmp_path: Path) -> None:
    home = tmp_path / "own" / "set"
    if "of" in layout:
        for part in ("train", "validation"):
            write_shard(home / layout.format(part, 0), range(5), hf=hf)
            write_shard(home / layout.format(part, 1), range(5, 8), hf=hf)
    else:
        for part in ("train", "validation"):
            write_shard(home / layout.format(part), range(8), hf=hf)
    for name, root in ((f"hf:{home}", None), ("hf:own/set", str(tmp_path))):
        source = open_source(name, root)
        assert source.images.shape == (16, 3, 8, 8)
        assert source.labels.tolist() == [n % 3 for n in range(8)] * 2
        assert source.test_from == 8
        assert source.classes == (("x", "y", "z") if hf else ("0", "1", "2"))
    assert torch.equal(source.images[:8], source.images[8:])


def test_without_a_held_out_part_the_test_set_is_drawn(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", range(40), mode="L")
    source = open_source(f"hf:{tmp_path}")
    assert source.images.shape == (40, 1, 8, 8)  # all are grey
    data = split(source)
    assert (len(data.train), len(data.validation), len(data.test)) == (29, 3, 8)


def test_one_coloured_image_makes_all_of_them_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", range(4), mode="L")
    write_shard(tmp_path / "test.parquet", range(1), mode="RGB")
    source = open_source(f"hf:{tmp_path}")
    assert source.images.shape == (5, 3, 8, 8)
    assert torch.equal(source.images[0, 0], source.images[0, 2])


def test_broken_rows_are_counted_over_all_files(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000-of-00002.parquet", range(5))
    rows = pa.table(
        {
            "id": [0, 1],
            "image": pa.array([{"bytes": b"no", "path": "/etc/hostname"}, {"bytes": None, "path": str(__file__)}]),
            "label": [0, 1],
        }
    )
    table = pq.read_table(tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(rows.cast(table.schema.remove_metadata()), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"2 of 7 images cannot be decoded: row 5 \(no image file\), row 6"):
        open_source(f"hf:{tmp_path}")


def test_what_a_folder_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.name=imagefolder"):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(DataError, match="there is no folder"):
        open_source(f"hf:{tmp_path / 'none'}")
    write_shard(tmp_path / "train-00000-of-00002.parquet", range(5))
    with pytest.raises(DataError, match="holds 1 of 2 files of 'train'"):
        open_source(f"hf:{tmp_path}")
    write_shard(tmp_path / "train.parquet", range(5))
    write_shard(tmp_path / "a" / "test-0.parquet", range(5))
    write_shard(tmp_path / "b" / "test-0.parquet", range(5))
    with pytest.raises(DataError, match=r"several datasets: .*/a, .*/b; name one"):
        open_source(f"hf:{tmp_path}")
    (tmp_path / "b" / "test-0.parquet").unlink()
    (tmp_path / "a" / "test-0.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"test-0.parquet is truncated or no parquet file"):
        open_source(f"hf:{tmp_path}")
    (tmp_path / "a" / "test-0.parquet").unlink()
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"5 images of 3x8x8 take .* set a smaller data.image_size"):
        open_source(f"hf:{tmp_path}")


def test_a_name_on_the_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"install secateur\[hf\]"):
        open_source("hf:someone/something")


def test_through_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["x", "y", "z"]
    rows = {"image": [{"bytes": png(8, "RGB", n), "path": None} for n in range(6)], "label": [n % 3 for n in range(6)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([4, 1])}).save_to_disk(str(tmp_path / "saved"))
    source = open_source("hf:saved", str(tmp_path))
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 1]
    assert source.classes == ("x", "y", "z")
    assert torch.equal(source.images[6:], source.images[[4, 1]])
    write_shard(tmp_path / "packed" / "train.parquet", range(6))
    assert torch.equal(open_source("hf:packed", str(tmp_path)).images, source.images[:6])
    (next((tmp_path / "saved" / "train").glob("*.arrow"))).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"saved is damaged .* save it again"):
        open_source("hf:saved", str(tmp_path))
    with pytest.raises(DataError, match=r"hf:someone/nothing cannot be loaded .* data.download=true"):
        open_source("hf:someone/nothing", str(tmp_path))


def test_a_name_on_the_hub_comes_from_the_cache_without_the_network(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = {part: str(tmp_path / f"{part}.parquet") for part in ("train", "test")}
    for path in files.values():
        write_shard(Path(path), range(5))
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "parquet").glob("*/*/*/")  # what the cache of a dataset on the hub looks like
    cached = tmp_path / "cache" / "someone___thing" / "plain" / "0.0.0" / made.name
    cached.mkdir(parents=True)
    for path in made.iterdir():
        (cached / path.name.replace("parquet-", "thing-")).write_bytes(path.read_bytes())
    about = (made / "dataset_info.json").read_text()
    about = about.replace('"dataset_name": "parquet"', '"dataset_name": "thing"').replace('"default"', '"plain"')
    (cached / "dataset_info.json").write_text(about)
    for name in ("hf:someone/thing", "hf:someone/thing:plain"):
        source = open_source(name, str(tmp_path / "cache"))
        assert source.labels.tolist() == [0, 1, 2, 0, 1] * 2
        assert source.test_from == 5
    assert not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"hf:someone/thing:other cannot be loaded .*plain"):
        open_source("hf:someone/thing:other", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="a name on the hub is owner/name"):
        open_source("hf:some/where/else", str(tmp_path / "cache"))


def test_names_in_recipes() -> None:
    text = "version: 1\nname: x\ndata: {name: NAME, image_size: 32, augment: flip_crop_cutout}"
    for name in (*SOURCES, "hf:a/b", "hf:/some/where", "celeba:Male"):
        assert loads(text.replace("NAME", name)).data.name == name
        assert known(name)
    for name in ("hf:", "hf", "hg:a", "celeba:"):
        with pytest.raises(RecipeError, match=r"data\.name = .*must be one of .*hf:NAME_OR_FOLDER"):
            loads(text.replace("NAME", name))
        with pytest.raises(DataError, match="there is no dataset"):
            open_source(name)
    with pytest.raises(RecipeError, match=r"data\.image_size = 0"):
        loads(text.replace("NAME", "digits").replace("32", "0"))
    assert set(FORMS) == {"hf", "celeba"}
    assert tuple(AUGMENTATIONS) == Data.model_fields["augment"].annotation.__args__  # pyrefly: ignore


@pytest.mark.parametrize(
    ("name", "size"), [("mnist", 28), ("fashion_mnist", 28), ("cifar10", 32), ("imagenette64", 64)]
)
def test_the_real_packed_folders(name: str, size: int) -> None:
    pytest.importorskip("pyarrow")
    folder = REAL / name
    if not (folder / "test.parquet").is_file():
        pytest.skip("the packed folders are not here")
    from secateur.data.parquet import _table
    from secateur.data.table import joined

    source = joined(name, [_table([folder / "test.parquet"])])  # the smaller part
    assert source.images.shape[1:] == ((1, size, size) if "mnist" in name else (3, size, size))
    assert len(source.classes) == 10
    counts = torch.bincount(source.labels)
    assert int(counts.min()) > 300
    assert 20 < float(source.images.float().mean()) < 140
    assert len(np.unique(source.images[:100].numpy().reshape(100, -1), axis=0)) == 100
