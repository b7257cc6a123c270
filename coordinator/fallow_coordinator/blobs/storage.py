"""Where finished blobs lie, by digest. Everything that is here is whole; what is being uploaded lies elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, S3Store

from fallow.errors import FallowError, Reason
from fallow.ids import DIGEST_BYTES, Digest

Buffer = bytes | bytearray | memoryview

_NOTE_BYTES_MAX: Final = 4096
_VERIFY_BYTES: Final = 4 * 1024 * 1024
_STAGED: Final = "staged"
_CLAIMED: Final = "claimed"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A blob as a listing shows it."""

    digest: Digest
    length_bytes: int
    stored_at_ms: int


class BlobStorage(Protocol):
    """Blobs by digest. Whoever puts has checked the digest. One contract suite for all implementations.

    Notes are small companions of a blob (at most 4 KiB) that may be lost with the power but never lie.
    Every call raises FallowError(STORAGE_FULL) when the storage is full.
    """

    async def put_file(self, digest: Digest, path: Path) -> None:
        """Takes over a finished file of this machine; on return the blob is durable and the file gone."""
        ...

    async def put_bytes(self, digest: Digest, data: Buffer) -> None:
        """Stores bytes; on return the blob is durable."""
        ...

    async def read(self, digest: Digest, *, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes from `offset`, which the caller knows to exist. Raises BLOB_UNKNOWN."""
        ...

    async def size(self, digest: Digest) -> int | None:
        """Length in bytes, None when the blob is not here."""
        ...

    async def delete(self, digest: Digest) -> bool:
        """Removes a blob and its notes; whether it was here."""
        ...

    async def put_note(self, digest: Digest, name: str, data: bytes) -> None:
        """Keeps a note beside the place of a blob, which may come later. `name` is letters, digits and dashes."""
        ...

    async def note(self, digest: Digest, name: str) -> bytes | None:
        """A note, None when there is none."""
        ...

    async def has_notes(self, digest: Digest) -> bool:
        """Whether any note is beside the place of a blob."""
        ...

    async def shelf(self, number: int) -> Sequence[StoredObject]:
        """All blobs whose digests begin with this byte, rising by digest."""
        ...

    def free_bytes(self) -> int | None:
        """Room left, None when unlimited."""
        ...


class _ObjectStorage:
    """What every implementation over an object store shares."""

    def __init__(self, store: LocalStore | MemoryStore | S3Store) -> None:
        self._store = store

    async def read(self, digest: Digest, *, offset: int, length: int) -> memoryview:
        try:
            data = await obstore.get_range_async(self._store, blob_key(digest), start=offset, length=length)
        except FileNotFoundError:
            raise unknown(digest) from None
        view = memoryview(data)
        assert view.nbytes == length, "the range lies in the blob"
        return view

    async def size(self, digest: Digest) -> int | None:
        try:
            return (await obstore.head_async(self._store, blob_key(digest)))["size"]
        except FileNotFoundError:
            return None

    async def delete(self, digest: Digest) -> bool:
        if await self.size(digest) is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store, blob_key(digest))
        notes = await obstore.list_with_delimiter_async(  # pyright: ignore[reportUnknownMemberType]
            self._store, f"{_notes_key(digest)}/"
        )
        for entry in notes["objects"]:
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, entry["path"])
        return True

    async def has_notes(self, digest: Digest) -> bool:
        notes = await obstore.list_with_delimiter_async(  # pyright: ignore[reportUnknownMemberType]
            self._store, f"{_notes_key(digest)}/"
        )
        return bool(notes["objects"])

    async def shelf(self, number: int) -> Sequence[StoredObject]:
        found: list[StoredObject] = []
        prefix = f"blobs/{number:02x}/"
        async for page in obstore.list(self._store, prefix):  # pyright: ignore[reportUnknownMemberType]
            for entry in page:
                digest = _digest_of_key(entry["path"])
                if digest is not None:
                    stored_at_ms = int(entry["last_modified"].timestamp() * 1_000)
                    found.append(StoredObject(digest, entry["size"], stored_at_ms))
        found.sort(key=lambda one: one.digest)
        return found

    async def put_note(self, digest: Digest, name: str, data: bytes) -> None:
        assert len(data) <= _NOTE_BYTES_MAX, "a note is small"
        assert name.replace("-", "").isalnum(), "a note's name needs no escaping"
        with translated():
            await obstore.put_async(self._store, f"{_notes_key(digest)}/{name}", data)

    async def note(self, digest: Digest, name: str) -> bytes | None:
        try:
            result = await obstore.get_async(self._store, f"{_notes_key(digest)}/{name}")
            return (await result.bytes_async()).to_bytes()
        except FileNotFoundError:
            return None


class FolderStorage(_ObjectStorage):
    """Blobs in a local folder: `blobs/ab/cdef…`, notes in `notes/`, unfinished files in `uploads/`.

    A blob comes into being by renaming a finished, synced file of the same file system, so none is ever seen in part.
    """

    def __init__(self, folder: Path) -> None:
        """Uses `folder`, made when missing."""
        self.folder = folder
        self.uploads = folder / "uploads"
        """Files that `put_file` can take over by renaming; what lies here is nobody's blob."""
        for path in (folder / "blobs", folder / "notes", self.uploads):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(LocalStore(folder.resolve()))

    async def put_file(self, digest: Digest, path: Path) -> None:
        assert path.parent == self.uploads, "only files of the same file system are taken over"
        key = blob_key(digest)
        shelf = (self.folder / key).parent
        await asyncio.to_thread(self._prepare, path, shelf)
        with translated():
            await obstore.rename_async(self._store, f"uploads/{path.name}", key)
        await asyncio.to_thread(_sync_folder, shelf)

    async def put_bytes(self, digest: Digest, data: Buffer) -> None:
        path = self.uploads / f"{secrets.token_hex(16)}.new"
        try:
            with translated():
                await asyncio.to_thread(path.write_bytes, data)
            await self.put_file(digest, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.folder).free

    def _prepare(self, path: Path, shelf: Path) -> None:
        with translated():
            _sync_file(path)
            if not shelf.is_dir():
                shelf.mkdir(mode=0o700, exist_ok=True)
                _sync_folder(shelf.parent)


class MemoryStorage(_ObjectStorage):
    """Blobs in this process's memory, for tests and trials; nothing outlives the process."""

    def __init__(self, *, free_bytes: int | None = None) -> None:
        """`free_bytes` is what it says is left, forever."""
        super().__init__(MemoryStore())
        self._free_bytes = free_bytes

    async def put_file(self, digest: Digest, path: Path) -> None:
        await self.put_bytes(digest, await asyncio.to_thread(path.read_bytes))
        path.unlink()

    async def put_bytes(self, digest: Digest, data: Buffer) -> None:
        with translated():
            await obstore.put_async(self._store, blob_key(digest), bytes(data))

    def free_bytes(self) -> int | None:
        return self._free_bytes


class S3Storage(_ObjectStorage):
    """Blobs in an S3 bucket, or in what speaks its language. Objects appear whole or not at all."""

    def __init__(self, store: S3Store, *, uploads: Path | None = None) -> None:
        """`store` names bucket, region, endpoint and credentials; `uploads` is where unfinished uploads grow."""
        super().__init__(store)
        self._bucket = store
        self._uploads = uploads

    async def put_file(self, digest: Digest, path: Path) -> None:
        with translated():
            await obstore.put_async(self._bucket, blob_key(digest), path)
        await asyncio.to_thread(path.unlink)

    async def put_bytes(self, digest: Digest, data: Buffer) -> None:
        with translated():
            await obstore.put_async(self._bucket, blob_key(digest), bytes(data))

    async def verified(self, digest: Digest, length_bytes: int) -> bool:
        """Whether the object that lies there is the blob: read in full, in bounded memory."""
        return await self._holds(blob_key(digest), digest, length_bytes)

    async def claim(self, name: str, length_bytes: int) -> bool:
        """Takes what was uploaded under `name` where no URL reaches it; False when there is nothing of that length."""
        staged = staged_key(name)
        try:
            found = (await obstore.head_async(self._store, staged))["size"]
            if found == length_bytes:
                await obstore.copy_async(self._store, staged, _claimed_key(name))
            await obstore.delete_async(self._store, staged)
        except FileNotFoundError:
            return False
        return found == length_bytes

    async def claimed_is(self, name: str, digest: Digest, length_bytes: int) -> bool:
        """Whether what was claimed is the blob: read in full, in bounded memory."""
        return await self._holds(_claimed_key(name), digest, length_bytes)

    async def claimed_bytes(self, name: str) -> bytes:
        """All that was claimed; for blobs that fit into memory."""
        result = await obstore.get_async(self._store, _claimed_key(name))
        return (await result.bytes_async()).to_bytes()

    async def settle_claim(self, name: str, digest: Digest | None) -> None:
        """Makes what was claimed the blob; None: lets go of it."""
        with translated():
            if digest is not None:
                await obstore.copy_async(self._store, _claimed_key(name), blob_key(digest))
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, _claimed_key(name))

    async def sweep_staged(self, older_than_ms: int) -> int:
        """Removes uploads that arrived before that moment and that nobody came back for; gives how many."""
        removed = 0
        for folder in (_STAGED, _CLAIMED):
            async for page in obstore.list(self._store, f"{folder}/"):  # pyright: ignore[reportUnknownMemberType]
                for entry in page:
                    if int(entry["last_modified"].timestamp() * 1_000) < older_than_ms:
                        with contextlib.suppress(FileNotFoundError):
                            await obstore.delete_async(self._store, entry["path"])
                        removed += 1
        return removed

    async def _holds(self, key: str, digest: Digest, length_bytes: int) -> bool:
        found, length = hashlib.sha256(), 0
        try:
            result = await obstore.get_async(self._store, key)
        except FileNotFoundError:
            return False
        async for piece in result.stream(min_chunk_size=_VERIFY_BYTES):
            found.update(piece)
            length += len(piece)
        return (found.digest(), length) == (digest, length_bytes)

    def free_bytes(self) -> int | None:
        # A bucket has no end, but what comes grows on this machine's disk first.
        return shutil.disk_usage(self._uploads).free if self._uploads is not None else None


