"""A job's results as they come: fetched a few ahead, decoded, in any order or in row order."""

from __future__ import annotations

import asyncio
import heapq
import tempfile
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO, Any, Final

import grpc

from fallow.client.blobs import BlobTransfers
from fallow.client.connection import Connection
from fallow.client.results import ResultDecoder, ResultRows, check_output
from fallow.errors import FallowError, Reason
from fallow.ids import JobId
from fallow.job import JOB_STATES_FINAL, JobStatus, RowSpan, TaskResult
from fallow.limits import MIB
from fallow.v1 import job_service_pb2
from fallow.wire.job import result_from_message, status_from_message

FETCHED_AHEAD: Final = 4
HELD_BYTES_IN_MEMORY_MAX: Final = 32 * MIB
"""Inline outputs that wait for their turn beyond this lie in a temporary file."""
DECODED_BYTES_MAX: Final = 256 * MIB


@dataclass(frozen=True, slots=True)
class Arrived:
    """A result and, when it travelled inline, its output."""

    result: TaskResult
    inline_output: bytes


async def watch(
    connection: Connection, job_id: JobId, *, status_only: bool = False
) -> AsyncGenerator[Arrived | JobStatus, None]:
    """Every result once, in cursor order, and changes of status; ends after a final status.

    It outlives the coordinator: after a break it goes on where it was. Raises JOB_UNKNOWN.
    """
    cursor = 0
    backoff = connection.backoff()
    while True:
        await connection.keep_fresh()
        request = job_service_pb2.WatchJobRequest(job_id=job_id, cursor=cursor, status_only=status_only)
        call = connection.jobs.WatchJob(request)
        try:
            async for message in call:
                backoff.succeeded()
                if message.WhichOneof("kind") == "result":
                    result, inline = result_from_message(message.result)
                    if result.cursor > cursor:
                        cursor = result.cursor
                        yield Arrived(result, inline)
                    continue
                status = status_from_message(message.status)
                yield status
                if status.state in JOB_STATES_FINAL and (status_only or cursor >= status.results):
                    return
            await backoff.pause(
                FallowError(Reason.COORDINATOR_UNREACHABLE, f"the watch of job {job_id} ended before the job did")
            )
        except grpc.aio.AioRpcError as failure:
            await connection.recover(failure, backoff)
        finally:
            call.cancel()


class Outputs:
    """Fetches and decodes outputs, holding inline ones until they are wanted."""

    def __init__(self, transfers: BlobTransfers, decoder: ResultDecoder) -> None:
        """Outputs decoded with `decoder`."""
        self._transfers = transfers
        self._decoder = decoder
        self._held: dict[int, bytes | tuple[int, int]] = {}
        self._held_bytes = 0
        self._file: IO[bytes] | None = None
        self._decoded: OrderedDict[int, tuple[ResultRows, int]] = OrderedDict()
        self._decoded_bytes = 0

    def hold(self, arrived: Arrived) -> None:
        """Keeps an inline output for later."""
        data = arrived.inline_output
        if not data:
            return
        if self._held_bytes + len(data) <= HELD_BYTES_IN_MEMORY_MAX:
            self._held[arrived.result.cursor] = data
            self._held_bytes += len(data)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fallow-results-")  # noqa: SIM115 (closed with us)
        self._held[arrived.result.cursor] = (self._file.seek(0, 2), len(data))
        self._file.write(data)

    async def rows(self, result: TaskResult) -> ResultRows:
        """The rows of a result; remembered while there is room, since spans of one result may be far apart."""
        known = self._decoded.get(result.cursor)
        if known is not None:
            self._decoded.move_to_end(result.cursor)
            return known[0]
        block = await self._block(result)
        rows = self._decoder.decode(result, block)
        size = len(block) if block is not None else 0
        self._decoded[result.cursor] = (rows, size)
        self._decoded_bytes += size
        while self._decoded_bytes > DECODED_BYTES_MAX and len(self._decoded) > 1:
            _, (_, dropped) = self._decoded.popitem(last=False)
            self._decoded_bytes -= dropped
        return rows

    def done_with(self, result: TaskResult) -> None:
        """Forgets a result that will not be asked for again."""
        _, size = self._decoded.pop(result.cursor, (None, 0))
        self._decoded_bytes -= size
        held = self._held.pop(result.cursor, None)
        if isinstance(held, bytes):
            self._held_bytes -= len(held)

    def close(self) -> None:
        """Removes the temporary file."""
        if self._file is not None:
            self._file.close()

    async def _block(self, result: TaskResult) -> bytes | None:
        held = self._held.get(result.cursor)
        if isinstance(held, tuple):
            assert self._file is not None
            self._file.seek(held[0])
            held = self._file.read(held[1])
        if held is not None:
            check_output(result, held)
            return held
        if result.output is None:
            return None
        return await self._transfers.download(result.output)


