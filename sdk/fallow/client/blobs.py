"""Uploads and downloads of the caller's own blobs, resumed where they broke off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc

from fallow.bundle_file import FileSource
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import BLOB_CHUNK_BYTES, GRANTS_PER_REQUEST_MAX
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import blob_service_pb2, job_service_pb2
from fallow.wire.blob import (
    BLOB_KINDS,
    BlobKind,
    grant_from_message,
    grant_to_message,
    receipt_from_message,
    receipt_to_message,
    reference_to_message,
)
from fallow.wire.chunks import (
    GET_METHOD,
    GET_UPLOAD_METHOD,
    PUT_METHOD,
    PutPart,
    decode_get_part,
    encode_put_part,
)
from fallow.wire.errors import error_from_rpc

Result = TypeVar("Result")

UPLOADS_AT_ONCE: Final = 4
GRANTS_RENEWED_MAX: Final = 5
"""How often one transfer may ask for a new grant: grants live for minutes, and only their start is checked."""
_RESTARTS: Final = frozenset({Reason.OFFSET_MISMATCH})
_REGRANTS: Final = frozenset({Reason.GRANT_EXPIRED})


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob to bring to the blob service."""

    blob: BlobReference
    kind: BlobKind
    source: FileSource


class BlobTransfers:
    """Moves blobs over a connection."""

    def __init__(self, connection: Connection) -> None:
        """Transfers over `connection`."""
        self._connection = connection
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def upload(self, uploads: Sequence[Upload]) -> None:
        """Brings what the account lacks, and records it; returns when all is durable.

        Raises STORAGE_FULL, DIGEST_MISMATCH when a file changes under our hands, and COORDINATOR_UNREACHABLE.
        """
        for first in range(0, len(uploads), GRANTS_PER_REQUEST_MAX):
            part = uploads[first : first + GRANTS_PER_REQUEST_MAX]
            grants = await self._upload_grants(part)
            wanted = [(upload, grant) for upload, grant in zip(part, grants, strict=True) if grant is not None]
            receipts = await _all(self._put(upload, grant) for upload, grant in wanted)
            found = [receipt_to_message(receipt) for receipt in receipts if receipt is not None]
            if found:
                request = job_service_pb2.RecordUploadsRequest(receipts=found)
                await self._connection.call(lambda jobs: jobs.RecordUploads(request, timeout=CALL_TIMEOUT_S))  # noqa: B023

    async def download(self, blob: BlobReference) -> bytes:
        """The content of a blob, checked against its digest. Raises BLOB_UNKNOWN, DIGEST_MISMATCH."""
        content = bytearray()
        async for chunk in self.chunks(blob):
            content += chunk
        data = bytes(content)
        if digest_of(data) != blob.digest:
            raise FallowError(
                Reason.DIGEST_MISMATCH, f"blob {blob.digest.hex()[:16]}… came with other content", field="blob"
            )
        return data

    async def chunks(self, blob: BlobReference) -> AsyncIterator[memoryview]:
        """The content of a blob in order, resumed when the stream breaks; the caller checks the digest."""
        backoff = self._connection.backoff()
        offset = regrants = 0
        grant = await self._download_grant(blob.digest)
        while offset < blob.length_bytes:
            await self._connection.keep_fresh()
            request = blob_service_pb2.GetRequest(grant=grant_to_message(grant), offset_bytes=offset)
            get = self._connection.blobs.unary_stream(
                GET_METHOD,
                request_serializer=blob_service_pb2.GetRequest.SerializeToString,
                response_deserializer=decode_get_part,
            )
            call = get(request)
            try:
                async for chunk in call:
                    backoff.succeeded()
                    offset += len(chunk)
                    yield chunk
                if offset < blob.length_bytes:
                    raise FallowError(
                        Reason.DIGEST_MISMATCH,
                        f"blob {blob.digest.hex()[:16]}… ended after {offset} bytes",
                        limit=f"{blob.length_bytes} bytes",
                    )
            except grpc.aio.AioRpcError as failure:
                if error_from_rpc(failure).reason in _REGRANTS and regrants < GRANTS_RENEWED_MAX:
                    regrants += 1
                    grant = await self._download_grant(blob.digest)
                else:
                    await self._connection.recover(failure, backoff)
            finally:
                call.cancel()

    async def _download_grant(self, digest: Digest) -> SignedBytes:
        request = job_service_pb2.GrantDownloadsRequest(digests=[digest])
        answer = await self._connection.call(lambda jobs: jobs.GrantDownloads(request, timeout=CALL_TIMEOUT_S))
        return grant_from_message(answer.grants[0])

    async def _upload_grants(self, uploads: Sequence[Upload]) -> list[SignedBytes | None]:
        """One grant for each blob, None for those that the account has."""
        request = job_service_pb2.GrantUploadsRequest(
            uploads=[
                job_service_pb2.UploadWanted(blob=reference_to_message(u.blob), kind=BLOB_KINDS.number(u.kind))
                for u in uploads
            ]
        )
        answer = await self._connection.call(lambda jobs: jobs.GrantUploads(request, timeout=CALL_TIMEOUT_S))
        return [None if granted.have else grant_from_message(granted.grant) for granted in answer.uploads]

    async def _put(self, upload: Upload, grant: SignedBytes) -> SignedBytes | None:
        """The receipt of a finished upload; None when somebody of the account was faster."""
        backoff = self._connection.backoff()
        regrants = restarts = 0
        resume = False
        async with self._slots:
            while True:
                await self._connection.keep_fresh()
                try:
                    offset = 0
                    if resume:
                        offset, receipt = await self._standing(grant)
                        if receipt is not None:
                            return receipt
                    return await self._put_once(upload, grant, offset)
                except grpc.aio.AioRpcError as failure:
                    resume = True
                    reason = error_from_rpc(failure).reason
                    if reason in _RESTARTS and restarts < GRANTS_RENEWED_MAX:
                        restarts += 1
                    elif reason in _REGRANTS and regrants < GRANTS_RENEWED_MAX:
                        regrants += 1
                        (renewed,) = await self._upload_grants([upload])
                        if renewed is None:
                            return None
                        grant = renewed
                    else:
                        await self._connection.recover(failure, backoff)

    async def _standing(self, grant: SignedBytes) -> tuple[int, SignedBytes | None]:
        """(where an upload goes on, its receipt when it is complete)."""
        ask = self._connection.blobs.unary_unary(
            GET_UPLOAD_METHOD,
            request_serializer=blob_service_pb2.GetUploadRequest.SerializeToString,
            response_deserializer=blob_service_pb2.GetUploadResponse.FromString,
        )
        answer = await ask(blob_service_pb2.GetUploadRequest(grant=grant_to_message(grant)), timeout=CALL_TIMEOUT_S)
        return answer.offset_bytes, receipt_from_message(answer.receipt) if answer.HasField("receipt") else None

    async def _put_once(self, upload: Upload, grant: SignedBytes, offset: int) -> SignedBytes:
        put = self._connection.blobs.stream_unary(
            PUT_METHOD,
            request_serializer=encode_put_part,
            response_deserializer=blob_service_pb2.PutResponse.FromString,
        )
        answer = await put(_parts(upload.source, grant, offset))
        return receipt_from_message(answer.receipt)


async def _parts(source: FileSource, grant: SignedBytes, offset: int) -> AsyncIterator[PutPart]:
    first = True
    async for chunk in _chunks_of(source, offset):
        yield PutPart(chunk, grant, offset) if first else PutPart(chunk)
        first = False
    if first:
        yield PutPart(b"", grant, offset)


async def _chunks_of(source: FileSource, offset: int) -> AsyncIterator[memoryview]:
    if isinstance(source, bytes):
        view = memoryview(source)
        for start in range(offset, len(view), BLOB_CHUNK_BYTES):
            yield view[start : start + BLOB_CHUNK_BYTES]
        return
    file = await asyncio.to_thread(Path(source).open, "rb")
    with contextlib.closing(file):
        file.seek(offset)
        while chunk := await asyncio.to_thread(file.read, BLOB_CHUNK_BYTES):
            yield memoryview(chunk)


async def _all(work: Iterable[Coroutine[object, object, Result]]) -> list[Result]:
    """All results in order; the first failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
