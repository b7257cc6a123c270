"""Sealed segments: the journal reads the same whichever records have left the database, and no crash loses one."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.checkpoint import Checkpoint, CheckpointUnusable, read_checkpoint, sign_checkpoint, signer_of
from fallow.identity import PrivateKey
from fallow.ids import AccountId, digest_of
from fallow.merkle import inclusion_proof, root_of, verify_inclusion
from fallow_coordinator.config import FollowerSettings
from fallow_coordinator.core.events import AccountCreated, JournalStarted
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import StorageFailed, WriterFenced
from fallow_coordinator.store import sqlite
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.journal_tree import JournalTree
from fallow_coordinator.store.sealed_segments import (
    FULL_SEGMENTS_MAX,
    Segment,
    SegmentShelf,
    read_header,
    read_records,
)
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.stored_record import StoredRecord

KEY = PrivateKey.generate()
SIGN = signer_of(KEY)
SETTINGS = FollowerSettings(chunk_records=5, segment_records=16)


@pytest.fixture(autouse=True)
def short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short journal lets go of records."""
    monkeypatch.setattr(sqlite, "JOURNAL_TAIL_RECORDS", 3)


def grow(store: SqliteStore, count: int) -> None:
    first = store.last_sequence + 1
    events = [
        (1_000 + number, JournalStarted(b"a journal") if number == 1 else account(number))
        for number in range(first, first + count)
    ]
    store.append(expected_sequence=store.last_sequence, events=events, payloads={})


def account(number: int) -> AccountCreated:
    return AccountCreated(AccountId(f"account-{number}"), "name " * (number % 5))


def seal(folder: Path, settings: FollowerSettings = SETTINGS) -> None:
    """A follower's life: views, a snapshot, and every segment that can be sealed."""
    follower = Follower(folder, settings, SIGN)
    follower.catch_up()
    follower.write_snapshot()
    while follower.seal_step():
        pass
    follower.close()


def let_go(store: SqliteStore, limit: int = 7) -> int:
    total = 0
    while count := store.let_go_of_sealed(limit):
        assert count <= limit
        total += count
    return total


def all_records(folder: Path) -> list[StoredRecord]:
    with JournalReader(folder / JOURNAL_FILE) as journal:
        records: list[StoredRecord] = []
        while found := journal.stored(after_sequence=len(records), limit=9):
            records.extend(found)
        return records


def in_database(folder: Path) -> list[int]:
    with sqlite3.connect(folder / JOURNAL_FILE) as connection:
        rows = [number for (number,) in connection.execute("SELECT sequence FROM journal ORDER BY sequence")]
    connection.close()
    return rows


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """A journal of 40 records, nothing sealed."""
    store = SqliteStore(tmp_path)
    grow(store, 40)
    yield store
    store.close()


def test_journal_reads_the_same_when_records_have_left_the_database(store: SqliteStore, tmp_path: Path) -> None:
    before = all_records(tmp_path)
    seal(tmp_path)
    assert all_records(tmp_path) == before
    assert let_go(store) == 32
    assert in_database(tmp_path) == list(range(33, 41))
    assert all_records(tmp_path) == before
    assert [record.sequence for record in store.read(after_sequence=30, limit=100)] == [31, 32], "of one segment"
    assert let_go(store) == 0
    grow(store, 40)
    assert store.last_sequence == 80
    seal(tmp_path)
    assert let_go(store) == 45, "the newest three stay though they be sealed"
    assert [record.sequence for record in all_records(tmp_path)] == list(range(1, 81))


def test_reopened_store_goes_on_where_the_journal_ended(store: SqliteStore, tmp_path: Path) -> None:
    seal(tmp_path)
    let_go(store)
    store.close()
    again = SqliteStore(tmp_path)
    assert (again.last_sequence, again.last_at_ms) == (40, 1_040)
    grow(again, 1)
    with JournalReader(tmp_path / JOURNAL_FILE) as journal:
        assert journal.read(after_sequence=40, limit=5)[0].event == account(41)
        assert journal.leaf(3) == all_records(tmp_path)[2].leaf
        assert journal.leaf(42) is None and journal.leaf(0) is None
    again.close()


def test_file_stops_growing_when_records_leave_it(store: SqliteStore, tmp_path: Path) -> None:
    sizes: list[int] = []
    for _ in range(8):
        grow(store, 400)
        seal(tmp_path, FollowerSettings(segment_records=256))
        let_go(store, 1_000)
        store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sizes.append((tmp_path / JOURNAL_FILE).stat().st_size)
    assert max(sizes[4:]) <= sizes[3] * 1.1, sizes