async def rows_as_they_come(
    events: AsyncIterator[Arrived | JobStatus], outputs: Outputs, on_status: Callable[[JobStatus], None]
) -> AsyncGenerator[ResultRows, None]:
    """The rows of each result in the order in which results came, fetched a few ahead."""
    queue: asyncio.Queue[asyncio.Task[ResultRows] | None] = asyncio.Queue(maxsize=FETCHED_AHEAD)

    async def fetch() -> None:
        try:
            async for event in events:
                if isinstance(event, JobStatus):
                    on_status(event)
                    continue
                outputs.hold(event)
                await queue.put(asyncio.ensure_future(outputs.rows(event.result)))
        finally:
            await queue.put(None)

    fetching: asyncio.Future[Any] = asyncio.ensure_future(fetch())
    try:
        while (task := await queue.get()) is not None:
            rows = await task
            yield rows
            outputs.done_with(rows.result)
        await fetching
    finally:
        left: list[asyncio.Future[Any]] = [fetching]
        fetching.cancel()
        while not queue.empty():
            task = queue.get_nowait()
            if task is not None:
                task.cancel()
                left.append(task)
        await asyncio.gather(*left, return_exceptions=True)


async def rows_in_order(
    events: AsyncIterator[Arrived | JobStatus], outputs: Outputs, on_status: Callable[[JobStatus], None]
) -> AsyncGenerator[ResultRows, None]:
    """Rows by rising job position, each as soon as all before it are there.

    A correction of rows that were given already is given at once.
    """
    position = 0
    waiting: list[tuple[int, int, RowSpan, TaskResult]] = []
    spans_left: dict[int, int] = {}
    async with aclosing(_results_of(events, outputs, on_status)) as results:
        async for result in results:
            spans_left[result.cursor] = len(result.spans)
            for index, span in enumerate(result.spans):
                heapq.heappush(waiting, (span.job_position, result.cursor * 1_000_000 + index, span, result))
            while waiting and waiting[0][0] <= position:
                start, _, span, ready = heapq.heappop(waiting)
                position = max(position, start + span.rows)
                yield (await outputs.rows(ready)).within(span)
                spans_left[ready.cursor] -= 1
                if not spans_left[ready.cursor]:
                    del spans_left[ready.cursor]
                    outputs.done_with(ready)


async def spans_in_order(spans: list[tuple[RowSpan, TaskResult]], outputs: Outputs) -> AsyncGenerator[ResultRows, None]:
    """The rows of each span in order, their outputs fetched a few ahead."""
    uses: dict[int, int] = {}
    for _, result in spans:
        uses[result.cursor] = uses.get(result.cursor, 0) + 1
    ahead: dict[int, asyncio.Task[ResultRows]] = {}
    next_to_fetch = 0
    try:
        for index, (span, result) in enumerate(spans):
            while next_to_fetch < len(spans) and (next_to_fetch <= index or len(ahead) < FETCHED_AHEAD):
                wanted = spans[next_to_fetch][1]
                if wanted.cursor not in ahead:
                    ahead[wanted.cursor] = asyncio.ensure_future(outputs.rows(wanted))
                next_to_fetch += 1
            task = ahead.get(result.cursor)
            rows = await task if task is not None else await outputs.rows(result)
            yield rows.within(span)
            ahead.pop(result.cursor, None)
            uses[result.cursor] -= 1
            if not uses[result.cursor]:
                outputs.done_with(result)
    finally:
        for task in ahead.values():
            task.cancel()
        await asyncio.gather(*ahead.values(), return_exceptions=True)


async def _results_of(
    events: AsyncIterator[Arrived | JobStatus], outputs: Outputs, on_status: Callable[[JobStatus], None]
) -> AsyncGenerator[TaskResult, None]:
    async for event in events:
        if isinstance(event, JobStatus):
            on_status(event)
        else:
            outputs.hold(event)
            yield event.result
