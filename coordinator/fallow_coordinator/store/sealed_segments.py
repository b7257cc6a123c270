"""Old stretches of the journal in files that never change, compressed, each under a signed checkpoint.

A segment holds a fixed number of records, a power of two, so that its root is a node of the journal's tree and the
tree of any number of segments follows from their roots alone. A file is a first line that says what it is, one JSON
line, and the compressed records; it appears whole or not at all. Records leave the database only once they lie here.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fallow.checkpoint import Checkpoint, CheckpointUnusable, Sign, read_checkpoint
from fallow.ids import Digest
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.durable_file import remove_unfinished, write_durably
from fallow_coordinator.store.encoding import EventUnreadable
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.journal_tree import JournalTree
from fallow_coordinator.store.segment import decode_segment, encode_segment
from fallow_coordinator.store.stored_record import StoredRecord

SEGMENTS_FOLDER: Final = "segments"
SEGMENT_RECORDS: Final = 1 << 16
FORMAT_VERSION: Final = 1
HEADER_BYTES_MAX: Final = 16_384
FULL_SEGMENTS_MAX: Final = 2
"""Segments made ahead of the newest snapshot, in memory: each has about 8 MB."""
COMPRESSION_LEVEL: Final = 3

_MAGIC: Final = b"fallow segment\n"
_NAME: Final = re.compile(r"records-(\d{20})-(\d{20})\.fallow")
_DAMAGED: Final = "restore the file from a backup"


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What stands before a segment's records."""

    format_version: int
    journal_id: str
    """Hexadecimal, as all digests here."""
    first: int
    last: int
    root: str
    """Over the leaves of its records: a node of the journal's tree."""
    last_leaf: str
    body_bytes: int
    body_digest: str
    checkpoint: str
    """The signed note that covers every record up to `last`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A file and what its name says."""

    path: Path
    first: int
    last: int


