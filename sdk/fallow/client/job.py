"""A job in the hands of its submitter, asynchronously."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

import pyarrow as pa

from fallow.certificate import Certificate, bundle_of, compose
from fallow.certificate_check import authority_fingerprint, check_certificate
from fallow.client.account import new_transfer_id
from fallow.client.blobs import BlobTransfers
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.client.evidence import fetch_evidence, follow_checkpoint, inline_outputs, manifest_of
from fallow.client.kept import KeptColumns
from fallow.client.resubmission import check_retryable, resubmission, rows_without_value
from fallow.client.results import STATUS_FAILED, ResultDecoder, ResultRows, RowResult, final_spans
from fallow.client.stream import (
    Arrived,
    Outputs,
    rows_as_they_come,
    rows_in_order,
    spans_in_order,
    watch,
)
from fallow.client.tables import ResultFile, ResultTables, Saved
from fallow.credits import parse_credits
from fallow.errors import FallowError, Reason
from fallow.explanation import JobExplanation
from fallow.identity import load_certificate
from fallow.ids import JobId
from fallow.job import (
    ACCEPTED,
    JOB_STATES_FINAL,
    PROVISIONAL,
    VERIFIED,
    JobProgress,
    JobState,
    JobStatus,
    RowSpan,
    TaskResult,
    WorkerShare,
)
from fallow.v1 import job_service_pb2, ledger_service_pb2
from fallow.wire.explanation import job_explanation_from_message
from fallow.wire.job import shares_from_messages, status_from_message

Order = Literal["row", "any"]
"""`row`: by position in the job; `any`: as soon as they are there."""

IDEMPOTENCY_KEY_BYTES: Final = 32
BATCH_ROWS: Final = 16_384
"""Rows that are put together before a table or file gets them."""


class AsyncJob:
    """One job. Get one from `AsyncClient.map` or `AsyncClient.job`."""

    def __init__(
        self,
        connection: Connection,
        transfers: BlobTransfers,
        job_id: JobId,
        *,
        output_schema: bytes = b"",
        kept: KeptColumns | None = None,
        has_kept: bool | None = None,
    ) -> None:
        """Call `AsyncClient.map` or `AsyncClient.job` instead.

        `output_schema`, `kept` and `has_kept` save asking when they are known.
        """
        self.id = job_id
        """What `client.job(id)` takes, from any process of the account."""
        self._connection = connection
        self._transfers = transfers
        self._output_schema = output_schema
        self._kept = kept
        self._has_kept = has_kept
        self._last: JobStatus | None = None
        self._shares: tuple[WorkerShare, ...] = ()

    def __repr__(self) -> str:
        return f"<job {self.id}>"

    async def status(self) -> JobStatus:
        """The job as the coordinator has it now."""
        request = job_service_pb2.GetJobRequest(job_id=self.id)
        answer = await self._connection.call(lambda jobs: jobs.GetJob(request, timeout=CALL_TIMEOUT_S))
        return self._seen(replace(status_from_message(answer.job), shares=shares_from_messages(answer.shares)))

    async def progress(self) -> JobProgress:
        """Rows done, failed and leased so far."""
        return (await self.status()).progress

    async def explain(self) -> JobExplanation:
        """Who could do the job's work, who cannot and why, and what it waits for now."""
        request = job_service_pb2.ExplainJobRequest(job_id=self.id)
        answer = await self._connection.call(lambda jobs: jobs.ExplainJob(request, timeout=CALL_TIMEOUT_S))
        return job_explanation_from_message(answer.explanation)

    async def statuses(self) -> AsyncGenerator[JobStatus, None]:
        """Each change of status until the job has ended."""
        async with aclosing(watch(self._connection, self.id, status_only=True)) as events:
            async for event in events:
                if isinstance(event, JobStatus):
                    yield self._seen(event)

    async def wait(self, *, check: bool = True) -> JobStatus:
        """The final status, once there is one. With `check` raises JOB_FAILED or JOB_CANCELLED."""
        async with aclosing(self.statuses()) as statuses:
            async for status in statuses:
                self._last = status
        assert self._last is not None, "a watch ends with a status"
        if check:
            _check(self._last)
        return self._last

    async def cancel(self) -> JobStatus:
        """Ends the job; rows that are done stay readable. Cancelling a finished job changes nothing."""
        request = job_service_pb2.CancelJobRequest(job_id=self.id)
        answer = await self._connection.call(lambda jobs: jobs.CancelJob(request, timeout=CALL_TIMEOUT_S))
        return self._seen(status_from_message(answer.job))

    async def accept(self) -> JobStatus:
        """Takes a verifying job's rows with the checks made by now: it succeeds. Raises JOB_UNFINISHED, FIELD_INVALID.

        Accepting a finished job changes nothing.
        """
        request = job_service_pb2.AcceptJobRequest(job_id=self.id)
        answer = await self._connection.call(lambda jobs: jobs.AcceptJob(request, timeout=CALL_TIMEOUT_S))
        return self._seen(status_from_message(answer.job))

    async def delete(self) -> JobStatus:
        """Lets go of the job's results, dataset and kept columns, for good; its status stays.

        Deleting a deleted job changes nothing. Raises JOB_UNFINISHED while it runs.
        """
        request = job_service_pb2.DeleteJobRequest(job_id=self.id)
        answer = await self._connection.call(lambda jobs: jobs.DeleteJob(request, timeout=CALL_TIMEOUT_S))
        self._kept, self._has_kept = None, None
        return self._seen(status_from_message(answer.job))

    async def retry_failed(self, *, idempotency_key: bytes | None = None) -> AsyncJob:
        """A new job over just the rows of this one that have no value, once it has ended.

        Bundle, data class, pool, title, options and kept columns are this job's. The kept column `first_row` tells
        each row's position in the job that was submitted first, so that results can be put together. Raises
        JOB_UNFINISHED, JOB_DELETED when the dataset is not retained any more, DATASET_EMPTY when no row failed.
        """
        status = await self.status()
        if status.state not in JOB_STATES_FINAL:
            raise FallowError(
                Reason.JOB_UNFINISHED,
                f"job {self.id} is {status.state.value}; rows are retried once it has ended",
                field="job_id",
                hint=f"`fallow job wait {self.id}` returns then",
            )
        if status.deleted_at_ms:
            raise FallowError(
                Reason.JOB_DELETED,
                f"the dataset of job {self.id} is not retained any more: {status.reason}",
                field="job_id",
                hint="submit the rows anew",
            )
        positions = await rows_without_value(self._connection, self._transfers, self.id, status.progress.rows_total)
        check_retryable(status, positions)
        request, kept = await resubmission(
            self._connection,
            self._transfers,
            self.id,
            positions,
            await self._kept_columns(),
            idempotency_key=secrets.token_bytes(IDEMPOTENCY_KEY_BYTES) if idempotency_key is None else idempotency_key,
        )
        answer = await self._connection.call(lambda jobs: jobs.SubmitMapJob(request, timeout=CALL_TIMEOUT_S))
        return AsyncJob(
            self._connection,
            self._transfers,
            JobId(answer.job_id),
            output_schema=self._output_schema,
            kept=kept,
            has_kept=True,
        )

    async def top_up(self, amount: str | int) -> JobStatus:
        """Adds so many credits to the budget; a job that was out of it goes on. `"0.5"` and whole numbers are exact.

        Raises INSUFFICIENT_CREDITS, JOB_FINISHED, and FIELD_INVALID when the job has no budget.
        """
        request = ledger_service_pb2.TopUpJobRequest(
            job_id=self.id, microcredits=parse_credits(str(amount), "amount"), transfer_id=new_transfer_id()
        )
        answer = await self._connection.call_ledger(lambda ledger: ledger.TopUpJob(request, timeout=CALL_TIMEOUT_S))
        return self._seen(status_from_message(answer.job))

    async def results(self, order: Order = "row") -> AsyncGenerator[RowResult, None]:
        """Every row of the job, while it runs: values, or why there are none.

        Rows that could not be read come last. Raises JOB_FAILED or JOB_CANCELLED after the last row there is.
        """
        async with aclosing(self.row_lists(order)) as lists:
            async for rows in lists:
                for row in rows:
                    yield row

    async def row_lists(self, order: Order = "row") -> AsyncGenerator[list[RowResult], None]:
        """As `results`, in handfuls."""
        _check_order(order)
        kept = await self._kept_columns()
        async with aclosing(self._live(order)) as parts:
            async for part in parts:
                yield list(_row_results(part, kept))
        if kept is not None and kept.unread_rows:
            carried = kept.rows(kept.submitted_rows, kept.submitted_rows + kept.unread_rows)
            yield [
                RowResult(position, STATUS_FAILED, {}, values, failure)
                for (position, failure), values in zip(kept.unread(), carried, strict=True)
            ]
        self._check_end()

    async def batches(self, order: Order = "row") -> AsyncGenerator[pa.RecordBatch, None]:
        """As `results`, as Arrow record batches.

        Columns: kept ones, outputs, `fallow.row`, `fallow.status`, `fallow.cause`, `fallow.reason`; outputs of failed
        rows are null.
        """
        _check_order(order)
        tables: ResultTables | None = None
        async with aclosing(self._live(order)) as parts:
            async for part in parts:
                tables = tables or await self._tables()
                yield tables.batch([part])
        unread = (tables or await self._tables()).unread()
        if unread is not None:
            yield unread
        self._check_end()

    async def table(self, *, partial: bool = False) -> pa.Table:
        """All rows in order once the job has succeeded, with the columns that `batches` tells.

        With `partial`, the rows there are of a job that failed or was cancelled; else JOB_FAILED, JOB_CANCELLED.
        """
        batches: list[pa.RecordBatch] = []
        async with self._settled(partial=partial) as (tables, parts):
            async for batch in parts:
                batches.append(batch)
        return pa.Table.from_batches(batches, schema=tables.schema)

    async def save(self, path: str | Path, *, partial: bool = False) -> Saved:
        """Writes the rows with a value to `path` once the job has succeeded, in order, in bounded memory.

        The ending decides: `.parquet`, `.arrow` or `.jsonl`. Rows that failed go to a side file, `out.failed.parquet`
        beside `out.parquet`, with cause and reason. Raises what `table` raises, and STORAGE_FULL.
        """
        async with self._settled(partial=partial) as (tables, parts):
            file = await asyncio.to_thread(ResultFile, Path(path), tables)
            try:
                async for batch in parts:
                    await asyncio.to_thread(file.write, batch)
                return replace(await asyncio.to_thread(file.finish), shares=self._shares)
            except BaseException:
                file.abandon()
                raise

    async def certificate(self, *, outputs: bool = True) -> Certificate:
        """What became of the job, with all that it takes to check it offline, checked once already.

        With `outputs` it carries the rows that workers signed inline (up to 64 MiB), without which those signatures
        can't be checked later. Raises JOB_UNFINISHED, JOB_DELETED, and EVIDENCE_WRONG when the coordinator's evidence
        does not hold.
        """
        connection = self._connection
        evidence = await fetch_evidence(connection, self.id)
        blocks = await inline_outputs(connection, self.id) if outputs else {}
        manifest = await manifest_of(connection, bundle_of(evidence))
        certificate = await asyncio.to_thread(compose, evidence, manifest=manifest, outputs=blocks)
        authority = load_certificate(connection.credentials.authority_pem)
        checked = await asyncio.to_thread(check_certificate, certificate.facts, authority_fingerprint(authority))
        await follow_checkpoint(connection, checked.checkpoint)
        return certificate

    def _seen(self, status: JobStatus) -> JobStatus:
        self._last = status
        self._output_schema = self._output_schema or status.output_schema
        if self._has_kept is None:
            self._has_kept = status.kept is not None
        return status

    def _note(self, status: JobStatus) -> None:
        self._seen(status)

    def _check_end(self, results: Sequence[TaskResult] = ()) -> None:
        if self._last is not None and self._last.state in JOB_STATES_FINAL:
            _check(self._last, results)

    async def _live(self, order: Order) -> AsyncGenerator[ResultRows, None]:
        outputs: Outputs | None = None
        events = watch(self._connection, self.id)
        try:
            outputs = Outputs(self._transfers, await self._decoder())
            arrange = rows_in_order if order == "row" else rows_as_they_come
            async with aclosing(arrange(events, outputs, self._note)) as parts:
                async for part in parts:
                    yield part
        finally:
            await events.aclose()
            if outputs is not None:
                outputs.close()

    @asynccontextmanager
    async def _settled(
        self, *, partial: bool
    ) -> AsyncGenerator[tuple[ResultTables, AsyncGenerator[pa.RecordBatch, None]], None]:
        """All rows, corrections applied, as batches in order, once the job has ended."""
        async with AsyncExitStack() as stack:
            outputs = Outputs(self._transfers, await self._decoder())
            stack.callback(outputs.close)
            arrived: list[Arrived] = []
            async with aclosing(watch(self._connection, self.id)) as events:
                async for event in events:
                    if isinstance(event, JobStatus):
                        self._seen(event)
                    else:
                        outputs.hold(event)
                        arrived.append(Arrived(event.result, b""))
            if not partial:
                self._check_end([entry.result for entry in arrived])
            tables = await self._tables()
            results = [_final(entry.result, self._last) for entry in arrived]
            spans = [(span, results[index]) for span, index in final_spans(results)]
            self._shares = _shares_of(spans)
            yield tables, await stack.enter_async_context(aclosing(_batched(spans_in_order(spans, outputs), tables)))

    async def _decoder(self) -> ResultDecoder:
        if not self._output_schema:
            await self.status()
        if not self._output_schema:
            raise FallowError(Reason.INTERNAL, f"the coordinator tells no output schema for job {self.id}")
        return ResultDecoder(self._output_schema)

    async def _tables(self) -> ResultTables:
        return ResultTables((await self._decoder()).schema, await self._kept_columns())

    async def _kept_columns(self) -> KeptColumns | None:
        if self._kept is not None:
            return self._kept
        if self._has_kept is None:
            await self.status()
        if not self._has_kept:
            return None
        status = self._last if self._last is not None and self._last.kept is not None else await self.status()
        assert status.kept is not None, "a job keeps its kept columns"
        with tempfile.TemporaryDirectory(prefix="fallow-kept-") as folder:
            path = Path(folder) / "kept.arrow"
            await self._transfers.download_to(status.kept, path)
            # The mapping outlives the file's name.
            self._kept = KeptColumns(path)
        return self._kept


