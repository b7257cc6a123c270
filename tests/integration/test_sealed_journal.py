"""Snapshots and sealed segments with real processes: what a kill at any moment leaves is the whole journal."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fallow.identity import PrivateKey
from fallow_coordinator.store import sqlite
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.sealed_segments import SegmentShelf
from fallow_coordinator.store.sqlite import SqliteStore
from integration.harness import coordinator, start_coordinator, wait_for
from integration.letting_go_writer import event_of
from integration.power_cut_disk import DiskHistory, PowerCutDisk
from unit.test_sealed_segments import all_records, grow, seal

PATIENCE_S = 60.0
FOLLOWER_KILLS = 6
WRITER_KILLS = 3
SEGMENTS_WANTED = 8
SEGMENT_RECORDS = 64
CUTS = 120


class Told:
    """The newest sequence that a writer acknowledged."""

    def __init__(self) -> None:
        self.sequence = 0

    def listen(self, writer: subprocess.Popen[bytes]) -> None:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.endswith(b"\n"):
                self.sequence = int(line)


def follower_of(folder: Path, key: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fallow_coordinator.follower", "--state", str(folder), "--key", str(key)]
    fast = ["--snapshot-records", "40", "--snapshot-rest-ms", "0", "--segment-records", str(SEGMENT_RECORDS)]
    return subprocess.Popen([*command, *fast], stderr=subprocess.DEVNULL)


@contextmanager
def writer_of(folder: Path, told: Told) -> Generator[subprocess.Popen[bytes]]:
    script = Path(__file__).parent / "letting_go_writer.py"
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tests}"}
    writer = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, env=environment)
    listener = threading.Thread(target=told.listen, args=(writer,))
    listener.start()
    try:
        yield writer
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        listener.join()
        assert writer.stdout is not None
        writer.stdout.close()


@pytest.mark.slow
@pytest.mark.processes
def test_no_record_is_lost_when_writer_and_follower_are_killed_while_segments_are_sealed(tmp_path: Path) -> None:
    folder, key = tmp_path / "journal", tmp_path / "key.pem"
    PrivateKey.generate().save(key)
    chance, told = random.Random(11), Told()
    follower = follower_of(folder, key)
    try:
        for _ in range(WRITER_KILLS):
            with writer_of(folder, told):
                for _ in range(FOLLOWER_KILLS // WRITER_KILLS):
                    before = told.sequence
                    wait_for(lambda before=before: told.sequence > before, PATIENCE_S, "the writer to go on")
                    time.sleep(chance.uniform(0.3, 0.9))  # the moment of the kill is the point
                    follower.send_signal(signal.SIGKILL)
                    follower.wait()
                    follower = follower_of(folder, key)
                sealed = len(SegmentShelf(folder).segments())
                wait_for(
                    lambda sealed=sealed: len(SegmentShelf(folder).segments()) > sealed + 1, PATIENCE_S, "a segment"
                )
        with writer_of(folder, told):
            wait_for(lambda: in_database(folder)[0] > SEGMENT_RECORDS * SEGMENTS_WANTED, PATIENCE_S, "records to leave")
    finally:
        follower.terminate()
        assert follower.wait(timeout=30) == 0
    report = check_journal(folder, public_der=PrivateKey.load(key).public_der)
    assert report.faults == []
    assert report.records >= told.sequence > SEGMENT_RECORDS * SEGMENTS_WANTED
    assert report.segments >= SEGMENTS_WANTED and report.snapshots >= 1
    with JournalReader(folder / JOURNAL_FILE) as journal:
        events = [
            record.event
            for after in range(0, report.records, 1)
            if after % SEGMENT_RECORDS == 0
            for record in journal.read(after_sequence=after, limit=1)
        ]
    assert events == [event_of(number + 1) for number in range(0, report.records, SEGMENT_RECORDS)]


def in_database(folder: Path) -> tuple[int, int]:
    """The oldest and newest record in the database."""
    connection = sqlite3.connect(f"{(folder / JOURNAL_FILE).as_uri()}?mode=ro", uri=True)
    try:
        first, last = connection.execute("SELECT min(sequence), max(sequence) FROM journal").fetchone()
    finally:
        connection.close()
    return int(first or 0), int(last or 0)


def test_power_cut_while_records_leave_the_database_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are synced before any record of theirs leaves: whatever is left of the deletion, all are there."""
    monkeypatch.setattr(sqlite, "JOURNAL_TAIL_RECORDS", 3)
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAGES_MAX", 20)
    folder, chance = tmp_path / "journal", random.Random(5)
    store = SqliteStore(folder)
    grow(store, 200)
    store.close()
    seal(folder)
    expected = all_records(folder)
    assert not (folder / f"{JOURNAL_FILE}-wal").stat().st_size, "all is in one file"
    base = {JOURNAL_FILE: (folder / JOURNAL_FILE).read_bytes()}
    with PowerCutDisk() as disk:
        store = SqliteStore(folder)
        begin = len(disk.log)
        promised: list[tuple[int, int]] = [(begin, 200)]
        while store.let_go_of_sealed(9):
            grow(store, 2)
            promised.append((len(disk.log), store.last_sequence))
        log = list(disk.log)
        store.close()
    assert in_database(folder)[0] > 150
    history = DiskHistory(log, base)
    for number, cut in enumerate(sorted(chance.choices(range(begin, len(log) + 1), k=CUTS))):
        left = tmp_path / f"cut-{number}"
        left.mkdir()
        (left / "segments").symlink_to(folder / "segments")
        history.advance(cut)
        history.survivors(left, chance, chance.choice((0.0, 0.5, 1.0)))
        again = SqliteStore(left)
        again.close()
        records = all_records(left)
        assert [record.sequence for record in records] == list(range(1, len(records) + 1)), f"cut {cut}"
        assert len(records) >= max(sequence for at, sequence in promised if at <= cut), f"cut {cut}"
        assert records[:200] == expected[: len(records)][:200]


@pytest.mark.processes
def test_coordinator_starts_from_its_snapshot_and_check_finds_everything(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with coordinator(state) as service:
        for number in range(5):
            service.cli("account", "create", f"number {number}")
        sequence = int(service.cli("status")["journal_sequence"])
        assert service.stop() == 0
    service = start_coordinator(state)
    try:
        said = service.log.read_text()
        assert "engine.replayed from_snapshot=" in said
        taken_up = int(said.rpartition("from_snapshot=")[2].split()[0])
        assert taken_up >= sequence - 1
        for number in range(5):
            service.cli("account", "create", f"later {number}")
        family = service.family()[1:]
        service.kill()
        psutil.wait_procs(family, timeout=PATIENCE_S)
    finally:
        service.discard()
    for path in (state / "journal" / "snapshots").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with coordinator(state) as service:
        said = service.log.read_text()
        assert "snapshot.refused" in said and "from_snapshot=0" in said
        damaged = service.cli_raw("check", "--deep", "--json")
        faults = json.loads(damaged.stdout)["faults"]
        assert damaged.returncode == 1
        assert faults and all("delete the file, it is not needed" in fault for fault in faults)
        for path in (state / "journal" / "snapshots").iterdir():
            path.unlink(missing_ok=True)
        assert service.cli("check", "--deep")["faults"] == []
