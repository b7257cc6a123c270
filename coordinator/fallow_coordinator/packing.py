"""The ports Packer and SingleRows over the blob service."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message

from fallow.errors import FallowError, Reason
from fallow.identity import BLOBS_NAME, PrivateKey
from fallow.ids import Digest
from fallow.v1 import blob_pb2, blob_service_pb2
from fallow.wire.chunks import CHUNK_MESSAGE_BYTES_MAX, COMPARE_ROWS_METHOD, PACK_METHOD, PACK_ROWS_METHOD
from fallow.wire.errors import error_from_rpc
from fallow_coordinator.ports import RowPlace, RowSource

ResponseT = TypeVar("ResponseT")

PACKS_AT_ONCE_MAX: Final = 16
ATTEMPTS_MAX: Final = 8
BACKOFF_MS_MIN: Final = 50
BACKOFF_MS_MAX: Final = 5_000
PACK_TIMEOUT_S: Final = 120.0

_CHANNEL_OPTIONS: Final[list[tuple[str, str | int]]] = [
    ("grpc.ssl_target_name_override", BLOBS_NAME),
    ("grpc.max_send_message_length", CHUNK_MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
]
_TRANSIENT_REASONS: Final = frozenset({Reason.OVERLOADED, Reason.COORDINATOR_UNREACHABLE, Reason.COORDINATOR_STOPPING})


class BlobPacker:
    """Has blocks packed by the blob service, so that rows never pass through the coordinator's process."""

    def __init__(
        self,
        endpoint: str,
        authority_pem: bytes,
        key: PrivateKey,
        certificate_pem: bytes,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Dials `endpoint` on first use, showing the coordinator's own `key`: the blob service packs for no other."""
        credentials = grpc.ssl_channel_credentials(authority_pem, key.pem, certificate_pem)
        self._channel = grpc.aio.secure_channel(endpoint, credentials, _CHANNEL_OPTIONS)
        self._call = self._channel.unary_unary(
            PACK_METHOD,
            request_serializer=blob_service_pb2.PackRequest.SerializeToString,
            response_deserializer=blob_service_pb2.PackResponse.FromString,
        )
        self._pack_rows = self._channel.unary_unary(
            PACK_ROWS_METHOD,
            request_serializer=blob_service_pb2.PackRowsRequest.SerializeToString,
            response_deserializer=blob_service_pb2.PackRowsResponse.FromString,
        )
        self._compare_rows = self._channel.unary_unary(
            COMPARE_ROWS_METHOD,
            request_serializer=blob_service_pb2.CompareRowsRequest.SerializeToString,
            response_deserializer=blob_service_pb2.CompareRowsResponse.FromString,
        )
        self._chance = chance
        self._at_once = asyncio.Semaphore(PACKS_AT_ONCE_MAX)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The coordinator's own channel to the blob service."""
        return self._channel

    async def close(self) -> None:
        """Cuts what is under way."""
        await self._channel.close()

    async def pack(
        self, *, sources: Sequence[tuple[Digest, int]], spans: Sequence[tuple[int, int, int]], nonce: bytes
    ) -> tuple[Digest, int]:
        """The packed block as (digest, length_bytes).

        Raises BLOB_UNKNOWN, FIELD_INVALID, ROW_BLOCK_MALFORMED, SCHEMA_MISMATCH, BLOCK_TOO_LARGE, STORAGE_FULL,
        LIMIT_EXCEEDED when the request itself is too long, or COORDINATOR_UNREACHABLE when the service stays away.
        """
        request = blob_service_pb2.PackRequest(
            sources=[blob_pb2.BlobReference(digest=digest, length_bytes=length) for digest, length in sources],
            spans=[
                blob_service_pb2.PackSpan(source=source, first_row=first_row, rows=rows)
                for source, first_row, rows in spans
            ],
            nonce=nonce,
        )
        _check_size(request, "spans")
        async with self._at_once:
            response = await self._answered(request, self._call)
        return Digest(response.blob.digest), response.blob.length_bytes

    async def pack_rows(
        self, *, sources: Sequence[RowSource], rows: Sequence[RowPlace], nonce: bytes
    ) -> tuple[Digest, int]:
        """The packed block of single rows as (digest, length_bytes). Raises as `pack`."""
        request = blob_service_pb2.PackRowsRequest(
            sources=_row_sources(sources),
            rows=[blob_service_pb2.RowPlace(source=source, row=row) for source, row in rows],
            nonce=nonce,
        )
        _check_size(request, "rows")
        async with self._at_once:
            response = await self._answered(request, self._pack_rows)
        return Digest(response.blob.digest), response.blob.length_bytes

    async def compare(
        self, *, sources: Sequence[RowSource], pairs: Sequence[tuple[RowPlace, RowPlace]]
    ) -> tuple[bool, ...]:
        """Whether each pair is the same bytes. Raises as `pack`, STORAGE_FULL excepted."""
        request = blob_service_pb2.CompareRowsRequest(
            sources=_row_sources(sources),
            pairs=[
                blob_service_pb2.RowPair(
                    left=blob_service_pb2.RowPlace(source=left[0], row=left[1]),
                    right=blob_service_pb2.RowPlace(source=right[0], row=right[1]),
                )
                for left, right in pairs
            ],
        )
        _check_size(request, "pairs")
        async with self._at_once:
            response = await self._answered(request, self._compare_rows)
        if len(response.equal) != len(pairs):
            raise FallowError(Reason.INTERNAL, f"the blob service compared {len(response.equal)} of {len(pairs)} pairs")
        return tuple(response.equal)

    async def _answered(self, request: Message, call: Callable[..., Awaitable[ResponseT]]) -> ResponseT:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return await call(request, timeout=PACK_TIMEOUT_S)
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure)
                if error.reason not in _TRANSIENT_REASONS or attempt == ATTEMPTS_MAX:
                    raise error from None
            pause_ms = min(BACKOFF_MS_MAX, BACKOFF_MS_MIN << attempt)
            await asyncio.sleep(pause_ms / 1000 * (0.5 + self._chance() / 2))
        raise AssertionError("the last attempt raises")


def _row_sources(sources: Sequence[RowSource]) -> list[blob_service_pb2.RowSource]:
    return [
        blob_service_pb2.RowSource(inline_block=source.inline_block)
        if source.inline_block
        else blob_service_pb2.RowSource(
            blob=blob_pb2.BlobReference(digest=source.blob.digest, length_bytes=source.blob.length_bytes)
        )
        for source in sources
    ]


def _check_size(request: Message, field: str) -> None:
    if request.ByteSize() > CHUNK_MESSAGE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a request of {request.ByteSize()} bytes for one block",
            field=field,
            limit=f"{CHUNK_MESSAGE_BYTES_MAX} bytes of request",
            hint="pack fewer or longer runs of rows",
        )
