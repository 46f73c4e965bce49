"""Packed image folders: parquet files with encoded images and integer labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secateur.data.dataset import Source
from secateur.data.decode import BROKEN_IMAGE
from secateur.data.table import LABELS, Table, joined
from secateur.types import DataError

__all__ = ["BROKEN_IMAGE", "find", "read", "read_any", "shards"]

ROWS = 2048  # rows that are read and decoded together
HELD_OUT = ("test", "validation", "valid", "val")


def find(name: str, root: str) -> Path | None:
    """Return ``root/name`` or ``root``, whichever holds ``train.parquet`` or ``test.parquet``, or None."""
    for folder in (Path(root) / name, Path(root)):
        if (folder / "train.parquet").exists() or (folder / "test.parquet").exists():
            return folder
    return None


def read(name: str, folder: Path, mode: str, size: int | None = None, labels: Sequence[str] = LABELS) -> Source:
    """Read ``train.parquet`` and ``test.parquet``; ``mode`` is the Pillow mode (``L`` grey, ``RGB``).

    Columns: ``image`` = struct<bytes, path> (PNG or JPEG) and ``label`` = integer; class names are in the
    ``huggingface`` key of the schema metadata.  Every image is decoded once, into one uint8 array.

    Raises ``DataError`` when a file is missing, truncated, without the columns, or holds a broken image.
    """
    tables = [_table([folder / f"{part}.parquet"]) for part in ("train", "test")]
    return joined(name, tables, mode=mode, size=size, labels=labels)


def read_any(name: str, folder: Path, size: int | None = None) -> Source:
    """Read the parquet files of ``train`` and of ``test`` (else ``validation``), as a hub lays them out.

    Without a test part the test set is drawn from ``train``.  Raises ``DataError`` as ``read`` does.
    """
    held = next((found for part in HELD_OUT if (found := shards(folder, part))), None)
    parts = [shards(folder, "train") or [folder / "train.parquet"], *([held] if held else [])]
    return joined(name, [_table(paths) for paths in parts], size=size)


def shards(folder: Path, part: str) -> list[Path]:
    """Return the files of ``part``: ``part.parquet``, ``part-00000-of-00002.parquet``, ...; [] without any.

    They may lie one folder down (``data``, or the name of the only configuration).  Raises ``DataError`` when
    several folders hold some, or when one of the numbered files is missing.
    """
    patterns = (f"{part}.parquet", f"{part}-*.parquet", f"{part}/*.parquet")
    found = next((f for p in patterns for f in (sorted(folder.glob(p)), sorted(folder.glob(f"*/{p}"))) if f), [])
    homes = sorted({str(path.parent) for path in found})
    if len(homes) > 1:
        raise DataError(f"{folder} holds several datasets: {', '.join(homes)}; name one of these folders.")
    _, _, total = found[0].stem.rpartition("-of-") if found else ("", "", "")
    if total.isdigit() and int(total) != len(found):
        raise DataError(f"{homes[0]} holds {len(found)} of {int(total)} files of {part!r}; fetch the others.")
    return found


def _table(paths: Sequence[Path]) -> Table:
    """Return the rows of files that share a schema; the images are read when somebody goes through them."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing; the folder must hold train.parquet and test.parquet.")
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{paths[0]} needs pyarrow: install secateur[data].") from error

    def damaged(path: Path, error: Exception) -> DataError:
        return DataError(f"{path} is truncated or no parquet file ({error}); fetch it again.")

    def rows(columns: list[str]) -> Iterator[Any]:
        for path in paths:
            try:
                with parquet.ParquetFile(path) as file:
                    yield from file.iter_batches(ROWS, columns=columns)
            except (arrow.ArrowException, OSError) as error:
                raise damaged(path, error) from error

    count, schemas = 0, []
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                count += file.metadata.num_rows
                schemas.append(file.schema_arrow)
        except (arrow.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        if not schemas[0].equals(schemas[-1]):
            raise DataError(f"{path} has other columns than {paths[0]}; the files of one part share theirs.")
    where = paths[0] if len(paths) == 1 else paths[0].parent
    return Table(str(where), count, schemas[0], rows)
