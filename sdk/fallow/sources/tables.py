"""Rows from Arrow tables and Parquet files."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fallow.arrow_rows import from_arrow, stacked
from fallow.errors import FallowError, Reason
from fallow.limits import MIB
from fallow.row_values import ColumnValues, described
from fallow.schema import BytesColumn
from fallow.sources.port import (
    BATCH_BYTES_TARGET,
    BATCH_ROWS_MAX,
    SourceBatch,
    SourceRequest,
    missing_column,
    windowed,
)

READ_BUFFER_BYTES = 1 * MIB
PARQUET_SUFFIXES = (".parquet", ".pq")


class TableSource:
    """An Arrow table or record batch."""

    def __init__(self, table: pa.Table | pa.RecordBatch) -> None:
        """Rows of `table`, which is not copied."""
        self._table = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table

    def check(self, request: SourceRequest) -> None:
        """See `Source.check`."""
        _check_columns(self._table.schema, request)

    def kept_schema(self, request: SourceRequest) -> pa.Schema | None:
        """See `Source.kept_schema`."""
        return _kept_schema(self._table.schema, request)

    def batches(self, request: SourceRequest) -> Iterator[SourceBatch]:
        """See `Source.batches`."""
        self.check(request)
        step = _rows_per_batch(self._table.nbytes, self._table.num_rows)
        first_row = 0
        for batch in self._table.to_batches(max_chunksize=step):
            if batch.num_rows:
                yield _batch(batch, request, first_row)
            first_row += batch.num_rows


class ParquetSource:
    """One Parquet file, several, or all in a folder, in name order; only the columns in use are read."""

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        """Rows of the files at `paths`, one after the other. Raises FIELD_INVALID when there are none."""
        named = [paths] if isinstance(paths, str | Path) else list(paths)
        self._paths: list[Path] = []
        for path in map(Path, named):
            found = (
                sorted(p for p in path.rglob("*") if p.suffix.lower() in PARQUET_SUFFIXES) if path.is_dir() else [path]
            )
            self._paths += found
        if not self._paths:
            raise FallowError(
                Reason.FIELD_INVALID, "there are no Parquet files", field=", ".join(map(str, named)), limit=".parquet"
            )

    def check(self, request: SourceRequest) -> None:
        """See `Source.check`. Also raises FIELD_INVALID when a file is no Parquet file."""
        first = self._schema(self._paths[0])
        for path in self._paths:
            schema = first if path is self._paths[0] else self._schema(path)
            _check_columns(schema, request)
            for name in _used(request):
                if schema.field(name).type != first.field(name).type:
                    raise FallowError(
                        Reason.SCHEMA_MISMATCH,
                        f"column {name!r} is {schema.field(name).type} in {path}",
                        field=name,
                        limit=f"{first.field(name).type}, as in {self._paths[0]}",
                    )

    def kept_schema(self, request: SourceRequest) -> pa.Schema | None:
        """See `Source.kept_schema`."""
        return _kept_schema(self._schema(self._paths[0]), request)

    def batches(self, request: SourceRequest) -> Iterator[SourceBatch]:
        """See `Source.batches`. Memory does not grow with the files or their row groups."""
        self.check(request)
        first_row = 0
        for path in self._paths:
            try:
                # Without these two a whole file would be read ahead, or a whole column of a row group.
                with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER_BYTES) as file:
                    for batch in self._file_batches(file, request):
                        yield _batch(batch, request, first_row)
                        first_row += batch.num_rows
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(path, error) from error

    @staticmethod
    def _file_batches(file: pq.ParquetFile, request: SourceRequest) -> Iterator[pa.RecordBatch]:
        metadata = file.metadata
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        step = _rows_per_batch(size, metadata.num_rows)
        # A column may be named twice when it is both used and kept; Parquet gives it once.
        for batch in file.iter_batches(batch_size=step, columns=_used(request), use_threads=False):
            if batch.num_rows:
                yield batch

    @staticmethod
    def _schema(path: Path) -> pa.Schema:
        try:
            return pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error


def _batch(batch: pa.RecordBatch, request: SourceRequest, first_row: int) -> SourceBatch:
    columns: dict[str, ColumnValues] = {}
    for column in request.schema.columns:
        names = request.source_columns(column.name)
        arrays = [batch.column(batch.schema.get_field_index(name)) for name in names]
        if len(names) > 1:
            columns[column.name] = stacked(arrays, column, names, allow_cast=request.cast, first_row=first_row)
            continue
        values = from_arrow(arrays[0], column, names[0], first_row=first_row)
        window = request.windows.get(column.name)
        if window and isinstance(column, BytesColumn):
            values = [windowed(content, window) for content in cast("Sequence[bytes]", values)]
        columns[column.name] = values
    kept_schema = _kept_schema(batch.schema, request)
    kept: pa.RecordBatch | None = None
    if kept_schema is not None:
        parts = [
            _plain(batch.column(batch.schema.get_field_index(name)), kept_schema.field(name).type, name)
            for name in request.keep
        ]
        kept = pa.RecordBatch.from_arrays(parts, schema=kept_schema)
    return SourceBatch(columns=columns, row_count=batch.num_rows, kept=kept)


def _check_columns(schema: pa.Schema, request: SourceRequest) -> None:
    for column in request.schema.columns:
        for name in request.source_columns(column.name):
            _check_column(schema, name, wanted=f"{column.name!r}: {described(column)}")
    for name in request.keep:
        _check_column(schema, name)


def _check_column(schema: pa.Schema, name: str, *, wanted: str = "") -> None:
    count = len(schema.get_all_field_indices(name))
    if count == 0:
        raise missing_column(name, schema.names, wanted=wanted)
    if count > 1:
        raise FallowError(Reason.SCHEMA_MISMATCH, f"there are {count} columns called {name!r}", field=name, limit="one")


def _kept_schema(schema: pa.Schema, request: SourceRequest) -> pa.Schema | None:
    if not request.keep:
        return None
    for name in request.keep:
        _check_column(schema, name)
    return pa.schema([pa.field(name, _plain_type(schema.field(name).type)) for name in request.keep])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a column is kept.

    An Arrow file cannot change a dictionary on its way, and rows cannot be picked from views and runs.
    """
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), kind.item_field.with_type(_plain_type(kind.item_type)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_plain_type(kind.value_type))
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(inner, kind.list_size)
        return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner)
    return kind


def _plain(array: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    """The array in the type `kind` that `_plain_type` gives."""
    try:
        if pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        return array if array.type.equals(kind) else array.cast(kind)
    except pa.ArrowException as error:
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"column {name!r} of type {array.type} cannot be kept: {error}",
            field=f"keep[{name}]",
        ) from None


def _used(request: SourceRequest) -> list[str]:
    wanted = [name for column in request.schema.columns for name in request.source_columns(column.name)]
    return list(dict.fromkeys([*wanted, *request.keep]))


def _rows_per_batch(size_bytes: int, rows: int) -> int:
    row_bytes = max(1, size_bytes // max(rows, 1))
    return max(1, min(BATCH_ROWS_MAX, BATCH_BYTES_TARGET // row_bytes))


def _unreadable(path: Path, error: Exception) -> FallowError:
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return FallowError(
        Reason.FIELD_INVALID, f"cannot read {path} as Parquet: {told}", field=str(path), limit="a Parquet file"
    )
