"""Row blocks: how rows travel. Anyone can slice, pack and hash one without knowing what a row means.

Layout, all little-endian and frozen: a header of 72 bytes (magic `FRB\\x01`, rows n as u32, flags u32 = 0, size
features f as u32, schema digest 32 bytes, nonce 16 bytes, body length u64), then n + 1 u32 offsets into the body, then
n x f u32 size features row by row, then the body. A row's bytes are its columns in schema order. A row of no bytes is,
in outputs, a failed row without a value.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from fallow import merkle
from fallow.errors import FallowError, Reason
from fallow.ids import DIGEST_BYTES, Digest, digest_of
from fallow.limits import BLOCK_BYTES_MAX, BLOCK_ROWS_MAX, ROW_BYTES_MAX, SIZE_FEATURES_MAX

MAGIC: Final = b"FRB\x01"
NONCE_BYTES: Final = 16
HEADER_BYTES: Final = 72
_HEADER: Final = struct.Struct("<4sIII32s16sQ")
_NONCE_START: Final = 48
_U32_BYTES: Final = 4
_U32_MAX: Final = 0xFFFFFFFF

assert _HEADER.size == HEADER_BYTES
assert array("I").itemsize == _U32_BYTES, "fallow needs a platform whose C unsigned int has 32 bits"

Buffer = bytes | bytearray | memoryview


class Span(NamedTuple):
    """Rows `start` up to, not including, `end` of the block that stands at `block` in a sequence of blocks."""

    block: int
    start: int
    end: int


class RowBlock:
    """A checked view of a block's bytes; rows are memoryviews into them, nothing is copied."""

    __slots__ = (
        "_body",
        "_body_start",
        "_data",
        "_offsets",
        "_size_features",
        "feature_count",
        "nonce",
        "schema_digest",
    )

    def __init__(
        self,
        *,
        data: memoryview,
        schema_digest: Digest,
        nonce: bytes,
        feature_count: int,
        offsets: Sequence[int],
        size_features: Sequence[int],
        body_start: int,
    ) -> None:
        """Takes what `parse` has checked; call `parse`."""
        self._data = data
        self.schema_digest = schema_digest
        """The digest of the schema that the rows follow."""
        self.nonce = nonce
        """16 bytes that keep equal rows from giving equal blocks."""
        self.feature_count = feature_count
        """How many size features stand beside each row."""
        self._offsets = offsets
        self._size_features = size_features
        self._body_start = body_start
        self._body = data[body_start:]

    @classmethod
    def parse(cls, data: Buffer) -> RowBlock:
        """A view of `data` once every offset in it has been checked.

        Raises BLOCK_TOO_LARGE, ROW_TOO_LARGE or ROW_BLOCK_MALFORMED, naming the offset in the block.
        """
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        view = view.toreadonly()
        if view.nbytes > BLOCK_BYTES_MAX:
            raise _block_too_large(view.nbytes)
        if view.nbytes < HEADER_BYTES:
            raise _malformed(f"{view.nbytes} bytes, shorter than its header", 0, f"at least {HEADER_BYTES} bytes")
        magic, row_count, flags, feature_count, schema_digest, nonce, body_length = _HEADER.unpack_from(view)
        if magic != MAGIC:
            raise _malformed(f"starts with {magic!r}", 0, f"{MAGIC!r}")
        if not 1 <= row_count <= BLOCK_ROWS_MAX:
            raise _malformed(f"says {row_count} rows", 4, f"1 to {BLOCK_ROWS_MAX} rows")
        if flags != 0:
            raise _malformed(f"has flags {flags:#x}", 8, "0")
        if feature_count > SIZE_FEATURES_MAX:
            raise _malformed(f"says {feature_count} size features", 12, f"at most {SIZE_FEATURES_MAX}")
        features_start = HEADER_BYTES + (row_count + 1) * _U32_BYTES
        body_start = features_start + row_count * feature_count * _U32_BYTES
        if view.nbytes != body_start + body_length:
            raise _malformed(
                f"is {view.nbytes} bytes long where its header says {body_start + body_length}", 64, "equal lengths"
            )
        offsets = _u32_view(view[HEADER_BYTES:features_start])
        _check_offsets(offsets, body_length)
        return cls(
            data=view,
            schema_digest=Digest(schema_digest),
            nonce=nonce,
            feature_count=feature_count,
            offsets=offsets,
            size_features=_u32_view(view[features_start:body_start]),
            body_start=body_start,
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> memoryview:
        """The bytes of one row. Negative positions are not for rows."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._body[self._offsets[row] : self._offsets[row + 1]]

    def __iter__(self) -> Iterator[memoryview]:
        body = self._body
        for start, end in pairwise(self._offsets):
            yield body[start:end]

    @property
    def data(self) -> memoryview:
        """The whole block, as it travels and as it is digested."""
        return self._data

    @property
    def body(self) -> memoryview:
        """All rows' bytes, one after the other."""
        return self._body

    @property
    def offsets(self) -> Sequence[int]:
        """n + 1 offsets into the body: row i lies at offsets[i] up to offsets[i + 1]."""
        return self._offsets

    @property
    def size_features(self) -> Sequence[int]:
        """n x f size features, row by row."""
        return self._size_features

    @property
    def nbytes(self) -> int:
        """The length of the whole block in bytes."""
        return self._data.nbytes

    @property
    def digest(self) -> Digest:
        """SHA-256 of the whole block; computed anew at each call."""
        return digest_of(self._data)

    def row_size_features(self, row: int) -> tuple[int, ...]:
        """The size features of one row, in schema order."""
        start = row * self.feature_count
        return tuple(self._size_features[start : start + self.feature_count])

    @property
    def size_feature_sums(self) -> tuple[int, ...]:
        """Each size feature summed over the rows, in schema order."""
        count = self.feature_count
        return tuple(sum(self._size_features[feature::count]) for feature in range(count))

    def leaves(self) -> list[Digest]:
        """The leaf digests of the rows, indexed by their position in this block."""
        return merkle.leaf_digests(self)

    def root(self) -> Digest:
        """The Merkle root over the rows: what a commitment signs."""
        return merkle.root_of(self.leaves())


class RowBlockWriter:
    """Collects rows one by one and packs them; refuses a row that would break a limit and stays as it was."""

    __slots__ = ("_body_bytes", "_feature_count", "_features", "_rows", "_schema_digest")

    def __init__(self, schema_digest: Digest, feature_count: int) -> None:
        """Collects rows of the schema with that digest, each with `feature_count` size features."""
        self._schema_digest = schema_digest
        self._feature_count = feature_count
        self._rows: list[Buffer] = []
        self._features = array("I")
        self._body_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """The length of the block if it were packed now, in bytes."""
        return block_bytes(row_count=len(self._rows), feature_count=self._feature_count, body_bytes=self._body_bytes)

    def add(self, row: Buffer, features: Sequence[int] = ()) -> None:
        """Appends a row and its size features; `row` is kept by reference until packed.

        Raises ROW_TOO_LARGE, BLOCK_TOO_LARGE, LIMIT_EXCEEDED (rows) or FIELD_INVALID (a feature that is no u32).
        """
        length = len(row)
        position = len(self._rows)
        if length > ROW_BYTES_MAX:
            raise _row_too_large(position, length)
        if position >= BLOCK_ROWS_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED, "a row block is full", field="rows", limit=f"{BLOCK_ROWS_MAX} rows"
            )
        total = block_bytes(
            row_count=position + 1, feature_count=self._feature_count, body_bytes=self._body_bytes + length
        )
        if total > BLOCK_BYTES_MAX:
            raise _block_too_large(total)
        _check_features(features, self._feature_count, f"rows[{position}].size_features")
        self._rows.append(row)
        self._features.extend(features)
        self._body_bytes += length

    def pack(self, nonce: bytes) -> bytes:
        """The block of the rows collected so far. Raises DATASET_EMPTY when there are none."""
        return _assemble(
            schema_digest=self._schema_digest,
            nonce=nonce,
            lengths=map(len, self._rows),
            row_count=len(self._rows),
            feature_count=self._feature_count,
            features=[_u32_bytes(self._features)],
            pieces=self._rows,
        )


