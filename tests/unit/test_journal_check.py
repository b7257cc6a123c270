"""`check` says nothing of a sound journal, and names what is wrong with a damaged one."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.encoding import leaf_of
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
