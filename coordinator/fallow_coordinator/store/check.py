"""The whole truth, from the first record: what `fallow-coordinator check` says about a state folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fallow.ids import Digest, digest_of
from fallow_coordinator.core import events as ev
from fallow_coordinator.core import invariants
from fallow_coordinator.core.state import State
from fallow_coordinator.ports import Record, StorageFailed
from fallow_coordinator.store.encoding import encode_event
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader, StoredRecord, decode_records
from fallow_coordinator.store.journal_tree import JournalTree
from fallow_coordinator.store.projection import Projection
from fallow_coordinator.store.sealed_segments import Segment, SegmentShelf, check_segment, read_records
from fallow_coordinator.store.snapshots import SnapshotHeader, SnapshotShelf, SnapshotUnusable, encode_state
from fallow_coordinator.store.view_file import VIEWS_FILE, ViewFile, blob_references, view_rows

CHUNK_RECORDS = 2_000
NAMED_MAX = 20
"""Missing or damaged blobs that are named one by one; of more, their number is told."""


@dataclass(slots=True)
class CheckReport:
    """What a check found; nothing in `faults` means that all is well."""

    records: int = 0
    """Records whose hash, order, clock, epoch and bytes were checked, and which were folded."""
    segments: int = 0
    """Sealed segments whose records, root and signed checkpoint were checked."""
    sealed_sequence: int = 0
    """The newest record that is sealed."""
    snapshots: int = 0
    """Snapshots of this software that say what the journal says."""
    view_sequence: int = 0
    """Where the views stood when they were compared."""
    view_rows: int = 0
    blobs: int = 0
    """Blobs and inline payloads that somebody refers to and that are there."""
    blobs_read: int = 0
    """Those of them that were read and compared with their digests."""
    faults: list[str] = field(default_factory=list[str])
    """One sentence each; after a fault in the journal nothing behind it is checked."""


class BlobFolder(Protocol):
    """Where blobs lie."""

    def length_bytes(self, digest: Digest) -> int | None:
        """How long a blob is; None: it is not there."""
        ...

    def digest(self, digest: Digest) -> Digest:
        """The digest of what lies in a blob's place."""
        ...


def check_journal(
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
    *,
    public_der: bytes | None = None,
    blobs: BlobFolder | None = None,
    deep: bool = False,
) -> CheckReport:
    """Replays the journal in `folder` and compares segments, snapshots, views and blobs with it; writes nothing there.

    `progress` is told how many records are done; `public_der` is the coordinator's key, under whose signature segments
    were sealed; `deep` reads every blob that somebody refers to. A coordinator may be running: the check ends at the
    record that is newest when it begins. Raises StorageFailed when there is no journal to check.
    """
    report = CheckReport()
    with JournalReader(folder / JOURNAL_FILE) as journal, tempfile.TemporaryDirectory() as scratch:
        # Views before the journal's end: they are never ahead of it.
        viewed = _ViewsToCompare(folder, Path(scratch), report)
        snapshots = _SnapshotsToCompare(folder, report)
        last_sequence = journal.last_sequence()
        projection = Projection()
        try:
            _check_segments(folder, journal, public_der, report)
            _replay(journal, last_sequence, projection, viewed, snapshots, report, progress)
            invariants.check(projection.state)
        except StorageFailed as failure:
            report.faults.append(str(failure))
        except AssertionError as error:
            report.faults.append(f"after record {report.records}: {error}")
        else:
            snapshots.left_over(journal)
            if blobs is not None:
                expected = viewed.references(projection.state)
                _check_blobs(journal, expected, blobs, report, deep=deep)
        viewed.close()
    return report


# ------------------------------------------------------------------------------------------------ records, segments


