"""A process of its own that tails the journal and keeps the SQL views.

`python -m fallow_coordinator.follower --state DIR`. It reads what is committed and never writes to the journal. It
holds the whole state, folded as the writer folds it, and writes a row for whatever changed, each record exactly once.
The writer never waits for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
from pathlib import Path

from fallow.shown_text import log_to_stderr
from fallow_coordinator.config import EXIT_STORAGE_FAILED, FollowerSettings
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader, StoredRecord, decode_records
from fallow_coordinator.store.projection import Projection
from fallow_coordinator.store.view_file import ViewFile

logger = logging.getLogger(__name__)


class Follower:
    """One tail of one journal."""

    def __init__(self, folder: Path, settings: FollowerSettings | None = None) -> None:
        """Takes up where the views in `folder` stand; views of another journal are made anew. Raises StorageFailed."""
        self._settings = settings or FollowerSettings()
        self._journal = JournalReader(folder / JOURNAL_FILE)
        self._views = ViewFile(folder)
        self._projection = Projection()
        self._version = -1
        self._sequence = 0
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
            self._sequence = stored[-1].sequence
        return len(stored)

    def catch_up(self) -> int:
        """Steps until nothing is left; gives how many records."""
        total = 0
        while count := self.step():
            total += count
        return total

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
        while self._sequence < applied:
            stored = self._chunk(self._sequence, applied)
            for record in decode_records(stored, self._sequence, self._journal.path):
                self._projection.pass_over(record)
            self._sequence = stored[-1].sequence
        logger.info("follower.resumed sequence=%d", self._sequence)


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
    options = parser.parse_args(arguments)
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = FollowerSettings()
    waker = _Waker()
    try:
        while not waker.is_ending() and not (options.state / JOURNAL_FILE).exists():
            waker.wait(settings.idle_poll_ms)
        if waker.is_ending():
            return 0
        follower = Follower(options.state, settings)
        while not waker.is_ending():
            count = follower.step()
            if count < settings.chunk_records:
                waker.wait(settings.busy_poll_ms if count else settings.idle_poll_ms)
        follower.close()
    except StorageFailed as failure:
        logger.critical("follower.ended exit_code=%d reason=%s", EXIT_STORAGE_FAILED, failure)
        return EXIT_STORAGE_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
