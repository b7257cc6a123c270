"""The write-ahead log is moved into the file beside the writer, and nothing depends on it."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from fallow_coordinator.core import events as ev
from fallow_coordinator.store import checkpoints
from fallow_coordinator.store.checkpoints import Checkpoints
from fallow_coordinator.store.sqlite import SqliteStore


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def frames_left(path: Path) -> int:
    """Frames of the log that are not in the file yet, as a checkpoint of our own finds them."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        _, frames, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return int(frames) - int(moved)
    finally:
        connection.close()


def test_log_is_moved_while_the_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_PAGES", 10)
    store = SqliteStore(tmp_path)
    size = (tmp_path / "journal.db").stat().st_size
    for number in range(200):
        event = ev.AccountCreated(account_id=f"account-{number}", name="n" * 500)  # type: ignore[arg-type]
        store.append(expected_sequence=number, events=[(1, event)], payloads={})
    assert "journal-checkpoints" in names()
    store.close()
    assert "journal-checkpoints" not in names(), "it ends with its store"
    assert (tmp_path / "journal.db").stat().st_size > size
    assert frames_left(tmp_path / "journal.db") == 0
    again = SqliteStore(tmp_path)
    assert again.last_sequence == 200
    again.close()


def test_no_thread_runs_for_a_small_journal(tmp_path: Path) -> None:
    before = names()
    store = SqliteStore(tmp_path)
    store.append(expected_sequence=0, events=[], payloads={})
    assert names() == before
    store.close()


def test_file_that_cannot_be_opened_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moving = Checkpoints(tmp_path / "nowhere" / "journal.db")
    moving.note(records=10**9, payloads=0)
    moving.close()
    assert "journal.checkpoints_off" in caplog.text