def _check_segments(folder: Path, journal: JournalReader, public_der: bytes | None, report: CheckReport) -> None:
    """Each segment by itself, all of them as one tree, and what lies both in them and in the database."""
    tree = JournalTree()
    for segment in SegmentShelf(folder).segments():
        records = read_records(segment)
        if bad := [record.sequence for record in records if not record.leaf_holds()]:
            raise StorageFailed(f"{segment.path}: record {bad[0]} does not match its hash; restore it from a backup")
        check_segment(segment, records, tree, public_der)
        _check_overlap(segment, records, journal)
        report.segments += 1
        report.sealed_sequence = segment.last


def _check_overlap(segment: Segment, records: list[StoredRecord], journal: JournalReader) -> None:
    leaves = {record.sequence: record.leaf for record in records}
    for sequence, leaf in journal.leaves_in_database(segment.first, segment.last):
        if leaves[sequence] != leaf:
            raise StorageFailed(f"{segment.path}: record {sequence} is another than the database has")


def _replay(
    journal: JournalReader,
    last_sequence: int,
    projection: Projection,
    viewed: _ViewsToCompare,
    snapshots: _SnapshotsToCompare,
    report: CheckReport,
    progress: Callable[[int], None],
) -> None:
    newest: StoredRecord | None = None
    stops = sorted({viewed.sequence, *snapshots.headers, last_sequence})
    while report.records < last_sequence:
        end = next(stop for stop in stops if stop > report.records)
        stored = journal.stored(after_sequence=report.records, limit=min(CHUNK_RECORDS, end - report.records))
        if not stored:
            raise StorageFailed(f"{journal.path}: record {report.records + 1} is missing")
        for lying, record in zip(stored, decode_records(stored, report.records, journal.path), strict=True):
            _check_record(lying, record, newest)
            projection.fold(record)
            report.records = lying.sequence
            newest = lying
        assert newest is not None
        viewed.take(projection, report.records)
        snapshots.compare(projection.state, newest)
        progress(report.records)


def _check_record(stored: StoredRecord, record: Record, before: StoredRecord | None) -> None:
    if encode_event(record.event) != stored.event:
        raise StorageFailed(f"record {stored.sequence} does not encode to the bytes that lie there")
    if before is not None and stored.at_ms < before.at_ms:
        raise StorageFailed(f"record {stored.sequence}: the clock goes back by {before.at_ms - stored.at_ms} ms")
    if before is not None and stored.epoch < before.epoch:
        raise StorageFailed(f"record {stored.sequence}: epoch {stored.epoch} comes after epoch {before.epoch}")


# ------------------------------------------------------------------------------------------------ snapshots


class _SnapshotsToCompare:
    """Snapshots of this software, each compared with the folded state where it stands."""

    def __init__(self, folder: Path, report: CheckReport) -> None:
        self._shelf = SnapshotShelf(folder)
        self._report = report
        self.headers: dict[int, tuple[Path, SnapshotHeader, bytes]] = {}
        """By sequence: file, header, digest of its body."""
        for path in self._shelf.paths():
            try:
                header, body = self._shelf.body(path)
            except SnapshotUnusable as error:
                if path.exists():
                    report.faults.append(f"{path}: {error}; delete the file, it is not needed")
            else:
                self.headers[header.sequence] = (path, header, hashlib.sha256(body).digest())

    def compare(self, state: State, newest: StoredRecord) -> None:
        """Looks at the snapshot that stands here, if there is one."""
        if (found := self.headers.pop(newest.sequence, None)) is None:
            return
        path, header, digest = found
        expected = hashlib.sha256()
        for line in encode_state(state):
            expected.update(line)
        if header.leaf != newest.leaf or digest != expected.digest():
            self._report.faults.append(f"{path}: it is not what the journal says; delete the file")
        else:
            self._report.snapshots += 1

    def left_over(self, journal: JournalReader) -> None:
        """Adds a fault for each snapshot that stands behind the journal's end."""
        for sequence, (path, _, _) in self.headers.items():
            if sequence > journal.last_sequence():
                self._report.faults.append(f"{path}: it stands behind the journal's last record; delete the file")


# ------------------------------------------------------------------------------------------------ views