def _final(result: TaskResult, last: JobStatus | None) -> TaskResult:
    """A result as it stands at the end: one that came while its rows were being checked has been checked since."""
    if result.status != PROVISIONAL or last is None or last.state is not JobState.SUCCEEDED:
        return result
    accepted = last.checks is not None and last.checks.accepted
    return replace(result, status=ACCEPTED if accepted else VERIFIED)


async def _batched(
    parts: AsyncGenerator[ResultRows, None], tables: ResultTables
) -> AsyncGenerator[pa.RecordBatch, None]:
    pending: list[ResultRows] = []
    rows = 0
    async with aclosing(parts):
        async for part in parts:
            pending.append(part)
            rows += len(part.positions) + len(part.failures)
            if rows >= BATCH_ROWS:
                yield tables.batch(pending)
                pending, rows = [], 0
    if pending:
        yield tables.batch(pending)
    unread = tables.unread()
    if unread is not None:
        yield unread


def _row_results(part: ResultRows, kept: KeptColumns | None) -> Iterator[RowResult]:
    if kept is None:
        yield from part.row_results(None, 0)
        return
    for span in part.result.spans:
        inside = part.within(span)
        if len(inside.positions) or inside.failures:
            carried = kept.rows(span.job_position, span.job_position + span.rows)
            yield from inside.row_results(carried, span.job_position)


