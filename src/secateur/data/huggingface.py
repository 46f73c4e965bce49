"""Any image classification dataset of the Hugging Face hub, or a local folder of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from secateur.data import parquet
from secateur.data.dataset import Source
from secateur.data.fetch import folder_of
from secateur.data.table import Table, joined
from secateur.types import DataError

ROWS = 1024  # rows that are read and decoded together


def huggingface(name: str, root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """The dataset ``hf:NAME``: an image column and an integer label, grey only when every image is.

    ``name`` is a folder (itself or below ``root``): parquet files are read without further packages, what
    ``save_to_disk`` wrote with ``datasets``.  Otherwise it is a name on the hub, ``owner/name`` or
    ``owner/name:configuration``; ``root`` is then the cache, and only ``download`` goes to the network.
    No code of a dataset is run.

    Raises ``DataError`` when nothing is found, and as ``table.joined`` does.
    """
    folder = _folder(name, root)
    if folder is None:
        return _source(name, _fetched(name, root, download), size)
    if any(parquet.shards(folder, part) for part in ("train", *parquet.HELD_OUT)):
        return parquet.read_any(name, folder, size)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _source(name, _loaded(folder), size)
    raise DataError(
        f"{folder} holds no train*.parquet and nothing that save_to_disk wrote; folders of images are read with "
        "data.name=imagefolder."
    )


def _folder(name: str, root: str | None) -> Path | None:
    """Return the folder that ``name`` means, None when it must be a name on the hub."""
    places = [Path(name), *([Path(root) / name] if root is not None else [])]
    found = next((place for place in places if place.is_dir()), None)
    if found is None and name.startswith((".", "/", "~")):
        raise DataError(f"hf:{name}: there is no folder {name!r}; correct data.name or data.root.")
    return found


def _datasets(name: object) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"hf:{name} is no folder with parquet files; reading it needs datasets: install secateur[hf]."
        ) from error


def _fetched(name: str, root: str | None, download: bool) -> Any:
    """Return the dataset ``name`` from the cache in ``root``, or from the hub when ``download`` is on."""
    datasets = _datasets(name)
    path, _, configuration = name.partition(":")
    if path.count("/") > 1:
        raise DataError(f"hf:{name}: there is no such folder, and a name on the hub is owner/name; correct data.name.")
    cache = str(folder_of(f"hf:{name}", root, download)) if root is not None else None
    try:
        with _offline(datasets, not download):
            return datasets.load_dataset(path, configuration or None, cache_dir=cache)
    except Exception as error:  # network, names, configurations, damaged caches: a dozen unrelated kinds
        hint = "" if download else ", or set data.download=true"
        raise DataError(f"hf:{name} cannot be loaded ({_line(error)}); correct data.name{hint}.") from error


@contextmanager
def _offline(datasets: Any, on: bool) -> Iterator[None]:
    """Keep ``datasets`` from the network, as ``HF_HUB_OFFLINE=1`` does; that it was off already stays so."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or on
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _loaded(folder: Path) -> Any:
    datasets = _datasets(folder)
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(f"{folder} is damaged ({_line(error)}); save it again.") from error


def _source(name: str, found: Any, size: int | None) -> Source:
    """Return a ``datasets.Dataset`` or ``DatasetDict`` as a source."""
    parts = dict(found) if isinstance(found, dict) else {"train": found}
    held = next((part for part in parquet.HELD_OUT if part in parts), None)
    if "train" not in parts:
        raise DataError(f"hf:{name} has no part called train; it has {', '.join(parts) or 'none'}.")
    return joined(name, [_table(f"hf:{name}, {part}", parts[part]) for part in ("train", held) if part], size=size)


def _table(where: str, part: Any) -> Table:
    """Return one part; arrow rows hold the images as they are stored, encoded."""

    def rows(columns: list[str]) -> Iterator[Any]:
        return part.select_columns(columns).with_format("arrow").iter(ROWS)

    return Table(where, len(part), part.features.arrow_schema, rows, paths=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
