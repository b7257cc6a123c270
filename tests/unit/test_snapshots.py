"""A state that was written down and read again is that state, and files that can't be trusted are passed over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fallow_coordinator.config import FollowerSettings
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import invariants
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import State
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import Record, StorageFailed
from fallow_coordinator.store import snapshots
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader, decode_records
from fallow_coordinator.store.segment import decode_segment
from fallow_coordinator.store.snapshots import (
    JournalSnapshots,
    SnapshotHeader,
    SnapshotShelf,
    SnapshotUnusable,
    decode_snapshot,
    decode_state,
    encode_snapshot,
    encode_state,
    state_version,
)
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.typed_json import Codecs
from journal_world import World

GOLDEN = sorted((Path(__file__).parents[1] / "golden_journals").glob("*.journal"))
ROWS = [f"row {number}".encode() for number in range(12)]


def written(state: State) -> bytes:
    return b"".join(encode_state(state))


def records_of(path: Path) -> list[Record]:
    return decode_records(decode_segment(path.read_bytes()), 0, path)


def shared_parts(value: object, seen: dict[int, str], where: str) -> list[str]:
    """Things that change and are reached in two ways: a snapshot would make two of one."""
    if isinstance(value, dict | list | set) or (dataclasses.is_dataclass(value) and not _is_frozen(value)):
        if id(value) in seen:
            return [f"{where} is {seen[id(value)]}"]
        seen[id(value)] = where
    parts: list[tuple[str, object]] = []
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(one.name, getattr(value, one.name)) for one in dataclasses.fields(value)]
    elif isinstance(value, dict):
        parts = [(f"[{key}]", held) for key, held in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"[{number}]", held) for number, held in enumerate(value)]
    return [found for name, part in parts for found in shared_parts(part, seen, f"{where}.{name}")]


def _is_frozen(value: Any) -> bool:
    return bool(type(value).__dataclass_params__.frozen)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_snapshot_at_any_record_and_the_rest_give_what_the_whole_journal_gives(path: Path) -> None:
    records = records_of(path)
    whole, taken_up = State(), State()
    for record in records:
        evolve(whole, record.event, record.at_ms)
        taken_up = decode_state(encode_state(taken_up))
        evolve(taken_up, record.event, record.at_ms)
    invariants.check(taken_up)
    assert taken_up == whole
    assert written(taken_up) == written(whole), "orders of dictionaries included"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_nothing_that_changes_stands_in_two_places_of_a_state(path: Path) -> None:
    state = State()
    for number, record in enumerate(records_of(path)):
        evolve(state, record.event, record.at_ms)
        if number % 20 == 0:
            assert shared_parts(state, {}, "state") == []


def test_every_type_of_the_state_is_covered() -> None:
    """A new field whose type fails here needs another type, or a line in `store/typed_json.py`."""
    assert "ended_order: deque[str]" in Codecs().of(State).shape


def test_state_with_a_type_that_is_not_covered_would_be_noticed() -> None:
    grown = dataclasses.make_dataclass("Grown", [("ledger", object, None)], bases=(State,))
    with pytest.raises(TypeError, match=r"Grown\.ledger"):
        Codecs().of(grown)


def test_long_collections_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    state = State()
    for record in records_of(GOLDEN[0]):
        evolve(state, record.event, record.at_ms)
    whole = len(list(encode_state(state)))
    monkeypatch.setattr(snapshots, "ENTRIES_PER_LINE", 2)
    lines = list(encode_state(state))
    assert len(lines) > whole
    assert decode_state(lines) == state
    with pytest.raises(SnapshotUnusable, match="twice"):
        decode_state([*lines, lines[-1]])
    with pytest.raises(SnapshotUnusable, match="missing"):
        decode_state(lines[:3])


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A journal with a finished job, a running one, and two snapshots."""
    folder = tmp_path / "journal"
    store = SqliteStore(folder)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker()
    await world.inspected_bundle(inspector)
    await world.submit_job(ROWS)
    snapshot(folder)
    await world.work_until_idle(inspector)
    await world.submit_job(ROWS)
    snapshot(folder)
    await world.tell(c.CreateAccount("behind the newest snapshot"))
    await world.engine.stop()
    store.close()
    return folder


