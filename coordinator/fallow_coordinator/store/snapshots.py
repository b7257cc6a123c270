"""The folded state in a file, so that a start reads it and the journal's tail instead of the whole journal.

A file is a first line that says what it is, one JSON line with where it stands, a compressed body of JSON lines, and
the SHA-256 of everything before. The body holds the fields of the state in pieces of a thousand entries; `typed_json`
says how. A snapshot is never the truth: one of other software, of another journal, damaged or from the future is
refused with a line in the log, the next older one is tried, and in the end the journal is folded from its beginning.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import fallow
from fallow.errors import FallowError
from fallow_coordinator import core
from fallow_coordinator.core.state import State
from fallow_coordinator.store.durable_file import remove_unfinished, write_durably
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.typed_json import Codec, Codecs, plain_of, value_of

logger = logging.getLogger(__name__)

SNAPSHOTS_FOLDER = "snapshots"
SNAPSHOTS_KEPT = 3
"""Files of this software: the newest, and two to fall back on."""
SNAPSHOTS_OF_OTHERS_KEPT = 2
"""Files of other versions: whoever goes back to one starts as quickly."""
FORMAT_VERSION = 1
ENTRIES_PER_LINE = 1_000
HEADER_BYTES_MAX = 4_096
COMPRESSION_LEVEL = 1

_MAGIC = b"fallow snapshot\n"
_DIGEST_BYTES = 32
_NAME = re.compile(r"snapshot-(\d{20})-([0-9a-f]{16})\.fallow")
_COLLECTIONS: frozenset[type] = frozenset({dict, list, deque})
"""Kinds of fields that may be long."""
_CODECS = Codecs()


class SnapshotUnusable(Exception):
    """A file that is no snapshot for this journal and this software; the message says why."""


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """Where a snapshot stands, and who can read it."""

    journal_id: bytes
    sequence: int
    """Of the newest record that is in it."""
    at_ms: int
    leaf: bytes
    """Of that record: the journal must have the same there."""
    epoch: int
    """Of the writer that appended it."""
    software: str
    """`state_version` of whoever wrote it."""


@functools.cache
def state_version() -> str:
    """Names the shape of the state and the code that folds it: 64 hexadecimal digits, others for any other software.

    Every module of the core and of the vocabulary counts, so that no snapshot outlives a change of what made it.
    """
    version = hashlib.sha256(f"{FORMAT_VERSION}\n{_CODECS.of(State).shape}\n".encode())
    for package in (core, fallow):
        assert package.__file__ is not None
        for source in sorted(Path(package.__file__).parent.glob("*.py")):
            version.update(f"{source.name}\n".encode() + hashlib.sha256(source.read_bytes()).digest())
    return version.hexdigest()


def encode_state(state: State) -> Iterator[bytes]:
    """The state as JSON lines: equal states, orders of dictionaries included, give equal bytes."""
    yield from _lines(state)


def decode_state(lines: Iterable[bytes]) -> State:
    """The state that was written. Raises SnapshotUnusable for lines that nobody wrote."""
    made: dict[str, Any] = {}
    readers = _field_codecs()
    with _collector_resting():
        try:
            for line in lines:
                name, piece = json.loads(line)
                value = value_of(readers[name], piece)
                if name in made:
                    _extend(made[name], value)
                else:
                    made[name] = value
            state = State(**made)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, FallowError) as error:
            raise SnapshotUnusable(f"its body can't be read: {error!r}") from error
        finally:
            _CODECS.forget_words()
    if made.keys() != readers.keys():
        raise SnapshotUnusable(f"{len(readers) - len(made)} fields of the state are missing")
    return state


def _lines(state: State) -> Iterator[bytes]:
    for name, codec in _field_codecs().items():
        for piece in _pieces(getattr(state, name)):
            yield json.dumps([name, plain_of(codec, piece)], separators=(",", ":")).encode() + b"\n"


def _pieces(value: Any) -> Iterator[Any]:
    """Parts of a collection, each of its kind, at least one; anything else as it is."""
    if type(value) not in _COLLECTIONS or len(value) <= ENTRIES_PER_LINE:
        yield value
        return
    kind = cast("Callable[[list[Any]], Any]", type(value))
    entries: Iterator[Any] = iter(value.items() if hasattr(value, "items") else value)
    while piece := list(itertools.islice(entries, ENTRIES_PER_LINE)):
        yield kind(piece)


def _extend(whole: Any, piece: Any) -> None:
    if type(whole) not in _COLLECTIONS:
        raise TypeError("a value stands there twice")
    if not hasattr(whole, "update"):
        whole.extend(piece)
        return
    before = len(whole)
    whole.update(piece)
    if len(whole) != before + len(piece):
        raise ValueError("a key stands there twice")


@functools.cache
def _field_codecs() -> dict[str, Codec[Any]]:
    hints = get_type_hints(State)
    return {one.name: _CODECS.of(hints[one.name], f"State.{one.name}") for one in dataclasses.fields(State)}


@contextmanager
def _collector_resting() -> Generator[None]:
    """No search for garbage while a million objects are made that all stay."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# ------------------------------------------------------------------------------------------------------ files


