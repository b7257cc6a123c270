"""What was acknowledged survives `kill -9` and power loss, and these tests notice a store for which that is not so."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fallow.ids import AccountId, digest_of
from fallow_coordinator.core.events import AccountCreated
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store import checkpoints, sqlite
from fallow_coordinator.store.sqlite import SqliteStore
from integration.power_cut_disk import SQLITE_FULL, SQLITE_IOERR_FSYNC, DiskHistory, Fault, Operation, PowerCutDisk

CUTS = 300
CUTS_SLOW = 1_000
KILLS = 4
ACKNOWLEDGED_BEFORE_KILL = 60


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """After so many operations of the disk, `append` had returned for everything up to this sequence."""

    operations: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Recording:
    log: list[Operation]
    acknowledged: list[Acknowledged]
    boundaries: set[int]
    """Sequences at which a batch ended."""


def payload_of(sequence: int) -> bytes:
    return f"payload {sequence} ".encode() * 50


def append_batch(store: SqliteStore, size: int) -> None:
    first = store.last_sequence + 1
    data = payload_of(first + size - 1)
    store.append(
        expected_sequence=store.last_sequence,
        events=[
            (number, AccountCreated(AccountId(f"account-{number}"), "name " * 20))
            for number in range(first, first + size)
        ],
        payloads={digest_of(data): data},
    )


def record(folder: Path, store_class: type[SqliteStore], seed: int) -> Recording:
    """A writer's life on a disk that takes notes, with small batches and a checkpoint now and then."""
    chance = random.Random(seed)
    acknowledged: list[Acknowledged] = []
    boundaries = {0}
    with PowerCutDisk() as disk:
        store = store_class(folder)
        for _ in range(60):
            append_batch(store, chance.randrange(1, 12))
            acknowledged.append(Acknowledged(len(disk.log), store.last_sequence))
            boundaries.add(store.last_sequence)
        # What closing would write and sync is no part of it: the power is cut before.
        log = list(disk.log)
        store.close()
    return Recording(log, acknowledged, boundaries)


def lost_after_cut(recording: Recording, history: DiskHistory, cut: int, folder: Path, chance: random.Random) -> str:
    """Reopens what the cut left; what is wrong with it, or nothing."""
    history.advance(cut)
    folder.mkdir()
    history.survivors(folder, chance, chance.choice((0.0, 0.5, 1.0)))
    promised = max((ack.sequence for ack in recording.acknowledged if ack.operations <= cut), default=0)
    try:
        store = SqliteStore(folder)
    except StorageFailed as failure:
        return f"cut {cut}: {failure}" if promised else ""
    try:
        records = store.read(after_sequence=0, limit=1_000_000)
        payload = store.payload(digest_of(payload_of(promised)))
    except StorageFailed as failure:
        return f"cut {cut}: {failure}"
    finally:
        store.close()
    if len(records) < promised:
        return f"cut {cut}: {promised} were acknowledged, {len(records)} are left"
    if promised and payload != payload_of(promised):
        return f"cut {cut}: the payload of acknowledged record {promised} is lost"
    if len(records) not in recording.boundaries:
        return f"cut {cut}: half a batch is left, up to {len(records)}"
    return ""


def first_loss(recording: Recording, folder: Path, cuts: int, seed: int) -> str:
    """Cuts the power at moments spread over the whole recording; the first thing that went wrong, or nothing."""
    chance = random.Random(seed)
    history = DiskHistory(recording.log)
    moments = sorted(chance.choices(range(len(recording.log) + 1), k=cuts))
    for number, cut in enumerate(moments):
        if wrong := lost_after_cut(recording, history, cut, folder / f"cut-{number}", chance):
            return f"{wrong} (seed {seed})"
    return ""


