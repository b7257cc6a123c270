"""The blocking face of the client. It works in scripts and in notebooks alike: calls run on a thread of their own."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Unpack

import pyarrow as pa

from fallow.bundle_file import Bundle
from fallow.certificate import Certificate
from fallow.checkpoint import Checkpoint
from fallow.client.account import Balances, Statement
from fallow.client.client import JOBS_PER_PAGE, AsyncClient, BundleState, Session, connect_async
from fallow.client.job import AsyncJob, Order
from fallow.client.loop_thread import LoopThread
from fallow.client.results import RowResult
from fallow.client.retry import PATIENCE_S
from fallow.client.tables import Saved
from fallow.client.terms import JobTerms
from fallow.explanation import JobExplanation
from fallow.ids import Digest, JobId
from fallow.job import JobOptions, JobProgress, JobStatus
from fallow.quote import Quote
from fallow.roles import DataClass
from fallow.sources import Rows


def connect(credentials: str | Path | None = None, *, patience_s: float = PATIENCE_S) -> Client:
    """A client of the coordinator that this user may use; see `connect_async` for the arguments."""
    loop = LoopThread.shared()
    return Client(loop.run(connect_async(credentials, patience_s=patience_s)), loop)


class Client:
    """A connection that outlives the coordinator's restarts. Use it as a context manager, or `close` it."""

    def __init__(self, client: AsyncClient, loop: LoopThread) -> None:
        """Call `connect`."""
        self._client = client
        self._loop = loop

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def session(self) -> Session:
        """Who the caller is."""
        return self._client.session

    def close(self) -> None:
        """Ends the connection; jobs go on."""
        self._loop.run(self._client.close())

    def map(
        self,
        bundle: Bundle,
        rows: Rows,
        *,
        data: DataClass | str,
        keep: Sequence[str] = (),
        inputs: Mapping[str, str | Sequence[str]] | None = None,
        cast: bool = False,
        title: str = "",
        failed_rows_max: int | None = None,
        retention: timedelta | None = None,
        idempotency_key: str | bytes | None = None,
        options: JobOptions | None = None,
        pool: str = "",
        on_rows: Callable[[int], None] | None = None,
        **terms: Unpack[JobTerms],
    ) -> Job:
        """Submits a job that applies `bundle` to each row; see `AsyncClient.map` for the arguments and errors."""
        submitted = self._client.map(
            bundle,
            rows,
            data=data,
            keep=keep,
            inputs=inputs,
            cast=cast,
            title=title,
            failed_rows_max=failed_rows_max,
            retention=retention,
            idempotency_key=idempotency_key,
            options=options,
            pool=pool,
            on_rows=on_rows,
            **terms,
        )
        return Job(self._loop.run(submitted), self._loop)

    def quote(
        self,
        bundle: Bundle,
        rows: Rows,
        *,
        data: DataClass | str,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
        cast: bool = False,
        options: JobOptions | None = None,
        pool: str = "",
        **terms: Unpack[JobTerms],
    ) -> Quote:
        """What `map` with the same arguments would cost, when it would end, who could do it: `AsyncClient.quote`."""
        asked = self._client.quote(
            bundle, rows, data=data, inputs=inputs, cast=cast, options=options, pool=pool, **terms
        )
        return self._loop.run(asked)

    def job(self, job_id: str) -> Job:
        """A job of the account, from whatever process it was submitted. Raises JOB_UNKNOWN."""
        return Job(self._loop.run(self._client.job(job_id)), self._loop)

    def jobs(self, limit: int = JOBS_PER_PAGE) -> list[JobStatus]:
        """The account's jobs, newest first, at most `limit`."""
        return self._loop.run(self._client.jobs(limit))

    def checkpoint(self) -> Checkpoint:
        """The coordinator's signed word on its journal now; see `AsyncClient.checkpoint`."""
        return self._loop.run(self._client.checkpoint())

    def balances(self) -> Balances:
        """What the account has now."""
        return self._loop.run(self._client.balances())

    def statement(self, *, since_ms: int = 0, until_ms: int = 0) -> Statement:
        """What came and went, the oldest first; see `AsyncClient.statement`."""
        return self._loop.run(self._client.statement(since_ms=since_ms, until_ms=until_ms))

    def register(self, bundle: Bundle) -> None:
        """Makes `bundle` known to the coordinator, which has it inspected; `map` does it by itself."""
        self._loop.run(self._client.register(bundle))

    def bundle_state(self, digest: Digest) -> BundleState | None:
        """What the coordinator knows of a bundle; None when it is not registered in this account."""
        return self._loop.run(self._client.bundle_state(digest))