def _shares_of(spans: Sequence[tuple[RowSpan, TaskResult]]) -> tuple[WorkerShare, ...]:
    rows: Counter[tuple[str, int]] = Counter()
    for span, result in spans:
        if result.worker_id:
            for node, count in result.rows_by_node(span):
                rows[(result.worker_id, node)] += count
    return tuple(WorkerShare(worker, node, count) for (worker, node), count in rows.most_common())


def _check_order(order: str) -> None:
    if order not in get_args(Order):
        raise FallowError(
            Reason.FIELD_INVALID, f"{order!r} is no order of rows", field="order", limit=", ".join(get_args(Order))
        )


def _check(status: JobStatus, results: Sequence[TaskResult] = ()) -> None:
    """Raises JOB_FAILED, with the first failed row of `results` if any, or JOB_CANCELLED, unless the job succeeded."""
    if status.state is JobState.FAILED:
        told = f"job {status.job_id} failed: {status.reason or 'no reason was given'}"
        failures = [failure for result in results for failure in result.failures]
        if failures:
            first = min(failures, key=lambda failure: failure.job_position)
            told += f"; row {first.job_position}: {first.reason}"
        raise FallowError(Reason.JOB_FAILED, told)
    if status.state is JobState.CANCELLED:
        raise FallowError(Reason.JOB_CANCELLED, f"job {status.job_id} was cancelled")
