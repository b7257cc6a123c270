"""`check` says nothing of a sound journal, and names what is wrong with a damaged one."""

from __future__ import annotations

import shutil
import sqlite3
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.checkpoint import signer_of
from fallow.identity import PrivateKey
from fallow.ids import Digest, digest_of
from fallow_coordinator.blob_folder import BlobFiles
from fallow_coordinator.blobs.storage import blob_key
from fallow_coordinator.config import FollowerSettings
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store import sqlite
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.encoding import leaf_of
from fallow_coordinator.store.sealed_segments import SegmentShelf, read_header, read_records, root_of_records
from fallow_coordinator.store.segment import encode_segment
from fallow_coordinator.store.snapshots import SnapshotShelf, decode_snapshot, encode_snapshot
from fallow_coordinator.store.sqlite import SqliteStore
from journal_world import World

ROWS = [f"row {number}".encode() for number in range(12)]


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A journal with a finished job and a running one, and views of the first part of it."""
    state = tmp_path / "state"
    store = SqliteStore(state)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker()
    await world.inspected_bundle(inspector)
    await world.submit_job(ROWS)
    follower = Follower(state)
    follower.catch_up()
    follower.close()
    await world.work_until_idle(inspector)
    await world.submit_job(ROWS)
    await world.engine.stop()
    store.close()
    return state


def change(folder: Path, file: str, statement: str, values: tuple[object, ...] = ()) -> None:
    with sqlite3.connect(folder / file) as connection:
        connection.execute(statement, values)
    connection.close()


def rewrite(folder: Path, sequence: int, **columns: object) -> None:
    """Changes a record and gives it the leaf that fits, as someone who covers traces would."""
    with sqlite3.connect(folder / "journal.db") as connection:
        names = ("at_ms", "epoch", "event", "salt")
        row = connection.execute(
            "SELECT at_ms, epoch, event, salt FROM journal WHERE sequence = ?", (sequence,)
        ).fetchone()
        record = dict(zip(names, row, strict=True)) | columns
        leaf = leaf_of(sequence=sequence, **record)
        connection.execute(
            "UPDATE journal SET at_ms = ?, epoch = ?, event = ?, salt = ?, leaf = ? WHERE sequence = ?",
            (*(record[name] for name in names), leaf, sequence),
        )
    connection.close()


def test_sound_journal_has_no_faults(folder: Path) -> None:
    told: list[int] = []
    report = check_journal(folder, told.append)
    assert report.faults == []
    assert report.records == told[-1] > report.view_sequence > 0
    assert report.view_rows > 0


def test_check_changes_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.db")}
    check_journal(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.db")} == before


def test_journal_without_views_is_checked_without_them(folder: Path) -> None:
    (folder / "views.db").unlink()
    report = check_journal(folder)
    assert (report.faults, report.view_sequence) == ([], 0)


def test_damaged_record_is_named(folder: Path) -> None:
    change(folder, "journal.db", "UPDATE journal SET salt = zeroblob(16) WHERE sequence = 9")
    assert "record 9 does not match its hash" in check_journal(folder).faults[0]


def test_missing_record_is_named(folder: Path) -> None:
    change(folder, "journal.db", "DELETE FROM journal WHERE sequence = 5")
    assert "record 5 is missing" in check_journal(folder).faults[0]


def test_forged_clock_is_found_though_its_leaf_fits(folder: Path) -> None:
    rewrite(folder, 9, at_ms=1)
    assert "record 9: the clock goes back" in check_journal(folder).faults[0]


def test_forged_epoch_is_found_though_its_leaf_fits(folder: Path) -> None:
    rewrite(folder, 9, epoch=0)
    assert "record 9: epoch 0 comes after epoch 1" in check_journal(folder).faults[0]


def test_event_that_no_decision_made_is_found(folder: Path) -> None:
    with sqlite3.connect(folder / "journal.db") as connection:
        events = dict(connection.execute("SELECT sequence, event FROM journal").fetchall())
    connection.close()
    rewrite(folder, 9, event=events[8])
    report = check_journal(folder)
    assert len(report.faults) == 1
    assert report.records >= 8


def test_views_that_differ_are_named(folder: Path) -> None:
    change(folder, "views.db", "UPDATE jobs SET rows_done = rows_done + 1")
    faults = check_journal(folder).faults
    assert len(faults) == 1 and "table jobs" in faults[0]


def test_folder_without_a_journal_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="can't be opened"):
        check_journal(tmp_path)


def test_check_of_a_copy_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "journal.db", copy / "journal.db")
    assert check_journal(copy).faults == []


# ------------------------------------------------------------------------------------------------ segments, snapshots

KEY = PrivateKey.generate()


@pytest.fixture
def sealed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same journal with a snapshot and its first records in segments only."""
    monkeypatch.setattr(sqlite, "JOURNAL_TAIL_RECORDS", 12)
    follower = Follower(folder, FollowerSettings(segment_records=8), signer_of(KEY))
    follower.catch_up()
    assert follower.write_snapshot()
    while follower.seal_step():
        pass
    follower.close()
    store = SqliteStore(folder)
    while store.let_go_of_sealed(1_000):
        pass
    store.close()
    return folder


