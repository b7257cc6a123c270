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
from fallow.schema import BytesColumn, Schema
from fallow.sources.arrays import ArraySource
from fallow.sources.folder import FolderSource
from fallow.sources.port import Source
from fallow.sources.tables import PARQUET_SUFFIXES, ParquetSource, TableSource


class ArrowRows(Protocol):
    """An Arrow table or record batch."""

    @property
    def num_rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


Rows = (
    Source
    | Mapping[str, ColumnValues]
    | Array
    | Sequence[bytes]
    | Sequence[str]
    | Sequence[Path]
    | ArrowRows
    | str
    | Path
)
"""NumPy arrays by column name, one array, an Arrow table, a Parquet file or several, a folder, or a source."""


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
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Path) for row in rows):
        return ParquetSource(cast("Sequence[Path]", rows))
    if isinstance(rows, np.ndarray | Sequence):
        return ArraySource(cast(ColumnValues, rows))
    # A caller without a type checker.
    raise FallowError(
        Reason.FIELD_INVALID,
        f"rows cannot be taken from {type(rows).__name__}",
        field="rows",
        limit="arrays by name, an array, an Arrow table, Parquet files or a folder",
    )


def _source_of_path(path: Path, schema: Schema) -> Source:
    of_files = len(schema.columns) == 1 and isinstance(schema.columns[0], BytesColumn)
    if path.is_dir():
        return FolderSource(path) if of_files else ParquetSource(path)
    if not path.exists():
        raise FallowError(Reason.FIELD_INVALID, f"{path} does not exist", field="rows")
    if path.suffix in PARQUET_SUFFIXES:
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
