"""Columns to and from Arrow: what tables and Parquet files hold, as the values that row blocks are made of."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fallow.errors import FallowError, Reason
from fallow.row_values import Array, ColumnValues, converted, described, numpy_dtype
from fallow.schema import BytesColumn, Column, DType, RaggedColumn, Schema, StringColumn, TensorColumn

_ARROW_TYPES: dict[DType, Any] = {
    DType.FLOAT32: pa.float32(),
    DType.FLOAT64: pa.float64(),
    DType.FLOAT16: pa.float16(),
    DType.INT8: pa.int8(),
    DType.INT16: pa.int16(),
    DType.INT32: pa.int32(),
    DType.INT64: pa.int64(),
    DType.UINT8: pa.uint8(),
    DType.UINT16: pa.uint16(),
    DType.UINT32: pa.uint32(),
    DType.UINT64: pa.uint64(),
    DType.BOOL: pa.bool_(),
}


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a column: nested fixed-size lists for tensors, nested lists where ragged."""
    match column:
        case TensorColumn() | RaggedColumn():
            made = _ARROW_TYPES[column.dtype]
            for dim in reversed(column.shape):
                made = pa.list_(made) if dim is None else pa.list_(made, dim)
            return made
        case BytesColumn():
            return pa.binary()
        case StringColumn():
            return pa.string()


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of rows of `schema`; every column may be null, for rows without a value."""
    return pa.schema([pa.field(column.name, arrow_type(column)) for column in schema.columns])


def to_arrow(values: ColumnValues, column: Column) -> pa.Array:
    """Decoded values of `column` as an Arrow array."""
    if not len(values):
        return pa.array([], type=arrow_type(column))
    if not isinstance(column, TensorColumn):
        if isinstance(column, RaggedColumn):
            values = [cast(Any, value).tolist() for value in values]
        return pa.array(values, type=arrow_type(column))
    array = cast(Array, values)
    made = pa.array(np.ascontiguousarray(array).reshape(-1), type=_ARROW_TYPES[column.dtype])
    for dim in reversed(column.shape):
        made = pa.FixedSizeListArray.from_arrays(made, dim)
    return made


def from_arrow(array: pa.Array | pa.ChunkedArray, column: Column, name: str, *, first_row: int = 0) -> ColumnValues:
    """The values that an Arrow array holds for `column`; `name` is what the user calls it, `first_row` the first row.

    Tensors come as (nested, fixed or variable) lists of equal lengths, or as one flat list of the right length a row.
    Raises SCHEMA_MISMATCH naming the column and the row for nulls, and for types that hold no such values.
    """
    flat = _plain(array)
    if flat.null_count:
        row = first_row + _first(pc.is_null(flat))
        raise _mismatch(name, f"is null in row {row}", column, hint="drop or fill such rows first", row=row)
    match column:
        case TensorColumn():
            return _tensor(flat, column, name, first_row)
        case RaggedColumn():
            return _ragged(flat, column, name, first_row)
        case BytesColumn():
            if not _is_text(flat.type) and not _is_bytes(flat.type):
                raise _mismatch(name, f"is {flat.type}", column)
            return cast("list[bytes]", flat.cast(pa.large_binary()).to_pylist())
        case StringColumn():
            if not _is_text(flat.type):
                raise _mismatch(name, f"is {flat.type}", column)
            return cast("list[str]", flat.to_pylist())


def stacked(
    arrays: Sequence[pa.Array | pa.ChunkedArray],
    column: Column,
    names: Sequence[str],
    *,
    allow_cast: bool,
    first_row: int = 0,
) -> Array:
    """Several columns of numbers side by side as one tensor column (rows, columns).

    Each is converted by itself, by the rule of `row_values.converted`. Raises SCHEMA_MISMATCH.
    """
    if not isinstance(column, TensorColumn) or column.shape != (len(names),):
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"{len(names)} columns ({', '.join(names)}) cannot make up {column.name!r}",
            field=column.name,
            limit=described(column),
        )
    single = TensorColumn(column.name, column.dtype, ())
    parts: list[Array] = []
    for array, name in zip(arrays, names, strict=True):
        part = cast(Array, from_arrow(array, single, name, first_row=first_row))
        if part.ndim != 1:
            raise _mismatch(name, f"has row shape {list(part.shape[1:])}", single)
        parts.append(converted(part, column.dtype, field=name, allow_cast=allow_cast))
    return np.stack(parts, axis=1)


def _plain(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One chunk, without dictionaries, extension types and views."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    return array


def _tensor(array: pa.Array, column: TensorColumn, name: str, first_row: int) -> Array:
    shape = [len(array)]
    inner = array
    while _is_list(inner.type):
        # So far all lists are of one length, which tells the row of each entry.
        lists_per_row = len(inner) // max(len(array), 1)
        length = _common_length(inner)
        if length is None:
            raise _lengths_differ(inner, column, name, first_row=first_row, lists_per_row=lists_per_row)
        shape.append(length)
        inner = inner.flatten()
        if inner.null_count:
            row = first_row + _first(pc.is_null(inner)) // (lists_per_row * length)
            what = f"has a null inside its list in row {row}"
            raise _mismatch(name, what, column, hint="drop or fill such rows first", row=row)
    if not (pa.types.is_integer(inner.type) or pa.types.is_floating(inner.type) or pa.types.is_boolean(inner.type)):
        raise _mismatch(name, f"is {array.type}", column)
    values = cast(Array, inner.to_numpy(zero_copy_only=False))
    wanted = (len(array), *column.shape)
    if tuple(shape) != wanted and len(shape) == 2 and int(np.prod(column.shape)) == shape[1]:
        shape = list(wanted)
    return values.reshape(shape)


def _common_length(array: pa.Array) -> int | None:
    """The length of every list; None when they differ."""
    if pa.types.is_fixed_size_list(array.type):
        return int(array.type.list_size)
    if not len(array):
        return 0
    bounds = pc.min_max(pc.list_value_length(array)).as_py()
    return int(bounds["max"]) if bounds["min"] == bounds["max"] else None


def _lengths_differ(
    array: pa.Array, column: TensorColumn, name: str, *, first_row: int, lists_per_row: int
) -> FallowError:
    """The error that names the first row with a list of another length than the schema's, else than the first."""
    lengths = pc.list_value_length(array)
    fitting = {*column.shape, int(np.prod(column.shape))}
    usual = int(lengths[0].as_py())
    odd = pc.invert(pc.is_in(lengths, pa.array(sorted(fitting), lengths.type)))
    if not pc.any(odd).as_py():
        odd = pc.not_equal(lengths, usual)
    place = _first(odd)
    row = first_row + place // lists_per_row
    return _mismatch(name, f"has a list of {lengths[place].as_py()} elements in row {row}", column, row=row)


