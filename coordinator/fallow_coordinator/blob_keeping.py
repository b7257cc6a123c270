"""The BlobKeeper port over the blob service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc

from fallow.ids import Digest
from fallow.v1 import blob_service_pb2, blob_service_pb2_grpc
from fallow.wire.errors import error_from_rpc
from fallow.wire.moments import moment_to_message

CALL_TIMEOUT_S: Final = 120.0

AnswerT = TypeVar("AnswerT")


class RemoteBlobs:
    """Lists and deletes blobs of the blob service, over the coordinator's own channel: it listens to no other."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """`channel` shows the coordinator's key and stays the caller's to close."""
        self._blobs: blob_service_pb2_grpc.BlobServiceAsyncStub = blob_service_pb2_grpc.BlobServiceStub(channel)

    async def list_blobs(
        self, shelf: int, *, stored_before_ms: int, after: Digest | None, limit: int
    ) -> Sequence[Digest]:
        """A page of one shelf. Raises COORDINATOR_UNREACHABLE while the service is away."""
        request = blob_service_pb2.ListBlobsRequest(
            shelf=shelf, stored_before=moment_to_message(stored_before_ms), after=after or b"", page_size=limit
        )
        answer = await _answered(lambda: self._blobs.ListBlobs(request, timeout=CALL_TIMEOUT_S))
        return [Digest(digest) for digest in answer.digests]

    async def delete_blobs(
        self, digests: Sequence[Digest], *, decided_at_ms: int, packed_only: bool = False
    ) -> Sequence[Digest]:
        """What is gone. Raises COORDINATOR_UNREACHABLE while the service is away."""
        request = blob_service_pb2.DeleteBlobsRequest(
            digests=digests, decided_at=moment_to_message(decided_at_ms), packed_only=packed_only
        )
        answer = await _answered(lambda: self._blobs.DeleteBlobs(request, timeout=CALL_TIMEOUT_S))
        return [Digest(digest) for digest in answer.digests]


async def _answered(call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    try:
        return await call()
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from None
