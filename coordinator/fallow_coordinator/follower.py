"""A process of its own that tails the journal: it keeps the SQL views, writes snapshots and seals segments.

`python -m fallow_coordinator.follower --state DIR [--key FILE]`. It reads what is committed and never writes to the
journal. It holds the whole state, folded as the writer folds it, and writes a row for whatever changed, each record
exactly once. Now and then it writes that state down, so that a start need not fold everything; and with the
coordinator's key it seals what lies behind the newest snapshot, so that the writer may let go of it. The writer never
waits for it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from fallow.checkpoint import Sign, signer_of
from fallow.identity import PrivateKey
from fallow.shown_text import log_to_stderr
from fallow_coordinator.config import COLLECTOR_THRESHOLDS, EXIT_STORAGE_FAILED, FollowerSettings
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.journal_nodes import run_start
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader, StoredRecord, decode_records
from fallow_coordinator.store.projection import Projection
from fallow_coordinator.store.sealed_segments import Sealing, SegmentShelf
from fallow_coordinator.store.snapshots import SnapshotHeader, SnapshotShelf, state_version
from fallow_coordinator.store.view_file import ViewFile

logger = logging.getLogger(__name__)

SNAPSHOT_SHARE: Final = 0.05
"""Part of the follower's time that snapshots take at most."""
SNAPSHOT_SHARE_LATE: Final = 0.2
"""The same, once the newest is `snapshot_records_late` old."""


