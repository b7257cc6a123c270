"""A source of rows cut into row blocks, and the kept columns beside them in one Arrow file."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import BLOCK_ROWS_MAX, JOB_BLOCKS_MAX, JOB_ROWS_MAX, MIB, ROW_BYTES_MAX
from fallow.row_block import NONCE_BYTES, RowBlock, pack_selection, with_nonce
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import Schema, TensorColumn
from fallow.sources.port import Source, SourceBatch, SourceRequest, UnreadRow

BLOCK_BYTES_TARGET = 8 * MIB
FAILURE_COLUMN: Final = "fallow.failure"
"""In the file of kept columns: null for submitted rows, which come first in job order; then the reasons of those that
could not be read."""
_ZERO_NONCE = bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a dataset, ready to travel."""

    data: bytes
    digest: Digest
    rows: int


class DatasetReader:
    """Reads a source once, giving its blocks; then the kept columns lie in a file and the unread rows are known."""

    def __init__(
        self,
        source: Source,
        request: SourceRequest,
        codec: RowCodec,
        *,
        nonce_key: bytes,
        unread_rows_max: int,
    ) -> None:
        """Prepares to read; raises SCHEMA_MISMATCH at once when a column is missing.

        `nonce_key` is secret: with it equal content gives equal blocks, so that a repeated submission uploads nothing
        twice, and without it nobody can tell what a block holds.
        """
        source.check(request)
        self._source = source
        self._request = request
        self._codec = codec
        self._nonce_key = nonce_key
        self._unread_rows_max = unread_rows_max
        kept_schema = source.kept_schema(request)
        self.kept_schema: pa.Schema | None = (
            kept_schema.append(pa.field(FAILURE_COLUMN, pa.string())) if kept_schema is not None else None
        )
        self.unread: list[UnreadRow] = []
        """Rows that could not be read so far."""
        self.rows = 0
        """Rows given in blocks so far."""

    def blocks(self, kept_path: Path | None = None) -> Iterator[Block]:
        """The blocks, each about 8 MiB or less. Blocking; call it outside the event loop, once.

        Kept columns are written to `kept_path`, which must be given when there is a `kept_schema`.
        Raises DATASET_EMPTY, ROW_TOO_LARGE, SCHEMA_MISMATCH, and LIMIT_EXCEEDED for too many rows, blocks or unread
        rows.
        """
        count = 0
        with _KeptWriter(kept_path, self.kept_schema) as kept:
            for block in self._coalesced(self._packed(kept)):
                count += 1
                self.rows += block.rows
                if self.rows > JOB_ROWS_MAX or count > JOB_BLOCKS_MAX:
                    raise FallowError(
                        Reason.LIMIT_EXCEEDED,
                        "the dataset is too large for one job",
                        field="rows",
                        limit=f"{JOB_ROWS_MAX} rows, {JOB_BLOCKS_MAX} blocks",
                        hint="submit it as several jobs",
                    )
                yield block
            kept.add_unread(self.unread)
        if not count:
            first = f"; the first of {len(self.unread)} unread ones: {self.unread[0].reason}" if self.unread else ""
            raise FallowError(Reason.DATASET_EMPTY, f"there are no rows to submit{first}", field="rows")

    def _packed(self, kept: _KeptWriter) -> Iterator[bytes]:
        first_row = 0
        for batch in self._source.batches(self._request):
            self._take_unread(batch)
            if not batch.row_count:
                continue
            if batch.kept is not None:
                kept.add(batch.kept)
            for start, end in self._cuts(batch, first_row):
                columns = {name: values[start:end] for name, values in batch.columns.items()}
                yield self._codec.encode(
                    columns, nonce=_ZERO_NONCE, cast=self._request.cast, first_row=first_row + start
                )
            first_row += batch.row_count

    def _coalesced(self, blocks: Iterator[bytes]) -> Iterator[Block]:
        """Small neighbours packed together, each with its final nonce."""
        pending: list[bytes] = []
        size = rows = 0
        for data in blocks:
            count = len(RowBlock.parse(data)) if len(data) < BLOCK_BYTES_TARGET else BLOCK_ROWS_MAX
            if pending and (size + len(data) > BLOCK_BYTES_TARGET or rows + count > BLOCK_ROWS_MAX):
                yield self._sealed(pending)
                pending, size, rows = [], 0, 0
            pending.append(data)
            size += len(data)
            rows += count
        if pending:
            yield self._sealed(pending)

    def _sealed(self, pending: Sequence[bytes]) -> Block:
        parsed = [RowBlock.parse(data) for data in pending]
        data = pending[0]
        if len(pending) > 1:
            everything = [(index, 0, len(block)) for index, block in enumerate(parsed)]
            data = pack_selection(parsed, everything, _ZERO_NONCE)
        nonce = hashlib.blake2b(data, digest_size=NONCE_BYTES, key=self._nonce_key).digest()
        sealed = with_nonce(data, nonce)
        return Block(sealed, digest_of(sealed), sum(len(block) for block in parsed))

    def _take_unread(self, batch: SourceBatch) -> None:
        self.unread += batch.unread
        if len(self.unread) > self._unread_rows_max:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"{len(self.unread)} rows could not be read; the first: {_named(self.unread[0])}",
                field="failed_rows_max",
                limit=f"{self._unread_rows_max} failed rows",
                hint="allow more failed rows, or make them readable",
            )

    def _cuts(self, batch: SourceBatch, first_row: int) -> Iterator[tuple[int, int]]:
        """Row ranges of a batch whose blocks stay near the target."""
        sizes = _row_sizes(self._codec.schema, batch)
        largest = int(sizes.argmax())
        if sizes[largest] > ROW_BYTES_MAX:
            raise FallowError(
                Reason.ROW_TOO_LARGE,
                f"row {first_row + largest} takes {int(sizes[largest])} bytes",
                field=f"rows[{first_row + largest}]",
                limit=f"{ROW_BYTES_MAX} bytes a row",
            )
        ends = np.cumsum(sizes)
        start = 0
        while start < batch.row_count:
            before = int(ends[start - 1]) if start else 0
            end = int(np.searchsorted(ends, before + BLOCK_BYTES_TARGET, side="right"))
            end = min(max(end, start + 1), start + BLOCK_ROWS_MAX, batch.row_count)
            yield start, end
            start = end


