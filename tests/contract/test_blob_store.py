"""The contract of BlobStorage, on every implementation."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow_coordinator.blobs.storage import BlobStorage, FolderStorage, MemoryStorage, S3Storage, blob_key, translated
from s3_server import S3Bucket

DATA = os.urandom(300_000)
DIGEST = digest_of(DATA)
OTHER = digest_of(b"other")


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStorage:
    if request.param == "s3":
        bucket: S3Bucket = request.getfixturevalue("s3_bucket")
        return S3Storage(bucket.store())
    if request.param == "folder":
        return FolderStorage(tmp_path / "blobs")
    return MemoryStorage()


@pytest.fixture
def finished(storage: BlobStorage, tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        folder = storage.uploads if isinstance(storage, FolderStorage) else tmp_path
        path = folder / f"{digest_of(data).hex()}.part"
        path.write_bytes(data)
        return path

    return make


async def whole(storage: BlobStorage, digest: Digest) -> bytes:
    size = await storage.size(digest)
    assert size is not None
    return bytes(await storage.read(digest, offset=0, length=size))


async def test_bytes_come_back_as_they_were_put(storage: BlobStorage) -> None:
    await storage.put_bytes(DIGEST, DATA)
    assert await whole(storage, DIGEST) == DATA


async def test_a_file_is_taken_over(storage: BlobStorage, finished: Callable[[bytes], Path]) -> None:
    path = finished(DATA)
    await storage.put_file(DIGEST, path)
    assert await whole(storage, DIGEST) == DATA
    assert not path.exists()


async def test_a_range_is_exactly_what_was_asked_for(storage: BlobStorage) -> None:
    await storage.put_bytes(DIGEST, DATA)
    assert bytes(await storage.read(DIGEST, offset=1_000, length=2_000)) == DATA[1_000:3_000]
    assert bytes(await storage.read(DIGEST, offset=len(DATA) - 1, length=1)) == DATA[-1:]


async def test_a_missing_blob_has_no_size_and_cannot_be_read(storage: BlobStorage) -> None:
    assert await storage.size(OTHER) is None
    with pytest.raises(FallowError) as caught:
        await storage.read(OTHER, offset=0, length=1)
    assert caught.value.reason is Reason.BLOB_UNKNOWN
    assert OTHER.hex() in str(caught.value)


async def test_putting_again_changes_nothing(storage: BlobStorage, finished: Callable[[bytes], Path]) -> None:
    await storage.put_bytes(DIGEST, DATA)
    await storage.put_file(DIGEST, finished(DATA))
    await storage.put_bytes(DIGEST, DATA)
    assert await whole(storage, DIGEST) == DATA


async def test_a_deleted_blob_is_gone_with_its_notes(storage: BlobStorage) -> None:
    await storage.put_bytes(DIGEST, DATA)
    await storage.put_note(DIGEST, "a", b"1")
    await storage.put_note(DIGEST, "b", b"2")
    assert await storage.delete(DIGEST)
    assert await storage.size(DIGEST) is None
    assert await storage.note(DIGEST, "a") is None
    assert await storage.note(DIGEST, "b") is None
    assert not await storage.delete(DIGEST)


async def test_notes_are_kept_by_blob_and_name(storage: BlobStorage) -> None:
    await storage.put_note(DIGEST, "a", b"first")
    await storage.put_note(DIGEST, "a", b"second")
    assert await storage.note(DIGEST, "a") == b"second"
    assert await storage.note(DIGEST, "b") is None
    assert await storage.note(OTHER, "a") is None
    assert await storage.size(DIGEST) is None, "a note is no blob"


async def test_a_reader_keeps_its_bytes_when_the_blob_goes(storage: BlobStorage) -> None:
    await storage.put_bytes(DIGEST, DATA)
    view = await storage.read(DIGEST, offset=0, length=len(DATA))
    await storage.delete(DIGEST)
    assert bytes(view) == DATA


def test_free_bytes_are_counted_or_unlimited(storage: BlobStorage) -> None:
    free = storage.free_bytes()
    assert free is None or free > 0


async def test_a_folder_shows_nothing_but_whole_blobs(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    await storage.put_bytes(DIGEST, DATA)
    files = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert files == [tmp_path / blob_key(DIGEST)]
    assert not list(storage.uploads.iterdir())


async def test_a_folder_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    await FolderStorage(tmp_path).put_bytes(DIGEST, DATA)
    assert await whole(FolderStorage(tmp_path), DIGEST) == DATA


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_words() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(FallowError) as caught, translated():
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert "free or add disk space" in str(caught.value)


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one() -> None:
    with pytest.raises(OSError, match="broken") as caught, translated():
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, FallowError)


async def test_a_shelf_lists_its_blobs_in_order_and_nothing_else(storage: BlobStorage) -> None:
    first = DIGEST[0]
    await storage.put_bytes(DIGEST, DATA)
    await storage.put_note(OTHER, "a", b"1")
    for content in (b"x%d" % number for number in range(40)):
        await storage.put_bytes(digest_of(content), content)
    (found,) = [one for one in await storage.shelf(first) if one.digest == DIGEST]
    assert found.length_bytes == len(DATA) and abs(found.stored_at_ms - time.time() * 1_000) < 60_000
    assert [one.digest for one in await storage.shelf(first)] == sorted(
        digest for digest in [DIGEST, *(digest_of(b"x%d" % number) for number in range(40))] if digest[0] == first
    )


async def test_notes_are_known_without_being_read(storage: BlobStorage) -> None:
    assert not await storage.has_notes(DIGEST)
    await storage.put_note(DIGEST, "a", b"1")
    assert await storage.has_notes(DIGEST) and not await storage.has_notes(OTHER)
