"""Files that grow at their end until they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, digest_of
from fallow.limits import MIB
from fallow.session import BlobReference
from fallow_coordinator.blobs.uploads import PartialUpload, PartialUploads, UnfinishedError

DATA = os.urandom(3 * MIB + 17)
BLOB = BlobReference(digest_of(DATA), len(DATA))
ACCOUNT = AccountId("account/with strange:letters")


@pytest.fixture
def syncer() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def uploads(tmp_path: Path, syncer: ThreadPoolExecutor) -> PartialUploads:
    return PartialUploads(tmp_path, syncer)


def grown(uploads: PartialUploads, data: bytes, *, offset: int = 0) -> PartialUpload:
    upload = uploads.upload(BLOB, ACCOUNT)
    upload.open(offset)
    for start in range(0, len(data), MIB):
        upload.append(memoryview(data)[start : start + MIB])
    return upload


def test_a_whole_upload_is_a_whole_file(uploads: PartialUploads) -> None:
    upload = grown(uploads, DATA)
    assert upload.remaining_bytes == 0
    upload.finish()
    assert upload.path.read_bytes() == DATA


def test_an_upload_goes_on_where_another_process_stopped(uploads: PartialUploads) -> None:
    grown(uploads, DATA[:MIB]).close()
    assert uploads.offset_bytes(BLOB, ACCOUNT) == MIB
    upload = grown(uploads, DATA[MIB:], offset=MIB)
    upload.finish()
    assert upload.path.read_bytes() == DATA


@pytest.mark.parametrize("offset", [1, MIB - 1, MIB + 1, len(DATA)])
def test_an_upload_goes_on_nowhere_else(uploads: PartialUploads, offset: int) -> None:
    grown(uploads, DATA[:MIB]).close()
    with pytest.raises(UnfinishedError) as caught:
        uploads.upload(BLOB, ACCOUNT).open(offset)
    assert caught.value.reason is Reason.OFFSET_MISMATCH
    assert str(MIB) in caught.value.limit
    assert uploads.offset_bytes(BLOB, ACCOUNT) == MIB


def test_an_upload_may_start_over(uploads: PartialUploads) -> None:
    grown(uploads, b"x" * MIB).close()
    upload = grown(uploads, DATA)
    upload.finish()
    assert upload.path.read_bytes() == DATA


def test_other_bytes_than_declared_are_found_out(uploads: PartialUploads) -> None:
    upload = grown(uploads, DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(FallowError) as caught:
        upload.finish()
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    upload.discard()
    assert uploads.offset_bytes(BLOB, ACCOUNT) == 0


def test_a_prefix_damaged_on_disk_is_found_out(uploads: PartialUploads) -> None:
    upload = grown(uploads, DATA[:MIB])
    upload.close()
    upload.path.write_bytes(bytes(MIB))
    resumed = grown(uploads, DATA[MIB:], offset=MIB)
    with pytest.raises(FallowError) as caught:
        resumed.finish()
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    resumed.close()


def test_accounts_never_share_a_file(uploads: PartialUploads) -> None:
    grown(uploads, DATA[:MIB]).close()
    assert uploads.offset_bytes(BLOB, AccountId("someone else")) == 0


def test_only_forgotten_files_are_swept(uploads: PartialUploads) -> None:
    old = grown(uploads, DATA[:MIB])
    old.close()
    other = uploads.upload(BLOB, AccountId("someone else"))
    other.open(0)
    other.close()
    os.utime(old.path, (0, 0))
    assert uploads.remove_older_than(60_000) == 1
    assert not old.path.exists()
    assert other.path.exists()