@pytest.fixture
def small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that cuts fall into checkpoints too."""
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAGES_MAX", 40)


@pytest.mark.usefixtures("small_checkpoints")
def test_acknowledged_batches_survive_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    recording = record(tmp_path / "state", SqliteStore, seed=1)
    kinds = {(operation.kind, Path(operation.path).suffix) for operation in recording.log}
    assert ("sync", ".db") in kinds, "no checkpoint happened: the test would not cover one"
    assert first_loss(recording, tmp_path, CUTS, seed=1) == ""


class MovedBeside(SqliteStore):
    """Waits after each batch until the checkpoint beside it, if one is due, has at least begun."""

    def append(self, **batch: Any) -> None:
        super().append(**batch)
        while self._checkpoints._due.is_set():
            time.sleep(0.000_1)


def test_acknowledged_batches_survive_a_power_cut_while_the_log_is_moved_beside_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_PAGES", 10)
    recording = record(tmp_path / "state", MovedBeside, seed=9)
    assert sum(one.kind == "sync" and one.path.endswith(".db") for one in recording.log) > 5
    assert first_loss(recording, tmp_path, CUTS, seed=9) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("small_checkpoints")
@pytest.mark.parametrize("seed", range(2, 8))
def test_acknowledged_batches_survive_many_power_cuts(tmp_path: Path, seed: int) -> None:
    recording = record(tmp_path / "state", SqliteStore, seed)
    assert first_loss(recording, tmp_path, CUTS_SLOW, seed) == ""


class NeverSyncs(SqliteStore):
    """Planted bug: `synchronous=OFF`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._writer.execute("PRAGMA synchronous = OFF")


class SyncsAtCheckpoints(SqliteStore):
    """Planted bug: `synchronous=NORMAL`, which loses the last commits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._writer.execute("PRAGMA synchronous = NORMAL")


class EarlyReply(SqliteStore):
    """Planted bug: `append` returns before its transaction is committed."""

    _kept: Any = None

    def _commit(self, *arguments: Any) -> None:
        kept, self._kept = self._kept, arguments
        if kept is not None:
            super()._commit(*kept)


@pytest.mark.usefixtures("small_checkpoints")
@pytest.mark.parametrize("broken", [NeverSyncs, SyncsAtCheckpoints, EarlyReply])
def test_store_that_loses_acknowledged_batches_is_found_out(tmp_path: Path, broken: type[SqliteStore]) -> None:
    recording = record(tmp_path / "state", broken, seed=1)
    assert "acknowledged" in first_loss(recording, tmp_path, 100, seed=1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("write", SQLITE_FULL), "the disk is full; free space"),
        (Fault("sync", SQLITE_IOERR_FSYNC), "the disk reports an error"),
    ],
    ids=["disk full", "sync failed"],
)
def test_failing_disk_ends_the_writer_with_words_and_keeps_what_was_acknowledged(
    tmp_path: Path, fault: Fault, words: str
) -> None:
    with PowerCutDisk() as disk:
        store = SqliteStore(tmp_path)
        append_batch(store, 5)
        disk.fault = fault
        with pytest.raises(StorageFailed, match=words):
            append_batch(store, 3)
        disk.fault = None
        with pytest.raises(StorageFailed, match=words):
            append_batch(store, 3)
    store.close()
    again = SqliteStore(tmp_path)
    assert len(again.read(after_sequence=0, limit=100)) in {5, 8}, "all of a failed batch or nothing of it"
    assert again.payload(digest_of(payload_of(5))) == payload_of(5)
    again.close()


@pytest.mark.processes
def test_acknowledged_batches_survive_kill_9(tmp_path: Path) -> None:
    chance = random.Random(7)
    promised = 0
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "appending_writer.py"), str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        with writer.stdout as told:
            for _ in range(chance.randrange(1, ACKNOWLEDGED_BEFORE_KILL)):
                promised = int(told.readline())
            writer.send_signal(signal.SIGKILL)
            promised = max(
                [promised, *(int(line) for line in told.read().splitlines(keepends=True) if line.endswith(b"\n"))]
            )
            writer.wait()
        store = SqliteStore(tmp_path)
        records = store.read(after_sequence=0, limit=1_000_000)
        assert len(records) >= promised
        assert [record.event for record in records] == [
            AccountCreated(AccountId(f"account-{number}"), "x" * 100) for number in range(1, len(records) + 1)
        ]
        store.close()


class _Always(random.Random):
    """Keeps every write whole."""

    def random(self) -> float:
        return 0.75


def test_recorded_disk_is_the_disk(tmp_path: Path) -> None:
    """The whole log, every write kept, gives the very bytes that lie in the folder."""
    copy = tmp_path / "copy"
    copy.mkdir()
    with PowerCutDisk() as disk:
        store = SqliteStore(tmp_path / "state")
        for size in range(1, 20):
            append_batch(store, size)
        history = DiskHistory(disk.log)
        history.advance(len(disk.log))
        history.survivors(copy, _Always(), 1.0)
        for name in ("journal.db", "journal.db-wal"):
            assert (copy / name).read_bytes() == (tmp_path / "state" / name).read_bytes(), name
        store.close()
