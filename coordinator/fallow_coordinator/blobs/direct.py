"""Uploads and downloads that bypass this process: by URLs of the bucket, for whoever shows a grant.

A URL is good for one blob, its digest and length, one method and at most as long as the grant. An upload arrives under
a name that says whose it is: whoever only knows the digest of a blob that is here already shows no bytes by it. Once
the client says that it has arrived, it is moved where no URL reaches it, read back in full, and then made a blob.
"""

from __future__ import annotations

import datetime
from typing import Final
from urllib.parse import urlsplit

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId
from fallow.session import BlobReference
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import BlobKind, Grant
from fallow_coordinator.blobs.presigning import Bucket, PresignedRequest, presigned_get, presigned_put
from fallow_coordinator.blobs.storage import S3Storage, staged_key
from fallow_coordinator.blobs.uploads import account_name

BYTES_MIN: Final = 2 * 1024 * 1024
"""Smaller blobs come and go through this process: a second request would cost more than it saves."""
VALID_FOR_S_MAX: Final = 3_600
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class DirectTransfers:
    """Gives out URLs of one bucket and takes in what came by them."""

    def __init__(self, storage: S3Storage, bucket: Bucket) -> None:
        """`bucket` is where `storage` keeps blobs, with the key that may sign for it."""
        self._storage = storage
        self._bucket = bucket

    def upload(self, grant: Grant, now_ms: int) -> PresignedRequest | None:
        """The request that sends the whole blob; None for small ones."""
        if grant.blob.length_bytes < BYTES_MIN:
            return None
        key = staged_key(_name(grant.blob, grant.account_id))
        return presigned_put(self._bucket, grant.blob, now=_moment(now_ms), expires_s=_valid_s(grant, now_ms), key=key)

    def download(self, grant: Grant, now_ms: int) -> PresignedRequest | None:
        """The request that reads the blob; None for small ones."""
        if grant.blob.length_bytes < BYTES_MIN:
            return None
        return presigned_get(self._bucket, grant.blob, now=_moment(now_ms), expires_s=_valid_s(grant, now_ms))

    async def claim(self, grant: Grant) -> bytes:
        """Takes what has arrived out of everybody's reach and reads it back; its bytes when it is a row block.

        Raises OFFSET_MISMATCH when nothing of that length has arrived, DIGEST_MISMATCH when it is something else.
        """
        name = _name(grant.blob, grant.account_id)
        if not await self._storage.claim(name, grant.blob.length_bytes):
            raise FallowError(
                Reason.OFFSET_MISMATCH,
                "no upload of that length has arrived",
                field="arrived",
                hint="send the bytes as the answer said, or by Put",
            )
        if not await self._storage.claimed_is(name, grant.blob.digest, grant.blob.length_bytes):
            await self._storage.settle_claim(name, None)
            raise FallowError(
                Reason.DIGEST_MISMATCH,
                "what arrived has another digest",
                field="arrived",
                limit=f"digest {grant.blob.digest.hex()}, as the grant says",
            )
        return await self._storage.claimed_bytes(name) if grant.kind is BlobKind.ROW_BLOCK else b""

    async def settle(self, grant: Grant, *, accept: bool) -> None:
        """Makes what was claimed the blob, or lets go of it."""
        digest = grant.blob.digest if accept else None
        await self._storage.settle_claim(_name(grant.blob, grant.account_id), digest)

    async def sweep(self, older_than_ms: int) -> int:
        """Removes what arrived before that moment and nobody came back for."""
        return await self._storage.sweep_staged(older_than_ms)


def may_be_given_out(endpoint: str) -> bool:
    """Whether URLs of this endpoint are safe to send: encrypted, or of this very machine."""
    parts = urlsplit(endpoint)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def request_to_message(request: PresignedRequest) -> blob_service_pb2.DirectRequest:
    """As the protocol carries it."""
    return blob_service_pb2.DirectRequest(method=request.method, url=request.url, headers=request.headers)


def _name(blob: BlobReference, account_id: AccountId) -> str:
    return f"{blob.digest.hex()}-{account_name(account_id)}"


def _moment(now_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now_ms / 1_000, datetime.UTC)


def _valid_s(grant: Grant, now_ms: int) -> int:
    return max(1, min(VALID_FOR_S_MAX, (grant.expires_at_ms - now_ms) // 1_000))
