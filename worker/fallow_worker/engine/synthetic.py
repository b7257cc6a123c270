"""Rows made from a schema alone, seeded: what a program is warmed up, measured and tested on beside real samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import BundleManifest, BytesCodec
from fallow.row_values import ColumnValues, numpy_dtype
from fallow.schema import BytesColumn, StringColumn, TensorColumn

INTEGER_TOPS = (100, 2, 1)
"""Integers of synthetic rows lie below one of these: first the widest, since nobody declares what indexes a program
takes; the last gives zeros only."""
BYTES_DEFAULT = 4096


def synthetic_rows(
    manifest: BundleManifest, count: int, *, seed: int, integer_top: int = INTEGER_TOPS[0], scale: float = 1.0
) -> dict[str, ColumnValues]:
    """Input columns of `count` rows; the same arguments give the same rows. `scale` stretches float columns."""
    generator = np.random.default_rng([seed, integer_top, count])
    columns: dict[str, ColumnValues] = {}
    for column in manifest.input_schema.columns:
        if isinstance(column, TensorColumn):
            shape = (count, *column.shape)
            dtype = numpy_dtype(column.dtype)
            values: NDArray[Any]
            if dtype.kind == "f":
                values = generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)
            elif dtype.kind == "b":
                values = generator.integers(0, 2, shape)
            else:
                values = generator.integers(0, integer_top, shape)
            columns[column.name] = values.astype(dtype)
        elif isinstance(column, BytesColumn):
            longest = content_bytes(manifest, column.name)
            lengths = generator.integers(longest // 4, longest + 1, count).tolist()
            columns[column.name] = [_content(generator, length) for length in lengths]
        elif isinstance(column, StringColumn):
            columns[column.name] = ["word " * int(words) for words in generator.integers(1, 64, count)]
    return columns


def sized_rows(manifest: BundleManifest, count: int, *, content_length: int, seed: int) -> dict[str, ColumnValues]:
    """As `synthetic_rows`, every column of bytes having exactly that length."""
    generator = np.random.default_rng(seed)
    columns = synthetic_rows(manifest, count, seed=seed)
    for column in manifest.input_schema.columns:
        if isinstance(column, BytesColumn):
            columns[column.name] = [_content(generator, content_length) for _ in range(count)]
    return columns


def content_bytes(manifest: BundleManifest, column: str) -> int:
    """The longest content that the codec of a column takes."""
    for stage in manifest.stages:
        if isinstance(stage, BytesCodec) and stage.column == column:
            return stage.head_window_bytes + stage.tail_window_bytes
    return BYTES_DEFAULT


def _content(generator: np.random.Generator, length: int) -> bytes:
    """Half of the contents are like text, half are any bytes."""
    low, high = (32, 127) if generator.integers(0, 2) else (0, 256)
    return generator.integers(low, high, length, dtype=np.uint8).tobytes()
