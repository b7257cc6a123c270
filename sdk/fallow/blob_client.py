"""Blobs over gRPC: uploads and downloads that survive cut connections and a restarted service."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, TypeVar

import grpc

from fallow import direct_transfer
from fallow.call_ending import CallEnding
from fallow.diagnosis import Explain
from fallow.direct_transfer import DIRECT_BYTES_MIN, DirectFailed, DirectRequest, direct_from_message
from fallow.errors import FallowError, Reason
from fallow.limits import BLOB_CHUNK_BYTES, MIB
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import decode_grant, grant_to_message, receipt_from_message
from fallow.wire.chunks import (
    GET_METHOD,
    GET_UPLOAD_METHOD,
    LET_IN_METADATA,
    LOCATE_METHOD,
    PUT_METHOD,
    PutPart,
    decode_get_part,
    encode_put_part,
)
from fallow.wire.errors import ERROR_METADATA_KEY, error_from_rpc

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
Progress = Callable[[int], None]
"""Hears how many bytes are across, in all; after a cut it may hear a smaller number once."""

ATTEMPTS_MAX: Final = 12
"""Failures in a row without a single chunk getting across."""
BACKOFF_MS_MIN: Final = 50
BACKOFF_MS_MAX: Final = 5_000
CALL_TIMEOUT_S: Final = 30.0
"""For calls that carry no chunks."""
STREAM_TIMEOUT_S: Final = 3_600.0
_LARGE_BYTES: Final = 2 * MIB
"""From here on digests and files are worked on in threads, beside the transfer."""
_REHASH_BYTES: Final = 4 * MIB

_TRANSIENT_STATUSES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""Without a detail of the service they come from the transport, which was cut or had enough for now."""
_TRANSIENT_REASONS: Final = frozenset({Reason.OVERLOADED, Reason.DEADLINE_EXCEEDED, Reason.COORDINATOR_STOPPING})

_T = TypeVar("_T")


