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
    header, body_at = read_header(segment)
    with storage_failures(segment.path), segment.path.open("rb") as file:
        file.seek(body_at)
        body = file.read()
    if hashlib.sha256(body).hexdigest() != header.body_digest:
        raise StorageFailed(f"{segment.path} does not match its digest; {_DAMAGED}")
    try:
        records = decode_segment(zlib.decompress(body))
    except (zlib.error, EventUnreadable) as error:
        raise StorageFailed(f"{segment.path}: {error}; {_DAMAGED}") from error
    if [record.sequence for record in records] != list(range(header.first, header.last + 1)):
        raise StorageFailed(f"{segment.path} lacks records; {_DAMAGED}")
    return records


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


class Sealing:
    """The segment that is being made: records are added as they come, and it is written once it is full."""

    def __init__(self, shelf: SegmentShelf, journal_id: bytes, sign: Sign, records: int = SEGMENT_RECORDS) -> None:
        """Goes on after the newest segment on the shelf, whose checkpoint must agree. Raises StorageFailed."""
        assert records & (records - 1) == 0, "a segment is a perfect tree"
        self._shelf = shelf
        self._journal_id = journal_id
        self._sign = sign
        self._count = records
        self._tree = JournalTree()
        self._last_leaf = b""
        for segment in shelf.segments():
            header, _ = read_header(segment)
            self._tree.add_subtree(bytes.fromhex(header.root), height_of(segment))
            if segment.last == shelf.through:
                check_checkpoint(segment, header, self._tree, None)
            if header.journal_id != journal_id.hex():
                raise StorageFailed(f"{segment.path} is of another journal; move it away")
            self._last_leaf = bytes.fromhex(header.last_leaf)
        self._begin()

    def _begin(self) -> None:
        self._next = self._first = self._tree.size + 1
        self._part = JournalTree()
        self._packer = zlib.compressobj(COMPRESSION_LEVEL)
        self._packed: list[bytes] = []

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
    def last_sequence(self) -> int:
        """The last record of the segment that is being made."""
        return self._first + self._count - 1

    def add(self, records: Sequence[StoredRecord]) -> None:
        """Takes the next records, none behind `last_sequence`. Raises StorageFailed for one that is damaged."""
        for record in records:
            if record.sequence != self._next or not record.leaf_holds():
                raise StorageFailed(f"record {self._next} is damaged or missing; it can't be sealed")
            self._part.add(record.leaf)
            self._next += 1
        assert self._next <= self.last_sequence + 1, "a segment has its number of records"
        self._packed.append(self._packer.compress(encode_segment(records)))
        if records:
            self._last_leaf = records[-1].leaf

    def finish(self, at_ms: int) -> Segment | None:
        """Writes the segment when it is full, reads it back, and begins the next; None: it is not full yet.

        `at_ms` is the moment that the checkpoint tells. Raises StorageFailed.
        """
        if self._part.size < self._count:
            return None
        self._packed.append(self._packer.flush())
        body = b"".join(self._packed)
        root, tree = self._part.root(), self._tree.copy()
        tree.add_subtree(root, self._count.bit_length() - 1)
        checkpoint = Checkpoint(self._journal_id, tree.size, tree.root(), at_ms)
        header = SegmentHeader(
            format_version=FORMAT_VERSION,
            journal_id=self._journal_id.hex(),
            first=self._first,
            last=self.last_sequence,
            root=root.hex(),
            last_leaf=self._last_leaf.hex(),
            body_bytes=len(body),
            body_digest=hashlib.sha256(body).hexdigest(),
            checkpoint=self._sign(checkpoint),
        )
        written = self._shelf.write(header, body)
        if root_of_records(read_records(written)) != root:
            raise StorageFailed(f"{written.path} was not written as it should be; look into the kernel's log")
        self._tree = tree
        self._begin()
        return written
