"""Uploads under way: files that grow at their end, one for each blob and account, until they are whole.

Everything here blocks; the service calls it in threads.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, digest_of
from fallow.limits import MIB
from fallow.session import BlobReference
from fallow_coordinator.blobs.storage import Buffer, translated

SUFFIX: Final = ".part"
_SYNC_EVERY_BYTES: Final = 16 * MIB
"""Written back while more is coming, so that the last sync is short."""
_REHASH_BYTES: Final = 4 * MIB


class UnfinishedError(FallowError):
    """An upload that is not whole, with nothing wrong in what came: it stays, to be resumed."""


class PartialUpload:
    """One growing file and the running digest of what is in it. Calls must not overlap."""

    def __init__(self, path: Path, blob: BlobReference, syncer: Executor) -> None:
        """Call `open` next."""
        self.path = path
        self.blob = blob
        self.offset_bytes = 0
        """How much has come and been written."""
        self._digest = hashlib.sha256()
        self._descriptor = -1
        self._syncer = syncer
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0

    @property
    def remaining_bytes(self) -> int:
        """How much is still to come."""
        return self.blob.length_bytes - self.offset_bytes

    def open(self, offset_bytes: int) -> None:
        """Goes on at an offset, or starts over at 0. Raises OFFSET_MISMATCH when the file does not end there."""
        with translated():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if offset_bytes == 0 else 0)
            self._descriptor = os.open(self.path, flags, 0o600)
        stored = os.fstat(self._descriptor).st_size
        if stored != offset_bytes:
            self.close()
            raise UnfinishedError(
                Reason.OFFSET_MISMATCH,
                f"this upload stands at {stored} bytes, not at {offset_bytes}",
                field="offset_bytes",
                limit=f"{stored}, or 0 to start over",
            )
        while self.offset_bytes < offset_bytes:
            piece = os.pread(self._descriptor, min(_REHASH_BYTES, offset_bytes - self.offset_bytes), self.offset_bytes)
            if not piece:
                break
            self._digest.update(piece)
            self.offset_bytes += len(piece)
        assert self.offset_bytes == offset_bytes, "nobody else shortens this file"

    def append(self, chunk: Buffer) -> None:
        """Writes and digests one chunk. Raises STORAGE_FULL."""
        view = memoryview(chunk)
        assert view.nbytes <= self.remaining_bytes, "the caller bounds the length"
        self._digest.update(view)
        while view:
            with translated():
                written = os.pwrite(self._descriptor, view, self.offset_bytes)
            self.offset_bytes += written
            self._unsynced_bytes += written
            view = view[written:]
        if self._unsynced_bytes >= _SYNC_EVERY_BYTES and (self._syncing is None or self._syncing.done()):
            self._unsynced_bytes = 0
            self._syncing = self._syncer.submit(os.fdatasync, self._descriptor)

    def finish(self) -> None:
        """Makes the whole file durable. Raises DIGEST_MISMATCH when it is not what was declared."""
        assert self.offset_bytes == self.blob.length_bytes, "only whole uploads are finished"
        if self._digest.digest() != self.blob.digest:
            raise FallowError(
                Reason.DIGEST_MISMATCH,
                f"the uploaded bytes have digest {self._digest.hexdigest()}",
                field="chunk",
                limit=f"digest {self.blob.digest.hex()}, as the grant says",
            )
        self._wait_for_sync()
        with translated():
            os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Lets go of the file, which stays; again is fine."""
        if self._descriptor >= 0:
            self._wait_for_sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Lets go of the file and removes it."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            with translated():
                syncing.result()


class PartialUploads:
    """The folder of growing files."""

    def __init__(self, folder: Path, syncer: Executor) -> None:
        """Uses `folder`, which exists. `syncer` writes files back in the background."""
        self._folder = folder
        self._syncer = syncer

    def upload(self, blob: BlobReference, account_id: AccountId) -> PartialUpload:
        """The upload of one blob by one account, not yet opened. Two accounts never share a file."""
        return PartialUpload(self._path(blob.digest, account_id), blob, self._syncer)

    def offset_bytes(self, blob: BlobReference, account_id: AccountId) -> int:
        """How far an upload is; 0 when nothing is here."""
        try:
            return self._path(blob.digest, account_id).stat().st_size
        except FileNotFoundError:
            return 0

    def remove_older_than(self, age_ms: int) -> int:
        """Removes files that nobody wrote to for so long; how many."""
        oldest = time.time() - age_ms / 1000
        removed = 0
        for path in self._folder.iterdir():
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def _path(self, digest: Digest, account_id: AccountId) -> Path:
        return self._folder / f"{digest.hex()}-{account_name(account_id)}{SUFFIX}"


def account_name(account_id: AccountId) -> str:
    """An account as part of a file name, whatever characters its identifier has."""
    return digest_of(account_id.encode()).hex()[:32]
