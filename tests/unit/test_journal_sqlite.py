"""Files that are not as they should be: each is refused in words that say what to do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fallow.ids import AccountId
from fallow_coordinator.core.events import AccountCreated
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.journal_reader import APPLICATION_ID, JournalReader
from fallow_coordinator.store.sqlite import SqliteStore


def append(store: SqliteStore, *names: str) -> None:
    store.append(
        expected_sequence=store.last_sequence,
        events=[(1_000, AccountCreated(AccountId(name), name)) for name in names],
        payloads={},
    )


def change(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / "journal.db") as connection:
        connection.execute(statement)
    connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal of three records, closed."""
    store = SqliteStore(tmp_path)
    append(store, "a", "b", "c")
    store.close()
    return tmp_path


def test_journal_syncs_every_commit(folder: Path) -> None:
    store = SqliteStore(folder)
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    store.close()


def test_every_record_has_a_salt_of_its_own(folder: Path) -> None:
    with JournalReader(folder / "journal.db") as journal:
        salts = {record.salt for record in journal.stored(after_sequence=0, limit=10)}
    assert len(salts) == 3
    assert {len(salt) for salt in salts} == {16}


@pytest.mark.parametrize("column", ["at_ms = at_ms + 1", "epoch = 7", "event = x'00'", "salt = zeroblob(16)"])
def test_any_change_of_a_record_is_noticed(folder: Path, column: str) -> None:
    change(folder, f"UPDATE journal SET {column} WHERE sequence = 2")
    store = SqliteStore(folder)
    with pytest.raises(StorageFailed, match="record 2 does not match its hash"):
        store.read(after_sequence=0, limit=10)
    store.close()


def test_missing_record_is_noticed(folder: Path) -> None:
    change(folder, "DELETE FROM journal WHERE sequence = 2")
    store = SqliteStore(folder)
    with pytest.raises(StorageFailed, match="record 2 is missing"):
        store.read(after_sequence=0, limit=10)
    store.close()


def test_foreign_database_is_not_touched(tmp_path: Path) -> None:
    change(tmp_path, "CREATE TABLE photos (name TEXT)")
    before = (tmp_path / "journal.db").read_bytes()
    with pytest.raises(StorageFailed, match="is not a journal of fallow"):
        SqliteStore(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        assert [name for (name,) in connection.execute("SELECT name FROM sqlite_schema")] == ["photos"]
    connection.close()
    assert (tmp_path / "journal.db").read_bytes() == before


def test_file_that_is_no_database_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database at all, but long enough to look like one" * 100)
    with pytest.raises(StorageFailed, match="is no database"):
        SqliteStore(tmp_path)


def test_journal_of_a_newer_version_is_left_alone(folder: Path) -> None:
    change(folder, "UPDATE meta SET value = 99 WHERE name = 'format_version'")
    with pytest.raises(StorageFailed, match="start the newer version"):
        SqliteStore(folder)
    with sqlite3.connect(folder / "journal.db") as connection:
        assert connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone() == (1,)
    connection.close()


def test_full_disk_is_told_with_what_to_do_and_nothing_of_the_batch_stays(folder: Path) -> None:
    store = SqliteStore(folder)
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFailed, match="the disk is full; free space") as failed:
        append(store, *("x" * 3_000 for _ in range(20)))
    assert str(folder / "journal.db") in str(failed.value)
    with pytest.raises(StorageFailed, match="the disk is full"):
        append(store, "after the failure")
    assert len(store.read(after_sequence=0, limit=100)) == 3
    store.close()


def test_read_only_journal_is_told_with_what_to_do(folder: Path) -> None:
    store = SqliteStore(folder)
    store._writer.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageFailed, match="may only be read; give this user write permission"):
        append(store, "x")
    store.close()


def test_folder_that_cannot_be_made_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageFailed, match=r"journal\.db"):
        SqliteStore(tmp_path / "file" / "state")


def test_reader_of_nothing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="can't be opened"):
        JournalReader(tmp_path / "journal.db")


def test_reader_sees_commits_of_another_process_and_their_coming(folder: Path) -> None:
    store = SqliteStore(folder)
    with JournalReader(folder / "journal.db") as journal:
        version = journal.data_version()
        assert journal.data_version() == version
        append(store, "d")
        assert journal.data_version() != version
        assert [record.sequence for record in journal.read(after_sequence=3, limit=10)] == [4]
        assert journal.last_sequence() == 4
    store.close()


def test_file_says_what_it_is(folder: Path) -> None:
    header = (folder / "journal.db").read_bytes()[:100]
    assert int.from_bytes(header[68:72], "big") == APPLICATION_ID