class _ViewsToCompare:
    """Views made anew: compared with the follower's where those stand, then taken on to the journal's end."""

    def __init__(self, folder: Path, scratch: Path, report: CheckReport) -> None:
        self._path = folder / VIEWS_FILE
        self._scratch = scratch
        self._report = report
        self._fresh = ViewFile(scratch)
        self._kept: dict[str, list[tuple[object, ...]]] = {}
        self.sequence = 0
        if self._path.exists():
            self.sequence, self._kept = view_rows(self._path)

    def take(self, projection: Projection, sequence: int) -> None:
        """Writes what changed, and compares when it is time."""
        self._fresh.apply(projection.take_changes(), sequence=sequence, leaf=b"")
        if sequence == self.sequence:
            self._compare()

    def _compare(self) -> None:
        _, expected = view_rows(self._scratch / VIEWS_FILE)
        self._report.view_sequence = self.sequence
        for table, kept in self._kept.items():
            self._report.view_rows += len(kept)
            if kept != expected[table]:
                differing = len(set(kept) ^ set(expected[table]))
                self._report.faults.append(
                    f"{self._path}: {differing} rows of table {table} are not what the journal says; "
                    "delete the file, the follower makes it anew"
                )
        self._kept = {}

    def references(self, state: State) -> dict[Digest, int | None]:
        """Every blob that must be there, with its length where that is known."""
        expected: dict[Digest, int | None] = blob_references(self._scratch / VIEWS_FILE)
        for bundle_digest, bundle in state.bundles.items():
            expected[bundle_digest] = None
            expected.update((file.digest, file.length_bytes) for file in bundle.files)
        for account in state.accounts.values():
            expected.update((digest, stored.blob.length_bytes) for digest, stored in account.blobs.items())
        for job in state.jobs.values():
            expected.update((block.blob.digest, block.blob.length_bytes) for block in job.blocks)
        return expected

    def close(self) -> None:
        """Gives the fresh file back."""
        self._fresh.close()


# ------------------------------------------------------------------------------------------------ blobs


def _check_blobs(
    journal: JournalReader, expected: Mapping[Digest, int | None], blobs: BlobFolder, report: CheckReport, *, deep: bool
) -> None:
    """Whether each is in the blob service or among the journal's payloads; what is gone since does not count."""
    missing: dict[Digest, str] = {}
    for digest, length in expected.items():
        if wrong := _what_is_wrong(journal, digest, length, blobs, report, deep=deep):
            missing[digest] = wrong
        else:
            report.blobs += 1
    if missing:
        for digest in _let_go_after(journal, report.records):
            missing.pop(digest, None)
    for wrong in list(missing.values())[:NAMED_MAX]:
        report.faults.append(wrong)
    if len(missing) > NAMED_MAX:
        report.faults.append(f"and {len(missing) - NAMED_MAX} more blobs")


def _what_is_wrong(
    journal: JournalReader, digest: Digest, length: int | None, blobs: BlobFolder, report: CheckReport, *, deep: bool
) -> str:
    payload = journal.payload(digest)
    if payload is not None:
        report.blobs_read += 1
        if digest_of(payload) != digest:
            return f"payload {digest.hex()} does not match its digest; restore the journal from a backup"
        return ""
    found = blobs.length_bytes(digest)
    if found is None:
        return f"blob {digest.hex()} is missing; restore it from a backup, or delete the jobs that need it"
    if length is not None and found != length:
        return f"blob {digest.hex()} has {found} bytes, not {length}; restore it from a backup"
    if deep:
        report.blobs_read += 1
        if blobs.digest(digest) != digest:
            return f"blob {digest.hex()} does not match its digest; restore it from a backup"
    return ""


def _let_go_after(journal: JournalReader, sequence: int) -> set[Digest]:
    """Blobs that were forgotten, or whose jobs were deleted, while the check went on."""
    gone: set[Digest] = set()
    while records := journal.read(after_sequence=sequence, limit=CHUNK_RECORDS):
        for record in records:
            if isinstance(record.event, ev.BlobsForgotten):
                gone.update(record.event.digests)
        sequence = records[-1].sequence
    return gone