def _first(flags: pa.Array) -> int:
    return int(pc.index(flags, True).as_py())


def _ragged(array: pa.Array, column: RaggedColumn, name: str, first_row: int) -> list[Array]:
    if not _is_list(array.type):
        raise _mismatch(name, f"is {array.type}", column)
    inner = array.type
    while _is_list(inner):
        inner = inner.value_type
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)):
        raise _mismatch(name, f"is {array.type}", column)
    dtype = np.dtype(inner.to_pandas_dtype())
    if len(column.shape) == 1:
        # The list array's own slices: no Python object for each element.
        return [cast(Array, array[row].values.to_numpy(zero_copy_only=False)) for row in range(len(array))]
    values: list[Array] = []
    for row, nested in enumerate(array.to_pylist()):
        try:
            made = np.asarray(nested, dtype=dtype)
        except (ValueError, TypeError):
            told = f"row {first_row + row} is no array of one shape"
            raise _mismatch(name, told, column, row=first_row + row) from None
        if made.size == 0 and made.ndim < len(column.shape):
            made = np.zeros([0 if dim is None else dim for dim in column.shape], dtype=numpy_dtype(column.dtype))
        values.append(made)
    return values


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _mismatch(name: str, what: str, column: Column, *, hint: str = "", row: int | None = None) -> FallowError:
    return FallowError(
        Reason.SCHEMA_MISMATCH,
        f"column {name!r} {what}",
        field=name if row is None else f"{name}[{row}]",
        limit=f"{described(column)} for input {column.name!r}",
        hint=hint,
    )
