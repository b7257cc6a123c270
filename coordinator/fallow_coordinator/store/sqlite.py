"""The journal in one SQLite file: WAL, `synchronous=FULL`, one transaction for each batch.

In WAL mode with FULL, a commit writes its frames to the write-ahead log, syncs it, and only then shows them to readers:
what `append` returned for, and what any reader saw, survives `kill -9` and power loss.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fallow.ids import Digest
from fallow_coordinator.core.events import Event
from fallow_coordinator.ports import Record, StorageFailed, WriterFenced
from fallow_coordinator.store.checkpoints import Checkpoints
from fallow_coordinator.store.encoding import SALT_BYTES, encode_event, leaf_of
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.journal_reader import (
    APPLICATION_ID,
    FORMAT_VERSION,
    JOURNAL_FILE,
    JournalReader,
    check_format,
)
from fallow_coordinator.store.sealed_segments import Segment, SegmentShelf, read_header

logger = logging.getLogger(__name__)

LOCK_WAIT_S = 5.0
"""How long a transaction of another process may hold us up before we give up."""
CHECKPOINT_PAGES_MAX = 16_000
"""Pages (4 KiB) in the write-ahead log before a commit moves into the file what `Checkpoints` has not moved: 64 MB."""
WAL_BYTES_KEPT = 32 * 1024 * 1024
"""Size to which the write-ahead log is cut back after a checkpoint."""
JOURNAL_TAIL_RECORDS = 10_000
"""The newest records, which stay in the database though they be sealed."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE journal (
    sequence INTEGER PRIMARY KEY,
    at_ms INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    event BLOB NOT NULL,
    salt BLOB NOT NULL,
    leaf BLOB NOT NULL
) STRICT;
CREATE TABLE payloads (digest BLOB PRIMARY KEY, bytes BLOB NOT NULL) STRICT;
INSERT INTO meta VALUES ('format_version', 0), ('epoch', 0);
"""
_INSERT_RECORD = "INSERT INTO journal (sequence, at_ms, epoch, event, salt, leaf) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_PAYLOAD = "INSERT OR IGNORE INTO payloads (digest, bytes) VALUES (?, ?)"
_OLDEST = "SELECT sequence FROM journal ORDER BY sequence LIMIT 1"
_STANDING = "SELECT (SELECT value FROM meta WHERE name = 'epoch'), (SELECT max(sequence) FROM journal)"


class SqliteStore:
    """The writer's store. `append` may run in one other thread; reads go through a connection of their own."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes the journal in `folder` and takes the next epoch. Raises StorageFailed."""
        self._path = folder / JOURNAL_FILE
        self._failure: StorageFailed | None = None
        with storage_failures(self._path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._writer = _open_writer(self._path)
            self._epoch = _take_epoch(self._writer)
            row = self._writer.execute("SELECT sequence, at_ms FROM journal ORDER BY sequence DESC LIMIT 1").fetchone()
        self._last_sequence, self._last_at_ms = (0, 0) if row is None else (int(row[0]), int(row[1]))
        self._reader = JournalReader(self._path)
        self._checkpoints = Checkpoints(self._path)
        self._segments = SegmentShelf(folder)
        self._trusted: Segment | None = None
        """The segment that was last compared with the database."""

    @property
    def path(self) -> Path:
        """Where the journal lies."""
        return self._path

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def last_sequence(self) -> int:
        return self._last_sequence

    @property
    def last_at_ms(self) -> int:
        return self._last_at_ms

    def append(
        self, *, expected_sequence: int, events: Sequence[tuple[int, Event]], payloads: Mapping[Digest, bytes]
    ) -> None:
        if self._failure is not None:
            raise self._failure
        rows = self._rows(expected_sequence, events)
        try:
            with storage_failures(self._path):
                self._commit(expected_sequence, rows, payloads)
        except StorageFailed as failure:
            # What of this batch reached the disk is unknown, and after a failed sync unknowable: nothing may follow it.
            self._failure = failure
            raise
        self._checkpoints.note(records=len(events), payloads=len(payloads))
        if events:
            self._last_sequence = expected_sequence + len(events)
            self._last_at_ms = events[-1][0]

    def _rows(
        self, expected_sequence: int, events: Sequence[tuple[int, Event]]
    ) -> list[tuple[int, int, int, bytes, bytes, Digest]]:
        salts = os.urandom(SALT_BYTES * len(events))
        epoch, clock = self._epoch, self._last_at_ms
        rows: list[tuple[int, int, int, bytes, bytes, Digest]] = []
        for index, (at_ms, event) in enumerate(events):
            assert at_ms >= clock, "the journal's clock never goes back"
            clock = at_ms
            sequence, data = expected_sequence + 1 + index, encode_event(event)
            salt = salts[index * SALT_BYTES : (index + 1) * SALT_BYTES]
            leaf = leaf_of(salt=salt, sequence=sequence, at_ms=at_ms, epoch=epoch, event=data)
            rows.append((sequence, at_ms, epoch, data, salt, leaf))
        return rows

    def _commit(
        self,
        expected_sequence: int,
        rows: Sequence[tuple[int, int, int, bytes, bytes, Digest]],
        payloads: Mapping[Digest, bytes],
    ) -> None:
        with self._transaction() as writer:
            last_sequence = self._standing(writer)
            if (last_sequence or 0) != expected_sequence:
                raise WriterFenced(
                    f"{self._path}: the journal ends at {last_sequence or 0}, this writer expected {expected_sequence}"
                )
            writer.executemany(_INSERT_RECORD, rows)
            if payloads:
                writer.executemany(_INSERT_PAYLOAD, list(payloads.items()))

    def _standing(self, writer: sqlite3.Connection) -> int | None:
        """The newest sequence in the database. Raises WriterFenced when another writer has taken over."""
        epoch, last_sequence = writer.execute(_STANDING).fetchone()
        if epoch != self._epoch:
            raise WriterFenced(f"{self._path}: a coordinator with epoch {epoch} has taken over from {self._epoch}")
        return None if last_sequence is None else int(last_sequence)

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        writer = self._writer
        writer.execute("BEGIN IMMEDIATE")
        try:
            yield writer
            writer.execute("COMMIT")
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise

    def read(self, *, after_sequence: int, limit: int) -> Sequence[Record]:
        return self._reader.read(after_sequence=after_sequence, limit=limit)

    def payload(self, digest: Digest) -> bytes | None:
        return self._reader.payload(digest)

    def payload_digests(self, *, after: Digest, limit: int) -> Sequence[Digest]:
        return self._reader.payload_digests(after=after, limit=limit)

    def drop_payloads(self, digests: Sequence[Digest]) -> int:
        if self._failure is not None:
            raise self._failure
        dropped = 0
        with storage_failures(self._path), self._transaction() as writer:
            for digest in digests:
                dropped += writer.execute("DELETE FROM payloads WHERE digest = ?", (digest,)).rowcount
        return dropped

    def let_go_of_sealed(self, limit: int) -> int:
        if self._failure is not None:
            raise self._failure
        try:
            with storage_failures(self._path):
                return self._let_go(limit)
        except StorageFailed as failure:
            self._failure = failure
            raise

    def _let_go(self, limit: int) -> int:
        row = self._writer.execute(_OLDEST).fetchone()
        oldest = self._last_sequence + 1 if row is None else int(row[0])
        if oldest > self._last_sequence - JOURNAL_TAIL_RECORDS:
            return 0
        segment = self._segments.holding(oldest)
        if segment is None or not self._holds(segment):
            return 0
        until = min(segment.last, oldest + limit - 1, self._last_sequence - JOURNAL_TAIL_RECORDS)
        with self._transaction() as writer:
            self._standing(writer)
            return writer.execute("DELETE FROM journal WHERE sequence <= ?", (until,)).rowcount

    def _holds(self, segment: Segment) -> bool:
        """Whether a segment's file is whole and ends with the record that the database has there."""
        if segment != self._trusted:
            try:
                header, _ = read_header(segment)
            except StorageFailed as failure:
                logger.error("segment.refused path=%s reason=%s", segment.path, failure)
                return False
            row = self._writer.execute("SELECT leaf FROM journal WHERE sequence = ?", (segment.last,)).fetchone()
            if row is None or bytes(row[0]).hex() != header.last_leaf:
                logger.error("segment.refused path=%s reason=%s", segment.path, "it is of another journal")
                return False
            self._trusted = segment
        return True

    def close(self) -> None:
        self._checkpoints.close()
        self._reader.close()
        self._writer.close()


def _open_writer(path: Path) -> sqlite3.Connection:
    writer = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)
    if writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        # Before anything is set: a file of somebody else's stays as it is.
        check_format(writer, path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES_MAX}")
    writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
    writer.execute("BEGIN IMMEDIATE")
    if not writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        for statement in _SCHEMA.split(";"):
            writer.execute(statement)
        writer.execute("UPDATE meta SET value = ? WHERE name = 'format_version'", (FORMAT_VERSION,))
        writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    writer.execute("COMMIT")
    check_format(writer, path)
    return writer


def _take_epoch(writer: sqlite3.Connection) -> int:
    row = writer.execute("UPDATE meta SET value = value + 1 WHERE name = 'epoch' RETURNING value").fetchone()
    return int(row[0])