def snapshot(folder: Path) -> None:
    follower = Follower(folder)
    follower.catch_up()
    assert follower.write_snapshot()
    follower.close()


def full_replay(folder: Path) -> State:
    state = State()
    with JournalReader(folder / JOURNAL_FILE) as journal:
        for record in journal.read(after_sequence=0, limit=1_000_000):
            evolve(state, record.event, record.at_ms)
    return state


def newest(folder: Path) -> Path:
    return SnapshotShelf(folder).paths()[0]


def rewritten(path: Path, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> None:
    """Changes header and body and gives the file the digest that fits, as someone who covers traces would."""
    magic, line, rest = path.read_bytes().split(b"\n", 2)
    header, body = change(json.loads(line), zlib.decompress(rest[:-32]))
    data = b"\n".join((magic, json.dumps(header).encode(), zlib.compress(body)))
    path.write_bytes(data + hashlib.sha256(data).digest())


async def test_engine_takes_up_the_newest_snapshot_and_the_tail(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = full_replay(folder)
    store = SqliteStore(folder)
    with caplog.at_level(logging.INFO):
        world = World(store=store, snapshots=JournalSnapshots(folder))
        await world.engine._replay()
    assert "folded=1" in caplog.text
    assert world.engine.state == expected and written(world.engine.state) == written(expected)
    store.close()


async def test_start_from_a_snapshot_works_on(folder: Path) -> None:
    store = SqliteStore(folder)
    world = World(store=store, snapshots=JournalSnapshots(folder))
    assert await world.engine.start() == store.last_sequence - 1, "the restart is one record more"
    await world.tell(c.CreateAccount("after the start"))
    await world.engine.stop()
    assert written(world.engine.state) == written(full_replay(folder))
    store.close()


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    rewritten(path, lambda header, body: (header | {"leaf": "00" * 32}, body))


def _future(path: Path) -> None:
    rewritten(path, lambda header, body: (header | {"sequence": header["sequence"] + 1_000}, body))


def _other_software(path: Path) -> None:
    rewritten(path, lambda header, body: (header | {"software": "00" * 32}, body))


def _other_body(path: Path) -> None:
    rewritten(path, lambda header, body: (header, body.replace(b'["sequence",', b'["sequence",1')))


def _not_a_state(path: Path) -> None:
    rewritten(path, lambda header, body: (header, body.replace(b'["jobs",', b'["jests",')))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut_off, "damaged"),
        (_one_bit, "damaged"),
        (_empty, "no snapshot, or was cut off"),
        (_foreign, "of another journal"),
        (_future, "where the journal has none"),
        (_other_software, "another version"),
        (_other_body, "do not agree"),
        (_not_a_state, "can't be read"),
    ],
)
def test_unusable_snapshot_is_refused_with_a_line_and_the_older_one_taken(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    older = JournalSnapshots(folder).newest()
    damage(newest(folder))
    found = JournalSnapshots(folder).newest()
    assert found is not None and older is not None and 0 < found.sequence < older.sequence
    assert f"snapshot.refused path={newest(folder)} reason=" in caplog.text and reason in caplog.text
    for path in SnapshotShelf(folder).paths():
        _empty(path)
    assert JournalSnapshots(folder).newest() is None, "the journal is folded from its beginning"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flip=st.none() | st.integers(0, 255))
def test_no_change_of_a_file_gives_another_state(folder: Path, cut: float, flip: int | None) -> None:
    data = bytearray(newest(folder).read_bytes())
    at = int(cut * (len(data) - 1))
    if flip is None:
        del data[at:]
    elif data[at] == flip:
        return
    else:
        data[at] = flip
    with pytest.raises(SnapshotUnusable):
        decode_snapshot(bytes(data))


