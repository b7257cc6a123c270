"""Questions about what the follower wrote: jobs and results that have left the state. Read-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from fallow.ids import AccountId, Digest, JobId
from fallow.job import JobStatus, TaskResult
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.session import BlobReference
from fallow.v1 import job_pb2
from fallow.wire.job import result_from_message, status_from_message
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.view_file import VIEWS_FILE

_JOBS = "SELECT status FROM jobs WHERE account_id = ? ORDER BY submitted_at_ms DESC, job_id DESC LIMIT ?"
_RETAINED = """SELECT DISTINCT output_digest FROM results JOIN jobs USING (job_id)
    WHERE output_digest IS NOT NULL AND output_length_bytes <= ? AND (finished_at_ms = 0 OR finished_at_ms > ?)"""
_JOBS_BEFORE = """SELECT status FROM jobs WHERE account_id = ? AND (submitted_at_ms, job_id) < (?, ?)
    ORDER BY submitted_at_ms DESC, job_id DESC LIMIT ?"""


class SqliteViews:
    """The Views port over the follower's file. Any thread may ask; one at a time. Empty until the follower begins."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VIEWS_FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def view_sequence(self) -> int:
        """Sequence of the newest record that the views show."""
        rows = self._rows("SELECT value FROM view_meta WHERE name = 'applied_sequence'", ())
        return int(rows[0][0]) if rows else 0

    def job_status(self, job_id: JobId) -> JobStatus | None:
        """The job as it stood at `view_sequence`, without its output schema; None for one that is not there."""
        rows = self._rows("SELECT status FROM jobs WHERE job_id = ?", (job_id,))
        return _status(rows[0][0]) if rows else None

    def jobs(self, account_id: AccountId, *, before: tuple[int, str] | None, limit: int) -> Sequence[JobStatus]:
        """Newest first; `before` is (submitted_at_ms, job_id) of the last one seen."""
        if before is None:
            rows = self._rows(_JOBS, (account_id, limit))
        else:
            rows = self._rows(_JOBS_BEFORE, (account_id, *before, limit))
        return [_status(row[0]) for row in rows]

    def results(self, job_id: JobId, *, after_cursor: int, limit: int) -> Sequence[TaskResult]:
        """Up to `limit` results with a cursor greater than `after_cursor`, rising."""
        rows = self._rows(
            "SELECT result FROM results WHERE job_id = ? AND cursor > ? ORDER BY cursor LIMIT ?",
            (job_id, after_cursor, limit),
        )
        return [result_from_message(job_pb2.TaskResult.FromString(row[0]))[0] for row in rows]

    def output(self, account_id: AccountId, digest: Digest) -> BlobReference | None:
        """An output block of one of the account's jobs, or None."""
        rows = self._rows(
            "SELECT output_length_bytes FROM results WHERE account_id = ? AND output_digest = ? LIMIT 1",
            (account_id, digest),
        )
        return BlobReference(digest, int(rows[0][0])) if rows else None

    def retained_outputs(self, finished_after_ms: int) -> frozenset[Digest]:
        """Output blocks small enough to be inline, of unfinished jobs and of those that ended after that moment."""
        rows = self._rows(_RETAINED, (INLINE_PAYLOAD_BYTES_MAX, finished_after_ms))
        return frozenset(Digest(row[0]) for row in rows)

    def close(self) -> None:
        """Gives the file back."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _rows(self, question: str, values: tuple[object, ...]) -> list[tuple[bytes, ...]]:
        with self._lock, storage_failures(self._path):
            if self._connection is None:
                if not self._path.exists():
                    return []
                self._connection = sqlite3.connect(
                    f"{self._path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
                )
            try:
                return self._connection.execute(question, values).fetchall()
            except sqlite3.OperationalError as error:
                # The follower has made the file and not yet its tables.
                if "no such table" in str(error):
                    return []
                raise


def _status(data: bytes) -> JobStatus:
    return status_from_message(job_pb2.JobStatus.FromString(data))
