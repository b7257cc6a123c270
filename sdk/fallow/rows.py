"""Rows to and from NumPy: columns of a schema become a row block, and a block becomes columns.

A column's values are an array of shape (rows, *shape) for tensors, and one value a row for the rest: `bytes`, `str`, or
an array for ragged columns. Rows of tensors alone are encoded as one byte matrix; nothing loops over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import ROW_BYTES_MAX
from fallow.row_block import RowBlock, pack_body
from fallow.row_values import Array, ColumnValues, checked_values, described, numpy_dtype
from fallow.schema import (
    BytesColumn,
    Column,
    DType,
    RaggedColumn,
    Schema,
    SizeFeature,
    StringColumn,
    TensorColumn,
)

_U32 = np.dtype("<u4")
_U32_BYTES = 4


@dataclass(frozen=True, slots=True)
class DecodedRows:
    """The rows of a block that have a value."""

    row_count: int
    """Rows in the block, with or without a value."""
    positions: NDArray[np.int64]
    """Rising positions in the block of the rows that `columns` hold."""
    columns: dict[str, ColumnValues]
    """Values by column name, `len(positions)` each."""
    malformed: dict[int, str]
    """Rows whose bytes do not follow the schema or disagree with their size features, and why."""


class RowCodec:
    """Turns columns into row blocks of one schema and back."""

    def __init__(self, schema: Schema, schema_digest: Digest) -> None:
        """A codec for `schema`, whose stored bytes have that digest."""
        self.schema = schema
        self.schema_digest = schema_digest
        self._runs = _runs_of(schema.columns)

    def encode(
        self,
        columns: Mapping[str, ColumnValues],
        *,
        nonce: bytes,
        cast: bool = False,
        positions: NDArray[np.int64] | None = None,
        row_count: int | None = None,
        first_row: int = 0,
    ) -> bytes:
        """The row block of `columns`; other entries of the mapping are left alone.

        With `positions` (rising) and `row_count` the values belong to those rows and all others get no bytes, which in
        outputs means that they failed. `cast` allows conversions that may round or must be checked for range. Errors
        call the first row `first_row`.
        Raises SCHEMA_MISMATCH naming the column, and what `row_block.pack` raises.
        """
        checked = [
            self._checked(column, columns, allow_cast=cast, first_row=first_row) for column in self.schema.columns
        ]
        counts = {len(values) for values in checked}
        if len(counts) != 1:
            told = ", ".join(
                f"{column.name}: {len(values)}" for column, values in zip(self.schema.columns, checked, strict=True)
            )
            raise FallowError(Reason.SCHEMA_MISMATCH, f"the columns differ in length ({told})", field="columns")
        valued = counts.pop()
        total = valued if row_count is None else row_count
        where = np.arange(total, dtype=np.int64) if positions is None else positions
        assert len(where) == valued <= total, "one position for each valued row"
        lengths, body = self._body(checked, valued)
        features = self._features(checked, valued)
        if valued != total:
            lengths = _scattered(lengths, where, total)
            features = _scattered(features, where, total)
        return pack_body(
            self.schema_digest,
            body=body,
            lengths=_as_list(lengths),
            row_count=total,
            features=features.astype(_U32).tobytes(),
            feature_count=len(self.schema.size_features),
            nonce=nonce,
        )

    def decode(self, block: RowBlock) -> DecodedRows:
        """The columns of the rows that have a value; rows that do not follow the schema are listed with a reason.

        Raises SCHEMA_MISMATCH when the block is of another schema.
        """
        if block.schema_digest != self.schema_digest or block.feature_count != len(self.schema.size_features):
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                f"the row block follows schema {block.schema_digest.hex()[:16]}…",
                field="schema_digest",
                limit=f"{self.schema_digest.hex()[:16]}…",
            )
        offsets = np.asarray(block.offsets, dtype=np.uint32).astype(np.int64)
        layout = _Layout(np.frombuffer(block.body, dtype=np.uint8), offsets)
        if self.schema.fixed_row_bytes is not None:
            return self._decode_fixed(layout)
        return self._decode_varying(layout, block)

    def _checked(
        self, column: Column, columns: Mapping[str, ColumnValues], *, allow_cast: bool, first_row: int
    ) -> ColumnValues:
        if column.name not in columns:
            have = ", ".join(sorted(columns)) or "none"
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                f"column {column.name!r} ({described(column)}) is missing; there is: {have}",
                field=column.name,
                limit=described(column),
            )
        return checked_values(column, columns[column.name], allow_cast=allow_cast, first_row=first_row)

    def _body(self, values: Sequence[ColumnValues], count: int) -> tuple[NDArray[np.int64], bytes]:
        """(length of each row, all rows' bytes)."""
        pieces: list[Sequence[bytes | memoryview]] = []
        lengths = np.zeros(count, dtype=np.int64)
        for run in self._runs:
            if isinstance(run, _TensorRun):
                matrix = run.matrix([cast(Array, values[index]) for index in run.indexes], count)
                if len(self._runs) == 1:
                    return np.full(count, run.row_bytes, dtype=np.int64), matrix
                view = memoryview(matrix)
                pieces.append([view[start : start + run.row_bytes] for start in range(0, len(view), run.row_bytes)])
                lengths += run.row_bytes
                continue
            contents, prefix = _varying_pieces(self.schema.columns[run], values[run])
            content_lengths = np.fromiter(map(len, contents), dtype=np.int64, count=count)
            pieces += [prefix or _prefixes(content_lengths), contents]
            lengths += content_lengths + (len(prefix[0]) if prefix else _U32_BYTES)
        return lengths, b"".join(chain.from_iterable(zip(*pieces, strict=True)))

    def size_features(self, columns: Mapping[str, ColumnValues]) -> NDArray[np.int64]:
        """The size features of each row, shape (rows, features), without encoding anything. Raises SCHEMA_MISMATCH."""
        values = [columns[column.name] for column in self.schema.columns]
        return self._features(values, len(values[0]))

    def _features(self, values: Sequence[ColumnValues], count: int) -> NDArray[np.int64]:
        features = np.zeros((count, len(self.schema.size_features)), dtype=np.int64)
        for index, feature in enumerate(self.schema.size_features):
            if feature is not SizeFeature.BYTES:
                raise FallowError(
                    Reason.SCHEMA_MISMATCH,
                    f"size feature {feature.value!r} cannot be counted from columns alone",
                    field=f"size_features[{index}]",
                    limit=SizeFeature.BYTES.value,
                )
            for column, column_values in zip(self.schema.columns, values, strict=True):
                if isinstance(column, BytesColumn):
                    features[:, index] += np.fromiter(map(len, column_values), dtype=np.int64, count=count)
                elif isinstance(column, StringColumn):
                    sizes = (len(text.encode()) for text in cast(Sequence[str], column_values))
                    features[:, index] += np.fromiter(sizes, dtype=np.int64, count=count)
        return features

    def _decode_fixed(self, layout: _Layout) -> DecodedRows:
        run = self._runs[0]
        assert isinstance(run, _TensorRun), "a fixed schema is one run of tensors"
        lengths = layout.ends - layout.starts
        right = lengths == run.row_bytes
        malformed = {
            int(row): f"row is {int(lengths[row])} bytes long where its schema takes {run.row_bytes}"
            for row in np.flatnonzero(~right & (lengths != 0))
        }
        positions = np.flatnonzero(right).astype(np.int64)
        body = layout.body
        if len(positions) * run.row_bytes != len(body):
            body = _gathered(body, layout.starts[positions], run.row_bytes).reshape(-1)
        return self._finished(layout, positions, run.columns_of(body), malformed)

    def _decode_varying(self, layout: _Layout, block: RowBlock) -> DecodedRows:
        count = len(layout.starts)
        present = layout.ends > layout.starts
        places = [self._place(column, layout) for column in self.schema.columns]
        layout.fail(layout.cursor != layout.ends, "row is longer than its schema's columns")
        self._check_features(layout, places, block)
        malformed = {int(row): layout.reasons[int(row)] for row in np.flatnonzero(present & ~layout.sound)}
        positions = np.flatnonzero(present & layout.sound).astype(np.int64)
        columns = {
            column.name: _extracted(column, layout.body, place.select(positions))
            for column, place in zip(self.schema.columns, places, strict=True)
        }
        assert count == len(block)
        return self._finished(layout, positions, columns, malformed)

    def _finished(
        self,
        layout: _Layout,
        positions: NDArray[np.int64],
        columns: dict[str, ColumnValues],
        malformed: dict[int, str],
    ) -> DecodedRows:
        """Takes out rows whose elements are impossible: bools that are neither, text that is not UTF-8."""
        keep = np.ones(len(positions), dtype=np.bool_)
        for column in self.schema.columns:
            for index in _impossible(column, columns[column.name]):
                keep[index] = False
                malformed[int(positions[index])] = f"column {column.name!r} does not hold {described(column)}"
        if not keep.all():
            kept = np.flatnonzero(keep)
            positions = positions[keep]
            columns = {name: _taken(values, kept) for name, values in columns.items()}
        for column in self.schema.columns:
            columns[column.name] = _final(column, columns[column.name])
        return DecodedRows(
            row_count=len(layout.starts),
            positions=positions,
            columns=columns,
            malformed=dict(sorted(malformed.items())),
        )

    def _place(self, column: Column, layout: _Layout) -> _Place:
        match column:
            case TensorColumn():
                return layout.take(np.full(len(layout.starts), column.row_bytes, dtype=np.int64), column.name)
            case BytesColumn() | StringColumn():
                return layout.take(layout.take_u32(column.name), column.name)
            case RaggedColumn():
                return self._ragged_place(column, layout)

    def _ragged_place(self, column: RaggedColumn, layout: _Layout) -> _Place:
        free: list[NDArray[np.int64]] = []
        elements = np.ones(len(layout.starts), dtype=np.int64)
        extent = elements
        for dim in column.shape:
            size = layout.take_u32(column.name) if dim is None else np.full_like(elements, dim)
            if dim is None:
                free.append(size)
            elements = np.minimum(elements * size, ROW_BYTES_MAX + 1)
            # An empty array may still have other dimensions that no machine can address.
            extent = np.minimum(extent * np.maximum(size, 1), ROW_BYTES_MAX + 1)
        layout.fail(extent > ROW_BYTES_MAX, f"column {column.name!r} has dimensions beyond any row")
        place = layout.take(elements * numpy_dtype(column.dtype).itemsize, column.name)
        return _Place(place.starts, place.lengths, tuple(free))

    def _check_features(self, layout: _Layout, places: Sequence[_Place], block: RowBlock) -> None:
        for index, feature in enumerate(self.schema.size_features):
            if feature is not SizeFeature.BYTES:
                continue
            counted = np.zeros(len(layout.starts), dtype=np.int64)
            for column, place in zip(self.schema.columns, places, strict=True):
                if isinstance(column, BytesColumn | StringColumn):
                    counted += place.lengths
            declared = np.asarray(block.size_features, dtype=np.int64)[index :: block.feature_count]
            layout.fail(counted != declared, "row disagrees with its size feature 'bytes'")


def _as_list(lengths: NDArray[np.int64]) -> list[int]:
    """The lengths as Python integers."""
    as_list: list[int] = lengths.tolist()
    return as_list


@dataclass(frozen=True, slots=True)
class _TensorRun:
    """Neighbouring tensor columns, encoded and decoded together as one byte matrix."""

    indexes: tuple[int, ...]
    names: tuple[str, ...]
    dtype: np.dtype[Any]
    """A packed record with fields `0`, `1`, …"""

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize

    def matrix(self, values: Sequence[Array], count: int) -> bytes:
        """All rows' bytes of these columns."""
        if len(values) == 1:
            return values[0].tobytes()
        records = np.empty(count, dtype=self.dtype)
        for index, column in enumerate(values):
            records[str(index)] = column
        return records.tobytes()

    def columns_of(self, body: NDArray[np.uint8]) -> dict[str, ColumnValues]:
        """The columns of rows that lie one after the other in `body`."""
        records = np.frombuffer(body, dtype=self.dtype)
        return {name: records[str(index)] for index, name in enumerate(self.names)}


def _runs_of(columns: Sequence[Column]) -> list[_TensorRun | int]:
    """Runs of tensor columns, and the indexes of the columns between them."""
    runs: list[_TensorRun | int] = []
    pending: list[int] = []

    def close() -> None:
        if pending:
            tensors = [cast(TensorColumn, columns[index]) for index in pending]
            fields = [(str(place), numpy_dtype(t.dtype), t.shape) for place, t in enumerate(tensors)]
            runs.append(_TensorRun(tuple(pending), tuple(t.name for t in tensors), np.dtype(fields)))
            pending.clear()

    for index, column in enumerate(columns):
        if isinstance(column, TensorColumn):
            pending.append(index)
        else:
            close()
            runs.append(index)
    close()
    return runs


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one column's content lies in the body, row by row."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    free_dims: tuple[NDArray[np.int64], ...] = ()

    def select(self, positions: NDArray[np.int64]) -> _Place:
        return _Place(
            self.starts[positions], self.lengths[positions], tuple(dims[positions] for dims in self.free_dims)
        )


class _Layout:
    """Walks all rows of a body at once, column by column."""

    def __init__(self, body: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.body = body
        self.starts = offsets[:-1]
        self.ends = offsets[1:]
        self.cursor = self.starts.copy()
        self.sound = np.ones(len(self.starts), dtype=np.bool_)
        self.reasons: dict[int, str] = {}

    def fail(self, wrong: NDArray[np.bool_], reason: str) -> None:
        for row in np.flatnonzero(wrong & self.sound & (self.ends > self.starts)):
            self.reasons[int(row)] = reason
        self.sound &= ~wrong

    def take(self, lengths: NDArray[np.int64], name: str) -> _Place:
        """The next `lengths` bytes of each row; rows that are too short fail and give nothing."""
        self.fail(self.cursor + lengths > self.ends, f"row ends within column {name!r}")
        starts = self.cursor
        taken = np.where(self.sound, lengths, 0)
        self.cursor = starts + taken
        return _Place(starts, taken)

    def take_u32(self, name: str) -> NDArray[np.int64]:
        """The next u32 of each row; 0 for rows that fail."""
        place = self.take(np.full(len(self.starts), _U32_BYTES, dtype=np.int64), name)
        values = np.zeros(len(self.starts), dtype=np.int64)
        rows = np.flatnonzero(place.lengths)
        values[rows] = _gathered(self.body, place.starts[rows], _U32_BYTES).view(_U32).reshape(-1)
        return values


_GATHER_INDEX_BYTES_MAX = 1 << 16
"""Most that is gathered by an index array, which is eight times as large; more is copied piece by piece."""


def _gathered(body: NDArray[np.uint8], starts: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    """Pieces of `length` bytes as a contiguous matrix (pieces, length)."""
    if length * max(len(starts), 1) <= _GATHER_INDEX_BYTES_MAX or length <= 2 * _U32_BYTES:
        indexes: NDArray[np.int64] = starts[:, None] + np.arange(length, dtype=np.int64)
        return np.take(body, indexes)
    out = np.empty((len(starts), length), dtype=np.uint8)
    for row, start in enumerate(_as_list(starts)):
        out[row] = body[start : start + length]
    return out


def _extracted(column: Column, body: NDArray[np.uint8], place: _Place) -> ColumnValues:
    if isinstance(column, TensorColumn):
        matrix = _gathered(body, place.starts, column.row_bytes)
        return matrix.reshape(-1).view(numpy_dtype(column.dtype)).reshape((len(place.starts), *column.shape))
    view = body.data
    spans = zip(_as_list(place.starts), _as_list(place.lengths), strict=True)
    contents = [bytes(view[start : start + length]) for start, length in spans]
    if not isinstance(column, RaggedColumn):
        return contents
    dtype = numpy_dtype(column.dtype)
    arrays: list[Array] = []
    for row, content in enumerate(contents):
        free = iter(int(dims[row]) for dims in place.free_dims)
        shape = tuple(next(free) if dim is None else dim for dim in column.shape)
        arrays.append(np.frombuffer(content, dtype=dtype).reshape(shape))
    return arrays


def _impossible(column: Column, values: ColumnValues) -> list[int]:
    """Indexes of values whose bytes no value of the column has."""
    if isinstance(column, StringColumn):
        return [index for index, content in enumerate(cast(Sequence[bytes], values)) if not _is_utf8(content)]
    if isinstance(column, TensorColumn) and column.dtype is DType.BOOL:
        elements = int(np.prod(column.shape))
        raw = np.ascontiguousarray(cast(Array, values)).view(np.uint8).reshape(len(values), elements)
        return np.flatnonzero((raw > 1).any(axis=1)).tolist()
    if isinstance(column, RaggedColumn) and column.dtype is DType.BOOL:
        arrays = cast(Sequence[Array], values)
        return [index for index, array in enumerate(arrays) if (array.view(np.uint8) > 1).any()]
    return []


def _final(column: Column, values: ColumnValues) -> ColumnValues:
    if isinstance(column, StringColumn):
        return [content.decode() for content in cast(Sequence[bytes], values)]
    if isinstance(column, TensorColumn):
        return np.ascontiguousarray(cast(Array, values))
    return values


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _taken(values: ColumnValues, kept: NDArray[np.int64]) -> ColumnValues:
    if isinstance(values, np.ndarray):
        return values[kept]
    return cast(ColumnValues, [values[int(index)] for index in kept])


def _scattered(values: NDArray[np.int64], where: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    out = np.zeros((total, *values.shape[1:]), dtype=np.int64)
    out[where] = values
    return out


def _prefixes(lengths: NDArray[np.int64]) -> list[bytes | memoryview]:
    raw = memoryview(lengths.astype(_U32).tobytes())
    return [raw[start : start + _U32_BYTES] for start in range(0, len(raw), _U32_BYTES)]


def _varying_pieces(column: Column, values: ColumnValues) -> tuple[Sequence[bytes], list[bytes | memoryview]]:
    """(content of each row, what stands before it; nothing when that is the content's length)."""
    if isinstance(column, RaggedColumn):
        arrays = cast(Sequence[Array], values)
        free = [axis for axis, dim in enumerate(column.shape) if dim is None]
        prefix: list[bytes | memoryview] = [
            np.asarray([array.shape[axis] for axis in free], dtype=_U32).tobytes() for array in arrays
        ]
        return [array.tobytes() for array in arrays], prefix
    if isinstance(column, StringColumn):
        return [text.encode() for text in cast(Sequence[str], values)], []
    return cast(Sequence[bytes], values), []