class _KeptWriter:
    """Writes kept columns as an uncompressed Arrow file, so that a reader can map it."""

    def __init__(self, path: Path | None, schema: pa.Schema | None) -> None:
        assert schema is None or path is not None, "kept columns need a file"
        self._schema = schema
        self._writer: Any = pa.ipc.new_file(str(path), schema) if schema is not None else None

    def __enter__(self) -> _KeptWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, rows: pa.RecordBatch) -> None:
        """Appends the kept columns of submitted rows."""
        assert self._schema is not None
        nothing = pa.nulls(rows.num_rows, pa.string())
        self._writer.write_batch(pa.RecordBatch.from_arrays([*rows.columns, nothing], schema=self._schema))

    def add_unread(self, unread: Sequence[UnreadRow]) -> None:
        """Appends the kept columns of rows that were not submitted."""
        if self._schema is None or not unread:
            return
        rows = [{**row.kept, FAILURE_COLUMN: row.reason} for row in unread]
        self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))


def _row_sizes(schema: Schema, batch: SourceBatch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """About what each row takes in a block; never less than the truth by more than a few bytes a character of text."""
    sizes = np.zeros(batch.row_count, dtype=np.int64)
    for column in schema.columns:
        if isinstance(column, TensorColumn):
            sizes += column.row_bytes
        else:
            lengths = (_length(value) for value in batch.columns[column.name])
            sizes += np.fromiter(lengths, dtype=np.int64, count=batch.row_count)
    return sizes


def _length(value: object) -> int:
    """Bytes of one varying value; 0 for what the encoder will refuse."""
    if isinstance(value, str):
        return 4 + (len(value) if value.isascii() else len(value.encode(errors="replace")))
    if isinstance(value, bytes):
        return 4 + len(value)
    nbytes: object = getattr(value, "nbytes", 0)
    return 4 + nbytes if isinstance(nbytes, int) else 0


def _named(row: UnreadRow) -> str:
    values = cast("Mapping[str, ColumnValues]", row.kept).values()
    return f"{', '.join(map(str, values))}: {row.reason}" if row.kept else row.reason
