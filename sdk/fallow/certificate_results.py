"""Compares saved results with a certificate: every row in a file is one that a worker committed to."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fallow.arrow_rows import from_arrow
from fallow.certificate import Json, bytes_at
from fallow.checking_story import wrong
from fallow.client.tables import ROW_COLUMN
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.job_story import Result, Story
from fallow.row_block import NONCE_BYTES, RowBlock
from fallow.rows import RowCodec
from fallow.wire.bundle import decode_manifest
from fallow.wire.schema import encode_schema

ENDINGS: Final = (".parquet", ".arrow")


@dataclass(frozen=True, slots=True)
class ResultsChecked:
    """What was compared."""

    rows: int
    """Of the file."""
    roots: int
    """Results whose root follows from these rows."""


def check_results(
    path: Path, certificate: Mapping[str, Json], story: Story, outputs: Mapping[Digest, RowBlock]
) -> ResultsChecked:
    """Works each result's root out again from the rows in `path`; the certificate itself has been checked.

    Raises EVIDENCE_WRONG naming the file and the first result, or row, that is another than was committed to, and
    FIELD_INVALID for a file that holds no results.
    """
    if certificate["manifest"] is None:
        raise wrong("manifest", "is missing, and without it nobody can tell how rows are written")
    manifest = decode_manifest(bytes_at("manifest", certificate["manifest"]))
    schema = manifest.output_schema
    codec = RowCodec(schema, digest_of(encode_schema(schema)))
    table = _table(path)
    positions = np.asarray(table.column(ROW_COLUMN).to_numpy(), dtype=np.int64)
    order = np.argsort(positions, kind="stable")
    rising = positions[order]
    if len(double := rising[1:][rising[1:] == rising[:-1]]):
        raise wrong(str(path), f"row {double[0]} stands there twice")
    seen = np.zeros(len(rising), dtype=np.bool_)
    roots = 0
    for result in story.results:
        if result.commitment is None:
            continue
        wanted = np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in result.task.spans])
        found = np.minimum(np.searchsorted(rising, wanted), max(len(rising) - 1, 0))
        there = rising[found] == wanted if len(rising) else np.zeros(len(wanted), dtype=np.bool_)
        seen[found[there]] = True
        if result.cursor in story.withdrawn:
            # Other workers gave some of these rows anew: the file no longer has all that this root is over.
            continue
        _check_result(path, result, codec, table, order[found[there]], np.flatnonzero(there), wanted, outputs)
        roots += 1
    if not seen.all():
        raise wrong(str(path), f"row {rising[np.flatnonzero(~seen)[0]]} is none that a worker committed to")
    return ResultsChecked(table.num_rows, roots)


def _check_result(
    path: Path,
    result: Result,
    codec: RowCodec,
    table: pa.Table,
    indexes: NDArray[np.int64],
    places: NDArray[np.int64],
    wanted: NDArray[np.int64],
    outputs: Mapping[Digest, RowBlock],
) -> None:
    """`indexes` are rows of the table, `places` where they stand in the block, `wanted` each block row's position."""
    assert result.commitment is not None, "only what was committed to has a root"
    fact = result.commitment.fact
    part = table.take(pa.array(indexes))
    try:
        columns: dict[str, Any] = {
            column.name: from_arrow(part.column(column.name), column, column.name) for column in codec.schema.columns
        }
        block = RowBlock.parse(codec.encode(columns, nonce=bytes(NONCE_BYTES), positions=places, row_count=len(wanted)))
    except (FallowError, KeyError) as error:
        raise wrong(str(path), f"its rows are not written as the job's outputs are: {error}") from None
    if block.root() == fact.output_root:
        return
    committed = outputs.get(fact.output_digest)
    if committed is not None:
        for row, position in enumerate(wanted.tolist()):
            if bytes(committed[row]) != bytes(block[row]):
                raise wrong(str(path), f"row {position} is another than {result.commitment.lease.worker_id} gave")
    raise wrong(
        str(path),
        f"among rows {int(wanted.min())} to {int(wanted.max())} (result {result.cursor}) one is another than "
        f"{result.commitment.lease.worker_id} committed to",
    )


def _table(path: Path) -> pa.Table:
    if path.suffix not in ENDINGS:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{path} does not hold rows bit by bit",
            field="results",
            limit=", ".join(ENDINGS),
            hint="save the results as .parquet",
        )
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            with pa.memory_map(str(path)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowException) as error:
        raise FallowError(Reason.FIELD_INVALID, f"{path} can't be read: {error}", field="results") from None
    if ROW_COLUMN not in table.schema.names:
        raise FallowError(
            Reason.FIELD_INVALID, f"{path} has no column {ROW_COLUMN}", field="results", hint="save results with it"
        )
    return table
