"""What SQLite complains about, in words a person can act on."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fallow_coordinator.ports import StorageFailed

_PRIMARY_CODE_MASK = 0xFF

_WORDS: dict[int, str] = {
    sqlite3.SQLITE_FULL: "the disk is full; free space there and start again",
    sqlite3.SQLITE_READONLY: "it may only be read; give this user write permission to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened; check that the folder exists and belongs to this user",
    sqlite3.SQLITE_PERM: "permission denied; give this user read and write permission",
    sqlite3.SQLITE_BUSY: "another process keeps writing to it; end the other coordinator and start again",
    sqlite3.SQLITE_LOCKED: "another process keeps writing to it; end the other coordinator and start again",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; run `fallow-coordinator check`, or restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the file is no database; name another state folder, or restore it from a backup",
    sqlite3.SQLITE_IOERR: "the disk reports an error; look into the kernel's log before you start again",
}


@contextmanager
def storage_failures(path: Path) -> Generator[None]:
    """Turns errors of SQLite and of the file system about `path` into StorageFailed."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(f"{path}: {_words(error)} ({_name(error)}: {error})") from error
    except OSError as error:
        words = _WORDS[sqlite3.SQLITE_FULL] if error.errno in {errno.ENOSPC, errno.EDQUOT} else str(error)
        raise StorageFailed(f"{path}: {words}") from error


def _words(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return _WORDS.get(code & _PRIMARY_CODE_MASK, "the database refused")


def _name(error: sqlite3.Error) -> str:
    return str(getattr(error, "sqlite_errorname", type(error).__name__))
