"""A small packed image folder, made on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(size: int, mode: str, seed: int) -> bytes:
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_packed(
    folder: Path, *, size: int = 28, mode: str = "L", train: int = 60, test: int = 20, classes: int = 10
) -> None:
    """Write ``train.parquet`` and ``test.parquet`` with random images and labels 0 .. classes - 1 in turn."""
    folder.mkdir(parents=True)
    names = {"info": {"features": {"label": {"names": [f"class {i}" for i in range(classes)]}}}}
    for name, count in (("train", train), ("test", test)):
        images = [{"bytes": png(size, mode, seed), "path": f"{seed}.png"} for seed in range(count)]
        table = pa.table({"image": images, "label": pa.array([i % classes for i in range(count)], pa.int64())})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), folder / f"{name}.parquet")
