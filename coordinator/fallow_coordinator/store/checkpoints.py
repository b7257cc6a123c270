"""Moves the write-ahead log into the database file beside the writer, so that no commit has to wait for it."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

CHECKPOINT_PAGES: Final = 4_000
"""Pages (4 KiB) in the write-ahead log after which they are moved: 16 MB."""
RECORDS_PER_PAGE: Final = 12
"""About as many records go into a page; payloads, whose digests lie anywhere, take one each and more."""


class Checkpoints:
    """A thread that runs passive checkpoints, which hold up neither writer nor readers. The writer never waits for it.

    What a checkpoint does is a copy: durability is the log's. If it fails or falls behind, the writer's own checkpoint
    does the rest at its threshold.
    """

    def __init__(self, path: Path) -> None:
        """Of the database at `path`; nothing runs before the first is due."""
        self._path = path
        self._pages = 0
        self._due = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def note(self, *, records: int, payloads: int) -> None:
        """So much was committed."""
        self._pages += records // RECORDS_PER_PAGE + 2 * payloads + 1
        if self._pages < CHECKPOINT_PAGES:
            return
        self._pages = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="journal-checkpoints", daemon=True)
            self._thread.start()
        self._due.set()

    def close(self) -> None:
        """Ends the thread, after the checkpoint that it is at."""
        self._stopping = True
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            connection = sqlite3.connect(self._path, isolation_level=None)
            # The log is synced before any page of it goes into the file.
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            logger.warning("journal.checkpoints_off error=%s", error)
            return
        try:
            while True:
                self._due.wait()
                self._due.clear()
                if self._stopping:
                    return
                try:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                except sqlite3.Error as error:
                    # The writer meets the same trouble at its next commit, and says it in words.
                    logger.warning("journal.checkpoint_failed error=%s", error)
        finally:
            connection.close()
