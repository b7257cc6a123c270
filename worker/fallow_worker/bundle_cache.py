"""Bundles on this machine's disk: files by content, checked while they are fetched, the longest unused ones dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import Final, Protocol

from fallow.bundle import BundleFile
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, digest_of
from fallow.limits import GIB, MIB
from fallow.session import BlobReference, BundleOffer, SignedBytes
from fallow.wire.bundle import decode_manifest
from fallow_worker.full_disk import told_when_full
from fallow_worker.ports import LoadedBundle

_log = logging.getLogger(__name__)

CACHE_BYTES_MAX_DEFAULT: Final = 20 * GIB
DISK_BYTES_SPARE: Final = 256 * MIB
"""Left free on the disk: a volunteer's machine must not fill up."""


_INCOMING: Final = "incoming"


class BlobReader(Protocol):
    """Reads blobs under grants."""

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        """Brings a blob into a file that appears whole, its digest checked, or not at all.

        Raises FallowError (GRANT_EXPIRED, BLOB_UNKNOWN, DIGEST_MISMATCH, COORDINATOR_UNREACHABLE, …) and OSError.
        """
        ...


class BundleCache:
    """Content-addressed files below one folder. Used from one event loop."""

    def __init__(self, folder: Path, *, bytes_max: int = CACHE_BYTES_MAX_DEFAULT) -> None:
        """Keeps up to `bytes_max` in `folder`, made when missing; what an earlier worker left is taken over."""
        self._folder = folder
        self._bytes_max = bytes_max
        self._kept: dict[Digest, int] = {}
        """Length of every complete file in bytes, the longest unused first."""
        self._holders: dict[LeaseId, tuple[Digest, ...]] = {}
        self._held: Counter[Digest] = Counter()
        self._fetching: dict[Digest, asyncio.Lock] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_over()

    @property
    def bytes_kept(self) -> int:
        """Bytes of complete files."""
        return sum(self._kept.values())

    async def bundle(self, offer: BundleOffer, blobs: BlobReader, holder: LeaseId) -> LoadedBundle:
        """The offered bundle, every file of it here and checked, and kept until `release(holder)`.

        Raises DIGEST_MISMATCH, BUNDLE_INVALID, LIMIT_EXCEEDED (too large for this cache), STORAGE_FULL and whatever the
        reader raises.
        """
        if digest_of(offer.manifest) != offer.bundle_digest:
            raise FallowError(Reason.DIGEST_MISMATCH, "the manifest is not the one that the lease names")
        manifest = decode_manifest(offer.manifest)
        if len(manifest.files) != len(offer.file_grants):
            raise FallowError(
                Reason.BUNDLE_INVALID, f"{len(offer.file_grants)} grants for {len(manifest.files)} files of the bundle"
            )
        self._check_size(manifest.files)
        self._hold(holder, tuple(file.digest for file in manifest.files))
        try:
            for file, grant in zip(manifest.files, offer.file_grants, strict=True):
                await self._present(file, grant, blobs)
        except BaseException:
            self.release(holder)
            raise
        return LoadedBundle(
            bundle_digest=offer.bundle_digest,
            manifest=offer.manifest,
            files={file.name: str(self._path(file.digest)) for file in manifest.files},
            canonical_batch_rows=offer.canonical_batch_rows,
            slot_dependent=offer.slot_dependent,
            memory_bytes_peak=offer.memory_bytes_peak,
        )

    def release(self, holder: LeaseId) -> None:
        """The holder needs its files no more; holding nothing is fine."""
        for digest in self._holders.pop(holder, ()):
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    # ------------------------------------------------------------------------------------------- for others

    def found(self, blob: BlobReference) -> Path | None:
        """The blob's file, which becomes the last one used; None when it is not here."""
        return self._path(blob.digest) if self._used(blob.digest, blob.length_bytes) else None

    def make_room_for(self, blob: BlobReference) -> None:
        """Drops what was not used for longest until the blob fits. Raises STORAGE_FULL: nothing in use is dropped."""
        if blob.length_bytes <= self._bytes_max:
            self._make_room(blob.length_bytes)
        if self.bytes_kept + blob.length_bytes > self._bytes_max:
            raise FallowError(
                Reason.STORAGE_FULL,
                f"the cache has no room for {blob.length_bytes} bytes more",
                limit=f"{self._bytes_max} bytes",
            )

    def incoming_path(self) -> Path:
        """A path for a blob that somebody leaves here; what an earlier worker did not finish goes at its start."""
        incoming = self._folder / _INCOMING
        incoming.mkdir(mode=0o700, exist_ok=True)
        return incoming / secrets.token_hex(16)

    def keep(self, blob: BlobReference, path: Path) -> None:
        """Takes over a file whose digest was checked. Raises STORAGE_FULL, OSError."""
        self.make_room_for(blob)
        place = self._path(blob.digest)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        path.replace(place)
        self._kept[blob.digest] = blob.length_bytes
        _log.info("cache.left file=%s bytes=%d", blob.digest.hex()[:16], blob.length_bytes)

    # ------------------------------------------------------------------------------------------- fetching

    async def _present(self, file: BundleFile, grant: SignedBytes, blobs: BlobReader) -> None:
        lock = self._fetching.setdefault(file.digest, asyncio.Lock())
        try:
            async with lock:
                if not self._used(file.digest, file.length_bytes):
                    await self._fetch(file, grant, blobs)
        finally:
            if not lock.locked():
                self._fetching.pop(file.digest, None)

    def _used(self, digest: Digest, length_bytes: int) -> bool:
        """Whether the file is here; if so it becomes the last one used."""
        kept = self._kept.pop(digest, None)
        if kept is None:
            return False
        path = self._path(digest)
        try:
            if path.stat().st_size != length_bytes:
                raise FileNotFoundError
            os.utime(path)
        except FileNotFoundError:
            _log.warning("cache.file_gone file=%s", path)
            return False
        self._kept[digest] = kept
        return True

    async def _fetch(self, file: BundleFile, grant: SignedBytes, blobs: BlobReader) -> None:
        self._make_room(file.length_bytes)
        path = self._path(file.digest)
        with told_when_full(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            await blobs.get_to_file(grant, BlobReference(file.digest, file.length_bytes), path)
        self._kept[file.digest] = file.length_bytes
        _log.info("cache.fetched file=%s bytes=%d", file.digest.hex()[:16], file.length_bytes)

    # ------------------------------------------------------------------------------------------- keeping

    def _take_over(self) -> None:
        for path in self._folder.glob(f"{_INCOMING}/*"):
            path.unlink(missing_ok=True)
        found: list[tuple[float, Digest, int]] = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(ValueError, OSError):
                status = path.stat()
                found.append((status.st_mtime, Digest(bytes.fromhex(path.name)), status.st_size))
        for _, digest, length_bytes in sorted(found):
            self._kept[digest] = length_bytes

    def _hold(self, holder: LeaseId, digests: tuple[Digest, ...]) -> None:
        self.release(holder)
        self._holders[holder] = digests
        self._held.update(digests)

    def _check_size(self, files: tuple[BundleFile, ...]) -> None:
        needed = sum(file.length_bytes for file in files)
        if needed > self._bytes_max:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"the bundle has {needed} bytes",
                field="bundle.files",
                limit=f"{self._bytes_max} bytes in this worker's cache",
                hint="start the worker with a larger --cache-gib",
            )

    def _make_room(self, length_bytes: int) -> None:
        """Drops unheld files, the longest unused first, until `length_bytes` more fit under both limits."""
        for digest in tuple(self._kept):
            if self.bytes_kept + length_bytes <= self._bytes_max and self._disk_bytes_free() >= length_bytes:
                return
            if not self._held[digest]:
                self._drop(digest)
        self._held += Counter()
        if self._disk_bytes_free() < length_bytes:
            raise self._full(length_bytes)

    def _drop(self, digest: Digest) -> None:
        length_bytes = self._kept.pop(digest)
        self._path(digest).unlink(missing_ok=True)
        _log.info("cache.dropped file=%s bytes=%d", digest.hex()[:16], length_bytes)

    def _disk_bytes_free(self) -> int:
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize - DISK_BYTES_SPARE

    def _full(self, length_bytes: int) -> FallowError:
        return FallowError(
            Reason.STORAGE_FULL,
            f"the disk of {self._folder} has no room for {length_bytes} bytes more",
            field=str(self._folder),
            hint="free some space, or start the worker with --state on another disk",
        )

    def _path(self, digest: Digest) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / name
