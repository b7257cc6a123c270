"""Reads a journal that somebody else writes: whole committed records, each compared with its hash."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from fallow.ids import Digest
from fallow_coordinator.ports import Record, StorageFailed
from fallow_coordinator.store.encoding import EventUnreadable, decode_event
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.sealed_segments import SegmentShelf
from fallow_coordinator.store.stored_record import StoredRecord

__all__ = ["JOURNAL_FILE", "JournalReader", "StoredRecord", "check_format", "decode_records"]

JOURNAL_FILE = "journal.db"
APPLICATION_ID = 0x46414C4C
"""`FALL` in the file's header: tells our files from anybody's."""
FORMAT_VERSION = 1

_RECORDS = "SELECT sequence, at_ms, epoch, event, salt, leaf FROM journal WHERE sequence > ? ORDER BY sequence LIMIT ?"


class JournalReader:
    """A read-only connection to a journal. It sees what is committed, and a commit is seen only once it is on disk.

    Records that have left the database are read out of their segments; nobody who asks need know where one lies.
    """

    def __init__(self, path: Path) -> None:
        """Opens the journal at `path`. Raises StorageFailed when there is none or it is not one of ours."""
        self._path = path
        self._segments = SegmentShelf(path.parent)
        with storage_failures(path):
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            check_format(self._connection, path)

    @property
    def path(self) -> Path:
        """Where the journal lies."""
        return self._path

    def last_sequence(self) -> int:
        """Sequence of the newest record, 0 when empty."""
        with storage_failures(self._path):
            row = self._connection.execute("SELECT max(sequence) FROM journal").fetchone()
        return int(row[0] or 0)

    def data_version(self) -> int:
        """Changes whenever somebody committed; costs a look into shared memory, not a read."""
        with storage_failures(self._path):
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def stored(self, *, after_sequence: int, limit: int) -> list[StoredRecord]:
        """Up to `limit` records after a sequence, as they lie there, unchecked."""
        with storage_failures(self._path):
            rows = self._connection.execute(_RECORDS, (after_sequence, limit)).fetchall()
        if limit > 0 and (not rows or rows[0][0] != after_sequence + 1):
            # Not in the database, or not any more: a record is in one of the two at every moment.
            if sealed := self._segments.stored(after_sequence=after_sequence, limit=limit):
                return sealed
        else:
            self._segments.forget()
        return list(map(StoredRecord._make, rows))

    def stretch(self, *, after_sequence: int, limit: int) -> list[StoredRecord]:
        """As `stored`, and never fewer than `limit` while there are more, wherever they lie."""
        records: list[StoredRecord] = []
        while len(records) < limit:
            found = self.stored(after_sequence=after_sequence + len(records), limit=limit - len(records))
            if not found:
                break
            records += found
        return records

    def leaf(self, sequence: int) -> bytes | None:
        """The leaf of a record, or None where there is none."""
        found = self.stored(after_sequence=sequence - 1, limit=1) if sequence > 0 else []
        return found[0].leaf if found and found[0].sequence == sequence else None

    def leaves_in_database(self, first: int, last: int) -> list[tuple[int, bytes]]:
        """(sequence, leaf) of those records from `first` to `last` that have not left the database."""
        with storage_failures(self._path):
            rows = self._connection.execute(
                "SELECT sequence, leaf FROM journal WHERE sequence BETWEEN ? AND ?", (first, last)
            ).fetchall()
        return [(int(sequence), bytes(leaf)) for sequence, leaf in rows]

    def read(self, *, after_sequence: int, limit: int) -> Sequence[Record]:
        """Up to `limit` checked records after a sequence. Raises StorageFailed for one that is damaged or missing."""
        return decode_records(self.stored(after_sequence=after_sequence, limit=limit), after_sequence, self._path)

    def payload(self, digest: Digest) -> bytes | None:
        """An inline payload, or None when it is not (any more) here."""
        with storage_failures(self._path):
            row = self._connection.execute("SELECT bytes FROM payloads WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else bytes(row[0])

    def payload_digests(self, *, after: Digest, limit: int) -> list[Digest]:
        """Up to `limit` digests of payloads behind `after`, rising."""
        with storage_failures(self._path):
            rows = self._connection.execute(
                "SELECT digest FROM payloads WHERE digest > ? ORDER BY digest LIMIT ?", (after, limit)
            ).fetchall()
        return [Digest(row[0]) for row in rows]

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decode_records(stored: Sequence[StoredRecord], after_sequence: int, path: Path) -> list[Record]:
    """The events of consecutive records, each decoded from the bytes whose hash was compared. Raises StorageFailed."""
    records: list[Record] = []
    for sequence, record in enumerate(stored, after_sequence + 1):
        if record.sequence != sequence:
            raise StorageFailed(f"{path}: record {sequence} is missing; restore the state folder from a backup")
        if not record.leaf_holds():
            raise StorageFailed(
                f"{path}: record {sequence} does not match its hash; the file is damaged, restore it from a backup"
            )
        try:
            event = decode_event(record.event)
        except EventUnreadable as error:
            raise StorageFailed(
                f"{path}: record {sequence}: {error}; start the version of fallow that wrote it, or a newer one"
            ) from error
        records.append(Record(sequence, record.at_ms, event, record.leaf))
    return records


def check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Raises StorageFailed unless the file is a journal in a format that this software knows."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StorageFailed(f"{path} is not a journal of fallow; name another state folder")
    version = int(connection.execute("SELECT value FROM meta WHERE name = 'format_version'").fetchone()[0])
    if version > FORMAT_VERSION:
        raise StorageFailed(
            f"{path} has format {version} and this software knows {FORMAT_VERSION}; start the newer version of fallow"
        )