class BlobClient:
    """Puts and gets blobs through one channel, for as many calls at once as the service allows."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        attempts_max: int = ATTEMPTS_MAX,
        direct: bool = True,
        chance: Callable[[], float] = random.random,
        explain: Explain | None = None,
    ) -> None:
        """`channel` is from `fallow.channel.blob_channel`; it stays the caller's. `chance` spreads retries, in 0..1.

        `direct`: whether the service may name the storage behind it. `explain` looks why the service cannot be reached;
        what can't pass by itself is then raised at once.
        """
        self._explain = explain
        self._put_call = channel.stream_unary(
            PUT_METHOD,
            request_serializer=encode_put_part,
            response_deserializer=blob_service_pb2.PutResponse.FromString,
        )
        self._get_call = channel.unary_stream(
            GET_METHOD,
            request_serializer=blob_service_pb2.GetRequest.SerializeToString,
            # Raw bytes, so that malformed ones are our error and not a bare status of gRPC.
            response_deserializer=_as_it_is,
        )
        self._get_upload_call = channel.unary_unary(
            GET_UPLOAD_METHOD,
            request_serializer=blob_service_pb2.GetUploadRequest.SerializeToString,
            response_deserializer=blob_service_pb2.GetUploadResponse.FromString,
        )
        self._locate_call = channel.unary_unary(
            LOCATE_METHOD,
            request_serializer=blob_service_pb2.LocateBlobRequest.SerializeToString,
            response_deserializer=blob_service_pb2.LocateBlobResponse.FromString,
        )
        self._attempts_max = attempts_max
        self._chance = chance
        self._direct = direct
        """Whether the storage itself is worth a try; not any more once it could not be reached."""

    async def put(self, grant: SignedBytes, source: Buffer | Path, *, progress: Progress | None = None) -> SignedBytes:
        """Uploads what the grant names, from memory or a file, and gives the service's receipt.

        Goes on where an earlier upload stopped. Raises what the service refuses with (GRANT_EXPIRED: call again with a
        fresh grant), DIGEST_MISMATCH when `source` is not what the grant says, COORDINATOR_UNREACHABLE when cut off for
        good, and OSError.
        """
        blob = decode_grant(grant.payload).blob
        opened = await asyncio.to_thread(_FileSource, source) if isinstance(source, Path) else _MemorySource(source)
        try:
            if opened.length_bytes != blob.length_bytes:
                raise FallowError(
                    Reason.DIGEST_MISMATCH,
                    f"{opened.length_bytes} bytes to upload",
                    field="source",
                    limit=f"{blob.length_bytes} bytes, as the grant says",
                )
            upload = _Upload(self, grant, blob, opened)
            return await self._persist(lambda moved: upload.attempt(_both(moved, progress)))
        finally:
            await opened.close()

    async def get(self, grant: SignedBytes, reference: BlobReference, *, progress: Progress | None = None) -> bytes:
        """Downloads a blob into memory; the digest is checked while it comes.

        Raises BLOB_UNKNOWN, DIGEST_MISMATCH, what the service refuses with, or COORDINATOR_UNREACHABLE.
        """
        sink = _MemorySink(reference)
        try:
            await self._persist(lambda moved: self._download(grant, reference, sink, _both(moved, progress)))
            return await sink.finish()
        finally:
            await sink.settle()

    async def get_to_file(
        self, grant: SignedBytes, reference: BlobReference, path: Path, *, progress: Progress | None = None
    ) -> None:
        """Downloads a blob into a file that appears whole or not at all; goes on with the `.part` of an earlier try.

        Raises what `get` raises, and OSError.
        """
        sink = await asyncio.to_thread(_FileSink, path, reference)
        try:
            await self._persist(lambda moved: self._download(grant, reference, sink, _both(moved, progress)))
            await sink.finish()
        finally:
            await sink.settle()

    async def upload_offset(self, grant: SignedBytes) -> tuple[int, SignedBytes | None]:
        """How many bytes of an upload are stored, and the receipt when that is all of them. One try."""
        standing = await self._standing(grant)
        return standing.offset_bytes, standing.receipt

    async def _standing(self, grant: SignedBytes, *, arrived: bool = False) -> _Standing:
        """Where an upload stands. One try."""
        request = blob_service_pb2.GetUploadRequest(grant=grant_to_message(grant), arrived=arrived)
        # What arrived is read back before the answer.
        timeout_s = STREAM_TIMEOUT_S if arrived else CALL_TIMEOUT_S
        try:
            response = await self._get_upload_call(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise _failure(failure) from None
        return _Standing(
            response.offset_bytes,
            receipt_from_message(response.receipt) if response.HasField("receipt") else None,
            direct_from_message(response.direct) if response.HasField("direct") else None,
        )

    async def standing(self, grant: SignedBytes, source: _Source) -> _Standing:
        """Where an upload stands, once the storage itself was sent what it wanted. One try."""
        standing = await self._standing(grant)
        if standing.direct is None or standing.offset_bytes or not self._direct:
            return standing
        try:
            await asyncio.to_thread(direct_transfer.send, standing.direct, source)
            return await self._standing(grant, arrived=True)
        except DirectFailed as failed:
            self._give_up_direct(failed)
        except FallowError as error:
            if error.reason not in {Reason.DIGEST_MISMATCH, Reason.OFFSET_MISMATCH}:
                raise
            self._give_up_direct(error)
        return replace(standing, direct=None)

    def _give_up_direct(self, reason: Exception) -> None:
        logger.info("blobs.through_the_service reason=%s", reason)
        self._direct = False

    async def _located(self, grant: SignedBytes) -> DirectRequest | None:
        """Where the blob can be read beside the service; None: nowhere."""
        request = blob_service_pb2.LocateBlobRequest(grant=grant_to_message(grant))
        try:
            response = await self._locate_call(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                self._direct = False
                return None
            raise _failure(failure) from None
        if not response.HasField("direct"):
            # It has no URLs, now and later; for small blobs nobody asks.
            self._direct = False
            return None
        return direct_from_message(response.direct)

    async def _download_directly(
        self, request: DirectRequest, reference: BlobReference, sink: _Sink, moved: Progress
    ) -> None:
        """From the storage itself, from where the sink stands; what is missing afterwards comes from the service."""
        pieces = direct_transfer.receive(request, sink.offset_bytes)
        try:
            while piece := await asyncio.to_thread(next, pieces, b""):
                if sink.offset_bytes + len(piece) > reference.length_bytes:
                    raise DirectFailed("the storage sends more than the blob holds")
                await sink.add(memoryview(piece))
                moved(sink.offset_bytes)
        except DirectFailed as failed:
            self._give_up_direct(failed)

    async def send(self, parts: _Parts) -> SignedBytes:
        """One Put call. One try."""
        call = self._put_call(parts, timeout=STREAM_TIMEOUT_S)
        parts.let_in_by(call)
        ending = CallEnding(call)
        try:
            response = await call
        except grpc.aio.AioRpcError as failure:
            raise _failure(await ending.failure(failure)) from None
        return receipt_from_message(response.receipt)

    async def _download(self, grant: SignedBytes, reference: BlobReference, sink: _Sink, moved: Progress) -> None:
        """One Get call, from where the sink stands."""
        if sink.offset_bytes == reference.length_bytes:
            return
        if self._direct and reference.length_bytes - sink.offset_bytes >= DIRECT_BYTES_MIN:
            located = await self._located(grant)
            if located is not None:
                await self._download_directly(located, reference, sink, moved)
                if sink.offset_bytes == reference.length_bytes:
                    return
        request = blob_service_pb2.GetRequest(grant=grant_to_message(grant), offset_bytes=sink.offset_bytes)
        call = self._get_call(request, timeout=STREAM_TIMEOUT_S)
        try:
            async for raw in call:
                chunk = decode_get_part(raw)
                if sink.offset_bytes + chunk.nbytes > reference.length_bytes:
                    raise FallowError(
                        Reason.DIGEST_MISMATCH,
                        "the service sends more than the blob holds",
                        field="chunk",
                        limit=f"{reference.length_bytes} bytes",
                    )
                await sink.add(chunk)
                moved(sink.offset_bytes)
        except grpc.aio.AioRpcError as failure:
            raise _failure(failure) from None
        finally:
            call.cancel()
        if sink.offset_bytes < reference.length_bytes:
            raise _PassingError(FallowError(Reason.COORDINATOR_UNREACHABLE, "the download ended early"))

    async def _persist(self, attempt: Callable[[Progress], Awaitable[_T]]) -> _T:
        """Repeats an attempt while it fails for reasons that pass, with growing, jittered pauses."""
        failures = 0
        furthest = 0
        words: FallowError | None = None

        def moved(offset_bytes: int) -> None:
            nonlocal failures, furthest
            if offset_bytes > furthest:
                furthest = offset_bytes
                failures = 0

        while True:
            try:
                return await attempt(moved)
            except _PassingError as passing:
                failures += 1
                if words is None and self._explain is not None and _is_away(passing.error):
                    words = await self._explain(passing.error)
                    if not _is_away(words):
                        raise words from None
                if failures >= self._attempts_max:
                    raise (words if words is not None and _is_away(passing.error) else passing.error) from None
                pause_ms = min(BACKOFF_MS_MAX, BACKOFF_MS_MIN << failures)
                await asyncio.sleep(pause_ms / 1000 * (0.5 + self._chance() / 2))


class _PassingError(Exception):
    """What may go away by itself, and the error to raise when it does not."""

    def __init__(self, error: FallowError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Standing:
    """How far an upload is."""

    offset_bytes: int
    receipt: SignedBytes | None
    """Of a blob that is whole."""
    direct: DirectRequest | None
    """How the whole blob may be sent to the storage itself."""


class _Upload:
    """One upload through however many calls it takes."""

    def __init__(self, client: BlobClient, grant: SignedBytes, blob: BlobReference, source: _Source) -> None:
        self._client = client
        self._grant = grant
        self._blob = blob
        self._source = source
        self._ask_first = blob.length_bytes >= _LARGE_BYTES
        """A small blob is at first sent without asking how much of it is there."""
        self._restarted = False

    async def attempt(self, moved: Progress) -> SignedBytes:
        """One call, from where the service stands."""
        offset = 0
        if self._ask_first:
            standing = await self._client.standing(self._grant, self._source)
            if standing.receipt is not None:
                moved(self._blob.length_bytes)
                return standing.receipt
            offset = standing.offset_bytes if standing.offset_bytes <= self._blob.length_bytes else 0
        self._ask_first = True
        try:
            return await self._client.send(_Parts(self._source, self._grant, self._blob, offset, moved))
        except FallowError as error:
            if error.reason is Reason.OFFSET_MISMATCH:
                raise _PassingError(error) from None
            if error.reason is Reason.DIGEST_MISMATCH and offset and not self._restarted:
                # What lay there was damaged, by a power loss for instance; the service has dropped it.
                self._restarted = True
                raise _PassingError(error) from None
            raise


class _Parts:
    """The messages of one Put call. No generator: gRPC may still be waiting in it when the call is over."""

    def __init__(
        self, source: _Source, grant: SignedBytes, blob: BlobReference, offset_bytes: int, moved: Progress
    ) -> None:
        self._source = source
        self._grant: SignedBytes | None = grant
        self._length_bytes = blob.length_bytes
        self._offset_bytes = offset_bytes
        self._moved = moved
        self._call: grpc.aio.StreamUnaryCall[PutPart, blob_service_pb2.PutResponse] | None = None

    def let_in_by(self, call: grpc.aio.StreamUnaryCall[PutPart, blob_service_pb2.PutResponse]) -> None:
        """Tells which call these parts go to; it has not asked for any yet."""
        self._call = call

    def __aiter__(self) -> _Parts:
        return self

    async def __anext__(self) -> PutPart:
        grant, self._grant = self._grant, None
        offset = self._offset_bytes
        if grant is None:
            # Asked for more: everything before is on its way.
            self._moved(offset)
            if offset >= self._length_bytes or not await self._let_in():
                raise StopAsyncIteration
        chunk = await self._source.piece(offset, min(BLOB_CHUNK_BYTES, self._length_bytes - offset))
        self._offset_bytes += len(chunk)
        return PutPart(chunk, grant, offset if grant else 0)

    async def _let_in(self) -> bool:
        """Waits until the service wants more than the first chunk; False when it has answered already.

        A call that ends while it writes loses its status in gRPC; so refusals are waited for while nothing is written.
        A refusal has initial metadata too, a moment before the call knows that it is over: the key tells them apart.
        """
        assert self._call is not None, "parts are asked for once the call is there"
        if any(key == LET_IN_METADATA for key, _ in await self._call.initial_metadata()):
            return not self._call.done()
        await self._call.code()
        return False


class _Source(Protocol):
    """What is uploaded, piece by piece."""

    length_bytes: int

    async def piece(self, offset_bytes: int, length_bytes: int) -> Buffer: ...

    def read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        """As `piece`, in a thread."""
        ...


class _MemorySource:
    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data).cast("B")
        self.length_bytes = self._view.nbytes

    async def piece(self, offset_bytes: int, length_bytes: int) -> Buffer:
        return self._view[offset_bytes : offset_bytes + length_bytes]

    def read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        return self._view[offset_bytes : offset_bytes + length_bytes]

    async def close(self) -> None:
        pass


class _FileSource:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.length_bytes = os.fstat(self._descriptor).st_size
        self._reading: asyncio.Future[bytes] | None = None

    async def piece(self, offset_bytes: int, length_bytes: int) -> Buffer:
        self._reading = asyncio.get_running_loop().run_in_executor(
            None, os.pread, self._descriptor, length_bytes, offset_bytes
        )
        return self._whole(await asyncio.shield(self._reading), length_bytes)

    def read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        return self._whole(os.pread(self._descriptor, length_bytes, offset_bytes), length_bytes)

    @staticmethod
    def _whole(data: bytes, length_bytes: int) -> bytes:
        if len(data) != length_bytes:
            raise FallowError(Reason.DIGEST_MISMATCH, "the file became shorter while it was uploaded", field="source")
        return data

    async def close(self) -> None:
        if self._reading is not None:
            await asyncio.wait([self._reading])
        os.close(self._descriptor)


class _Sink(Protocol):
    """What is downloaded into, always at its end."""

    offset_bytes: int

    async def add(self, chunk: memoryview) -> None: ...


class _MemorySink:
    """Bytes and their digest, which for large blobs are put in place beside the transfer."""

    def __init__(self, reference: BlobReference) -> None:
        self._reference = reference
        # Hands out what was written into it without another copy.
        self._buffer = io.BytesIO()
        self._digest = hashlib.sha256()
        self._beside = _Beside()
        self.offset_bytes = 0

    async def add(self, chunk: memoryview) -> None:
        if self._reference.length_bytes < _LARGE_BYTES:
            self._write(chunk)
        else:
            await self._beside.run(lambda: self._write(chunk))
        self.offset_bytes += chunk.nbytes

    async def finish(self) -> bytes:
        """The blob. Raises DIGEST_MISMATCH."""
        await self._beside.wait()
        if self._digest.digest() != self._reference.digest:
            raise _altered(self._reference)
        return self._buffer.getvalue()

    async def settle(self) -> None:
        """Waits until nothing works on the chunks any more."""
        await self._beside.settle()

    def _write(self, chunk: memoryview) -> None:
        if not self._buffer.tell():
            # All the room at once, as soon as the service shows that there is something to come.
            self._buffer.seek(self._reference.length_bytes - 1)
            self._buffer.write(b"\0")
            self._buffer.seek(0)
        self._digest.update(chunk)
        self._buffer.write(chunk)


class _FileSink:
    """A `.part` file and the digest of what is in it."""

    def __init__(self, path: Path, reference: BlobReference) -> None:
        """Goes on with what an earlier try left. Blocks."""
        self._path = path
        self._partial = path.with_name(f"{path.name}.part")
        self._reference = reference
        self._digest = hashlib.sha256()
        self._beside = _Beside()
        self.offset_bytes = 0
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._descriptor).st_size > reference.length_bytes:
            os.ftruncate(self._descriptor, 0)
        while piece := os.pread(self._descriptor, _REHASH_BYTES, self.offset_bytes):
            self._digest.update(piece)
            self.offset_bytes += len(piece)

    async def add(self, chunk: memoryview) -> None:
        offset = self.offset_bytes
        await self._beside.run(lambda: self._write(chunk, offset))
        self.offset_bytes += chunk.nbytes

    async def finish(self) -> None:
        """Makes the file appear. Raises DIGEST_MISMATCH, and then nothing is left."""
        await self._beside.wait()
        if self._digest.digest() != self._reference.digest:
            self._partial.unlink(missing_ok=True)
            raise _altered(self._reference)
        await asyncio.to_thread(os.fsync, self._descriptor)
        self._partial.replace(self._path)

    async def settle(self) -> None:
        """Lets go of the file once nothing works on it any more."""
        await self._beside.settle()
        os.close(self._descriptor)

    def _write(self, chunk: memoryview, offset: int) -> None:
        self._digest.update(chunk)
        while chunk:
            written = os.pwrite(self._descriptor, chunk, offset)
            offset += written
            chunk = chunk[written:]


class _Beside:
    """One piece of work in a thread while the next chunk comes."""

    def __init__(self) -> None:
        self._running: asyncio.Future[None] | None = None

    async def run(self, work: Callable[[], None]) -> None:
        """Starts `work` once what runs has ended; raises what that raised."""
        await self.wait()
        self._running = asyncio.get_running_loop().run_in_executor(None, work)

    async def wait(self) -> None:
        """Waits for what runs and raises what it raised."""
        if self._running is not None:
            await asyncio.shield(self._running)
            self._running = None

    async def settle(self) -> None:
        """Waits for what runs, whatever comes of it."""
        if self._running is not None:
            await asyncio.wait([self._running])


def _altered(reference: BlobReference) -> FallowError:
    return FallowError(
        Reason.DIGEST_MISMATCH,
        "the downloaded bytes are not the blob",
        field="blob.digest",
        limit=f"digest {reference.digest.hex()}",
    )


def _failure(failure: grpc.aio.AioRpcError) -> FallowError | _PassingError:
    """What a failed call is to be answered with."""
    error = error_from_rpc(failure)
    if any(key == ERROR_METADATA_KEY for key, _ in failure.trailing_metadata() or ()):
        passing = error.reason in _TRANSIENT_REASONS
    else:
        passing = failure.code() in _TRANSIENT_STATUSES
    return _PassingError(error) if passing else error


def _is_away(error: FallowError) -> bool:
    return error.reason is Reason.COORDINATOR_UNREACHABLE


def _as_it_is(data: bytes) -> bytes:
    return data


def _both(moved: Progress, progress: Progress | None) -> Progress:
    if progress is None:
        return moved

    def hear(offset_bytes: int) -> None:
        moved(offset_bytes)
        progress(offset_bytes)

    return hear
