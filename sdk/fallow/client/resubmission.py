"""Rows of a job that have no value, submitted again as a job of their own."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fallow.client.blobs import BlobTransfers, Upload
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.client.kept import KeptColumns
from fallow.client.results import final_spans
from fallow.client.stream import watch
from fallow.dataset import BLOCK_BYTES_TARGET, FAILURE_COLUMN
from fallow.errors import FallowError, Reason
from fallow.ids import JobId, digest_of
from fallow.job import DatasetBlock, JobStatus, TaskResult
from fallow.limits import BLOCK_ROWS_MAX, INLINE_PAYLOAD_BYTES_MAX, ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow.row_block import NONCE_BYTES, RowBlock, pack_selection, with_nonce
from fallow.session import BlobReference
from fallow.v1 import job_pb2, job_service_pb2
from fallow.wire.blob import BlobKind, reference_to_message
from fallow.wire.job import block_from_message, block_to_message

FIRST_ROW_COLUMN: Final = "first_row"
"""Kept column of a job over retried rows: each row's position in the job that was submitted first."""


async def rows_without_value(
    connection: Connection, transfers: BlobTransfers, job_id: JobId, rows: int
) -> NDArray[np.int64]:
    """Positions of a finished job's rows that failed or were never reached, rising."""
    results: list[TaskResult] = []
    inline: list[bytes] = []
    async with aclosing(watch(connection, job_id)) as events:
        async for event in events:
            if not isinstance(event, JobStatus):
                results.append(event.result)
                # Outputs are only looked at where not every failure is listed.
                inline.append(event.inline_output if _is_full(event.result) else b"")
    valued = np.zeros(rows, dtype=np.bool_)
    for span, index in final_spans(results):
        result = results[index]
        valued[span.job_position : span.job_position + span.rows] = result.output is not None
        for failure in result.failures:
            if span.job_position <= failure.job_position < span.job_position + span.rows:
                valued[failure.job_position] = False
        if _is_full(result) and result.output is not None:
            block = RowBlock.parse(inline[index] or await transfers.download(result.output))
            for row in range(span.rows):
                if not len(block[span.block_row + row]):
                    valued[span.job_position + row] = False
    return np.flatnonzero(~valued)


async def submission_of(connection: Connection, job_id: JobId) -> job_service_pb2.SubmitMapJobRequest:
    """What a job was submitted as, with all its blocks. Raises JOB_UNKNOWN, JOB_DELETED."""
    whole: job_service_pb2.SubmitMapJobRequest | None = None
    while True:
        request = job_service_pb2.GetJobSubmissionRequest(
            job_id=job_id, first_block=0 if whole is None else len(whole.blocks)
        )
        answer = await connection.call(lambda jobs: jobs.GetJobSubmission(request, timeout=CALL_TIMEOUT_S))  # noqa: B023
        if whole is None:
            whole = answer.submission
        else:
            whole.blocks.extend(answer.submission.blocks)
        if len(whole.blocks) >= answer.blocks or not answer.submission.blocks:
            return whole


async def resubmission(
    connection: Connection,
    transfers: BlobTransfers,
    job_id: JobId,
    positions: NDArray[np.int64],
    kept: KeptColumns | None,
    *,
    idempotency_key: bytes,
) -> tuple[job_service_pb2.SubmitMapJobRequest, KeptColumns]:
    """The request that submits the rows at `positions` of a job again, their blocks and kept columns uploaded.

    Bundle, data class, pool, title and options are the job's. Raises JOB_DELETED, BLOB_UNKNOWN and what uploads raise.
    """
    request = await submission_of(connection, job_id)
    blocks = await _selected_blocks(connection, transfers, request.blocks, positions)
    del request.blocks[:]
    request.blocks.extend(blocks)
    request.idempotency_key = idempotency_key
    with tempfile.TemporaryDirectory(prefix="fallow-kept-") as folder:
        path = Path(folder) / "kept.arrow"
        data = await asyncio.to_thread(_write_kept, path, kept, positions)
        reference = BlobReference(digest_of(data), len(data))
        await transfers.upload([Upload(reference, BlobKind.OPAQUE, path)])
        request.kept.CopyFrom(reference_to_message(reference))
        # The mapping outlives the file's name.
        return request, KeptColumns(path)


async def _selected_blocks(
    connection: Connection,
    transfers: BlobTransfers,
    messages: Sequence[job_pb2.DatasetBlock],
    positions: NDArray[np.int64],
) -> list[job_pb2.DatasetBlock]:
    """Fresh blocks of the rows at `positions`; only blocks that hold one of them are fetched."""
    starts = list(accumulate((message.rows for message in messages), initial=0))
    made: list[job_pb2.DatasetBlock] = []
    pending: list[bytes] = []

    async def seal(*, last: bool) -> None:
        parsed = [RowBlock.parse(data) for data in pending]
        whole = [(index, 0, len(block)) for index, block in enumerate(parsed)]
        data = pack_selection(parsed, whole, bytes(NONCE_BYTES)) if len(parsed) > 1 else pending[0]
        # As in a first submission: equal rows give equal blocks, which a repetition need not upload.
        sealed = with_nonce(data, hashlib.blake2b(data, digest_size=NONCE_BYTES, key=connection.nonce_key).digest())
        inline = last and not made and len(sealed) <= INLINE_PAYLOAD_BYTES_MAX
        reference = BlobReference(digest_of(sealed), len(sealed))
        if not inline:
            await transfers.upload([Upload(reference, BlobKind.ROW_BLOCK, sealed)])
        rows = sum(len(block) for block in parsed)
        made.append(block_to_message(DatasetBlock(reference, rows, inline), sealed if inline else b""))
        pending.clear()

    for index, message in enumerate(messages):
        low, high = np.searchsorted(positions, (starts[index], starts[index + 1]))
        if low == high:
            continue
        block, data = block_from_message(message, f"blocks[{index}]")
        source = RowBlock.parse(data or await transfers.download(block.blob))
        wanted = (positions[low:high] - starts[index]).tolist()
        part = pack_selection([source], [(0, row, row + 1) for row in wanted], bytes(NONCE_BYTES))
        size = sum(map(len, pending)) + len(part)
        rows = sum(len(RowBlock.parse(data)) for data in pending) + len(wanted)
        if pending and (size > BLOCK_BYTES_TARGET or rows > BLOCK_ROWS_MAX):
            await seal(last=False)
        pending.append(part)
    await seal(last=True)
    return made


def _write_kept(path: Path, kept: KeptColumns | None, positions: NDArray[np.int64]) -> bytes:
    """Writes the kept columns of those rows, each with its first position; gives the file's bytes."""
    table = kept.take(positions) if kept is not None else pa.table({FIRST_ROW_COLUMN: pa.array(positions)})
    if FIRST_ROW_COLUMN not in table.schema.names:
        table = table.append_column(FIRST_ROW_COLUMN, pa.array(positions))
    table = table.append_column(FAILURE_COLUMN, pa.nulls(table.num_rows, pa.string()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


def _is_full(result: TaskResult) -> bool:
    return len(result.failures) >= ROW_FAILURES_LISTED_PER_TASK_MAX


def check_retryable(status: JobStatus, positions: NDArray[np.int64]) -> None:
    """Returns when there is a row to retry. Raises DATASET_EMPTY."""
    if not len(positions):
        raise FallowError(
            Reason.DATASET_EMPTY,
            f"every row of job {status.job_id} that was submitted has a value",
            field="job_id",
            hint="rows that could not be read were never submitted: mend them and submit them",
        )
