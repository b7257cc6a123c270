"""The views' own database file: its tables, and the only writer of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fallow.ids import Digest
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.projection import Changes

VIEWS_FILE = "views.db"
VIEWS_VERSION = 7
"""Another version in the file: the views are built anew from the journal."""
LOCK_WAIT_S = 5.0

_TABLES: dict[str, str] = {
    "accounts": "account_id TEXT PRIMARY KEY, name TEXT",
    "pools": "pool_id TEXT PRIMARY KEY, account_id TEXT, name TEXT, mode TEXT, policy TEXT",
    "pool_members": "pool_id TEXT, account_id TEXT, admitted INTEGER, PRIMARY KEY (pool_id, account_id)",
    "tokens": """token_id TEXT PRIMARY KEY, account_id TEXT, pool_id TEXT, role TEXT, tier TEXT, uses_max INTEGER,
        uses INTEGER, expires_at_ms INTEGER, revoked INTEGER, tags TEXT""",
    "parties": """party_id TEXT PRIMARY KEY, account_id TEXT, pool_id TEXT, role TEXT, tier TEXT, name TEXT,
        token_id TEXT, key_fingerprint BLOB, enrolled_at_ms INTEGER, not_after_ms INTEGER, revoked INTEGER,
        revoked_reason TEXT""",
    "workers": """worker_id TEXT PRIMARY KEY, account_id TEXT, pool_id TEXT, tier TEXT, connected INTEGER,
        sessions INTEGER, window INTEGER, quarantined INTEGER, quarantine_reason TEXT, rows_settled INTEGER,
        tasks_settled INTEGER""",
    "bundles": """account_id TEXT, bundle_digest BLOB, standing TEXT, reason TEXT, canonical_batch_rows INTEGER,
        PRIMARY KEY (account_id, bundle_digest)""",
    "jobs": """job_id TEXT PRIMARY KEY, account_id TEXT, pool_id TEXT, party_id TEXT, bundle_digest BLOB, title TEXT,
        data_class TEXT, state TEXT, reason TEXT, reason_code TEXT, policy TEXT, microcredits INTEGER,
        submitted_at_ms INTEGER, finished_at_ms INTEGER, rows INTEGER, rows_done INTEGER, rows_failed INTEGER,
        tasks_settled INTEGER, results INTEGER, status BLOB""",
    "results": """job_id TEXT, cursor INTEGER, account_id TEXT, worker_id TEXT, node INTEGER, rows INTEGER,
        rows_failed INTEGER, output_digest BLOB, output_length_bytes INTEGER, status TEXT, result BLOB,
        PRIMARY KEY (job_id, cursor)""",
    "result_nodes": """job_id TEXT, cursor INTEGER, number INTEGER, node INTEGER, rows INTEGER, rows_failed INTEGER,
        PRIMARY KEY (job_id, cursor, number)""",
    "job_blobs": "job_id TEXT, blob_digest BLOB, PRIMARY KEY (job_id, blob_digest)",
    "job_submissions": "job_id TEXT PRIMARY KEY, account_id TEXT, submission BLOB",
    "job_payloads": "job_id TEXT, digest BLOB, PRIMARY KEY (job_id, digest)",
    "retained_jobs": "job_id TEXT PRIMARY KEY, account_id TEXT, keep_until_ms INTEGER",
    "postings": """sequence INTEGER, number INTEGER, at_ms INTEGER, what TEXT, book TEXT, purse TEXT, account_id TEXT,
        pool_id TEXT, job_id TEXT, worker_id TEXT, note TEXT, microcredits INTEGER, PRIMARY KEY (sequence, number)""",
    "settlements": """sequence INTEGER PRIMARY KEY, at_ms INTEGER, pool_id TEXT, job_id TEXT, account_id TEXT,
        worker_account_id TEXT, worker_id TEXT, device_class TEXT, rows INTEGER, rows_failed INTEGER,
        unit_micros INTEGER, price_microcredits_per_unit INTEGER, microcredits INTEGER,
        contribution_microcredits INTEGER, energy_millijoules INTEGER""",
    "deleted_jobs": "job_id TEXT PRIMARY KEY, account_id TEXT, deleted_at_ms INTEGER, reason TEXT",
    "job_records": "job_id TEXT, sequence INTEGER, session_id TEXT, PRIMARY KEY (job_id, sequence)",
    "tree_nodes": "number INTEGER PRIMARY KEY, root BLOB",
}
"""Columns of each table; a row of `Changes` has its values in this order. Whatever belongs to somebody says to whom."""

_GONE_WITH_THEIR_JOB = (
    "results",
    "result_nodes",
    "job_blobs",
    "job_submissions",
    "job_payloads",
    "retained_jobs",
    "job_records",
)

_EXTRAS = (
    "CREATE INDEX outputs_of_jobs ON results (output_digest)",
    "CREATE INDEX blobs_of_jobs ON job_blobs (blob_digest)",
    "CREATE INDEX payloads_of_jobs ON job_payloads (digest)",
    "CREATE INDEX ends_of_retention ON retained_jobs (keep_until_ms)",
    "CREATE INDEX jobs_of_account ON jobs (account_id, submitted_at_ms, job_id)",
    "CREATE INDEX postings_of_account ON postings (account_id, at_ms)",
    "CREATE INDEX settlements_of_worker ON settlements (worker_id, at_ms)",
    "CREATE INDEX settlements_in_time ON settlements (at_ms)",
    """CREATE VIEW rows_by_worker AS
        SELECT account_id, job_id, worker_id, coalesce(part.node, results.node) AS node,
            count(DISTINCT cursor) AS tasks, sum(coalesce(part.rows, results.rows)) AS rows,
            sum(coalesce(part.rows_failed, results.rows_failed)) AS rows_failed
        FROM results LEFT JOIN result_nodes AS part USING (job_id, cursor)
        WHERE worker_id != '' GROUP BY account_id, job_id, worker_id, coalesce(part.node, results.node)""",
)
_META = "CREATE TABLE IF NOT EXISTS view_meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID"


class ViewFile:
    """Writes the views, each chunk of the journal exactly once: its rows and its end stand in one transaction."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes the file in `folder`; one of another version is emptied. Raises StorageFailed."""
        self._path = folder / VIEWS_FILE
        with storage_failures(self._path):
            self._connection = sqlite3.connect(self._path, timeout=LOCK_WAIT_S, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            # What a power cut takes here is read from the journal again: rows and the sequence go together.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(_META)
        if self._meta("version") != VIEWS_VERSION:
            self.empty()

    @property
    def applied_sequence(self) -> int:
        """Sequence of the newest record that the views show."""
        sequence = self._meta("applied_sequence")
        return sequence if isinstance(sequence, int) else 0

    @property
    def applied_leaf(self) -> bytes:
        """Leaf of that record: tells whether this is still the journal that the views were made of."""
        leaf = self._meta("applied_leaf")
        return leaf if isinstance(leaf, bytes) else b""

    def apply(self, changes: Changes, *, sequence: int, leaf: bytes) -> None:
        """Writes a chunk's rows and that the views now stand at `sequence`. Raises StorageFailed."""
        with storage_failures(self._path):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                for table, rows in changes.rows.items():
                    marks = ", ".join("?" * len(rows[0]))
                    # The table's name is one of ours. Who was deleted first stays so.
                    clash = "IGNORE" if table == "deleted_jobs" else "REPLACE"
                    connection.executemany(f"INSERT OR {clash} INTO {table} VALUES ({marks})", rows)  # noqa: S608
                for table in _GONE_WITH_THEIR_JOB:
                    connection.executemany(
                        f"DELETE FROM {table} WHERE job_id = ?",  # noqa: S608
                        [(job_id,) for job_id in changes.jobs_deleted],
                    )
                self._set_meta(applied_sequence=sequence, applied_leaf=leaf)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def empty(self) -> None:
        """Makes all tables anew, without a row. Raises StorageFailed."""
        with storage_failures(self._path):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DROP VIEW IF EXISTS rows_by_worker")
            for table, columns in _TABLES.items():
                connection.execute(f"DROP TABLE IF EXISTS {table}")
                connection.execute(f"CREATE TABLE {table} ({columns})")
            for statement in _EXTRAS:
                connection.execute(statement)
            self._set_meta(version=VIEWS_VERSION, applied_sequence=0, applied_leaf=b"")
            connection.execute("COMMIT")

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()

    def _meta(self, name: str) -> object:
        with storage_failures(self._path):
            row = self._connection.execute("SELECT value FROM view_meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _set_meta(self, **values: object) -> None:
        self._connection.executemany("INSERT OR REPLACE INTO view_meta VALUES (?, ?)", list(values.items()))


def view_rows(path: Path) -> tuple[int, dict[str, list[tuple[object, ...]]]]:
    """Where a view file stands, and every row of every table by key, at one moment. Raises StorageFailed."""
    with storage_failures(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.execute("BEGIN")
            row = connection.execute("SELECT value FROM view_meta WHERE name = 'applied_sequence'").fetchone()
            rows = {
                table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()  # noqa: S608
                for table in _TABLES
            }
            return int(row[0]), rows
        finally:
            connection.close()


def blob_references(path: Path) -> dict[Digest, int | None]:
    """Datasets, kept columns and outputs of all jobs that are not deleted, with lengths where the views have them."""
    with storage_failures(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            inputs = "SELECT blob_digest FROM job_blobs UNION SELECT digest FROM job_payloads"
            found: dict[Digest, int | None] = {Digest(row[0]): None for row in connection.execute(inputs)}
            outputs = "SELECT DISTINCT output_digest, output_length_bytes FROM results WHERE output_digest IS NOT NULL"
            found.update((Digest(digest), int(length)) for digest, length in connection.execute(outputs))
            return found
        finally:
            connection.close()
