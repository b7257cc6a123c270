"""Jobs wherever they are: in the state while they live, in the follower's views once they have left it."""

from __future__ import annotations

import asyncio
import datetime
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, JobId, PoolId
from fallow.job import DatasetBlock, JobOptions, JobStatus, TaskResult, WorkerShare
from fallow.limits import JOB_SHARES_SHOWN_MAX
from fallow.roles import DataClass
from fallow.session import BlobReference
from fallow.wire.bundle import decode_manifest
from fallow.wire.schema import encode_schema
from fallow_coordinator.core.jobs import DELETED_BY_OWNER
from fallow_coordinator.core.questions import job_status, jobs_of, readable_blob, results_after, shares_told
from fallow_coordinator.engine import Engine
from fallow_coordinator.ports import Views

SCHEMAS_REMEMBERED_MAX: Final = 1_024
DELETIONS_REMEMBERED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class JobSubmission:
    """A job as it was submitted."""

    bundle_digest: Digest
    blocks: tuple[DatasetBlock, ...]
    data_class: DataClass
    pool_id: PoolId
    title: str
    options: JobOptions
    kept: BlobReference | None


class JobReads:
    """Answers about jobs of one account at a time; another account's are as unknown as none."""

    def __init__(self, engine: Engine, views: Views) -> None:
        """Looks into `engine`'s state first, then into `views`, in another thread."""
        self._engine = engine
        self._views = views
        self._schemas: OrderedDict[Digest, bytes] = OrderedDict()
        self._deleted: OrderedDict[JobId, int] = OrderedDict()
        """When jobs were deleted that had left the state: known here until the views know."""

    async def status(self, account_id: AccountId, job_id: JobId) -> JobStatus:
        """The job as its owner sees it. Raises JOB_UNKNOWN."""
        status = job_status(self._engine.state, job_id)
        if status is None:
            status = await asyncio.to_thread(self._views.job_status, job_id)
        if status is None or status.account_id != account_id:
            raise FallowError(
                Reason.JOB_UNKNOWN, "this account has no such job", field="job_id", hint="list jobs to see them"
            )
        return self._complete(self._without_deleted(status))

    async def shares(self, job_id: JobId) -> Sequence[WorkerShare]:
        """Rows by worker and node, the most first; the caller has checked whose job it is."""
        job = self._engine.state.jobs.get(job_id)
        if job is None:
            return await asyncio.to_thread(self._views.shares, job_id, limit=JOB_SHARES_SHOWN_MAX)
        return shares_told(job)

    async def submission(self, account_id: AccountId, job_id: JobId) -> JobSubmission:
        """What a job of the account was submitted as. Raises JOB_UNKNOWN, JOB_DELETED."""
        check_not_deleted(await self.status(account_id, job_id))
        job = self._engine.state.jobs.get(job_id)
        if job is not None:
            return JobSubmission(
                job.bundle_digest, job.blocks, job.data_class, job.pool_id, job.title, job.options, job.kept
            )
        event = await asyncio.to_thread(self._views.submission, job_id)
        if event is None:
            raise FallowError(
                Reason.JOB_UNKNOWN, "the job's dataset is not known any more", field="job_id", hint="submit it anew"
            )
        return JobSubmission(
            event.bundle_digest, event.blocks, event.data_class, event.pool_id, event.title, event.options, event.kept
        )

    def remember_deleted(self, job_id: JobId, at_ms: int) -> None:
        """The job is deleted from now on, even while the views do not say so yet."""
        self._deleted[job_id] = at_ms
        if len(self._deleted) > DELETIONS_REMEMBERED_MAX:
            self._deleted.popitem(last=False)

    def _without_deleted(self, status: JobStatus) -> JobStatus:
        at_ms = self._deleted.get(status.job_id)
        if at_ms is None or status.deleted_at_ms:
            return status
        return replace(
            status,
            deleted_at_ms=at_ms,
            reason=DELETED_BY_OWNER,
            reason_code=Reason.JOB_DELETED.value,
            results=0,
            kept=None,
        )

    async def results(self, job_id: JobId, *, after_cursor: int, limit: int) -> Sequence[TaskResult]:
        """Results after a cursor, rising; the caller has checked whose job it is."""
        if job_id in self._engine.state.jobs:
            return results_after(self._engine.state, job_id, after_cursor, limit)
        return await asyncio.to_thread(self._views.results, job_id, after_cursor=after_cursor, limit=limit)

    async def page(self, account_id: AccountId, *, before: tuple[int, str] | None, limit: int) -> Sequence[JobStatus]:
        """Up to `limit` jobs, newest first, after the one `before` (submitted_at_ms, job_id)."""
        viewed = await asyncio.to_thread(self._views.jobs, account_id, before=before, limit=limit)
        found = {status.job_id: status for status in viewed}
        # The state is asked last and wins: it is ahead of the views.
        for status in jobs_of(self._engine.state, account_id):
            if before is None or (status.submitted_at_ms, status.job_id) < before:
                found[status.job_id] = status
        newest_first = sorted(found.values(), key=lambda s: (s.submitted_at_ms, s.job_id), reverse=True)
        return [self._complete(self._without_deleted(status)) for status in newest_first[:limit]]

    async def owned_blobs(self, account_id: AccountId, digests: Sequence[Digest]) -> Sequence[BlobReference]:
        """The account's blobs with these digests. Raises BLOB_UNKNOWN for one that it may not read, whoever has it."""
        blobs: list[BlobReference] = []
        for index, digest in enumerate(digests):
            blob = readable_blob(self._engine.state, account_id, digest)
            if blob is None:
                blob = await asyncio.to_thread(self._views.output, account_id, digest)
            if blob is None:
                raise FallowError(Reason.BLOB_UNKNOWN, "this account has no such blob", field=f"digests[{index}]")
            blobs.append(blob)
        return blobs

    def _complete(self, status: JobStatus) -> JobStatus:
        """With the schema of its output rows, from the bundle's manifest."""
        if status.output_schema:
            return status
        schema = self._schemas.get(status.bundle_digest)
        if schema is None:
            manifest = self._engine.payload(status.bundle_digest)
            if manifest is None:
                return status
            schema = self._schemas[status.bundle_digest] = encode_schema(decode_manifest(manifest).output_schema)
            if len(self._schemas) > SCHEMAS_REMEMBERED_MAX:
                self._schemas.popitem(last=False)
        return replace(status, output_schema=schema)


def check_not_deleted(status: JobStatus) -> None:
    """Returns when the job's results are there. Raises JOB_DELETED."""
    if status.deleted_at_ms:
        moment = datetime.datetime.fromtimestamp(status.deleted_at_ms / 1000, datetime.UTC)
        raise FallowError(
            Reason.JOB_DELETED,
            f"the results of job {status.job_id} were deleted at {moment:%Y-%m-%d %H:%M:%S} UTC: {status.reason}",
            field="job_id",
            hint="submit it again to have them again; `--retention` says how long results stay",
        )
