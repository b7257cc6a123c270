"""The whole truth, from the first record: what `fallow-coordinator check` says about a state folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fallow_coordinator.core import invariants
from fallow_coordinator.ports import Record, StorageFailed
from fallow_coordinator.store.encoding import encode_event
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader, StoredRecord, decode_records
from fallow_coordinator.store.projection import Projection
from fallow_coordinator.store.view_file import VIEWS_FILE, ViewFile, view_rows

CHUNK_RECORDS = 2_000


@dataclass(slots=True)
class CheckReport:
    """What a check found; nothing in `faults` means that all is well."""

    records: int = 0
    """Records whose hash, order, clock, epoch and bytes were checked, and which were folded."""
    view_sequence: int = 0
    """Where the views stood when they were compared."""
    view_rows: int = 0
    faults: list[str] = field(default_factory=list[str])
    """One sentence each; after a fault in the journal nothing behind it is checked."""


def check_journal(folder: Path, progress: Callable[[int], None] = lambda _: None) -> CheckReport:
    """Replays the journal in `folder` and compares the views with it; writes nothing there.

    `progress` is told how many records are done. A coordinator may be running: the check ends at the record that is
    newest when it begins. Raises StorageFailed when there is no journal to check.
    """
    report = CheckReport()
    with JournalReader(folder / JOURNAL_FILE) as journal, tempfile.TemporaryDirectory() as scratch:
        last_sequence = journal.last_sequence()
        viewed = _ViewsToCompare(folder, Path(scratch))
        projection = Projection()
        try:
            _replay(journal, last_sequence, projection, viewed, report, progress)
            invariants.check(projection.state)
        except StorageFailed as failure:
            report.faults.append(str(failure))
        except AssertionError as error:
            report.faults.append(f"after record {report.records}: {error}")
        else:
            viewed.compare(report)
        viewed.close()
    return report


def _replay(
    journal: JournalReader,
    last_sequence: int,
    projection: Projection,
    viewed: _ViewsToCompare,
    report: CheckReport,
    progress: Callable[[int], None],
) -> None:
    newest: StoredRecord | None = None
    while report.records < last_sequence:
        end = viewed.sequence if report.records < viewed.sequence else last_sequence
        stored = journal.stored(after_sequence=report.records, limit=min(CHUNK_RECORDS, end - report.records))
        if not stored:
            raise StorageFailed(f"{journal.path}: record {report.records + 1} is missing")
        for lying, record in zip(stored, decode_records(stored, report.records, journal.path), strict=True):
            _check_record(lying, record, newest)
            projection.fold(record)
            report.records = lying.sequence
            newest = lying
        viewed.take(projection, report.records)
        progress(report.records)


def _check_record(stored: StoredRecord, record: Record, before: StoredRecord | None) -> None:
    if encode_event(record.event) != stored.event:
        raise StorageFailed(f"record {stored.sequence} does not encode to the bytes that lie there")
    if before is not None and stored.at_ms < before.at_ms:
        raise StorageFailed(f"record {stored.sequence}: the clock goes back by {before.at_ms - stored.at_ms} ms")
    if before is not None and stored.epoch < before.epoch:
        raise StorageFailed(f"record {stored.sequence}: epoch {stored.epoch} comes after epoch {before.epoch}")


class _ViewsToCompare:
    """Views made anew up to where the follower's stand, so that the two can be compared."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._path = folder / VIEWS_FILE
        self._scratch = scratch
        self._fresh = ViewFile(scratch)
        self._kept: dict[str, list[tuple[object, ...]]] = {}
        self.sequence = 0
        if self._path.exists():
            self.sequence, self._kept = view_rows(self._path)

    def take(self, projection: Projection, sequence: int) -> None:
        """Writes what changed, as long as the follower's views go so far."""
        changes = projection.take_changes()
        if sequence <= self.sequence:
            self._fresh.apply(changes, sequence=sequence, leaf=b"")

    def compare(self, report: CheckReport) -> None:
        """Adds a fault for each table that differs."""
        _, expected = view_rows(self._scratch / VIEWS_FILE)
        report.view_sequence = self.sequence
        for table, kept in self._kept.items():
            report.view_rows += len(kept)
            if kept != expected[table]:
                differing = len(set(kept) ^ set(expected[table]))
                report.faults.append(
                    f"{self._path}: {differing} rows of table {table} are not what the journal says; "
                    "delete the file, the follower makes it anew"
                )

    def close(self) -> None:
        self._fresh.close()