def pack(
    schema_digest: Digest,
    rows: Sequence[Buffer],
    features: Sequence[Sequence[int]],
    nonce: bytes,
) -> bytes:
    """The block of `rows`, `features[i]` being the size features of row i (or `features` empty when there are none).

    Raises DATASET_EMPTY, ROW_TOO_LARGE, BLOCK_TOO_LARGE, LIMIT_EXCEEDED or FIELD_INVALID.
    """
    writer = RowBlockWriter(schema_digest, len(features[0]) if features else 0)
    if features and len(features) != len(rows):
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{len(features)} lists of size features for {len(rows)} rows",
            field="size_features",
            limit="one for each row",
        )
    for position, row in enumerate(rows):
        writer.add(row, features[position] if features else ())
    return writer.pack(nonce)


def pack_body(
    schema_digest: Digest,
    *,
    body: Buffer,
    lengths: Iterable[int],
    row_count: int,
    features: Buffer = b"",
    feature_count: int = 0,
    nonce: bytes,
) -> bytes:
    """The block of rows that already stand one after the other in `body`; `features` are its u32 bytes, little-endian.

    For callers that encode many rows at once. Raises what `pack` raises.
    """
    length = len(features) if not isinstance(features, memoryview) else features.nbytes
    assert length == row_count * feature_count * _U32_BYTES, "size features do not fit the rows"
    return _assemble(
        schema_digest=schema_digest,
        nonce=nonce,
        lengths=lengths,
        row_count=row_count,
        feature_count=feature_count,
        features=[features],
        pieces=[body],
    )


