"""Questions about what the follower wrote: jobs and results that have left the state. Read-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from fallow.errors import Reason
from fallow.ids import AccountId, Digest, JobId
from fallow.job import JobStatus, TaskResult, WorkerShare
from fallow.session import BlobReference
from fallow.v1 import job_pb2
from fallow.wire.job import result_from_message, status_from_message
from fallow_coordinator.core.events import JobSubmitted
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.view_file import VIEWS_FILE
from fallow_coordinator.store.work_events import decode_submission

_STATUS = "SELECT status, deleted_at_ms, deleted_jobs.reason FROM jobs LEFT JOIN deleted_jobs USING (job_id)"
_JOBS = f"{_STATUS} WHERE jobs.account_id = ? ORDER BY submitted_at_ms DESC, job_id DESC LIMIT ?"
_JOBS_BEFORE = f"""{_STATUS} WHERE jobs.account_id = ? AND (submitted_at_ms, job_id) < (?, ?)
    ORDER BY submitted_at_ms DESC, job_id DESC LIMIT ?"""

_JOB_RECORDS = """SELECT sequence, coalesce(session_id, '') FROM job_records WHERE job_id = ?
    ORDER BY sequence LIMIT ?"""
JOB_RECORDS_MAX: Final = 1_000_000
"""Records of one job that are told of: ten for each of the most tasks that a job has."""
_SEQUENCE = "SELECT value FROM view_meta WHERE name = 'applied_sequence'"
_REFERRED = """SELECT 1 FROM results WHERE output_digest = ?
    UNION ALL SELECT 1 FROM job_blobs WHERE blob_digest = ?
    UNION ALL SELECT 1 FROM job_payloads WHERE digest = ? LIMIT 1"""


class SqliteViews:
    """The Views port over the follower's file. Any thread may ask; one at a time. Empty until the follower begins."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VIEWS_FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def view_sequence(self) -> int:
        """Sequence of the newest record that the views show."""
        rows = self._rows(_SEQUENCE, ())
        return int(rows[0][0]) if rows else 0

    def job_status(self, job_id: JobId) -> JobStatus | None:
        """The job as it stood at `view_sequence`, without its output schema; None for one that is not there."""
        rows = self._rows(f"{_STATUS} WHERE job_id = ?", (job_id,))
        return _status(rows[0]) if rows else None

    def jobs(self, account_id: AccountId, *, before: tuple[int, str] | None, limit: int) -> Sequence[JobStatus]:
        """Newest first; `before` is (submitted_at_ms, job_id) of the last one seen."""
        if before is None:
            rows = self._rows(_JOBS, (account_id, limit))
        else:
            rows = self._rows(_JOBS_BEFORE, (account_id, *before, limit))
        return [_status(row) for row in rows]

    def results(self, job_id: JobId, *, after_cursor: int, limit: int) -> Sequence[TaskResult]:
        """Up to `limit` results with a cursor greater than `after_cursor`, rising."""
        rows = self._rows(
            "SELECT result FROM results WHERE job_id = ? AND cursor > ? ORDER BY cursor LIMIT ?",
            (job_id, after_cursor, limit),
        )
        return [result_from_message(job_pb2.TaskResult.FromString(row[0]))[0] for row in rows]

    def shares(self, job_id: JobId, *, limit: int) -> Sequence[WorkerShare]:
        """Rows by worker and node, the most first."""
        rows = self._rows(
            """SELECT worker_id, node, rows FROM rows_by_worker WHERE job_id = ?
               ORDER BY rows DESC, worker_id, node LIMIT ?""",
            (job_id, limit),
        )
        return [WorkerShare(str(worker_id), int(node), int(count)) for worker_id, node, count in rows]

    def output(self, account_id: AccountId, digest: Digest) -> BlobReference | None:
        """An output block of one of the account's jobs, or None."""
        rows = self._rows(
            "SELECT output_length_bytes FROM results WHERE account_id = ? AND output_digest = ? LIMIT 1",
            (account_id, digest),
        )
        return BlobReference(digest, int(rows[0][0])) if rows else None

    def references(self, digests: Sequence[Digest]) -> tuple[int, frozenset[Digest]]:
        """Those of the blobs and payloads to which a job refers that is not deleted, and where the views stood then."""
        found: set[Digest] = set()
        with self._lock, storage_failures(self._path):
            connection = self._connected()
            if connection is None:
                return 0, frozenset()
            # One transaction: the sequence and the references are those of one moment.
            connection.execute("BEGIN")
            try:
                sequence = self._ask(connection, _SEQUENCE, ())
                for digest in digests:
                    if self._ask(connection, _REFERRED, (digest, digest, digest)):
                        found.add(digest)
            finally:
                connection.execute("COMMIT")
        return (int(sequence[0][0]) if sequence else 0), frozenset(found)

    def expired_jobs(self, now_ms: int, limit: int) -> Sequence[tuple[AccountId, JobId]]:
        """Jobs whose retention is over and that are not deleted, the longest overdue first."""
        rows = self._rows(
            "SELECT account_id, job_id FROM retained_jobs WHERE keep_until_ms <= ? ORDER BY keep_until_ms LIMIT ?",
            (now_ms, limit),
        )
        return [(AccountId(str(account_id)), JobId(str(job_id))) for account_id, job_id in rows]

    def submission(self, job_id: JobId) -> JobSubmitted | None:
        """What the job was submitted as; None for one that is deleted or not there."""
        rows = self._rows("SELECT submission FROM job_submissions WHERE job_id = ?", (job_id,))
        return decode_submission(rows[0][0]) if rows else None

    def job_records(self, job_id: JobId) -> tuple[int, Sequence[tuple[int, str]]]:
        """(view_sequence, (sequence, session of a commitment or "") of each record of the job, rising), of one moment.

        Of a job that is deleted or not there: none.
        """
        with self._lock, storage_failures(self._path):
            connection = self._connected()
            if connection is None:
                return 0, ()
            connection.execute("BEGIN")
            try:
                sequence = self._ask(connection, _SEQUENCE, ())
                rows = self._ask(connection, _JOB_RECORDS, (job_id, JOB_RECORDS_MAX + 1))
            finally:
                connection.execute("COMMIT")
        return (int(sequence[0][0]) if sequence else 0), [(int(number), str(session)) for number, session in rows]

    def run_roots(self, first: int, count: int) -> Sequence[tuple[int, bytes]]:
        """(number, root) of those of the journal's full runs of records that the views have, from `first` on."""
        rows = self._rows(
            "SELECT number, root FROM tree_nodes WHERE number >= ? AND number < ?", (first, first + count)
        )
        return [(int(number), bytes(root)) for number, root in rows]

    def close(self) -> None:
        """Gives the file back."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _rows(self, question: str, values: tuple[object, ...]) -> list[tuple[bytes, ...]]:
        with self._lock, storage_failures(self._path):
            connection = self._connected()
            return [] if connection is None else self._ask(connection, question, values)

    def _connected(self) -> sqlite3.Connection | None:
        """The connection; None while the follower has not made the file. The caller holds the lock."""
        if self._connection is None and self._path.exists():
            self._connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
        return self._connection

    @staticmethod
    def _ask(connection: sqlite3.Connection, question: str, values: tuple[object, ...]) -> list[tuple[bytes, ...]]:
        try:
            return connection.execute(question, values).fetchall()
        except sqlite3.OperationalError as error:
            # The follower has made the file and not yet its tables, or they are those of an older version.
            if "no such table" in str(error):
                return []
            raise


def _status(row: tuple[object, ...]) -> JobStatus:
    data, deleted_at_ms, reason = row
    assert isinstance(data, bytes)
    status = status_from_message(job_pb2.JobStatus.FromString(data))
    if not isinstance(deleted_at_ms, int):
        return status
    return replace(
        status,
        deleted_at_ms=deleted_at_ms,
        reason=str(reason),
        reason_code=Reason.JOB_DELETED.value,
        results=0,
        kept=None,
    )
