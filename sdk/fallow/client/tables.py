"""Results as Arrow tables and files."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# pyarrow carries no types.

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fallow.arrow_rows import arrow_schema, to_arrow
from fallow.client.kept import KeptColumns, python_rows
from fallow.client.results import STATUS_FAILED, ResultRows
from fallow.errors import FallowError, Reason
from fallow.job import WorkerShare
from fallow.row_values import ColumnValues
from fallow.schema import Schema

ROW_COLUMN: Final = "fallow.row"
STATUS_COLUMN: Final = "fallow.status"
CAUSE_COLUMN: Final = "fallow.cause"
REASON_COLUMN: Final = "fallow.reason"

_FACTS: Final = [
    pa.field(ROW_COLUMN, pa.int64()),
    pa.field(STATUS_COLUMN, pa.string()),
    pa.field(CAUSE_COLUMN, pa.string()),
    pa.field(REASON_COLUMN, pa.string()),
]


@dataclass(frozen=True, slots=True)
class Saved:
    """What was written."""

    path: Path
    rows: int
    """Rows with a value."""
    failed_path: Path | None
    """The side file with rows that failed and their reasons; None when none did."""
    failed_rows: int
    shares: tuple[WorkerShare, ...] = ()
    """Who did how much, most first."""


class ResultTables:
    """Builds Arrow batches: kept columns, output columns, then position, status, cause and reason of each row."""

    def __init__(self, schema: Schema, kept: KeptColumns | None) -> None:
        """Tables of rows of the output `schema` beside `kept` columns."""
        self._output = schema
        self._kept = kept
        carried = list(kept.schema) if kept is not None else []
        self._kept_names = [field.name for field in carried]
        self.schema: pa.Schema = pa.schema([*carried, *arrow_schema(schema), *_FACTS])
        """Columns of every batch; outputs are null, and cause and reason are not, where the status is `failed`."""

    def batch(self, parts: Sequence[ResultRows]) -> pa.RecordBatch:
        """The rows of `parts`, ordered by position."""
        positions, statuses, failures = _positions(parts)
        order = np.argsort(positions, kind="stable")
        valued = sum(len(part.positions) for part in parts)
        # Rows after the valued ones are the failed ones, which have nothing to take.
        indexes = pa.array(order, mask=order >= valued)
        arrays: list[pa.Array] = []
        for column in self._output.columns:
            values = to_arrow(_joined([part.columns[column.name] for part in parts]), column)
            arrays.append(values.take(indexes))
        told = [failures[row - valued] if row >= valued else None for row in order.tolist()]
        facts = [
            pa.array(positions[order]),
            pa.array([statuses[row] for row in order.tolist()], pa.string()),
            pa.array([failure.cause.value if failure else None for failure in told], pa.string()),
            pa.array([failure.reason if failure else None for failure in told], pa.string()),
        ]
        return pa.RecordBatch.from_arrays([*self._carried(positions[order]), *arrays, *facts], schema=self.schema)

    def unread(self) -> pa.RecordBatch | None:
        """The rows that could not be read; None when there are none."""
        if self._kept is None or not self._kept.unread_rows:
            return None
        rows = self._kept.unread()
        positions = np.asarray([position for position, _ in rows], dtype=np.int64)
        nothing = [pa.nulls(len(rows), field.type) for field in arrow_schema(self._output)]
        facts = [
            pa.array(positions),
            pa.array([STATUS_FAILED] * len(rows)),
            pa.array([failure.cause.value for _, failure in rows]),
            pa.array([failure.reason for _, failure in rows]),
        ]
        return pa.RecordBatch.from_arrays([*self._carried(positions), *nothing, *facts], schema=self.schema)

    def valued_part(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of `batch` that have a value, without cause and reason."""
        names = [name for name in self.schema.names if name not in {CAUSE_COLUMN, REASON_COLUMN}]
        return batch.filter(pc.is_null(batch.column(CAUSE_COLUMN))).select(names)

    def failed_part(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of `batch` that failed: kept columns, position, cause and reason."""
        names = [*self._kept_names, ROW_COLUMN, CAUSE_COLUMN, REASON_COLUMN]
        return batch.filter(pc.is_valid(batch.column(CAUSE_COLUMN))).select(names)

    def _carried(self, positions: NDArray[np.int64]) -> list[pa.Array]:
        if self._kept is None:
            return []
        columns = self._kept.take(positions).columns
        return [pa.concat_arrays(c.chunks) if c.num_chunks else pa.nulls(0, c.type) for c in columns]


class _Writer(Protocol):
    def write_batch(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


class ResultFile:
    """Writes valued rows to a file and failed ones to its side file; nothing is seen under either name until both are
    whole."""

    def __init__(self, path: Path, tables: ResultTables) -> None:
        """A file at `path`: `.parquet`, `.arrow` or `.jsonl`. Raises FIELD_INVALID for another ending or no folder."""
        check_result_path(path)
        self._tables = tables
        self._path = path
        self._failed_path = path.with_name(f"{path.stem}.failed{path.suffix}")
        self._partial = path.with_name(f".{path.name}.partial")
        self._failed_partial = path.with_name(f".{self._failed_path.name}.partial")
        self._valued: _Writer | None = None
        self._failed: _Writer | None = None
        self._rows = self._failed_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch of `ResultTables`. Raises STORAGE_FULL when the disk refuses."""
        valued, failed = self._tables.valued_part(batch), self._tables.failed_part(batch)
        make = _WRITERS[self._path.suffix]
        try:
            # An empty result is a file too, with its columns.
            self._valued = self._valued or make(self._partial, valued.schema)
            if valued.num_rows:
                self._valued.write_batch(valued)
                self._rows += valued.num_rows
            if failed.num_rows:
                self._failed = self._failed or make(self._failed_partial, failed.schema)
                self._failed.write_batch(failed)
                self._failed_rows += failed.num_rows
        except OSError as error:
            raise FallowError(
                Reason.STORAGE_FULL, f"cannot write {self._path}: {error.strerror or error}", field="path"
            ) from error
        except pa.ArrowException as error:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"these columns cannot go into a {self._path.suffix} file: {error}",
                field="path",
                hint="another ending may take them: .arrow, .jsonl",
            ) from error

    def finish(self) -> Saved:
        """Makes the files visible; an older side file goes away when nothing failed."""
        if self._valued is None:
            empty = pa.RecordBatch.from_pylist([], schema=self._tables.schema)
            self.write(empty)
        for writer in (self._valued, self._failed):
            if writer is not None:
                writer.close()
        self._partial.replace(self._path)
        if self._failed is not None:
            self._failed_partial.replace(self._failed_path)
        else:
            self._failed_path.unlink(missing_ok=True)
        failed_path = self._failed_path if self._failed is not None else None
        return Saved(self._path, self._rows, failed_path, self._failed_rows)

    def abandon(self) -> None:
        """Removes what was written so far."""
        for writer in (self._valued, self._failed):
            if writer is not None:
                writer.close()
        self._partial.unlink(missing_ok=True)
        self._failed_partial.unlink(missing_ok=True)