def test_sealed_journal_is_checked_from_its_first_record(sealed: Path) -> None:
    report = check_journal(sealed, public_der=KEY.public_der)
    assert report.faults == []
    assert (report.segments, report.sealed_sequence) == (report.records // 8, report.records // 8 * 8)
    assert report.snapshots == 1
    assert report.view_sequence == report.records


def test_segments_under_another_key_are_named(sealed: Path) -> None:
    faults = check_journal(sealed, public_der=PrivateKey.generate().public_der).faults
    assert len(faults) == 1 and "no signature of the coordinator's key" in faults[0]


def test_missing_segment_is_named_by_the_record_that_is_missing(sealed: Path) -> None:
    SegmentShelf(sealed).segments()[1].path.unlink()
    assert "record 9 is missing" in check_journal(sealed, public_der=KEY.public_der).faults[0]


def test_forged_segment_is_found_though_leaf_and_digests_fit(sealed: Path) -> None:
    shelf = SegmentShelf(sealed)
    segment = shelf.segments()[0]
    records = read_records(segment)
    forged = records[4]._replace(salt=bytes(16))
    records[4] = forged._replace(
        leaf=leaf_of(salt=forged.salt, sequence=5, at_ms=forged.at_ms, epoch=forged.epoch, event=forged.event),
    )
    header, _ = read_header(segment)
    body = zlib.compress(encode_segment(records))
    shelf.write(replace(header, body_bytes=len(body), body_digest=digest_of(body).hex()), body)
    assert "another root than it says" in check_journal(sealed, public_der=KEY.public_der).faults[0]
    fits = replace(header, root=root_of_records(records).hex(), body_bytes=len(body), body_digest=digest_of(body).hex())
    shelf.write(fits, body)
    assert "another root than the journal's tree" in check_journal(sealed, public_der=KEY.public_der).faults[0]


def test_record_that_differs_between_segment_and_database_is_named(sealed: Path) -> None:
    last = SegmentShelf(sealed).segments()[-1].last
    rewrite(sealed, last, salt=bytes(16))
    assert f"record {last} is another than the database has" in check_journal(sealed).faults[0]


def test_snapshot_that_lies_is_named(sealed: Path) -> None:
    path = SnapshotShelf(sealed).paths()[0]
    header, state = decode_snapshot(path.read_bytes())
    next(iter(state.accounts.values())).name = "somebody else"
    path.write_bytes(b"".join(encode_snapshot(header, state)))
    faults = check_journal(sealed).faults
    assert len(faults) == 1 and f"{path}: it is not what the journal says" in faults[0]


def test_damaged_snapshot_and_one_from_the_future_are_named(sealed: Path) -> None:
    path = SnapshotShelf(sealed).paths()[0]
    (path.parent / path.name.replace("snapshot-0", "snapshot-1")).write_bytes(path.read_bytes()[:-1])
    header, state = decode_snapshot(path.read_bytes())
    path.write_bytes(b"".join(encode_snapshot(replace(header, sequence=10**6), state)))
    faults = check_journal(sealed).faults
    assert len(faults) == 2
    assert any("it is damaged" in fault for fault in faults)
    assert any("behind the journal's last record" in fault for fault in faults)


# ------------------------------------------------------------------------------------------------ blobs


def stored_blob(folder: Path, data: bytes, digest: Digest | None = None) -> Path:
    path = folder / blob_key(digest or digest_of(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_blobs_are_looked_for_and_read_when_asked(folder: Path, tmp_path: Path) -> None:
    blobs = BlobFiles(tmp_path / "blob service")
    missing = check_journal(folder, blobs=blobs)
    assert [fault.split(";")[0] for fault in missing.faults] == [f"blob {digest_of(b'a model').hex()} is missing"]
    path = stored_blob(tmp_path / "blob service", b"a model")
    report = check_journal(folder, blobs=blobs)
    assert report.faults == []
    assert report.blobs > report.blobs_read > 0, "inline payloads are read, they are small"
    path.write_bytes(b"a m0del")
    assert check_journal(folder, blobs=blobs).faults == []
    deep = check_journal(folder, blobs=blobs, deep=True)
    assert len(deep.faults) == 1 and "does not match its digest" in deep.faults[0]
    path.write_bytes(b"a mod")
    assert "has 5 bytes, not 7" in check_journal(folder, blobs=blobs).faults[0]


def test_damaged_and_missing_payloads_are_named(folder: Path, tmp_path: Path) -> None:
    blobs = BlobFiles(tmp_path)
    stored_blob(tmp_path, b"a model")
    change(folder, "journal.db", "UPDATE payloads SET bytes = x'00'")
    damaged = check_journal(folder, blobs=blobs).faults
    assert damaged and all("does not match its digest" in fault for fault in damaged)
    change(folder, "journal.db", "DELETE FROM payloads")
    missing = check_journal(folder, blobs=blobs).faults
    assert missing and all("is missing" in fault for fault in missing)