def blob_key(digest: Digest) -> str:
    """Where a blob lies: 256 shelves, so that no folder grows without bound."""
    text = digest.hex()
    return f"blobs/{text[:2]}/{text[2:]}"


def staged_key(name: str) -> str:
    """Where an upload by URL arrives: a name that says whose it is, so that nobody shows another's bytes."""
    return f"{_STAGED}/{name}"


def _claimed_key(name: str) -> str:
    return f"{_CLAIMED}/{name}"


def _digest_of_key(key: str) -> Digest | None:
    """The digest of a blob's key; None for anything else that lies there."""
    _, _, tail = key.partition("/")
    try:
        digest = bytes.fromhex(tail.replace("/", "", 1))
    except ValueError:
        return None
    return Digest(digest) if len(digest) == DIGEST_BYTES else None


def _notes_key(digest: Digest) -> str:
    text = digest.hex()
    return f"notes/{text[:2]}/{text[2:]}"


def unknown(digest: Digest) -> FallowError:
    """BLOB_UNKNOWN for that digest."""
    return FallowError(Reason.BLOB_UNKNOWN, f"blob {digest.hex()} is not here", field="blob.digest")


def storage_full(detail: str) -> FallowError:
    """STORAGE_FULL, with what to do about it."""
    return FallowError(
        Reason.STORAGE_FULL,
        f"the blob service's storage is full: {detail}",
        hint="the operator must free or add disk space; uploads go on from where they stand",
    )


class translated(contextlib.AbstractContextManager[None]):  # noqa: N801 — reads as a verb where it stands
    """Turns a full disk into STORAGE_FULL; everything else passes."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise storage_full(error.strerror or "no space left") from None
        if isinstance(error, BaseError) and ("os error 28" in str(error) or "os error 122" in str(error)):
            raise storage_full("no space left on device") from None


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