def check_result_path(path: Path) -> None:
    """Raises FIELD_INVALID unless a `ResultFile` can be made at `path`: a known ending, in a folder that is there."""
    if path.suffix not in _WRITERS:
        raise FallowError(Reason.FIELD_INVALID, f"{path} has no known ending", field="path", limit=", ".join(_WRITERS))
    if not path.parent.is_dir():
        raise FallowError(Reason.FIELD_INVALID, f"{path.parent} is no folder", field="path")


class _JsonLines:
    """One JSON object a line; bytes are base64, tensors nested lists.

    Floats that JSON does not have are the strings `NaN`, `Infinity` and `-Infinity`, as in protobuf's JSON.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for row in python_rows(pa.Table.from_batches([batch])):
            try:
                line = json.dumps(row, default=_jsonable, ensure_ascii=False, allow_nan=False)
            except ValueError:
                line = json.dumps(_without_nan(row), default=_jsonable, ensure_ascii=False, allow_nan=False)
            self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()


def _without_nan(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, dict):
        return {str(key): _without_nan(entry) for key, entry in cast("dict[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in cast("Sequence[object]", value)]
    return value


def _jsonable(value: object) -> object:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def _parquet(path: Path, schema: pa.Schema) -> _Writer:
    return cast(_Writer, pq.ParquetWriter(path, schema, compression="zstd"))


def _arrow(path: Path, schema: pa.Schema) -> _Writer:
    return cast(_Writer, pa.ipc.new_file(str(path), schema))


_WRITERS: Final = {".parquet": _parquet, ".arrow": _arrow, ".jsonl": _JsonLines}


def _positions(parts: Sequence[ResultRows]) -> tuple[NDArray[np.int64], list[str], list[Any]]:
    """Positions and statuses, valued rows of all parts first; and the failures of the others."""
    failed = [(position, failure) for part in parts for position, failure in part.failures.items()]
    failed_positions = np.asarray([position for position, _ in failed], dtype=np.int64)
    positions = np.concatenate([*[part.positions for part in parts], failed_positions])
    statuses = [part.result.status for part in parts for _ in range(len(part.positions))]
    return positions, statuses + [STATUS_FAILED] * len(failed), [failure for _, failure in failed]


def _joined(parts: Sequence[ColumnValues]) -> ColumnValues:
    """The values of several parts; a part without rows may come without its dtype."""
    filled = [part for part in parts if len(part)]
    if not filled:
        return cast("list[bytes]", [])
    if len(filled) == 1:
        return filled[0]
    if isinstance(filled[0], np.ndarray):
        return np.concatenate(cast("list[NDArray[Any]]", filled))
    return cast(ColumnValues, [value for part in filled for value in part])
