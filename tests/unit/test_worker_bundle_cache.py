"""Bundles on a worker's disk."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from fallow.bundle import BundleFile, BundleManifest, ProgramFormat, ProgramStage
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, digest_of
from fallow.schema import BytesColumn, Schema
from fallow.session import BlobReference, BundleOffer, SignedBytes
from fallow.wire.bundle import encode_manifest
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.testing import MemoryBlobs

LEASE, OTHER = LeaseId("lease-1"), LeaseId("lease-2")
SCHEMA = Schema((BytesColumn("row"),))


def offer_of(blobs: MemoryBlobs, *contents: bytes) -> BundleOffer:
    stored = [blobs.add(content) for content in contents]
    manifest = encode_manifest(
        BundleManifest(
            name="test",
            files=tuple(
                BundleFile(f"file-{number}", reference.digest, reference.length_bytes)
                for number, (reference, _) in enumerate(stored)
            ),
            stages=(ProgramStage(ProgramFormat.ONNX, "file-0", (), ()),),
            input_schema=SCHEMA,
            output_schema=SCHEMA,
        )
    )
    return BundleOffer(digest_of(manifest), manifest, tuple(grant for _, grant in stored), 4, True, 1000)


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


async def test_a_bundle_is_fetched_once_and_named_file_by_file(tmp_path: Path, blobs: MemoryBlobs) -> None:
    cache = BundleCache(tmp_path)
    offer = offer_of(blobs, b"program", b"labels")
    loaded = await cache.bundle(offer, blobs, LEASE)
    assert {name: Path(path).read_bytes() for name, path in loaded.files.items()} == {
        "file-0": b"program",
        "file-1": b"labels",
    }
    assert (loaded.canonical_batch_rows, loaded.slot_dependent, loaded.memory_bytes_peak) == (4, True, 1000)
    await cache.bundle(offer, blobs, OTHER)
    assert blobs.gets == 2


async def test_two_leases_that_want_a_bundle_at_once_fetch_it_once(tmp_path: Path, blobs: MemoryBlobs) -> None:
    cache = BundleCache(tmp_path)
    offer = offer_of(blobs, b"program")
    await asyncio.gather(cache.bundle(offer, blobs, LEASE), cache.bundle(offer, blobs, OTHER))
    assert blobs.gets == 1


async def test_a_new_cache_takes_over_what_lies_there(tmp_path: Path, blobs: MemoryBlobs) -> None:
    offer = offer_of(blobs, b"program")
    await BundleCache(tmp_path).bundle(offer, blobs, LEASE)
    again = BundleCache(tmp_path)
    assert again.bytes_kept == len(b"program")
    await again.bundle(offer, blobs, LEASE)
    assert blobs.gets == 1


async def test_the_longest_unused_file_goes_first_and_held_ones_stay(tmp_path: Path, blobs: MemoryBlobs) -> None:
    cache = BundleCache(tmp_path, bytes_max=250)
    old, held, new = (offer_of(blobs, bytes([n]) * 100) for n in range(3))
    await cache.bundle(held, blobs, LEASE)
    await cache.bundle(old, blobs, OTHER)
    cache.release(OTHER)
    loaded = await cache.bundle(new, blobs, OTHER)
    assert cache.bytes_kept == 200
    assert all(Path(path).exists() for path in loaded.files.values())
    gets = blobs.gets
    await cache.bundle(held, blobs, LeaseId("third"))
    assert blobs.gets == gets, "what a lease holds is still here"
    await cache.bundle(old, blobs, OTHER)
    assert blobs.gets == gets + 1, "the unused one had gone"


async def test_a_bundle_larger_than_the_cache_is_refused_with_the_option_to_set(
    tmp_path: Path, blobs: MemoryBlobs
) -> None:
    with pytest.raises(FallowError) as caught:
        await BundleCache(tmp_path, bytes_max=10).bundle(offer_of(blobs, b"x" * 11), blobs, LEASE)
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    assert "--cache-gib" in caught.value.hint


async def test_a_manifest_that_is_not_the_leases_own_is_refused(tmp_path: Path, blobs: MemoryBlobs) -> None:
    offer = offer_of(blobs, b"program")
    forged = BundleOffer(Digest(b"f" * 32), offer.manifest, offer.file_grants, 4, False, 0)
    with pytest.raises(FallowError) as caught:
        await BundleCache(tmp_path).bundle(forged, blobs, LEASE)
    assert caught.value.reason is Reason.DIGEST_MISMATCH


async def test_too_few_grants_are_refused(tmp_path: Path, blobs: MemoryBlobs) -> None:
    offer = offer_of(blobs, b"program", b"labels")
    short = BundleOffer(offer.bundle_digest, offer.manifest, offer.file_grants[:1], 4, False, 0)
    with pytest.raises(FallowError) as caught:
        await BundleCache(tmp_path).bundle(short, blobs, LEASE)
    assert caught.value.reason is Reason.BUNDLE_INVALID


async def test_a_file_that_somebody_deleted_is_fetched_again(tmp_path: Path, blobs: MemoryBlobs) -> None:
    cache = BundleCache(tmp_path)
    offer = offer_of(blobs, b"program")
    loaded = await cache.bundle(offer, blobs, LEASE)
    Path(loaded.files["file-0"]).unlink()
    await cache.bundle(offer, blobs, LEASE)
    assert blobs.gets == 2


class FullDisk(MemoryBlobs):
    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


async def test_a_full_disk_is_told_with_the_folder_and_what_to_do(tmp_path: Path) -> None:
    blobs = FullDisk()
    cache = BundleCache(tmp_path)
    with pytest.raises(FallowError) as caught:
        await cache.bundle(offer_of(blobs, b"program"), blobs, LEASE)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert str(tmp_path) in str(caught.value)
    assert "--state on another disk" in caught.value.hint
    assert cache.bytes_kept == 0


async def test_a_disk_without_room_is_not_filled(
    tmp_path: Path, blobs: MemoryBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow_worker.bundle_cache.DISK_BYTES_SPARE", 1 << 60)
    with pytest.raises(FallowError) as caught:
        await BundleCache(tmp_path).bundle(offer_of(blobs, b"program"), blobs, LEASE)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert blobs.gets == 0
