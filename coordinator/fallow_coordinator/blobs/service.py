"""The rpc face of the blob service: grants in, bytes in and out, receipts out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import grpc
from google.protobuf.message import Message

from fallow.errors import FallowError, Reason
from fallow.grant_check import checked_grant
from fallow.identity import PrivateKey, fingerprint_of
from fallow.ids import KeyFingerprint
from fallow.limits import BLOB_CHUNK_BYTES, BLOCK_BYTES_MAX, KIB, MIB
from fallow.row_block import Span
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import (
    BlobKind,
    BlobOperation,
    Grant,
    digest_from,
    grant_from_message,
    receipt_to_message,
    reference_from_message,
    reference_to_message,
)
from fallow.wire.chunks import LET_IN_METADATA, PutPart, decode_put_part, encode_get_part
from fallow.wire.moments import moment_from_message
from fallow_coordinator.blobs.admission import Gate, Turn, Turns
from fallow_coordinator.blobs.config import BlobLimits
from fallow_coordinator.blobs.deletion import DigestLocks, Touches, delete_blobs
from fallow_coordinator.blobs.direct import DirectTransfers, request_to_message
from fallow_coordinator.blobs.packs import Source, SourceBlocks, pack_blocks
from fallow_coordinator.blobs.receipts import Receipts, receipt_of
from fallow_coordinator.blobs.single_rows import equal_rows, pairs_of, sources_of, spans_of
from fallow_coordinator.blobs.storage import BlobStorage, storage_full, unknown
from fallow_coordinator.blobs.uploads import PartialUpload, PartialUploads, UnfinishedError, account_name
from fallow_coordinator.service.calls import Context, decoded, method_name, peer_of, service_handlers
from fallow_coordinator.service.errors import abort
from fallow_coordinator.service.rate_limit import RateLimit

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_A = TypeVar("_A")
_M = TypeVar("_M", bound=Message)

_SERVICE: Final = blob_service_pb2.DESCRIPTOR.services_by_name["BlobService"]
_READ_AHEAD_BYTES: Final = 4 * MIB
"""Read from storage at once; the next piece is read while this one is sent."""
_DRAIN_S: Final = 2.0
_GRANT_REQUEST_BYTES_MAX: Final = 4 * KIB
"""Longest request that holds a grant and a number or two."""
_PAGE_SIZE_DEFAULT: Final = 1_000
_PEERS_REMEMBERED_MAX: Final = 10_000


class BlobService:
    """Answers the methods of `fallow.v1.BlobService`."""

    def __init__(
        self,
        *,
        storage: BlobStorage,
        uploads_folder: Path,
        key: PrivateKey,
        coordinator_public_key: bytes,
        limits: BlobLimits,
        direct: DirectTransfers | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`key` signs receipts; `coordinator_public_key` (DER) signs grants, and its holder alone may pack.

        `direct` gives out URLs of the storage; None: all bytes pass through here.
        """
        self._storage = storage
        self._limits = limits
        self._direct = direct
        self._coordinator_public_key = coordinator_public_key
        self._coordinator = fingerprint_of(coordinator_public_key)
        self._now_ms = now_ms
        self._threads = ThreadPoolExecutor(limits.threads, "blobs")
        # Its own pool: write-back must not wait behind appends that wait for it.
        self._syncer = ThreadPoolExecutor(limits.threads, "blobs-sync")
        self._uploads = PartialUploads(uploads_folder, self._syncer)
        self._receipts = Receipts(storage, key)
        self._sources = SourceBlocks(storage, self._threads, bytes_max=limits.source_cache_bytes)
        self._puts = Gate("uploads", streams_max=limits.uploads_max, per_peer_max=limits.streams_per_peer_max)
        self._gets = Gate("downloads", streams_max=limits.downloads_max, per_peer_max=limits.streams_per_peer_max)
        self._packs = Gate("packs", streams_max=limits.packs_waiting_max, per_peer_max=limits.packs_waiting_max)
        self._packing = asyncio.Semaphore(limits.packs_max)
        self._turns = Turns(
            patience_s=limits.chunk_patience_ms / 1000, takeover_patience_s=limits.takeover_patience_ms / 1000
        )
        self._growing: set[PartialUpload] = set()
        self._touches = Touches(began_at_ms=now_ms(), remembered_max=limits.touches_remembered_max)
        self._locks = DigestLocks()
        self._rate = RateLimit(
            per_s=limits.calls_per_peer_s,
            burst=limits.calls_per_peer_burst,
            peers_max=_PEERS_REMEMBERED_MAX,
            clock=time.monotonic,
        )

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server is given. Messages are taken as bytes: we parse them ourselves, without copies."""
        return service_handlers(
            _SERVICE,
            {
                "GetUpload": grpc.unary_unary_rpc_method_handler(_ended_well("GetUpload", self._get_upload)),
                "Put": grpc.stream_unary_rpc_method_handler(_ended_well("Put", self._put)),
                "Get": grpc.unary_stream_rpc_method_handler(_ended_well("Get", self._get)),
                "LocateBlob": grpc.unary_unary_rpc_method_handler(_ended_well("LocateBlob", self._locate)),
                "Pack": grpc.unary_unary_rpc_method_handler(_ended_well("Pack", self._pack)),
                "PackRows": grpc.unary_unary_rpc_method_handler(_ended_well("PackRows", self._pack_rows)),
                "CompareRows": grpc.unary_unary_rpc_method_handler(_ended_well("CompareRows", self._compare_rows)),
                "ListBlobs": grpc.unary_unary_rpc_method_handler(_ended_well("ListBlobs", self._list_blobs)),
                "DeleteBlobs": grpc.unary_unary_rpc_method_handler(_ended_well("DeleteBlobs", self._delete_blobs)),
            },
        )

    def sweep(self) -> None:
        """Removes uploads that nobody goes on with. Blocks for as long as listing a folder takes."""
        removed = self._uploads.remove_older_than(self._limits.partial_age_ms_max)
        if removed:
            _log.info("uploads.swept removed=%d", removed)

    async def sweep_direct(self) -> None:
        """Removes uploads by URL that nobody came back for."""
        if self._direct is not None:
            removed = await self._direct.sweep(self._now_ms() - self._limits.partial_age_ms_max)
            if removed:
                _log.info("uploads.swept_from_bucket removed=%d", removed)

    def close(self) -> None:
        """Ends the threads once what they do is done."""
        self._threads.shutdown()
        self._syncer.shutdown()

    # ------------------------------------------------------------------------------------------------------- calls

    async def _get_upload(self, raw: bytes, context: Context) -> bytes:
        peer = self._peer(context)
        request = _request_with_grant(raw, blob_service_pb2.GetUploadRequest)
        grant = self._checked(grant_from_message(request.grant), BlobOperation.PUT, peer)
        receipt = await self._found(grant)
        if receipt is None and request.arrived and self._direct is not None:
            with self._puts.entered(peer):
                receipt = await self._arrived(grant, self._direct)
        if receipt is not None:
            response = blob_service_pb2.GetUploadResponse(
                offset_bytes=grant.blob.length_bytes, receipt=receipt_to_message(receipt)
            )
        else:
            response = blob_service_pb2.GetUploadResponse(
                offset_bytes=self._uploads.offset_bytes(grant.blob, grant.account_id)
            )
            if self._direct is not None and (request_of := self._direct.upload(grant, self._now_ms())) is not None:
                response.direct.CopyFrom(request_to_message(request_of))
        return response.SerializeToString()

    async def _locate(self, raw: bytes, context: Context) -> bytes:
        peer = self._peer(context)
        request = _request_with_grant(raw, blob_service_pb2.LocateBlobRequest)
        grant = self._checked(grant_from_message(request.grant), BlobOperation.GET, peer)
        response = blob_service_pb2.LocateBlobResponse()
        if self._direct is not None:
            if await self._storage.size(grant.blob.digest) != grant.blob.length_bytes:
                raise unknown(grant.blob.digest)
            if (found := self._direct.download(grant, self._now_ms())) is not None:
                response.direct.CopyFrom(request_to_message(found))
        return response.SerializeToString()

    async def _put(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        peer = self._peer(context)
        with self._puts.entered(peer):
            receipt = await self._received(requests, peer, context)
        return blob_service_pb2.PutResponse(receipt=receipt_to_message(receipt)).SerializeToString()

    async def _get(self, raw: bytes, context: Context) -> None:
        peer = self._peer(context)
        request = _request_with_grant(raw, blob_service_pb2.GetRequest)
        grant = self._checked(grant_from_message(request.grant), BlobOperation.GET, peer)
        length = grant.blob.length_bytes
        if request.offset_bytes > length:
            raise FallowError(
                Reason.OFFSET_MISMATCH,
                f"offset {request.offset_bytes} is beyond the end",
                field="offset_bytes",
                limit=f"{length} bytes",
            )
        if await self._storage.size(grant.blob.digest) != length:
            raise unknown(grant.blob.digest)
        with self._gets.entered(peer):
            await self._send(grant, request.offset_bytes, context)

    async def _pack(self, raw: bytes, context: Context) -> bytes:
        self._check_coordinator(context, "packs")
        request = decoded(raw, blob_service_pb2.PackRequest)
        sources = [reference_from_message(source, f"sources[{index}]") for index, source in enumerate(request.sources)]
        spans = [Span(span.source, span.first_row, span.first_row + span.rows) for span in request.spans]
        blob, rows = await self._packed(sources, spans, request.nonce)
        return blob_service_pb2.PackResponse(blob=reference_to_message(blob), rows=rows).SerializeToString()

    async def _pack_rows(self, raw: bytes, context: Context) -> bytes:
        self._check_coordinator(context, "packs")
        request = decoded(raw, blob_service_pb2.PackRowsRequest)
        blob, _ = await self._packed(sources_of(request.sources), spans_of(request.rows), request.nonce)
        return blob_service_pb2.PackRowsResponse(blob=reference_to_message(blob)).SerializeToString()

    async def _packed(
        self, sources: Sequence[Source], spans: Sequence[Span], nonce: bytes
    ) -> tuple[BlobReference, int]:
        with self._packs.entered(self._coordinator):
            async with self._packing:
                self._check_space(BLOCK_BYTES_MAX)
                return await pack_blocks(
                    sources=sources,
                    spans=spans,
                    nonce=nonce,
                    blocks=self._sources,
                    storage=self._storage,
                    threads=self._threads,
                )

    async def _compare_rows(self, raw: bytes, context: Context) -> bytes:
        self._check_coordinator(context, "compares")
        request = decoded(raw, blob_service_pb2.CompareRowsRequest)
        sources, pairs = sources_of(request.sources), pairs_of(request.pairs)
        with self._packs.entered(self._coordinator):
            async with self._packing:
                equal = await equal_rows(sources, pairs, blocks=self._sources, threads=self._threads)
        return blob_service_pb2.CompareRowsResponse(equal=equal).SerializeToString()

    async def _list_blobs(self, raw: bytes, context: Context) -> bytes:
        self._check_coordinator(context, "lists blobs")
        request = decoded(raw, blob_service_pb2.ListBlobsRequest)
        size = request.page_size or _PAGE_SIZE_DEFAULT
        if not request.shelf <= 255 or size > self._limits.listed_max:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"shelf {request.shelf}, {size} blobs",
                field="page_size",
                limit=f"shelves 0 to 255, {self._limits.listed_max} blobs",
            )
        before_ms = moment_from_message(request.stored_before)
        found = await self._storage.shelf(request.shelf)
        old = [one.digest for one in found if one.stored_at_ms < before_ms and one.digest > request.after]
        return blob_service_pb2.ListBlobsResponse(digests=old[:size]).SerializeToString()

    async def _delete_blobs(self, raw: bytes, context: Context) -> bytes:
        self._check_coordinator(context, "deletes blobs")
        request = decoded(raw, blob_service_pb2.DeleteBlobsRequest)
        if len(request.digests) > self._limits.deleted_per_call_max:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"{len(request.digests)} blobs at once",
                field="digests",
                limit=f"{self._limits.deleted_per_call_max} blobs",
            )
        digests = [digest_from(digest, f"digests[{index}]") for index, digest in enumerate(request.digests)]
        gone = await delete_blobs(
            self._storage,
            self._touches,
            self._locks,
            digests,
            untouched_since_ms=moment_from_message(request.decided_at) - self._limits.grace_ms,
            packed_only=request.packed_only,
        )
        for digest in gone:
            self._sources.forget(digest)
        _log.info("blobs.deleted named=%d gone=%d packed_only=%s", len(digests), len(gone), request.packed_only)
        return blob_service_pb2.DeleteBlobsResponse(digests=gone).SerializeToString()

    def _check_coordinator(self, context: Context, what: str) -> None:
        if self._peer(context) != self._coordinator:
            raise FallowError(Reason.PERMISSION_DENIED, f"only the coordinator {what}", field="key")

    async def _found(self, grant: Grant) -> SignedBytes | None:
        """A fresh receipt for what this account uploaded before; from now on the blob stays for the grace at least."""
        async with self._locks.held(grant.blob.digest):
            now_ms = self._now_ms()
            receipt = await self._receipts.find(grant, now_ms=now_ms)
            if receipt is not None:
                self._touches.touch(grant.blob.digest, now_ms)
            return receipt

    # ----------------------------------------------------------------------------------------------------- receiving

    async def _received(self, requests: AsyncIterator[bytes], peer: KeyFingerprint, context: Context) -> SignedBytes:
        """Takes in one upload and gives the receipt once everything is durable; what is wrong is not kept.

        Initial metadata is sent when the upload is let in. A client that waits for it before its second chunk hears
        every refusal in full: gRPC's client loses the status of a call that ends while it writes.
        """
        first = await self._first_part(requests)
        if first.grant is None:
            raise FallowError(Reason.FIELD_MISSING, "an upload begins with its grant", field="grant")
        grant = self._checked(first.grant, BlobOperation.PUT, peer)
        _check_block_length(grant)
        async with self._turns.taken(f"{grant.blob.digest.hex()}-{grant.account_id}") as turn:
            known = await self._found(grant)
            if known is not None:
                return known
            upload = self._uploads.upload(grant.blob, grant.account_id)
            stands_at = self._uploads.offset_bytes(grant.blob, grant.account_id) if first.offset_bytes else 0
            self._check_space(grant.blob.length_bytes - min(stands_at, grant.blob.length_bytes))
            self._growing.add(upload)
            try:
                await self._in_thread(upload.open, first.offset_bytes)
                await context.send_initial_metadata(((LET_IN_METADATA, "1"),))
                await self._grow(upload, first, requests, turn)
                return await self._stored(upload, grant)
            except UnfinishedError:
                raise
            except Exception:
                await self._in_thread(upload.discard)
                await _drained(requests, upload.remaining_bytes)
                raise
            finally:
                self._growing.discard(upload)
                await self._in_thread(upload.close)

    async def _arrived(self, grant: Grant, direct: DirectTransfers) -> SignedBytes:
        """Reads back what came by URL, and gives the receipt once it is a blob; what is wrong is not kept."""
        _check_block_length(grant)
        async with self._turns.taken(f"{grant.blob.digest.hex()}-{grant.account_id}"):
            if (known := await self._found(grant)) is not None:
                return known
            data = await direct.claim(grant)
            async with self._locks.held(grant.blob.digest):
                now_ms = self._now_ms()
                try:
                    receipt = await self._in_thread(receipt_of, grant, lambda: data, now_ms=now_ms)
                except FallowError:
                    await direct.settle(grant, accept=False)
                    raise
                self._touches.touch(grant.blob.digest, now_ms)
                signed = await self._receipts.keep(receipt)
                await direct.settle(grant, accept=True)
            _log.info("blob.arrived digest=%s bytes=%d", grant.blob.digest.hex(), grant.blob.length_bytes)
            return signed

    async def _first_part(self, requests: AsyncIterator[bytes]) -> PutPart:
        try:
            async with asyncio.timeout(self._limits.chunk_patience_ms / 1000):
                return decode_put_part(await anext(requests))
        except TimeoutError:
            raise self._too_slow() from None
        except StopAsyncIteration:
            raise FallowError(Reason.FIELD_MISSING, "the upload is empty", field="grant") from None

    async def _grow(self, upload: PartialUpload, first: PutPart, requests: AsyncIterator[bytes], turn: Turn) -> None:
        """Writes and digests each chunk in a thread while the next one is received."""
        writing: asyncio.Future[None] | None = None
        part: PutPart | None = first
        missing_bytes = upload.remaining_bytes
        try:
            async with turn.deadline:
                while part is not None and not turn.taken_over:
                    missing_bytes -= _checked_length(part, missing_bytes, upload.blob)
                    if writing is not None:
                        await asyncio.shield(writing)
                    turn.advance()
                    writing = asyncio.get_running_loop().run_in_executor(self._threads, upload.append, part.chunk)
                    part = await _next_part(requests)
                if writing is not None:
                    await asyncio.shield(writing)
        except TimeoutError:
            if not turn.taken_over:
                raise self._too_slow() from None
        finally:
            if writing is not None and not writing.done():
                # Cut off in mid-chunk: the file is closed only after the thread has let go of it.
                await asyncio.wait([writing])
        if turn.taken_over:
            raise UnfinishedError(
                Reason.OFFSET_MISMATCH, "another stream goes on with this upload", field="offset_bytes"
            )
        if missing_bytes:
            # A cut connection may look like an early end: what came stays.
            raise UnfinishedError(
                Reason.DIGEST_MISMATCH,
                f"the upload ended {missing_bytes} bytes early",
                field="chunk",
                limit=f"{upload.blob.length_bytes} bytes, as the grant says",
            )

    async def _stored(self, upload: PartialUpload, grant: Grant) -> SignedBytes:
        """Checks the finished file and makes it a blob."""
        await self._in_thread(upload.finish)
        async with self._locks.held(grant.blob.digest):
            now_ms = self._now_ms()
            receipt = await self._in_thread(receipt_of, grant, upload.path.read_bytes, now_ms=now_ms)
            self._touches.touch(grant.blob.digest, now_ms)
            # The note first: a blob without its note would have to be uploaded again, a note without its blob says
            # nothing.
            signed = await self._receipts.keep(receipt)
            await self._storage.put_file(grant.blob.digest, upload.path)
        _log.info(
            "blob.stored digest=%s bytes=%d kind=%s account=%s",
            grant.blob.digest.hex(),
            grant.blob.length_bytes,
            grant.kind.value,
            account_name(grant.account_id),
        )
        return signed

    # ------------------------------------------------------------------------------------------------------- sending

    async def _send(self, grant: Grant, offset_bytes: int, context: Context) -> None:
        """Sends a blob from an offset, reading ahead by one piece."""
        loop = asyncio.get_running_loop()
        patience_s = self._limits.chunk_patience_ms / 1000
        length = grant.blob.length_bytes

        def read(position: int) -> asyncio.Task[memoryview]:
            wanted = min(_READ_AHEAD_BYTES, length - position)
            return loop.create_task(self._read(grant, position, wanted))

        ahead = read(offset_bytes) if offset_bytes < length else None
        try:
            async with asyncio.timeout(patience_s) as deadline:
                position = offset_bytes
                while ahead is not None:
                    piece = await ahead
                    position += piece.nbytes
                    ahead = read(position) if position < length else None
                    for start in range(0, piece.nbytes, BLOB_CHUNK_BYTES):
                        await context.write(encode_get_part(piece[start : start + BLOB_CHUNK_BYTES]))
                        deadline.reschedule(loop.time() + patience_s)
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            if ahead is not None:
                ahead.cancel()

    async def _read(self, grant: Grant, offset: int, length: int) -> memoryview:
        return await self._storage.read(grant.blob.digest, offset=offset, length=length)

    # -------------------------------------------------------------------------------------------------------- checks

    def _peer(self, context: Context) -> KeyFingerprint:
        peer = peer_of(context).key_fingerprint
        self._rate.take(peer)
        return peer

    def _checked(self, signed: SignedBytes, operation: BlobOperation, peer: KeyFingerprint) -> Grant:
        return checked_grant(
            signed,
            operation=operation,
            coordinator_public_key=self._coordinator_public_key,
            peer=peer,
            now_ms=self._now_ms(),
        )

    def _check_space(self, wanted_bytes: int) -> None:
        """Raises STORAGE_FULL when this and all uploads under way would not leave the floor free."""
        free = self._storage.free_bytes()
        if free is None:
            return
        promised = sum(upload.remaining_bytes for upload in self._growing)
        left = free - promised - wanted_bytes
        if left < self._limits.free_bytes_floor:
            _log.warning(
                "storage.full free_bytes=%d promised_bytes=%d wanted_bytes=%d floor_bytes=%d",
                free,
                promised,
                wanted_bytes,
                self._limits.free_bytes_floor,
            )
            raise storage_full(
                f"{free} bytes are free, {promised} of them promised, {self._limits.free_bytes_floor} are kept free, "
                f"{wanted_bytes} are wanted"
            )

    def _too_slow(self) -> FallowError:
        return UnfinishedError(
            Reason.DEADLINE_EXCEEDED,
            "the stream stood still for too long",
            limit=f"{self._limits.chunk_patience_ms} ms between chunks",
            hint="go on from where it stands",
        )

    async def _in_thread(self, call: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Runs a blocking call to its end, even when this stream is cut off meanwhile."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments, **named))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise


def _request_with_grant(raw: bytes, request_type: type[_M]) -> _M:
    """A request whose size is checked before it is parsed. Raises LIMIT_EXCEEDED or MALFORMED_MESSAGE."""
    if len(raw) > _GRANT_REQUEST_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a {request_type.DESCRIPTOR.name} of {len(raw)} bytes",
            field=request_type.DESCRIPTOR.name,
            limit=f"{_GRANT_REQUEST_BYTES_MAX} bytes",
        )
    return decoded(raw, request_type)


def _ended_well(method: str, answer: Callable[[_R, Context], Awaitable[_A]]) -> Callable[[_R, Context], Awaitable[_A]]:
    """The method, with every failure sent by the one door."""
    name = method_name(_SERVICE, method)

    async def handle(request: _R, context: Context) -> _A:
        try:
            return await answer(request, context)
        except Exception as error:
            await abort(context, error, name)

    return handle


def _check_block_length(grant: Grant) -> None:
    if grant.kind is BlobKind.ROW_BLOCK and grant.blob.length_bytes > BLOCK_BYTES_MAX:
        raise FallowError(
            Reason.BLOCK_TOO_LARGE,
            f"a row block of {grant.blob.length_bytes} bytes",
            field="grant.blob.length_bytes",
            limit=f"{BLOCK_BYTES_MAX} bytes a block",
            hint="cut the rows into several blocks",
        )


async def _drained(requests: AsyncIterator[bytes], declared_bytes: int) -> None:
    """Lets the rest run out for a moment, so that the client is not writing, and deaf, when it is refused."""
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_DRAIN_S):
            while declared_bytes > 0:
                declared_bytes -= len(await anext(requests))


async def _next_part(requests: AsyncIterator[bytes]) -> PutPart | None:
    try:
        raw = await anext(requests)
    except StopAsyncIteration:
        return None
    return decode_put_part(raw)


def _checked_length(part: PutPart, missing_bytes: int, blob: BlobReference) -> int:
    """The length of a part's chunk. Raises LIMIT_EXCEEDED beyond a chunk's limit, DIGEST_MISMATCH beyond the blob's."""
    length = len(part.chunk)
    if length > BLOB_CHUNK_BYTES:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a chunk of {length} bytes",
            field="chunk",
            limit=f"{BLOB_CHUNK_BYTES} bytes a chunk",
        )
    if length > missing_bytes:
        raise FallowError(
            Reason.DIGEST_MISMATCH,
            f"the upload is longer than declared, by {length - missing_bytes} bytes or more",
            field="chunk",
            limit=f"{blob.length_bytes} bytes, as the grant says",
        )
    return length