def test_only_the_newest_few_are_kept(tmp_path: Path) -> None:
    shelf = SnapshotShelf(tmp_path, kept=2)
    for sequence in range(1, 6):
        state = State(journal_id=b"j", sequence=sequence)
        shelf.save(SnapshotHeader(b"j", sequence, 0, b"leaf", 1, state_version()), state)
    assert [int(path.name[9:29]) for path in shelf.paths()] == [5, 4]
    others = [tmp_path / "snapshots" / f"snapshot-{number:020}-{'0' * 16}.fallow" for number in range(9)]
    for path in others:
        path.write_bytes(b"of another version")
    (tmp_path / "snapshots" / "snapshot.unfinished").write_bytes(b"of a crash")
    shelf.save(SnapshotHeader(b"j", 6, 0, b"leaf", 1, state_version()), State(journal_id=b"j", sequence=6))
    assert [path.exists() for path in others] == [False] * 7 + [True] * 2
    assert not (tmp_path / "snapshots" / "snapshot.unfinished").exists()


def test_equal_states_give_equal_files() -> None:
    header = SnapshotHeader(b"j", 1, 0, b"leaf", 1, state_version())
    one, other = State(journal_id=b"j", sequence=1), State(journal_id=b"j", sequence=1)
    assert b"".join(encode_snapshot(header, one)) == b"".join(encode_snapshot(header, other))


def test_follower_goes_on_from_a_snapshot_and_the_views_stay_right(folder: Path) -> None:
    whole = Follower(folder)
    whole.catch_up()
    expected, at = written(whole._projection.state), whole.applied_sequence
    whole.close()
    follower = Follower(folder)
    assert follower.snapshot_sequence > 0
    assert (written(follower._projection.state), follower.applied_sequence) == (expected, at)
    follower.close()


def test_views_behind_every_snapshot_are_made_from_the_beginning(folder: Path) -> None:
    for path in folder.glob("views.db*"):
        path.unlink()
    follower = Follower(folder)
    assert (follower.snapshot_sequence, follower.applied_sequence) == (0, 0)
    follower.catch_up()
    assert written(follower._projection.state) == written(full_replay(folder))
    follower.close()


def test_snapshots_are_due_by_records_and_by_time_and_rest_between(folder: Path) -> None:
    shutil.rmtree(folder / "snapshots")
    by_records = Follower(folder, FollowerSettings(snapshot_records=10, snapshot_rest_ms=0))
    assert by_records.snapshot_is_due()
    assert by_records.write_snapshot() and not by_records.snapshot_is_due() and not by_records.write_snapshot()
    by_records.close()
    shutil.rmtree(folder / "snapshots")
    resting = Follower(folder, FollowerSettings(snapshot_records=10, snapshot_rest_ms=3_600_000))
    assert not resting.snapshot_is_due()
    resting.close()
    by_time = Follower(folder, FollowerSettings(snapshot_ms=0))
    assert by_time.snapshot_is_due()
    by_time.close()


def test_snapshots_take_a_small_part_of_the_time_until_a_start_would_take_long(folder: Path) -> None:
    shutil.rmtree(folder / "snapshots")
    for late, waited_s, is_due in ((10**6, 18.0, False), (10**6, 20.0, True), (10, 3.0, False), (10, 5.0, True)):
        follower = Follower(
            folder, FollowerSettings(snapshot_records=10, snapshot_records_late=late, snapshot_rest_ms=0)
        )
        follower._snapshot_took_s = 1.0
        follower._snapshot_tried_s -= waited_s
        assert follower.snapshot_is_due() is is_due, (late, waited_s)
        follower.close()


def test_full_disk_costs_a_snapshot_and_no_view(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    follower = Follower(folder)
    follower.catch_up()

    def full(*_: object) -> int:
        raise StorageFailed("the disk is full")

    monkeypatch.setattr(snapshots, "write_durably", full)
    before = SnapshotShelf(folder).paths()
    assert not follower.write_snapshot()
    assert "snapshot.failed" in caplog.text and SnapshotShelf(folder).paths() == before
    follower.close()