class Follower:
    """One tail of one journal."""

    def __init__(self, folder: Path, settings: FollowerSettings | None = None, sign: Sign | None = None) -> None:
        """Takes up where the views in `folder` stand; views of another journal are made anew. Raises StorageFailed.

        `sign` signs checkpoints; None: nothing is sealed.
        """
        self._settings = settings or FollowerSettings()
        self._folder = folder
        self._sign = sign
        # Asked for at once: the files on disk are still those that this process runs.
        self._software = state_version()
        self._journal = JournalReader(folder / JOURNAL_FILE)
        self._views = ViewFile(folder)
        self._projection = Projection()
        self._version = -1
        self._sequence = 0
        self._newest: StoredRecord | None = None
        self._snapshots = SnapshotShelf(folder)
        self._snapshot_sequence = 0
        self._snapshot_tried_s = time.monotonic()
        self._snapshot_took_s = 0.0
        self._sealing: Sealing | None = None
        self._sealing_failed = False
        self._resume()

    @property
    def applied_sequence(self) -> int:
        """Sequence of the newest record that the views show."""
        return self._sequence

    def step(self) -> int:
        """Puts the next chunk of records into the views; gives how many. Raises StorageFailed."""
        version = self._journal.data_version()
        if version == self._version:
            return 0
        stored = self._chunk(self._sequence)
        if len(stored) < self._settings.chunk_records:
            self._version = version
        if stored:
            for record in decode_records(stored, self._sequence, self._journal.path):
                self._projection.fold(record)
            self._views.apply(self._projection.take_changes(), sequence=stored[-1].sequence, leaf=stored[-1].leaf)
            self._sequence, self._newest = stored[-1].sequence, stored[-1]
            sealing = self._sealing
            if sealing is not None and sealing.next_sequence == stored[0].sequence and len(stored) <= sealing.room:
                # They were read and compared just now: sealing need not do it again.
                sealing.add(stored, checked=True)
        return len(stored)

    def catch_up(self) -> int:
        """Steps until nothing is left; gives how many records."""
        total = 0
        while count := self.step():
            total += count
        return total

    # ----------------------------------------------------------------------------------------- snapshots, segments

    @property
    def snapshot_sequence(self) -> int:
        """Where the newest snapshot stands that this process knows to be good; 0: there is none."""
        return self._snapshot_sequence

    def snapshot_is_due(self) -> bool:
        """Whether the newest snapshot is old enough for the next.

        Under load it is by the time that writing it takes, up to the number of records that a start may have to fold.
        """
        behind, settings = self._sequence - self._snapshot_sequence, self._settings
        waited_ms = (time.monotonic() - self._snapshot_tried_s) * 1_000
        if behind >= settings.snapshot_records:
            share = SNAPSHOT_SHARE_LATE if behind >= settings.snapshot_records_late else SNAPSHOT_SHARE
            rest_ms = self._snapshot_took_s * 1_000 * (1 / share - 1)
            return waited_ms >= max(settings.snapshot_rest_ms, rest_ms)
        return behind > 0 and waited_ms >= settings.snapshot_ms

    def write_snapshot(self) -> bool:
        """Writes the state as it is folded now; gives whether that worked. A full disk is told in the log."""
        newest, state = self._newest, self._projection.state
        if newest is None or newest.sequence == self._snapshot_sequence:
            return False
        began = self._snapshot_tried_s = time.monotonic()
        header = SnapshotHeader(
            state.journal_id, newest.sequence, newest.at_ms, newest.leaf, newest.epoch, self._software
        )
        try:
            length = self._snapshots.save(header, state)
        except StorageFailed as failure:
            logger.error("snapshot.failed sequence=%d reason=%s", newest.sequence, failure)
            return False
        self._snapshot_sequence = newest.sequence
        self._sealing_failed = False
        self._snapshot_took_s = time.monotonic() - began
        logger.info("snapshot.written sequence=%d bytes=%d took_s=%.2f", newest.sequence, length, self._snapshot_took_s)
        return True

    def seal_step(self) -> bool:
        """Does a piece of the sealing of records behind the newest snapshot; gives whether there may be more now."""
        if self._sign is None or self._sealing_failed:
            return False
        try:
            return self._seal_chunk(self._sign)
        except StorageFailed as failure:
            # The records stay in the database, which grows: tried again after the next snapshot.
            logger.error("segment.failed reason=%s", failure)
            self._sealing, self._sealing_failed = None, True
            return False

    def _seal_chunk(self, sign: Sign) -> bool:
        sealing = self._sealing
        if sealing is None:
            if not self._snapshot_sequence:
                return False
            journal_id = self._projection.state.journal_id
            shelf = SegmentShelf(self._folder)
            sealing = self._sealing = Sealing(shelf, journal_id, sign, self._settings.segment_records)
            if sealing.sealed_through and self._journal.leaf(sealing.sealed_through) != sealing.last_leaf:
                raise StorageFailed(
                    f"{self._journal.path} does not hold what was sealed up to record {sealing.sealed_through}; "
                    "restore journal and segments from one backup"
                )
        if 0 < sealing.full_through <= self._snapshot_sequence:
            written = sealing.finish(time.time_ns() // 1_000_000)
            assert written is not None, "a full segment is written"
            logger.info("segment.sealed first=%d last=%d", written.first, written.last)
            return True
        # What `step` could not hand over: records from before this process, and those for which there was no room.
        wanted = min(self._settings.chunk_records, self._sequence - sealing.next_sequence + 1, sealing.room)
        if wanted <= 0:
            return False
        sealing.add(self._journal.stored(after_sequence=sealing.next_sequence - 1, limit=wanted))
        return True

    def close(self) -> None:
        """Gives both files back."""
        self._views.close()
        self._journal.close()

    def _chunk(self, after_sequence: int, until_sequence: int | None = None) -> list[StoredRecord]:
        limit = self._settings.chunk_records
        if until_sequence is not None:
            limit = min(limit, until_sequence - after_sequence)
        return self._journal.stored(after_sequence=after_sequence, limit=limit)

    def _resume(self) -> None:
        applied, leaf = self._views.applied_sequence, self._views.applied_leaf
        if applied:
            newest = self._journal.stored(after_sequence=applied - 1, limit=1)
            if not newest or newest[0].leaf != leaf:
                logger.warning("follower.rebuilding reason=views_of_another_journal applied_sequence=%d", applied)
                self._views.empty()
                applied = 0
        if found := self._snapshots.newest(self._journal.leaf, until_sequence=applied):
            header, state = found
            begin = run_start(header.sequence)
            run = self._journal.stretch(after_sequence=begin, limit=header.sequence - begin)
            leaves = [record.leaf for record in run]
            self._projection = Projection(state, leaves)
            self._sequence = self._snapshot_sequence = header.sequence
        while self._sequence < applied:
            stored = self._chunk(self._sequence, applied)
            for record in decode_records(stored, self._sequence, self._journal.path):
                self._projection.pass_over(record)
            self._sequence, self._newest = stored[-1].sequence, stored[-1]
        logger.info("follower.resumed sequence=%d snapshot=%d", self._sequence, self._snapshot_sequence)


class _Waker:
    """Waits for a while, or for a signal to end."""

    def __init__(self) -> None:
        self._ending = False
        self._read, self._write = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def is_ending(self) -> bool:
        """Whether the process shall end."""
        return self._ending

    def _end(self, *_: object) -> None:
        self._ending = True
        os.write(self._write, b"!")

    def wait(self, timeout_ms: int) -> None:
        """Returns after `timeout_ms`, and at once when the process shall end."""
        select.select([self._read], [], [], timeout_ms / 1_000)


def main(arguments: list[str] | None = None) -> int:
    """Follows until SIGTERM; gives the exit code."""
    parser = argparse.ArgumentParser(prog="fallow_coordinator.follower", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="the folder of the journal")
    parser.add_argument("--key", type=Path, help="the coordinator's key: segments are sealed under its signature")
    defaults = FollowerSettings()
    for name in ("snapshot_records", "snapshot_records_late", "snapshot_ms", "snapshot_rest_ms", "segment_records"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    options = parser.parse_args(arguments)
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = replace(
        defaults,
        snapshot_records=options.snapshot_records,
        snapshot_records_late=options.snapshot_records_late,
        snapshot_ms=options.snapshot_ms,
        snapshot_rest_ms=options.snapshot_rest_ms,
        segment_records=options.segment_records,
    )
    # Whoever works for somebody who waits goes first: the writer, and those who submit.
    os.nice(settings.niceness)
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    waker = _Waker()
    try:
        while not waker.is_ending() and not (options.state / JOURNAL_FILE).exists():
            waker.wait(settings.idle_poll_ms)
        if waker.is_ending():
            return 0
        sign = signer_of(PrivateKey.load(options.key)) if options.key is not None else None
        follower = Follower(options.state, settings, sign)
        # What was read stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        while not waker.is_ending():
            count = follower.step()
            if follower.snapshot_is_due():
                follower.write_snapshot()
            if count >= settings.chunk_records:
                # Sealing waits until the views have caught up.
                continue
            if not follower.seal_step():
                waker.wait(settings.poll_ms(count))
        # The next start folds what comes after this one, which is next to nothing.
        follower.catch_up()
        follower.write_snapshot()
        follower.close()
    except StorageFailed as failure:
        logger.critical("follower.ended exit_code=%d reason=%s", EXIT_STORAGE_FAILED, failure)
        return EXIT_STORAGE_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