def test_nothing_leaves_the_database_that_is_not_sealed(store: SqliteStore, tmp_path: Path) -> None:
    assert let_go(store) == 0
    follower = Follower(tmp_path, SETTINGS, SIGN)
    follower.catch_up()
    assert not follower.seal_step(), "no snapshot covers it"
    follower.close()
    unsigned = Follower(tmp_path, SETTINGS)
    unsigned.write_snapshot()
    assert not unsigned.seal_step(), "nobody signs"
    unsigned.close()
    assert let_go(store) == 0


def test_records_that_were_just_put_into_the_views_are_sealed_without_being_read_again(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(tmp_path, SETTINGS, SIGN)
    follower.catch_up()
    follower.write_snapshot()
    while follower.seal_step():
        pass
    read: list[int] = []
    stored = JournalReader.stored

    def noted(self: JournalReader, *, after_sequence: int, limit: int) -> list[StoredRecord]:
        found = stored(self, after_sequence=after_sequence, limit=limit)
        read.extend(record.sequence for record in found)
        return found

    monkeypatch.setattr(JournalReader, "stored", noted)
    grow(store, 20)
    follower.catch_up()
    assert not follower.seal_step(), "what is full waits for a snapshot that covers it"
    assert SegmentShelf(tmp_path).holding(33) is None
    follower.write_snapshot()
    while follower.seal_step():
        pass
    follower.close()
    assert read == list(range(41, 61)), "each once"
    shelf = SegmentShelf(tmp_path)
    sealed = [record for segment in shelf.segments() for record in read_records(segment)]
    assert sealed == all_records(tmp_path)[:48]


def test_only_so_many_segments_are_made_ahead_of_the_snapshot(store: SqliteStore, tmp_path: Path) -> None:
    follower = Follower(tmp_path, SETTINGS, SIGN)
    follower.catch_up()
    follower.write_snapshot()
    while follower.seal_step():
        pass
    grow(store, 100)
    follower.catch_up()
    while follower.seal_step():
        pass
    sealing = follower._sealing
    assert sealing is not None and sealing.room == 0
    assert sealing.next_sequence == 33 + FULL_SEGMENTS_MAX * 16, "the rest stays in the database"
    follower.write_snapshot()
    while follower.seal_step():
        pass
    follower.close()
    assert SegmentShelf(tmp_path).segments()[-1].last == 128
    assert let_go(store) == 128


def test_segment_of_another_journal_takes_no_record_out(store: SqliteStore, tmp_path: Path) -> None:
    other = SqliteStore(tmp_path / "other")
    grow(other, 40)
    other.close()
    seal(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "segments", tmp_path / "segments")
    assert let_go(store) == 0
    seal(tmp_path)
    assert len(SegmentShelf(tmp_path).segments()) == 2, "nothing is added to what is of another journal"


def test_damaged_segment_takes_no_record_out(store: SqliteStore, tmp_path: Path) -> None:
    seal(tmp_path)
    path = SegmentShelf(tmp_path).segments()[0].path
    path.write_bytes(path.read_bytes()[:-1])
    assert let_go(store) == 0


def test_fenced_writer_takes_nothing_out(store: SqliteStore, tmp_path: Path) -> None:
    seal(tmp_path)
    later = SqliteStore(tmp_path)
    with pytest.raises(WriterFenced):
        store.let_go_of_sealed(10)
    assert let_go(later) == 32
    later.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-5] + bytes(5),
        lambda data: b"",
        lambda data: data.replace(b'"first": 1', b'"first": 2'),
        lambda data: data.replace(b"fallow segment", b"fallow sediment"),
    ],
)
def test_damaged_segment_is_refused_with_words(
    store: SqliteStore, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    seal(tmp_path)
    let_go(store)
    path = SegmentShelf(tmp_path).segments()[0].path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageFailed, match=r"restore the file from a backup"):
        all_records(tmp_path)


# ------------------------------------------------------------------------------------------------ tree, checkpoints


