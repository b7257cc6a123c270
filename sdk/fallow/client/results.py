"""Results as they come from the coordinator, and as rows with positions, values and failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.job import JobRowFailure, RowSpan, TaskResult
from fallow.ranges import RangeSet
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import Schema
from fallow.session import Cause
from fallow.wire.schema import decode_schema

STATUS_FAILED: Final = "failed"
"""The status of a row without a value; other rows carry what the pool's policy found, such as `unverified`."""


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no value."""

    cause: Cause
    """Whose fault it is: `row`, `program`, `worker`, `platform` or `owner-preempt`."""
    reason: str


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row of a job's result."""

    position: int
    """Its place in the job, from 0; rows that could not be read stand after all submitted ones."""
    status: str
    """`unverified` until the pool checks results, `verified`, or `failed`."""
    values: Mapping[str, Any]
    """Output columns: NumPy arrays or scalars, `str` or `bytes`; empty when the row failed."""
    kept: Mapping[str, Any]
    """Kept columns, as Python values."""
    failure: RowFailure | None = None
    """Set when the row failed."""
    corrects: bool = False
    """True when it replaces a row that was given before."""


@dataclass(frozen=True, slots=True)
class ResultRows:
    """Rows of one result, decoded."""

    result: TaskResult
    positions: NDArray[np.int64]
    """Job position of each row that has a value."""
    block_rows: NDArray[np.int64]
    """Row of the output block of each row that has a value, rising."""
    columns: Mapping[str, ColumnValues]
    """Output values, one for each entry of `positions`."""
    failures: Mapping[int, RowFailure]
    """By job position."""

    def within(self, span: RowSpan) -> ResultRows:
        """Only the rows of one span of the result."""
        first = int(np.searchsorted(self.block_rows, span.block_row))
        last = int(np.searchsorted(self.block_rows, span.block_row + span.rows))
        end = span.job_position + span.rows
        return ResultRows(
            result=self.result,
            positions=self.positions[first:last],
            block_rows=self.block_rows[first:last],
            columns={name: values[first:last] for name, values in self.columns.items()},
            failures={p: self.failures[p] for p in range(span.job_position, end) if p in self.failures},
        )

    def row_results(self, kept: Sequence[Mapping[str, Any]] | None, first_position: int) -> Iterator[RowResult]:
        """The rows one by one, in the order of their positions; `kept[i]` belongs to `first_position + i`."""
        corrects = self.result.corrects > 0
        failed = [(position, -1) for position in self.failures]
        valued = zip(cast("list[int]", self.positions.tolist()), range(len(self.positions)), strict=True)
        for position, index in sorted([*valued, *failed]):
            carried: Mapping[str, Any] = kept[position - first_position] if kept is not None else {}
            if index < 0:
                yield RowResult(position, STATUS_FAILED, {}, carried, self.failures[position], corrects)
            else:
                values = {name: column[index] for name, column in self.columns.items()}
                yield RowResult(position, self.result.status, values, carried, None, corrects)


class ResultDecoder:
    """Turns output blocks into rows of the job."""

    def __init__(self, output_schema: bytes) -> None:
        """Takes the exact bytes of the output schema."""
        self.schema: Schema = decode_schema(output_schema)
        self._codec = RowCodec(self.schema, digest_of(output_schema))

    def decode(self, result: TaskResult, block: bytes | None) -> ResultRows:
        """The rows of a result; `block` is its output, None when nobody computed it.

        Rows of no bytes failed; a result lists the reasons of the first ones only, and the others' say so.
        Raises SCHEMA_MISMATCH or ROW_BLOCK_MALFORMED when the block is not what was agreed.
        """
        failures = {f.job_position: RowFailure(f.cause, f.reason) for f in result.failures}
        if block is None:
            for span in result.spans:
                for position in range(span.job_position, span.job_position + span.rows):
                    failures.setdefault(position, _shared(result.failures))
            nothing = np.zeros(0, dtype=np.int64)
            return ResultRows(result, nothing, nothing, self._no_columns(), failures)
        parsed = RowBlock.parse(block)
        decoded = self._codec.decode(parsed)
        job_positions = _job_positions(result.spans, len(parsed))
        valued = np.zeros(len(parsed), dtype=np.bool_)
        valued[decoded.positions] = True
        for row in np.flatnonzero(~valued & (job_positions >= 0)).tolist():
            position = int(job_positions[row])
            wrong = decoded.malformed.get(row)
            told = RowFailure(Cause.WORKER, wrong) if wrong else _unlisted(result.failures)
            failures.setdefault(position, told)
        ours = job_positions[decoded.positions] >= 0
        columns: Mapping[str, ColumnValues] = decoded.columns
        rows = decoded.positions
        if not ours.all():
            kept = np.flatnonzero(ours)
            columns = {name: _taken(values, kept) for name, values in columns.items()}
            rows = rows[kept]
        return ResultRows(result, job_positions[rows], rows, columns, failures)

    def _no_columns(self) -> dict[str, ColumnValues]:
        return {column.name: cast("list[bytes]", []) for column in self.schema.columns}


def final_spans(results: Sequence[TaskResult]) -> list[tuple[RowSpan, int]]:
    """The spans that stand at the end, by job position, each with the index of its result.

    Where results overlap, which is where one corrects another, the later one counts.
    """
    spans: list[tuple[RowSpan, int]] = []
    covered = RangeSet()
    for index in range(len(results) - 1, -1, -1):
        for span in results[index].spans:
            mine = RangeSet.of(span.job_position, span.job_position + span.rows)
            for start, end in (mine - covered).ranges:
                row = span.block_row + start - span.job_position
                spans.append((RowSpan(start, row, end - start), index))
            covered = covered.add(span.job_position, span.job_position + span.rows)
    return sorted(spans, key=lambda entry: entry[0].job_position)


def check_output(result: TaskResult, block: bytes) -> None:
    """Raises DIGEST_MISMATCH unless an inline output is the one that its result names."""
    if result.output is None or digest_of(block) != result.output.digest:
        raise FallowError(
            Reason.DIGEST_MISMATCH, f"the output of result {result.cursor} is not the one named", field="inline_output"
        )


def _unlisted(failures: Sequence[JobRowFailure]) -> RowFailure:
    """For a row beyond those whose reasons a result lists."""
    last = _shared(failures)
    if not failures:
        return last
    place = failures[-1].job_position
    return RowFailure(last.cause, f"its own reason is not listed; row {place} of its task: {last.reason}")


def _shared(failures: Sequence[JobRowFailure]) -> RowFailure:
    """For the rows of a task that was given up as a whole."""
    if failures:
        return RowFailure(failures[-1].cause, failures[-1].reason)
    return RowFailure(Cause.PROGRAM, "the row has no value and no reason was given")


def _job_positions(spans: Sequence[RowSpan], rows: int) -> NDArray[np.int64]:
    """The job position of each row of a block, -1 for rows that are none of the job's."""
    positions = np.full(rows, -1, dtype=np.int64)
    for span in spans:
        if span.block_row + span.rows > rows:
            raise FallowError(
                Reason.ROW_BLOCK_MALFORMED,
                f"a result names row {span.block_row + span.rows - 1} of an output block of {rows} rows",
                field="result.spans",
            )
        end = span.job_position + span.rows
        positions[span.block_row : span.block_row + span.rows] = np.arange(span.job_position, end)
    return positions


def _taken(values: ColumnValues, kept: NDArray[np.intp]) -> ColumnValues:
    if isinstance(values, np.ndarray):
        return values[kept]
    return cast(ColumnValues, [values[int(index)] for index in kept])
