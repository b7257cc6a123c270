"""What a source of rows is asked and what it gives."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from fallow.errors import FallowError, Reason
from fallow.limits import MIB
from fallow.row_values import ColumnValues
from fallow.schema import Schema

BATCH_BYTES_TARGET = 8 * MIB
"""About what one batch takes in memory; a single row may take more."""
BATCH_ROWS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What is wanted of a source."""

    schema: Schema
    """The input schema: a batch has values for each of its columns."""
    windows: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """For bytes columns that travel in part: bytes of the head and of the tail window."""
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """For schema columns made of source columns with other names; several are put side by side."""
    keep: Sequence[str] = ()
    """Source columns to carry to the result."""
    cast: bool = False
    """Whether values may be converted with loss."""

    def source_columns(self, column: str) -> Sequence[str]:
        """The source columns that make up a schema column."""
        return self.inputs.get(column, (column,))


@dataclass(frozen=True, slots=True)
class UnreadRow:
    """A row that could not be read: it is not submitted, and is reported as failed."""

    reason: str
    kept: Mapping[str, object]
    """Its kept columns."""


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """Some rows, in the source's order."""

    columns: Mapping[str, ColumnValues]
    """A value for each row and each column of the schema."""
    row_count: int
    kept: pa.RecordBatch | None = None
    """One row for each row of `columns`; None when nothing is kept."""
    unread: Sequence[UnreadRow] = ()
    """Rows that came between and could not be read."""


class Source(Protocol):
    """Rows in a fixed order. Each call of `batches` begins anew."""

    def check(self, request: SourceRequest) -> None:
        """Raises SCHEMA_MISMATCH naming a column that is not there, before anything is read."""
        ...

    def kept_schema(self, request: SourceRequest) -> pa.Schema | None:
        """The Arrow schema of kept columns; None when nothing is kept."""
        ...

    def batches(self, request: SourceRequest) -> Iterator[SourceBatch]:
        """The rows, in batches of about `BATCH_BYTES_TARGET`. May block; called outside the event loop."""
        ...


def missing_column(name: str, have: Sequence[str], *, wanted: str = "") -> FallowError:
    """The error for a column that a source does not have."""
    return FallowError(
        Reason.SCHEMA_MISMATCH,
        f"column {name!r} is missing; there is: {', '.join(have) or 'none'}",
        field=name,
        limit=wanted,
        hint="name the columns to use with `inputs=` (`--input NAME=COLUMN[,COLUMN…]`)" if wanted else "",
    )


def windowed(content: bytes, windows: tuple[int, int]) -> bytes:
    """What of `content` travels: all of it, or its head and tail windows."""
    head, tail = windows
    if len(content) <= head + tail:
        return content
    return content[:head] + content[len(content) - tail :]
