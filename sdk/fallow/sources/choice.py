"""The source that fits what a user hands over as rows."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa

from fallow.errors import FallowError, Reason
from fallow.row_values import Array, ColumnValues
from fallow.schema import BytesColumn, Schema, StringColumn
from fallow.sources.arrays import ArraySource
from fallow.sources.folder import FolderSource
from fallow.sources.port import Source
from fallow.sources.tables import PARQUET_SUFFIXES, ParquetSource, TableSource


class ArrowRows(Protocol):
    """An Arrow table or record batch, or a data frame that gives its columns as an Arrow stream."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Rows = (
    Source
    | Mapping[str, ColumnValues]
    | Array
    | Sequence[bytes]
    | Sequence[str]
    | Sequence[str | Path]
    | ArrowRows
    | str
    | Path
)
"""NumPy arrays by column name, one array, an Arrow table or a data frame, a Parquet file or several, a folder, or a
source."""


def source_of(rows: Rows, schema: Schema) -> Source:
    """The source for `rows` under an input schema.

    A path names a Parquet, `.npy` or `.npz` file, or a folder: of files when the schema is one column of bytes, else of
    Parquet files. Raises FIELD_INVALID when nothing fits.
    """
    if isinstance(rows, pa.Table | pa.RecordBatch):
        return TableSource(rows)
    if isinstance(rows, str | Path):
        return _source_of_path(Path(rows), schema)
    if isinstance(rows, Mapping):
        return ArraySource(rows)
    if hasattr(rows, "batches") and hasattr(rows, "kept_schema"):
        return cast(Source, rows)
    if isinstance(rows, Sequence) and _are_paths(rows, schema):
        return ParquetSource(cast("Sequence[str | Path]", rows))
    if isinstance(rows, np.ndarray | Sequence):
        return ArraySource(cast(ColumnValues, rows))
    if hasattr(rows, "__arrow_c_stream__"):
        return _source_of_frame(rows)
    # A caller without a type checker.
    raise FallowError(
        Reason.FIELD_INVALID,
        f"rows cannot be taken from {type(rows).__name__}",
        field="rows",
        limit="arrays by name, an array, an Arrow table, a data frame, Parquet files or a folder",
    )


def _are_paths(rows: Sequence[object], schema: Schema) -> bool:
    """Whether a list names files. Text is meant as rows where a column takes text."""
    kinds = Path if any(isinstance(column, StringColumn) for column in schema.columns) else str | Path
    return bool(rows) and all(isinstance(row, kinds) for row in rows)


def _source_of_frame(rows: object) -> Source:
    """Rows of whatever speaks Arrow's stream interface: data frames of pandas or polars, query results."""
    try:
        return TableSource(pa.table(rows))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise FallowError(
            Reason.FIELD_INVALID, f"rows cannot be taken from {type(rows).__name__}: {error}", field="rows"
        ) from None


def _source_of_path(path: Path, schema: Schema) -> Source:
    of_files = len(schema.columns) == 1 and isinstance(schema.columns[0], BytesColumn)
    if path.is_dir():
        return FolderSource(path) if of_files else ParquetSource(path)
    if not path.exists():
        raise FallowError(Reason.FIELD_INVALID, f"{path} does not exist", field="rows")
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return ParquetSource(path)
    if path.suffix in {".npy", ".npz"}:
        return _source_of_numpy(path)
    raise FallowError(
        Reason.FIELD_INVALID,
        f"{path} is no input that fallow reads",
        field="rows",
        limit=".parquet, .npy, .npz, or a folder",
    )


def _source_of_numpy(path: Path) -> Source:
    try:
        if path.suffix == ".npy":
            return ArraySource(cast(Array, np.load(path, mmap_mode="r", allow_pickle=False)))
        archive: Any = np.load(path, allow_pickle=False)
        with archive:
            return ArraySource({name: archive[name] for name in archive.files})
    except (OSError, ValueError, EOFError) as error:
        raise FallowError(
            Reason.FIELD_INVALID, f"cannot read {path}: {error}", field="rows", limit="arrays of numbers, no pickles"
        ) from None