@given(st.integers(0, 70))
def test_tree_has_the_roots_of_rfc_6962(count: int) -> None:
    leaves = [digest_of(number.to_bytes(4, "big")) for number in range(count)]
    tree = JournalTree()
    for leaf in leaves:
        tree.add(leaf)
    assert (tree.root(), tree.size) == (root_of(leaves), count)
    parts = JournalTree()
    for first in range(0, count - count % 8, 8):
        parts.add_subtree(root_of(leaves[first : first + 8]), 3)
    assert parts.root() == root_of(leaves[: count - count % 8]), "segments' roots are nodes of the tree"


def test_checkpoints_cover_the_journal_and_prove_each_record(store: SqliteStore, tmp_path: Path) -> None:
    seal(tmp_path)
    leaves = [record.leaf for record in all_records(tmp_path)]
    for segment in SegmentShelf(tmp_path).segments():
        checkpoint = read_checkpoint(read_header(segment)[0].checkpoint, KEY.public_der)
        assert checkpoint.size == segment.last and checkpoint.journal_id == b"a journal"
        covered = leaves[: checkpoint.size]
        assert checkpoint.root == root_of(covered)
        proof = inclusion_proof(covered, 4)
        assert verify_inclusion(root=checkpoint.root, leaf=leaves[4], index=4, leaf_count=len(covered), proof=proof)


def test_checkpoint_is_a_signed_note() -> None:
    checkpoint = Checkpoint(b"\x01\x02", 16, digest_of(b"root"), 1_700_000_000_000)
    note = sign_checkpoint(checkpoint, KEY)
    text, _, signatures = note.partition("\n\n")
    assert text.splitlines()[:2] == ["fallow journal 0102", "16"]
    assert signatures.startswith("\N{EM DASH} coordinator ")
    assert read_checkpoint(note, KEY.public_der) == checkpoint
    assert read_checkpoint(note + "\N{EM DASH} witness AAAA\n", KEY.public_der) == checkpoint, "others may sign too"
    for forged in (note.replace("\n16\n", "\n17\n"), note.replace("time 17", "time 18"), note[:-9] + "AAAAAAA=\n"):
        with pytest.raises(CheckpointUnusable):
            read_checkpoint(forged, KEY.public_der)
    with pytest.raises(CheckpointUnusable, match="no signature of the coordinator"):
        read_checkpoint(note, PrivateKey.generate().public_der)


# ------------------------------------------------------------------------------------------------ crashes


class _Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The `step`-th call that makes or changes a file of a snapshot or segment never happens."""
    calls = 0

    def counted(right: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise _Crash
            return right(*arguments, **named)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "open", counted(os.open))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    # A process that is gone cleans up nothing.
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("step", range(1, 20))
def test_crash_at_any_step_of_sealing_loses_nothing(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before = all_records(tmp_path)
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        try:
            seal(tmp_path)
        except _Crash:
            pass
        else:
            assert step > 10, "there are so many steps"
    assert all_records(tmp_path) == before
    let_go(store)
    assert all_records(tmp_path) == before, "what was sealed by then may leave, and is there"
    seal(tmp_path)
    let_go(store)
    assert in_database(tmp_path) == list(range(33, 41))
    assert all_records(tmp_path) == before
    assert not list(tmp_path.rglob("*.unfinished"))


def test_any_mix_of_growing_sealing_and_letting_go_keeps_every_record(tmp_path: Path) -> None:
    chance = random.Random(3)
    store = SqliteStore(tmp_path)
    expected: dict[int, bytes] = {}
    for _ in range(60):
        match chance.randrange(5):
            case 0 | 1:
                grow(store, chance.randrange(1, 30))
                with JournalReader(tmp_path / JOURNAL_FILE) as journal:
                    fresh = journal.stored(after_sequence=len(expected), limit=100)
                expected.update((record.sequence, record.leaf) for record in fresh)
            case 2:
                seal(tmp_path) if store.last_sequence else None
            case 3:
                store.let_go_of_sealed(chance.randrange(1, 20))
            case _:
                store.close()
                store = SqliteStore(tmp_path)
        if expected:
            assert {record.sequence: record.leaf for record in all_records(tmp_path)} == expected
    assert len(in_database(tmp_path)) < len(expected)
    assert len(expected) == sum(len(read_records(one)) for one in _segments(tmp_path)) + _unsealed(tmp_path, expected)
    store.close()


def _segments(folder: Path) -> list[Segment]:
    return list(SegmentShelf(folder).segments())


def _unsealed(folder: Path, expected: dict[int, bytes]) -> int:
    return len(expected) - _segments(folder)[-1].last