def pack_selection(
    sources: Sequence[RowBlock],
    selection: Iterable[tuple[int, int, int]],
    nonce: bytes,
) -> bytes:
    """A fresh block of the selected rows, in the order in which `selection` names them.

    `selection` holds (block, start, end): rows `start` up to `end` of `sources[block]`; a `Span` will do. Contiguous
    rows are copied as one piece. Raises SCHEMA_MISMATCH when sources follow different schemas, FIELD_INVALID for a
    range that is not in its block, and DATASET_EMPTY, BLOCK_TOO_LARGE or LIMIT_EXCEEDED as `pack` does.
    """
    if not sources:
        raise _empty()
    first = sources[0]
    if any(
        source.schema_digest != first.schema_digest or source.feature_count != first.feature_count for source in sources
    ):
        raise FallowError(Reason.SCHEMA_MISMATCH, "row blocks of different schemas cannot be packed together")
    feature_count = first.feature_count
    lengths: list[int] = []
    features: list[Buffer] = []
    pieces: list[Buffer] = []
    for position, (block, start, end) in enumerate(selection):
        if not 0 <= block < len(sources) or not 0 <= start < end <= len(sources[block]):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"rows {start} to {end} of block {block} do not exist",
                field=f"selection[{position}]",
            )
        source = sources[block]
        offsets = source.offsets[start : end + 1]
        if end - start == 1:
            lengths.append(offsets[1] - offsets[0])
        else:
            lengths.extend([high - low for low, high in pairwise(offsets)])
        pieces.append(source.body[offsets[0] : offsets[-1]])
        if feature_count:
            features.append(_u32_bytes(source.size_features[start * feature_count : end * feature_count]))
    return _assemble(
        schema_digest=first.schema_digest,
        nonce=nonce,
        lengths=lengths,
        row_count=len(lengths),
        feature_count=feature_count,
        features=features,
        pieces=pieces,
    )


def with_nonce(block: bytes, nonce: bytes) -> bytes:
    """The same block under another nonce."""
    assert len(nonce) == NONCE_BYTES and len(block) >= HEADER_BYTES, "a whole block and a nonce of 16 bytes"
    return b"".join((block[:_NONCE_START], nonce, memoryview(block)[_NONCE_START + NONCE_BYTES :]))


def block_bytes(*, row_count: int, feature_count: int, body_bytes: int) -> int:
    """The length in bytes of a block with that many rows, size features and body bytes."""
    return HEADER_BYTES + (row_count + 1 + row_count * feature_count) * _U32_BYTES + body_bytes


