"""Kept columns beside a job's rows: an Arrow file that is mapped, not loaded."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fallow.client.results import RowFailure
from fallow.dataset import FAILURE_COLUMN
from fallow.errors import FallowError, Reason
from fallow.session import Cause


class KeptColumns:
    """Kept columns of submitted rows by job position, then those of rows that could not be read."""

    def __init__(self, path: Path) -> None:
        """Maps the file at `path`. Raises MALFORMED_MESSAGE when it is no such file."""
        try:
            with pa.memory_map(str(path)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
        except (OSError, pa.ArrowException) as error:
            raise FallowError(
                Reason.MALFORMED_MESSAGE, f"the kept columns are damaged: {error}", field="kept"
            ) from None
        if FAILURE_COLUMN not in table.schema.names:
            raise FallowError(Reason.MALFORMED_MESSAGE, "the kept columns lack their failures", field="kept")
        self._failures = table.column(FAILURE_COLUMN)
        self.table: pa.Table = table.drop_columns([FAILURE_COLUMN])
        """All rows, submitted ones first."""
        self.unread_rows: int = table.num_rows - self._failures.null_count
        """Rows that were not submitted because they could not be read."""
        self.submitted_rows: int = self._failures.null_count

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the kept columns."""
        return self.table.schema

    def rows(self, start: int, end: int) -> Sequence[Mapping[str, Any]]:
        """Kept values of positions `start` up to `end`, one mapping a row."""
        return python_rows(self.table.slice(start, end - start))

    def take(self, positions: NDArray[np.int64]) -> pa.Table:
        """Kept columns of the rows at `positions`, in that order."""
        if not len(positions):
            return self.table.slice(0, 0)
        # Positions come in runs, and a slice copies nothing.
        breaks = (np.flatnonzero(np.diff(positions) != 1) + 1).tolist()
        bounds = [0, *breaks, len(positions)]
        slices = [self.table.slice(int(positions[low]), high - low) for low, high in pairwise(bounds)]
        return pa.concat_tables(slices)

    def unread(self) -> list[tuple[int, RowFailure]]:
        """Position and failure of each row that could not be read."""
        reasons = self._failures.slice(self.submitted_rows).to_pylist()
        return [
            (self.submitted_rows + index, RowFailure(Cause.ROW, f"could not be read: {reason}"))
            for index, reason in enumerate(cast("list[str]", reasons))
        ]


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """One mapping a row, of Python values; times finer than a microsecond, which Python does not have, are cut."""
    kinds = [_python_type(field.type) for field in table.schema]
    for index, (field, kind) in enumerate(zip(table.schema, kinds, strict=True)):
        if not kind.equals(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(kind, safe=False))
    return cast("list[dict[str, Any]]", table.to_pylist())


def _python_type(kind: pa.DataType) -> pa.DataType:
    """`kind` with microseconds in place of nanoseconds."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_python_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_python_type(kind.value_type)))
    return kind
