"""Presigned URLs on a server that checks them: good for one blob, its bytes and its time, and for nothing else."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from fallow.ids import digest_of
from fallow.session import BlobReference
from fallow_coordinator.blobs.presigning import PresignedRequest, presigned_get, presigned_put
from fallow_coordinator.blobs.storage import S3Storage
from s3_server import S3Bucket, send

DATA = b"some rows" * 1_000
BLOB = BlobReference(digest_of(DATA), len(DATA))


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def put_of(bucket: S3Bucket, blob: BlobReference = BLOB) -> PresignedRequest:
    return presigned_put(bucket.bucket, blob, now=now(), expires_s=60)


async def test_a_blob_goes_up_and_comes_down_by_url_and_is_read_back(s3_bucket: S3Bucket) -> None:
    storage = S3Storage(s3_bucket.store())
    assert not await storage.verified(BLOB.digest, BLOB.length_bytes)
    assert send(put_of(s3_bucket), DATA)[0] == 200
    assert await storage.verified(BLOB.digest, BLOB.length_bytes)
    assert not await storage.verified(BLOB.digest, BLOB.length_bytes - 1)
    assert send(presigned_get(s3_bucket.bucket, BLOB, now=now(), expires_s=60)) == (200, DATA)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_an_expired_url_is_refused(s3_bucket: S3Bucket, method: str) -> None:
    signer = presigned_get if method == "GET" else presigned_put
    late = signer(s3_bucket.bucket, BLOB, now=now() - datetime.timedelta(seconds=61), expires_s=60)
    status, words = send(late, DATA if method == "PUT" else None)
    assert (status, words) == (403, b"AccessDenied: Request has expired")


def test_a_url_is_good_for_its_own_bytes_alone(s3_bucket: S3Bucket) -> None:
    other = b"other row" * 1_000
    assert send(put_of(s3_bucket), other) == (403, b"BadDigest")
    lied = put_of(s3_bucket, BlobReference(digest_of(other), len(other))).headers
    assert send(replace(put_of(s3_bucket), headers=lied), other) == (403, b"SignatureDoesNotMatch")
    longer = {**put_of(s3_bucket).headers, "content-length": str(len(DATA) + 1)}
    assert send(replace(put_of(s3_bucket), headers=longer), DATA + b"!") == (403, b"SignatureDoesNotMatch")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("X-Amz-Expires=60", "X-Amz-Expires=600"),
        (BLOB.digest.hex()[2:], digest_of(b"other").hex()[2:]),
        ("X-Amz-Signature=", "X-Amz-Signature=0"),
    ],
)
def test_an_altered_url_is_refused(s3_bucket: S3Bucket, old: str, new: str) -> None:
    request = presigned_get(s3_bucket.bucket, BLOB, now=now(), expires_s=60)
    assert old in request.url
    assert send(replace(request, url=request.url.replace(old, new))) == (403, b"SignatureDoesNotMatch")


def test_a_url_for_reading_does_not_write(s3_bucket: S3Bucket) -> None:
    read = presigned_get(s3_bucket.bucket, BLOB, now=now(), expires_s=60)
    assert send(replace(read, method="PUT"), DATA) == (403, b"SignatureDoesNotMatch")


async def test_read_back_finds_what_does_not_belong_there(s3_bucket: S3Bucket) -> None:
    storage = S3Storage(s3_bucket.store())
    await storage.put_bytes(BLOB.digest, b"x" * BLOB.length_bytes)
    assert not await storage.verified(BLOB.digest, BLOB.length_bytes)
