"""Rows from NumPy arrays and Python lists."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import pyarrow as pa

from fallow.errors import FallowError, Reason
from fallow.row_values import ColumnValues, converted, described, number_array
from fallow.schema import BytesColumn, Column, TensorColumn
from fallow.sources.port import (
    BATCH_BYTES_TARGET,
    BATCH_ROWS_MAX,
    SourceBatch,
    SourceRequest,
    missing_column,
    windowed,
)

VARYING_ROWS_PER_BATCH = 4_096
"""Rows taken at a time when their length is not known beforehand."""


class ArraySource:
    """A mapping of column name to array or list, all of one length; or one array, for schemas of one column."""

    def __init__(self, columns: Mapping[str, ColumnValues] | ColumnValues) -> None:
        """Rows of `columns`; arrays are not copied."""
        self._columns: dict[str, ColumnValues] | None = None
        self._single: ColumnValues | None = None
        if isinstance(columns, Mapping):
            self._columns = {name: _sized(values, name) for name, values in columns.items()}
        else:
            self._single = _sized(columns, "rows")

    def check(self, request: SourceRequest) -> None:
        """See `Source.check`. Also raises SCHEMA_MISMATCH when the columns differ in length."""
        self._row_count(self._named(request), request)

    def kept_schema(self, request: SourceRequest) -> pa.Schema | None:
        """See `Source.kept_schema`."""
        kept = self._kept(self._named(request), request.keep, 0, 0)
        return kept.schema if kept is not None else None

    def batches(self, request: SourceRequest) -> Iterator[SourceBatch]:
        """See `Source.batches`."""
        columns = self._named(request)
        total = self._row_count(columns, request)
        row_bytes = request.schema.fixed_row_bytes
        step = VARYING_ROWS_PER_BATCH if row_bytes is None else max(1, BATCH_BYTES_TARGET // row_bytes)
        step = min(step, BATCH_ROWS_MAX)
        for start in range(0, total, step):
            end = min(start + step, total)
            yield SourceBatch(
                columns={
                    column.name: _values(columns, column, request, start, end) for column in request.schema.columns
                },
                row_count=end - start,
                kept=self._kept(columns, request.keep, start, end),
            )

    def _named(self, request: SourceRequest) -> dict[str, ColumnValues]:
        if self._columns is not None:
            return self._columns
        assert self._single is not None
        names = [column.name for column in request.schema.columns]
        if len(names) != 1:
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                "one array cannot be the rows of several columns",
                field="rows",
                limit=f"a mapping with {', '.join(names)}",
            )
        return {names[0]: self._single}

    def _row_count(self, columns: dict[str, ColumnValues], request: SourceRequest) -> int:
        used: dict[str, int] = {}
        for column in request.schema.columns:
            for name in request.source_columns(column.name):
                if name not in columns:
                    raise missing_column(name, list(columns), wanted=f"{column.name!r}: {described(column)}")
                used[name] = len(columns[name])
        for name in request.keep:
            if name not in columns:
                raise missing_column(name, list(columns))
            used[name] = len(columns[name])
        if len(set(used.values())) > 1:
            told = ", ".join(f"{name}: {length}" for name, length in used.items())
            raise FallowError(Reason.SCHEMA_MISMATCH, f"the columns differ in length ({told})", field="rows")
        return next(iter(used.values()))

    @staticmethod
    def _kept(columns: dict[str, ColumnValues], keep: Sequence[str], start: int, end: int) -> pa.RecordBatch | None:
        if not keep:
            return None
        arrays: list[pa.Array] = []
        for name in keep:
            if name not in columns:
                raise missing_column(name, list(columns))
            values = columns[name]
            # The type is that of the whole column, whatever a batch of it holds.
            kind = None if isinstance(values, np.ndarray) else pa.infer_type(values)
            part = values[start:end]
            try:
                arrays.append(
                    pa.array(part if not isinstance(part, np.ndarray) or part.ndim == 1 else list(part), kind)
                )
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                raise FallowError(
                    Reason.SCHEMA_MISMATCH, f"column {name!r} cannot be kept: {error}", field=f"keep[{name}]"
                ) from None
        return pa.RecordBatch.from_arrays(arrays, names=list(keep))


def _values(
    columns: dict[str, ColumnValues], column: Column, request: SourceRequest, start: int, end: int
) -> ColumnValues:
    names = request.source_columns(column.name)
    if len(names) == 1:
        values = columns[names[0]][start:end]
        window = request.windows.get(column.name)
        if window and isinstance(column, BytesColumn):
            return [_windowed(value, window) for value in cast("Sequence[object]", values)]
        return values
    if not isinstance(column, TensorColumn) or column.shape != (len(names),):
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"{len(names)} columns ({', '.join(names)}) cannot make up {column.name!r}",
            field=column.name,
            limit=described(column),
        )
    parts = [
        converted(number_array(columns[name][start:end], name), column.dtype, field=name, allow_cast=request.cast)
        for name in names
    ]
    for part, name in zip(parts, names, strict=True):
        if part.ndim != 1:
            raise FallowError(
                Reason.SCHEMA_MISMATCH, f"column {name!r} has row shape {list(part.shape[1:])}", field=name
            )
    return np.stack(parts, axis=1)


def _windowed(value: object, window: tuple[int, int]) -> bytes:
    """The part of bytes of any kind that travels; anything else is left for the encoder to refuse by name."""
    if isinstance(value, bytes):
        return windowed(value, window)
    if isinstance(value, bytearray):
        return windowed(bytes(value), window)
    if isinstance(value, memoryview):
        return windowed(value.tobytes(), window)
    return cast(bytes, value)


def _sized(values: ColumnValues, name: str) -> ColumnValues:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"{name!r} is {type(values).__name__}",
            field=name,
            limit="an array or a list with one value for each row",
        )
    if isinstance(values, np.ndarray) and values.ndim == 0:
        raise FallowError(Reason.SCHEMA_MISMATCH, f"{name!r} has no row axis", field=name, limit="an array of rows")
    return values