def encode_snapshot(header: SnapshotHeader, state: State) -> Iterator[bytes]:
    """The bytes of a snapshot file, piece by piece."""
    digest = hashlib.sha256()
    for piece in _unsigned(header, state):
        digest.update(piece)
        yield piece
    yield digest.digest()


def _unsigned(header: SnapshotHeader, state: State) -> Iterator[bytes]:
    yield _MAGIC
    told = {name: value.hex() if isinstance(value, bytes) else value for name, value in _facts(header).items()}
    yield json.dumps(told, sort_keys=True).encode() + b"\n"
    packer = zlib.compressobj(COMPRESSION_LEVEL)
    for line in encode_state(state):
        if packed := packer.compress(line):
            yield packed
    yield packer.flush()


def _facts(header: SnapshotHeader) -> dict[str, Any]:
    return {one.name: getattr(header, one.name) for one in dataclasses.fields(header)}


def decode_snapshot(data: bytes) -> tuple[SnapshotHeader, State]:
    """What a snapshot file holds. Raises SnapshotUnusable."""
    header, body = _opened(data)
    state = decode_state(io.BytesIO(body))
    if (state.journal_id, state.sequence, state.clock_ms) != (header.journal_id, header.sequence, header.at_ms):
        raise SnapshotUnusable("its first lines and its body do not agree")
    return header, state


def _opened(data: bytes) -> tuple[SnapshotHeader, bytes]:
    """The header and the body's lines. Raises SnapshotUnusable."""
    header, body_at = _header_of(data)
    if header.software != state_version():
        raise SnapshotUnusable("it was written by another version of fallow")
    if hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise SnapshotUnusable("it is damaged: its digest is another")
    try:
        return header, zlib.decompress(memoryview(data)[body_at:-_DIGEST_BYTES])
    except zlib.error as error:
        raise SnapshotUnusable(f"it is damaged: {error}") from error