def _assemble(
    *,
    schema_digest: Digest,
    nonce: bytes,
    lengths: Iterable[int],
    row_count: int,
    feature_count: int,
    features: Sequence[Buffer],
    pieces: Sequence[Buffer],
) -> bytes:
    assert len(schema_digest) == DIGEST_BYTES, "a schema digest has 32 bytes"
    assert len(nonce) == NONCE_BYTES, "a nonce has 16 bytes"
    if row_count < 1:
        raise _empty()
    if row_count > BLOCK_ROWS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"a block of {row_count} rows", field="rows", limit=f"{BLOCK_ROWS_MAX} rows"
        )
    offsets = [0, *accumulate(lengths)]
    assert len(offsets) == row_count + 1, "one length for each row"
    total = block_bytes(row_count=row_count, feature_count=feature_count, body_bytes=offsets[-1])
    if total > BLOCK_BYTES_MAX:
        raise _block_too_large(total)
    if offsets[-1] > ROW_BYTES_MAX:
        for position, (start, end) in enumerate(pairwise(offsets)):
            if end - start > ROW_BYTES_MAX:
                raise _row_too_large(position, end - start)
    header = _HEADER.pack(MAGIC, row_count, 0, feature_count, schema_digest, nonce, offsets[-1])
    block = b"".join((header, _u32_bytes(array("I", offsets)), *features, *pieces))
    assert len(block) == total, "the pieces do not add up to the offsets"
    return block


def _check_offsets(offsets: Sequence[int], body_length: int) -> None:
    if offsets[0] != 0:
        raise _malformed(f"first offset is {offsets[0]}", HEADER_BYTES, "0")
    row_count = len(offsets) - 1
    if offsets[row_count] != body_length:
        raise _malformed(
            f"last offset is {offsets[row_count]}",
            HEADER_BYTES + row_count * _U32_BYTES,
            f"the body's {body_length} bytes",
        )
    previous = 0
    for index, offset in enumerate(offsets):
        length = offset - previous
        if length < 0:
            raise _malformed(
                f"offset {index} ({offset}) lies before offset {index - 1} ({previous})",
                HEADER_BYTES + index * _U32_BYTES,
                "offsets that never fall",
            )
        if length > ROW_BYTES_MAX:
            raise _row_too_large(index - 1, length)
        previous = offset


def _check_features(features: Sequence[int], feature_count: int, field: str) -> None:
    if len(features) != feature_count:
        raise FallowError(
            Reason.FIELD_INVALID, f"{len(features)} size features", field=field, limit=f"{feature_count} for each row"
        )
    for feature in features:
        if not 0 <= feature <= _U32_MAX:
            raise FallowError(Reason.FIELD_INVALID, f"size feature {feature}", field=field, limit=f"0 to {_U32_MAX}")


def _u32_view(data: memoryview) -> Sequence[int]:
    """Little-endian u32s as integers, without a copy where the machine stores them so."""
    if sys.byteorder == "little":
        return data.cast("I")
    values = array("I", bytes(data))
    values.byteswap()
    return values


def _u32_bytes(values: Sequence[int]) -> Buffer:
    """Integers as little-endian u32 bytes."""
    if sys.byteorder == "little" and isinstance(values, memoryview):
        return values.cast("B")
    packed = values if isinstance(values, array) else array("I", values)
    if sys.byteorder != "little":
        packed = array("I", packed)
        packed.byteswap()
    return packed.tobytes()


def _malformed(what: str, offset: int, allowed: str) -> FallowError:
    return FallowError(
        Reason.ROW_BLOCK_MALFORMED,
        f"the row block {what}, at byte {offset}",
        field=f"row_block[{offset}]",
        limit=allowed,
    )


def _row_too_large(position: int, length: int) -> FallowError:
    return FallowError(
        Reason.ROW_TOO_LARGE,
        f"row {position} of the block takes {length} bytes",
        field=f"rows[{position}]",
        limit=f"{ROW_BYTES_MAX} bytes a row",
    )


def _block_too_large(length: int) -> FallowError:
    return FallowError(
        Reason.BLOCK_TOO_LARGE,
        f"a row block of {length} bytes",
        field="row_block",
        limit=f"{BLOCK_BYTES_MAX} bytes a block",
        hint="cut the rows into several blocks",
    )


def _empty() -> FallowError:
    return FallowError(Reason.DATASET_EMPTY, "a row block without rows", field="rows", limit="at least 1 row")
