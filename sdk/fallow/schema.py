"""The schema of a row: columns in order, and the size features that stand in clear beside them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from fallow.errors import FallowError, Reason
from fallow.limits import COLUMN_NAME_BYTES_MAX, ROW_BYTES_MAX, SCHEMA_COLUMNS_MAX, SIZE_FEATURES_MAX, TENSOR_RANK_MAX


class DType(StrEnum):
    """Element types of tensors, named as NumPy and ONNX name them."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    UINT64 = "uint64"
    BOOL = "bool"


DTYPE_BYTES: dict[DType, int] = {
    DType.FLOAT32: 4,
    DType.FLOAT64: 8,
    DType.FLOAT16: 2,
    DType.INT8: 1,
    DType.INT16: 2,
    DType.INT32: 4,
    DType.INT64: 8,
    DType.UINT8: 1,
    DType.UINT16: 2,
    DType.UINT32: 4,
    DType.UINT64: 8,
    DType.BOOL: 1,
}


class SizeFeature(StrEnum):
    """What a row's size is counted in, in clear in the row block, as uint32."""

    BYTES = "bytes"
    TOKENS = "tokens"
    PIXELS = "pixels"
    MILLISECONDS = "milliseconds"


@dataclass(frozen=True, slots=True)
class TensorColumn:
    """A tensor of fixed dtype and shape (the row axis not included); little-endian, C order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes this column takes in every row."""
        size = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True, slots=True)
class RaggedColumn:
    """A tensor whose shape differs from row to row: `None` marks a free dimension.

    Encoded as one uint32 for each free dimension, in order, then the elements.
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class BytesColumn:
    """Opaque bytes: a uint32 length, then the bytes."""

    name: str


@dataclass(frozen=True, slots=True)
class StringColumn:
    """UTF-8 text: a uint32 length in bytes, then the bytes."""

    name: str


Column = TensorColumn | RaggedColumn | BytesColumn | StringColumn

SchemaBytes = NewType("SchemaBytes", bytes)
"""A schema's deterministic protobuf bytes, as stored; its digest is their SHA-256."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Columns in the order in which they stand in a row's bytes, and the size features of each row."""

    columns: tuple[Column, ...]
    size_features: tuple[SizeFeature, ...] = ()

    def __post_init__(self) -> None:
        check_schema(self)

    @property
    def fixed_row_bytes(self) -> int | None:
        """The length of every row in bytes, or None when some column varies."""
        total = 0
        for column in self.columns:
            if not isinstance(column, TensorColumn):
                return None
            total += column.row_bytes
        return total

    def column(self, name: str) -> Column:
        """The column called `name`. Raises SCHEMA_MISMATCH when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        have = ", ".join(column.name for column in self.columns)
        raise FallowError(Reason.SCHEMA_MISMATCH, f"there is no column {name!r}", field=name, limit=have)


def check_schema(schema: Schema) -> None:
    """Raises FIELD_INVALID or LIMIT_EXCEEDED when a schema could not describe a row."""
    if not 1 <= len(schema.columns) <= SCHEMA_COLUMNS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a schema of {len(schema.columns)} columns",
            field="columns",
            limit=f"1 to {SCHEMA_COLUMNS_MAX} columns",
        )
    if len(schema.size_features) > SIZE_FEATURES_MAX or len(set(schema.size_features)) != len(schema.size_features):
        raise FallowError(
            Reason.FIELD_INVALID,
            "size features repeat or are too many",
            field="size_features",
            limit=f"up to {SIZE_FEATURES_MAX}, each once",
        )
    seen: set[str] = set()
    for index, column in enumerate(schema.columns):
        _check_column(column, f"columns[{index}]", seen)
    least = sum(_least_bytes(column) for column in schema.columns)
    if least > ROW_BYTES_MAX:
        raise FallowError(
            Reason.ROW_TOO_LARGE,
            f"a row would take {least} bytes or more",
            field="columns",
            limit=f"{ROW_BYTES_MAX} bytes",
        )


def _least_bytes(column: Column) -> int:
    """Bytes that a row cannot do without: the smallest value of a column that varies counts with one element."""
    if isinstance(column, TensorColumn):
        return column.row_bytes
    if isinstance(column, RaggedColumn):
        return TensorColumn(column.name, column.dtype, tuple(dim or 1 for dim in column.shape)).row_bytes
    return 0


def _check_column(column: Column, field: str, seen: set[str]) -> None:
    name_bytes = len(column.name.encode())
    if not 1 <= name_bytes <= COLUMN_NAME_BYTES_MAX or column.name in seen:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"column name {column.name!r} is empty, too long or repeated",
            field=f"{field}.name",
            limit=f"1 to {COLUMN_NAME_BYTES_MAX} bytes, each once",
        )
    seen.add(column.name)
    if isinstance(column, TensorColumn | RaggedColumn):
        dims = [dim for dim in column.shape if dim is not None]
        if len(column.shape) > TENSOR_RANK_MAX or any(dim < 1 or dim > ROW_BYTES_MAX for dim in dims):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"column {column.name!r} has shape {list(column.shape)}",
                field=f"{field}.shape",
                limit=f"at most {TENSOR_RANK_MAX} dimensions, each from 1 to {ROW_BYTES_MAX}",
            )
        if isinstance(column, RaggedColumn) and None not in column.shape:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"ragged column {column.name!r} has no free dimension",
                field=f"{field}.shape",
                hint="declare it as a tensor",
            )
