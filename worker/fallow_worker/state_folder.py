"""A worker's folder: who it is, one daemon at a time, what it caches, and how it fares."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final

from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX
from fallow.errors import FallowError, Reason

STATE_VARIABLE: Final = "FALLOW_WORKER_STATE"
CREDENTIAL_FILES: Final = ("certificate.pem", "identity.json", "authority.pem", "key.pem")
_LOCK_POLL_S: Final = 0.1

Status = Mapping[str, object]


def default_state_folder() -> Path:
    """`$FALLOW_WORKER_STATE`, else `$XDG_STATE_HOME/fallow/worker`, else `~/.local/state/fallow/worker`."""
    named = os.environ.get(STATE_VARIABLE)
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "fallow" / "worker"


class StateFolder:
    """Paths below one folder, for its owner alone."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder when missing, mode 0700."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def credentials(self) -> Path:
        """Key, certificate and authority lie in the folder itself."""
        return self.folder

    def forget_credentials(self) -> None:
        """Removes key and certificates."""
        for name in CREDENTIAL_FILES:
            (self.credentials / name).unlink(missing_ok=True)

    @property
    def join_line(self) -> Path:
        """The line that this worker joined with, or will join with at its first start: an image keeps it (0600)."""
        return self.folder / "join_line"

    def prepare_image(self) -> None:
        """Takes away key, identity and what belongs to one machine alone; the join line and cached bundles stay."""
        self.forget_credentials()
        for path in (self.resume_token, self._status, self.tuning):
            path.unlink(missing_ok=True)

    @property
    def resume_token(self) -> Path:
        """The token of the last session."""
        return self.folder / "resume_token"

    @property
    def tuning(self) -> Path:
        """How bundles run best on this machine."""
        return self.folder / "tuning.json"

    @property
    def cache(self) -> Path:
        """Bundle files."""
        return self.folder / "cache"

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @property
    def _ask(self) -> Path:
        return self.folder / "ask"

    @property
    def _status(self) -> Path:
        return self.folder / "status.json"

    @contextlib.contextmanager
    def locked(self, *, wait_s: float = 0.0) -> Generator[None]:
        """Alone in the folder while the block runs; waits up to `wait_s` for a daemon that is about to end.

        Raises FIELD_INVALID, naming the other process.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + wait_s
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise FallowError(
                        Reason.FIELD_INVALID,
                        f"another worker (process {_read_pid(descriptor)}) already runs on {self.folder}",
                        field="--state",
                        hint="stop that one, or give this one a folder of its own",
                    )
                time.sleep(_LOCK_POLL_S)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def running_pid(self) -> int | None:
        """The process that holds the folder; None when none does."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return None if _try_lock(descriptor) else _read_pid(descriptor)
        finally:
            os.close(descriptor)

    def read_ask(self) -> int:
        """What the owner asks for a unit, in micro-credits; 0 when nothing, or nothing readable, was said."""
        try:
            text = self._ask.read_text().strip()
        except OSError:
            return 0
        # A file that somebody damaged must not make a machine dearer than anything, nor stop it.
        return int(text) if text.isdecimal() and int(text[:20]) <= ASK_MICROCREDITS_PER_UNIT_MAX else 0

    def write_ask(self, microcredits_per_unit: int) -> None:
        """Remembers what the owner asks; a running worker takes it up at its next look."""
        temporary = self.folder / f".ask.{os.getpid()}.new"
        temporary.write_text(f"{microcredits_per_unit}\n")
        temporary.replace(self._ask)

    def write_status(self, status: Status) -> None:
        """Leaves word for `fallow-worker status`: whole or not at all, not worth an fsync."""
        temporary = self.folder / f".status.{os.getpid()}.new"
        temporary.write_text(json.dumps(status))
        temporary.replace(self._status)

    def read_status(self) -> Status:
        """The last word; empty when there is none."""
        try:
            return dict(json.loads(self._status.read_text()))
        except (OSError, ValueError):
            return {}


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(descriptor: int) -> int:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else 0