def _header_of(data: bytes) -> tuple[SnapshotHeader, int]:
    """The header and where the body begins. Raises SnapshotUnusable."""
    end = data.find(b"\n", len(_MAGIC), len(_MAGIC) + HEADER_BYTES_MAX)
    if not data.startswith(_MAGIC) or end < 0 or len(data) < end + _DIGEST_BYTES:
        raise SnapshotUnusable("it is no snapshot, or was cut off")
    try:
        told = json.loads(data[len(_MAGIC) : end])
        header = SnapshotHeader(
            journal_id=bytes.fromhex(told["journal_id"]),
            sequence=int(told["sequence"]),
            at_ms=int(told["at_ms"]),
            leaf=bytes.fromhex(told["leaf"]),
            epoch=int(told["epoch"]),
            software=str(told["software"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise SnapshotUnusable(f"its first lines can't be read: {error!r}") from error
    return header, end + 1


class SnapshotShelf:
    """The snapshots of one journal's folder."""

    def __init__(self, folder: Path, kept: int = SNAPSHOTS_KEPT) -> None:
        """`folder` is the journal's; nothing is made until something is written."""
        self._folder = folder / SNAPSHOTS_FOLDER
        self._kept = kept

    def paths(self) -> list[Path]:
        """Snapshots of this software, newest first."""
        mine = state_version()[:16]
        return [path for _, software, path in self._found() if software == mine]

    def _found(self) -> list[tuple[int, str, Path]]:
        """(sequence, software, path), newest first."""
        if not self._folder.is_dir():
            return []
        with storage_failures(self._folder):
            names = [(path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir()]
        return sorted(((int(name[1]), name[2], path) for path, name in names if name), reverse=True)

    def save(self, header: SnapshotHeader, state: State) -> int:
        """Writes a snapshot, durably, and lets go of old ones; gives its bytes. Raises StorageFailed."""
        with storage_failures(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(self._folder)
        name = f"snapshot-{header.sequence:020}-{header.software[:16]}.fallow"
        length = write_durably(self._folder / name, encode_snapshot(header, state))
        self._let_go()
        return length

    def _let_go(self) -> None:
        mine, seen, others = state_version()[:16], 0, 0
        with storage_failures(self._folder):
            for _, software, path in self._found():
                if software == mine:
                    seen += 1
                    superfluous = seen > self._kept
                else:
                    others += 1
                    superfluous = others > SNAPSHOTS_OF_OTHERS_KEPT
                if superfluous:
                    path.unlink(missing_ok=True)

    def newest(
        self,
        leaf_at: Callable[[int], bytes | None],
        *,
        journal_id: bytes | None = None,
        until_sequence: int | None = None,
    ) -> tuple[SnapshotHeader, State] | None:
        """The newest snapshot that belongs to this journal, not behind `until_sequence`; None when there is none.

        `leaf_at` tells the journal's leaf at a sequence, None where it has no record. Files that can't be used are
        passed over with a line in the log.
        """
        for path in self.paths():
            try:
                header, state = self.load(path, leaf_at, until_sequence)
            except SnapshotUnusable as reason:
                logger.warning("snapshot.refused path=%s reason=%s", path, reason)
                continue
            except _TooNew:
                continue
            if journal_id is not None and header.journal_id != journal_id:
                logger.warning("snapshot.refused path=%s reason=%s", path, "it is of another journal")
                continue
            return header, state
        return None

    def load(
        self, path: Path, leaf_at: Callable[[int], bytes | None], until_sequence: int | None = None
    ) -> tuple[SnapshotHeader, State]:
        """One snapshot, compared with the journal. Raises SnapshotUnusable."""
        data = _bytes_of(path)
        header, _ = _header_of(data)
        if until_sequence is not None and header.sequence > until_sequence:
            raise _TooNew
        leaf = leaf_at(header.sequence)
        if leaf is None:
            raise SnapshotUnusable(f"it stands at record {header.sequence}, where the journal has none")
        if leaf != header.leaf:
            raise SnapshotUnusable(f"it is of another journal: record {header.sequence} has another leaf")
        return decode_snapshot(data)

    def body(self, path: Path) -> tuple[SnapshotHeader, bytes]:
        """A snapshot's header and the lines that `encode_state` wrote, compared with its digest and nothing else.

        Raises SnapshotUnusable.
        """
        return _opened(_bytes_of(path))


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SnapshotUnusable(f"it can't be read: {error.strerror}") from error


class _TooNew(Exception):
    """Stands behind what is asked for."""


class JournalSnapshots:
    """The Snapshots port of the journal in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> State | None:
        """The newest that belongs to the journal beside it, or None. Raises StorageFailed."""
        with JournalReader(self._folder / JOURNAL_FILE) as journal:
            found = SnapshotShelf(self._folder).newest(journal.leaf)
        return None if found is None else found[1]
