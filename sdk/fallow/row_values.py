"""Values of a column: what NumPy calls its type, what is accepted for it, and what is said when it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.schema import BytesColumn, Column, DType, RaggedColumn, StringColumn, TensorColumn

Array = NDArray[Any]
ColumnValues = Array | Sequence[bytes] | Sequence[str] | Sequence[Array]
"""Values of one column, one for each row."""


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The little-endian NumPy dtype of a schema's element type."""
    return np.dtype(dtype.value).newbyteorder("<")


def described(column: Column) -> str:
    """A column's kind in words, such as `float32[3, 224]`."""
    match column:
        case TensorColumn():
            return f"{column.dtype.value}[{', '.join(map(str, column.shape))}]" if column.shape else column.dtype.value
        case RaggedColumn():
            return f"{column.dtype.value}[{', '.join('?' if dim is None else str(dim) for dim in column.shape)}]"
        case BytesColumn():
            return "bytes"
        case StringColumn():
            return "UTF-8 text"


def checked_values(column: Column, values: ColumnValues, *, allow_cast: bool, first_row: int = 0) -> ColumnValues:
    """`values` in the exact types that are encoded: arrays of the column's dtype, `bytes`, `str`.

    Raises SCHEMA_MISMATCH naming column and row (the first is called `first_row`), what it is and what is wanted.
    """
    match column:
        case TensorColumn():
            return _checked_tensor(column, values, allow_cast=allow_cast)
        case RaggedColumn():
            return [
                _checked_ragged(column, value, row, allow_cast=allow_cast)
                for row, value in enumerate(values, first_row)
            ]
        case BytesColumn():
            return [_checked_bytes(column, value, row) for row, value in enumerate(values, first_row)]
        case StringColumn():
            return [_checked_string(column, value, row) for row, value in enumerate(values, first_row)]


def converted(values: Array, dtype: DType, *, field: str, allow_cast: bool) -> Array:
    """`values` with that element type, never changed silently: widening is lossless, the rest needs `allow_cast`.

    With `allow_cast` integers are checked for range, finite floats must stay finite, and floats become no integers.
    Raises SCHEMA_MISMATCH.
    """
    wanted = numpy_dtype(dtype)
    have = values.dtype
    if have == wanted:
        return values
    if have.kind in "iuf" and wanted.kind in "iuf" and (have.kind == "f") == (wanted.kind == "f"):
        if np.can_cast(have, wanted, "safe"):
            return values.astype(wanted)
        if allow_cast and _fits(values, wanted):
            with np.errstate(over="ignore"):
                return values.astype(wanted)
        if allow_cast:
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                f"column {field!r} holds values that {dtype.value} cannot hold",
                field=field,
                limit=dtype.value,
            )
    elif allow_cast and have.kind in "iub" and wanted.kind in "iuf":
        return values.astype(wanted)
    hint = f"convert it yourself, or allow it (`cast=True`, `--cast`): values become {dtype.value}"
    castable = have.kind in "iufb" and wanted.kind in "iuf" and not (have.kind == "f" and wanted.kind != "f")
    raise FallowError(
        Reason.SCHEMA_MISMATCH,
        f"column {field!r} is {have.name}, the schema wants {dtype.value}",
        field=field,
        limit=dtype.value,
        hint=hint if castable else "",
    )


def _fits(values: Array, wanted: np.dtype[Any]) -> bool:
    if wanted.kind == "f":
        finite = values[np.isfinite(values)]
        return not finite.size or float(np.abs(finite).max()) <= float(np.finfo(wanted).max)
    info = np.iinfo(wanted)
    return not values.size or (int(values.min()) >= info.min and int(values.max()) <= info.max)


def _checked_tensor(column: TensorColumn, values: ColumnValues, *, allow_cast: bool) -> Array:
    array = number_array(values, column.name)
    if array.ndim == 0 or array.shape[1:] != column.shape:
        wanted = ["rows", *map(str, column.shape)]
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"column {column.name!r} has shape {list(array.shape)}, the schema wants [{', '.join(wanted)}]",
            field=column.name,
            limit=described(column),
        )
    return converted(array, column.dtype, field=column.name, allow_cast=allow_cast)


def _checked_ragged(column: RaggedColumn, value: object, row: int, *, allow_cast: bool) -> Array:
    array = number_array(value, f"{column.name}[{row}]")
    fits = array.ndim == len(column.shape) and all(
        dim is None or size == dim for dim, size in zip(column.shape, array.shape, strict=True)
    )
    if not fits:
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"column {column.name!r} row {row} has shape {list(array.shape)}, the schema wants {described(column)}",
            field=f"{column.name}[{row}]",
            limit=described(column),
        )
    return converted(array, column.dtype, field=column.name, allow_cast=allow_cast)


def _checked_bytes(column: BytesColumn, value: object, row: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, memoryview):
        return value.tobytes()
    raise _wrong_value(column, value, row)


def _checked_string(column: StringColumn, value: object, row: int) -> str:
    if not isinstance(value, str):
        raise _wrong_value(column, value, row)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong_value(column, value, row) from None
    return str(value)


def _wrong_value(column: Column, value: object, row: int) -> FallowError:
    return FallowError(
        Reason.SCHEMA_MISMATCH,
        f"column {column.name!r} row {row} is {type(value).__name__}, the schema wants {described(column)}",
        field=f"{column.name}[{row}]",
        limit=described(column),
    )


def number_array(values: object, field: str) -> Array:
    """`values` as an array of numbers or bools. Raises SCHEMA_MISMATCH for anything else, and for masked values."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(cast(Any, values)):
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"column {field!r} has masked values",
            field=field,
            limit="a value in every place",
            hint="fill them (`filled`) or drop such rows first",
        )
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, dtype=np.object_)
    if array.dtype.kind not in "iufb":
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"column {field!r} holds {array.dtype.name}, not numbers of one shape",
            field=field,
            limit="an array of numbers or bools",
        )
    return array