class Job:
    """One job. Ctrl-C while waiting for it leaves it running and tells its id."""

    def __init__(self, job: AsyncJob, loop: LoopThread) -> None:
        """Call `Client.map` or `Client.job`."""
        self._job = job
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._job)

    @property
    def id(self) -> JobId:
        """What `client.job(id)` takes, from any process of the account."""
        return self._job.id

    def status(self) -> JobStatus:
        """The job as the coordinator has it now."""
        return self._loop.run(self._job.status())

    def progress(self) -> JobProgress:
        """Rows done, failed and leased so far."""
        return self._loop.run(self._job.progress())

    def explain(self) -> JobExplanation:
        """Who could do the job's work, who cannot and why, and what it waits for now."""
        return self._loop.run(self._job.explain())

    def statuses(self) -> Iterator[JobStatus]:
        """Each change of status until the job has ended."""
        with self._detaching():
            yield from self._loop.iterate(self._job.statuses())

    def wait(self, *, check: bool = True) -> JobStatus:
        """The final status, once there is one. With `check` raises JOB_FAILED or JOB_CANCELLED."""
        with self._detaching():
            return self._loop.run(self._job.wait(check=check))

    def cancel(self) -> JobStatus:
        """Ends the job; rows that are done stay readable. Cancelling a finished job changes nothing."""
        return self._loop.run(self._job.cancel())

    def accept(self) -> JobStatus:
        """Takes a verifying job's rows with the checks made by now; see `AsyncJob.accept`."""
        return self._loop.run(self._job.accept())

    def top_up(self, amount: str | int) -> JobStatus:
        """Adds so many credits to the budget; a job that was out of it goes on."""
        return self._loop.run(self._job.top_up(amount))

    def delete(self) -> JobStatus:
        """Lets go of the job's results, dataset and kept columns, for good; see `AsyncJob.delete`."""
        return self._loop.run(self._job.delete())

    def retry_failed(self, *, idempotency_key: bytes | None = None) -> Job:
        """A new job over just the rows of this one that have no value; see `AsyncJob.retry_failed`."""
        return Job(self._loop.run(self._job.retry_failed(idempotency_key=idempotency_key)), self._loop)

    def results(self, order: Order = "row") -> Iterator[RowResult]:
        """Every row of the job, while it runs: values, or why there are none; see `AsyncJob.results`."""
        with self._detaching():
            for rows in self._loop.iterate(self._job.row_lists(order)):
                yield from rows

    def batches(self, order: Order = "row") -> Iterator[pa.RecordBatch]:
        """As `results`, as Arrow record batches; see `AsyncJob.batches` for the columns."""
        with self._detaching():
            yield from self._loop.iterate(self._job.batches(order))

    def table(self, *, partial: bool = False) -> pa.Table:
        """All rows in order once the job has succeeded; see `AsyncJob.table`."""
        with self._detaching():
            return self._loop.run(self._job.table(partial=partial))

    def save(self, path: str | Path, *, partial: bool = False) -> Saved:
        """Writes all rows to a file once the job has succeeded; see `AsyncJob.save`."""
        with self._detaching():
            return self._loop.run(self._job.save(path, partial=partial))

    def certificate(self, *, outputs: bool = True) -> Certificate:
        """What became of the job, with all that it takes to check it offline; see `AsyncJob.certificate`."""
        return self._loop.run(self._job.certificate(outputs=outputs))

    @contextmanager
    def _detaching(self) -> Generator[None, None, None]:
        try:
            yield
        except KeyboardInterrupt:
            sys.stderr.write(f"\ndetached: job {self.id} goes on; `fallow job watch {self.id}` returns to it\n")
            raise