class SegmentShelf:
    """The sealed segments of one journal's folder; reading and writing, never changing."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the journal's; nothing is made until something is sealed."""
        self._folder = folder / SEGMENTS_FOLDER
        self._segments: list[Segment] = []
        self._cached: tuple[Path, list[StoredRecord]] | None = None

    def segments(self) -> Sequence[Segment]:
        """Those without a gap from the first record on, in order. Raises StorageFailed."""
        self._segments = []
        if self._folder.is_dir():
            with storage_failures(self._folder):
                names = [(path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir()]
            found = [Segment(path, int(name[1]), int(name[2])) for path, name in names if name]
            found.sort(key=lambda segment: segment.first)
            for segment in found:
                if segment.first == self.through + 1 and segment.last >= segment.first:
                    self._segments.append(segment)
        return self._segments

    @property
    def through(self) -> int:
        """Every record up to this sequence was sealed when `segments` was last called; 0: none."""
        return self._segments[-1].last if self._segments else 0

    def holding(self, sequence: int) -> Segment | None:
        """The segment that holds a record, or None. Looks at the folder again when it is not in a known one."""
        if sequence > self.through:
            self.segments()
        low, high = 0, len(self._segments)
        while low < high:
            middle = (low + high) // 2
            if self._segments[middle].last < sequence:
                low = middle + 1
            else:
                high = middle
        return self._segments[low] if low < len(self._segments) else None

    def stored(self, *, after_sequence: int, limit: int) -> list[StoredRecord]:
        """Up to `limit` records after a sequence out of one segment, unchecked but for the file's digest.

        Empty when they are not here. Raises StorageFailed for a damaged file.
        """
        segment = self.holding(after_sequence + 1)
        if segment is None:
            return []
        if self._cached is None or self._cached[0] != segment.path:
            self._cached = (segment.path, read_records(segment))
        begin = after_sequence + 1 - segment.first
        return self._cached[1][begin : begin + limit]

    def forget(self) -> None:
        """Lets go of the records held in memory."""
        self._cached = None

    def write(self, header: SegmentHeader, body: bytes) -> Segment:
        """Adds the next segment, durably. Raises StorageFailed."""
        with storage_failures(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(self._folder)
        path = self._folder / f"records-{header.first:020}-{header.last:020}.fallow"
        line = json.dumps(asdict(header), sort_keys=True).encode() + b"\n"
        write_durably(path, (_MAGIC, line, body))
        return Segment(path, header.first, header.last)


def read_header(segment: Segment) -> tuple[SegmentHeader, int]:
    """A segment's header and where its body begins. Raises StorageFailed."""
    with storage_failures(segment.path), segment.path.open("rb") as file:
        data = file.read(len(_MAGIC) + HEADER_BYTES_MAX)
        length = segment.path.stat().st_size
    end = data.find(b"\n", len(_MAGIC))
    if not data.startswith(_MAGIC) or end < 0:
        raise StorageFailed(f"{segment.path} is no segment of a journal; {_DAMAGED}")
    try:
        header = SegmentHeader(**json.loads(data[len(_MAGIC) : end]))
    except (ValueError, TypeError) as error:
        raise StorageFailed(f"{segment.path}: its first lines can't be read ({error}); {_DAMAGED}") from error
    if header.format_version > FORMAT_VERSION:
        raise StorageFailed(
            f"{segment.path} has format {header.format_version} and this software knows {FORMAT_VERSION}; "
            "start the newer version of fallow"
        )
    if (header.first, header.last) != (segment.first, segment.last):
        raise StorageFailed(f"{segment.path} holds records {header.first} to {header.last}; {_DAMAGED}")
    if length != end + 1 + header.body_bytes:
        raise StorageFailed(f"{segment.path} has {length} bytes, not {end + 1 + header.body_bytes}; {_DAMAGED}")
    return header, end + 1


def read_records(segment: Segment) -> list[StoredRecord]:
    """All records of a segment, as they lay in the database. Raises StorageFailed for a file that is damaged."""
    try:
        records = decode_segment(_plain_body(segment))
    except EventUnreadable as error:
        raise StorageFailed(f"{segment.path}: {error}; {_DAMAGED}") from error
    if [record.sequence for record in records] != list(range(segment.first, segment.last + 1)):
        raise StorageFailed(f"{segment.path} lacks records; {_DAMAGED}")
    return records


def _plain_body(segment: Segment) -> bytes:
    """A segment's records as they were encoded. Raises StorageFailed for a file that is damaged."""
    header, body_at = read_header(segment)
    with storage_failures(segment.path), segment.path.open("rb") as file:
        file.seek(body_at)
        body = file.read()
    if hashlib.sha256(body).hexdigest() != header.body_digest:
        raise StorageFailed(f"{segment.path} does not match its digest; {_DAMAGED}")
    try:
        return zlib.decompress(body)
    except zlib.error as error:
        raise StorageFailed(f"{segment.path}: {error}; {_DAMAGED}") from error


def check_segment(
    segment: Segment, records: Sequence[StoredRecord], tree: JournalTree, public_der: bytes | None
) -> Checkpoint:
    """Adds a segment to the tree of those before it and compares roots and signature. Raises StorageFailed."""
    header, _ = read_header(segment)
    root, height = root_of_records(records), height_of(segment)
    if root.hex() != header.root or records[-1].leaf.hex() != header.last_leaf:
        raise StorageFailed(f"{segment.path}: its records have another root than it says; {_DAMAGED}")
    tree.add_subtree(root, height)
    return check_checkpoint(segment, header, tree, public_der)


def check_checkpoint(
    segment: Segment, header: SegmentHeader, tree: JournalTree, public_der: bytes | None
) -> Checkpoint:
    """The segment's checkpoint, which must say what `tree` says, signed by that key. Raises StorageFailed."""
    try:
        checkpoint = read_checkpoint(header.checkpoint, public_der)
    except CheckpointUnusable as error:
        raise StorageFailed(f"{segment.path}: {error}") from error
    if (checkpoint.size, checkpoint.root) != (tree.size, tree.root()):
        raise StorageFailed(f"{segment.path}: its checkpoint says another root than the journal's tree has")
    if checkpoint.journal_id.hex() != header.journal_id:
        raise StorageFailed(f"{segment.path}: its checkpoint is of another journal")
    return checkpoint


def height_of(segment: Segment) -> int:
    """Height of the perfect tree over a segment's records. Raises StorageFailed when there is none."""
    count = segment.last - segment.first + 1
    if count & (count - 1) or (segment.first - 1) % count:
        raise StorageFailed(f"{segment.path}: {count} records from {segment.first} on are no perfect tree; {_DAMAGED}")
    return count.bit_length() - 1


def root_of_records(records: Sequence[StoredRecord]) -> Digest:
    """The root over the leaves of records, in order."""
    tree = JournalTree()
    for record in records:
        tree.add(record.leaf)
    return tree.root()


@dataclass(frozen=True, slots=True)
class _Full:
    """A segment that is complete and not written yet."""

    first: int
    last: int
    root: Digest
    last_leaf: bytes
    plain_digest: bytes
    """Over the records as they were encoded, before they were compressed."""
    body: bytes


class Sealing:
    """The segments that are being made: records are added as they come, and a full segment is written when it may be.

    So the same records need not be read again, and compressing them is spread over the time in which they come.
    """

    def __init__(self, shelf: SegmentShelf, journal_id: bytes, sign: Sign, records: int = SEGMENT_RECORDS) -> None:
        """Goes on after the newest segment on the shelf, whose checkpoint must agree. Raises StorageFailed."""
        assert records & (records - 1) == 0, "a segment is a perfect tree"
        self._shelf = shelf
        self._journal_id = journal_id
        self._sign = sign
        self._count = records
        self._tree = JournalTree()
        self._last_leaf = b""
        self._full: deque[_Full] = deque()
        for segment in shelf.segments():
            header, _ = read_header(segment)
            self._tree.add_subtree(bytes.fromhex(header.root), height_of(segment))
            if segment.last == shelf.through:
                check_checkpoint(segment, header, self._tree, None)
            if header.journal_id != journal_id.hex():
                raise StorageFailed(f"{segment.path} is of another journal; move it away")
            self._last_leaf = bytes.fromhex(header.last_leaf)
        self._begin(self._tree.size + 1)

    def _begin(self, first: int) -> None:
        self._next = self._first = first
        self._part = JournalTree()
        self._packer = zlib.compressobj(COMPRESSION_LEVEL)
        self._packed: list[bytes] = []
        self._plain = hashlib.sha256()

    @property
    def sealed_through(self) -> int:
        """Every record up to this sequence is sealed."""
        return self._tree.size

    @property
    def last_leaf(self) -> bytes:
        """Of the newest record that was added."""
        return self._last_leaf

    @property
    def next_sequence(self) -> int:
        """The record that is wanted next."""
        return self._next

    @property
    def room(self) -> int:
        """How many records may be added before a full segment must be written."""
        return (FULL_SEGMENTS_MAX - len(self._full)) * self._count - (self._next - self._first)

    @property
    def full_through(self) -> int:
        """The last record of the oldest full segment, which may be written once nobody needs it; 0: none is full."""
        return self._full[0].last if self._full else 0

    def add(self, records: Sequence[StoredRecord], *, checked: bool = False) -> None:
        """Takes the next records, no more than `room`; `checked`: their leaves were compared.

        Raises StorageFailed for one that is damaged.
        """
        assert len(records) <= self.room, "who adds looks for room"
        while records:
            share = records[: self._count - (self._next - self._first)]
            self._add(share, checked=checked)
            records = records[len(share) :]

    def _add(self, records: Sequence[StoredRecord], *, checked: bool) -> None:
        """Takes records that belong to the segment that is being made."""
        for record in records:
            if record.sequence != self._next or not (checked or record.leaf_holds()):
                raise StorageFailed(f"record {self._next} is damaged or missing; it can't be sealed")
            self._part.add(record.leaf)
            self._next += 1
        data = encode_segment(records)
        self._plain.update(data)
        self._packed.append(self._packer.compress(data))
        self._last_leaf = records[-1].leaf
        if self._part.size == self._count:
            self._packed.append(self._packer.flush())
            self._full.append(
                _Full(
                    first=self._first,
                    last=self._next - 1,
                    root=self._part.root(),
                    last_leaf=self._last_leaf,
                    plain_digest=self._plain.digest(),
                    body=b"".join(self._packed),
                )
            )
            self._begin(self._next)

    def finish(self, at_ms: int) -> Segment | None:
        """Writes the oldest full segment and reads it back; None: none is full.

        `at_ms` is the moment that the checkpoint tells. Raises StorageFailed.
        """
        if not self._full:
            return None
        full = self._full[0]
        tree = self._tree.copy()
        tree.add_subtree(full.root, self._count.bit_length() - 1)
        checkpoint = Checkpoint(self._journal_id, tree.size, tree.root(), at_ms)
        header = SegmentHeader(
            format_version=FORMAT_VERSION,
            journal_id=self._journal_id.hex(),
            first=full.first,
            last=full.last,
            root=full.root.hex(),
            last_leaf=full.last_leaf.hex(),
            body_bytes=len(full.body),
            body_digest=hashlib.sha256(full.body).hexdigest(),
            checkpoint=self._sign(checkpoint),
        )
        written = self._shelf.write(header, full.body)
        if hashlib.sha256(_plain_body(written)).digest() != full.plain_digest:
            raise StorageFailed(f"{written.path} was not written as it should be; look into the kernel's log")
        self._tree = tree
        self._full.popleft()
        return written
