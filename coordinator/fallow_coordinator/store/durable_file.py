"""Files that appear whole and stay: written beside their place, synced, renamed into it, and the folder synced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from fallow_coordinator.store.failures import storage_failures

_UNFINISHED = ".unfinished"


def write_durably(path: Path, pieces: Iterable[bytes]) -> int:
    """Makes `path` hold `pieces`, surely on disk when this returns; gives the bytes. Raises StorageFailed.

    A crash at any moment leaves the old file, or none, or the new one; and perhaps an unfinished one beside it.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    length = 0
    with storage_failures(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                    length += len(piece)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    return length


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes what a crash in the middle of a writing left in `folder`."""
    with storage_failures(folder):
        for path in folder.glob(f"*{_UNFINISHED}"):
            path.unlink(missing_ok=True)
