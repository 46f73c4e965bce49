"""Arrow tables of encoded images and labels, whoever reads them: every image is decoded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secateur.data.dataset import Source
from secateur.data.decode import CHANNELS, Encoded, Problem, fill, form, grey, refuse
from secateur.data.memory import demand
from secateur.types import DataError

LABELS = ("label", "labels", "fine_label")
IMAGES = ("image", "img")


@dataclass(frozen=True, eq=False)
class Table:
    """One part of a dataset: where it is, how many rows, their arrow schema, and how to go through columns.

    ``rows(columns)`` yields arrow record batches (or tables) in order, and may be called again.  ``paths``
    says whether a row may name an image file instead of holding its content.
    """

    where: str
    count: int
    schema: Any
    rows: Callable[[list[str]], Iterator[Any]]
    paths: bool = False


def joined(
    name: str,
    tables: Sequence[Table],
    *,
    mode: str | None = None,
    size: int | None = None,
    labels: Sequence[str] = LABELS,
) -> Source:
    """Return the rows of a training table and, where there is one, of a test table as one source.

    ``mode`` is the Pillow mode of the images (``L``, ``RGB``; None: grey when all are); ``labels`` are the
    columns that may be the label, best first.  Raises ``DataError`` when a column is missing, a table is
    empty, sizes differ, the images do not fit the memory, or some are broken (counted and named).
    """
    columns = [_columns(table, labels) for table in tables]
    for table in tables:
        if table.count == 0:
            raise DataError(f"{table.where} holds no images.")
    mode = mode or ("L" if all(map(_all_grey, tables, columns)) else "RGB")
    shape = _shape(tables, columns, mode, size)
    total = sum(table.count for table in tables)
    demand(tables[0].where, total, shape)
    images, answers, start = np.empty((total, *shape), np.uint8), np.empty(total, np.int64), 0
    for table, column in zip(tables, columns, strict=True):
        part = slice(start, start + table.count)
        _decode(table, column, mode, size is not None, images[part], answers[part])
        start += table.count
    classes = _class_names(tables[0], columns[0][1]) or tuple(str(i) for i in range(int(answers.max()) + 1))
    test_from = tables[0].count if len(tables) > 1 else None
    return Source(name, torch.from_numpy(images), torch.from_numpy(answers), classes, test_from)


def _shape(
    tables: Sequence[Table], columns: Sequence[tuple[str, str]], mode: str, size: int | None
) -> tuple[int, int, int]:
    """Return (channels, height, width) of all images; raises ``DataError`` when the tables disagree."""
    forms = [form(_images(table, image), mode, size) for table, (image, _) in zip(tables, columns, strict=True)]
    known = [shape for shape in forms if shape is not None]
    if len(set(known)) > 1:
        raise DataError(
            f"{tables[0].where}: training images are {known[0]}, test images {known[1]}; sizes must agree, "
            "or set data.image_size."
        )
    return known[0] if known else (CHANNELS[mode], 1, 1)


def _decode(
    table: Table, columns: tuple[str, str], mode: str, resize: bool, images: np.ndarray, answers: np.ndarray
) -> None:
    """Fill ``images`` and ``answers`` from the rows of ``table``."""
    problems, at = list[Problem](), 0
    for rows in table.rows(list(columns)):
        encoded = _encoded(table, rows, columns[0])
        part = slice(at, at + len(encoded))
        problems += [(at + i, reason) for i, reason in fill(images[part], encoded, mode, resize=resize)]
        answers[part] = _integers(table, rows, columns[1])
        at += len(encoded)
    refuse(table.where, table.count, problems, lambda i: f"row {i}")


def _columns(table: Table, labels: Sequence[str]) -> tuple[str, str]:
    """Return the names of the image and the label column; raises ``DataError`` when one is missing."""
    names, features = list(table.schema.names), _features(table)
    of_kind = {kind: [n for n in names if _kind(features.get(n)) == kind] for kind in ("Image", "ClassLabel")}
    image = next((n for n in (*IMAGES, *of_kind["Image"][:1]) if n in names), None)
    only = of_kind["ClassLabel"] if len(of_kind["ClassLabel"]) == 1 else []
    label = next((n for n in (*labels, *only) if n in names), None)
    if image is None or label is None:
        raise _wrong_columns(table, "one is missing", labels[0])
    return image, label


def _wrong_columns(table: Table, why: object, label: str = LABELS[0]) -> DataError:
    return DataError(
        f"{table.where} needs a column 'image' (struct with 'bytes') and an integer column {label!r}; "
        f"found {', '.join(table.schema.names) or 'none'} ({why})."
    )


def _images(table: Table, column: str) -> Iterator[Encoded]:
    return (image for rows in table.rows([column]) for image in _encoded(table, rows, column))


def _encoded(table: Table, rows: Any, column: str) -> list[Encoded]:
    """Return the encoded images of one batch of rows: bytes, or a struct that holds them."""
    values = rows.column(column).to_pylist()
    try:
        content = [value if value is None or isinstance(value, bytes) else value["bytes"] for value in values]
        if table.paths:
            return [value["path"] if item is None else item for item, value in zip(content, values, strict=True)]
        return content
    except (KeyError, TypeError) as error:
        raise _wrong_columns(table, error) from error


def _integers(table: Table, rows: Any, column: str) -> np.ndarray:
    """Return the labels of one batch of rows."""
    try:
        return np.asarray(rows.column(column).to_numpy(zero_copy_only=False)).astype(np.int64, casting="safe")
    except (TypeError, ValueError) as error:
        raise _wrong_columns(table, error, column) from error


def _all_grey(table: Table, columns: tuple[str, str]) -> bool:
    """Return whether no image has colours; the first that has ends the search."""
    return all(map(grey, _images(table, columns[0])))


def _features(table: Table) -> dict[str, Any]:
    """Return column -> feature of the schema's ``huggingface`` metadata; {} where it says nothing."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(table: Table, label: str) -> tuple[str, ...]:
    """Return the class names of column ``label``, or () when the metadata holds none."""
    feature = _features(table).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()
