"""Serves the blobs that lie here to other workers of the pool, as the blob service would: the same methods and grants.

Whoever may read a blob may also leave it here: an upload comes under the grant to read. Nobody has to trust this
server, because readers check digests; it trusts nobody, because it checks grants and digests too.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from google.protobuf.message import DecodeError

from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.grant_check import checked_grant
from fallow.identity import POOL_CACHE_NAME, PrivateKey, fingerprint_of, load_certificate, public_der_of_certificate
from fallow.ids import KeyFingerprint
from fallow.limits import BLOB_CHUNK_BYTES, KIB
from fallow.roles import Tier
from fallow.session import BlobReference, PoolCache, SignedBytes
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import BlobOperation, Grant, grant_from_message
from fallow.wire.chunks import (
    BLOB_SERVICE,
    CHUNK_MESSAGE_BYTES_MAX,
    LET_IN_METADATA,
    PutPart,
    decode_put_part,
    encode_get_part,
    malformed,
)
from fallow.wire.errors import ERROR_METADATA_KEY, encode_error
from fallow_worker.bundle_cache import BundleCache

_log = logging.getLogger(__name__)

READS_AT_ONCE_MAX: Final = 32
KEEPS_AT_ONCE_MAX: Final = 4
STREAMS_OF_A_PEER_MAX: Final = 4
CONNECTIONS_MAX: Final = 1_024
CALLS_AT_ONCE_MAX: Final = 256
CHUNK_PATIENCE_S: Final = 10.0
"""An upload that stands still for so long is dropped."""
SEND_PATIENCE_S: Final = 30.0
"""A reader that takes no chunk for so long is dropped."""
CERTIFICATE_VALID_FOR: Final = datetime.timedelta(days=3_650)
CLOCK_ALLOWANCE: Final = datetime.timedelta(days=1)
STOP_GRACE_S: Final = 0.5
TIERS_THAT_SERVE: Final = frozenset({Tier.MANAGED, Tier.OPERATOR})

Context = grpc.aio.ServicerContext[Any, Any]

_STATUS_OF: Final = {
    Reason.BLOB_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.OFFSET_MISMATCH: grpc.StatusCode.OUT_OF_RANGE,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STORAGE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.GRANT_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    Reason.GRANT_EXPIRED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""Statuses of what is refused here; INVALID_ARGUMENT for what is not listed."""


@dataclass(slots=True)
class PoolCacheCounts:
    """What others got and left here, for status and tests."""

    blobs_served: int = 0
    bytes_served: int = 0
    blobs_kept: int = 0
    blobs_lacking: int = 0
    refused: int = 0


class PoolCacheServer:
    """Answers `Get`, `Put` and `GetUpload` of `fallow.v1.BlobService` from one cache. Used from one event loop."""

    def __init__(
        self,
        credentials: Credentials,
        cache: BundleCache,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`credentials` say whose grants hold, who may connect, and for which pool."""
        self.counts = PoolCacheCounts()
        self._credentials = credentials
        self._cache = cache
        self._now_ms = now_ms
        self._gates = {
            BlobOperation.GET: _Gate("readers", READS_AT_ONCE_MAX),
            BlobOperation.PUT: _Gate("uploads", KEEPS_AT_ONCE_MAX),
        }
        self._server: grpc.aio.Server | None = None

    async def start(self, listen: str) -> PoolCache:
        """Listens at `host:port` (port 0: any) and gives what others have to know. Raises FIELD_INVALID."""
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal():
            raise FallowError(
                Reason.FIELD_INVALID, f"{listen!r} is no place to listen", field="--serve-cache", limit="HOST:PORT"
            )
        key = PrivateKey.generate()
        certificate = _certificate(key)
        self._server = grpc.aio.server(options=_options(), maximum_concurrent_rpcs=CALLS_AT_ONCE_MAX)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Get": grpc.unary_stream_rpc_method_handler(self._get),
            "Put": grpc.stream_unary_rpc_method_handler(self._put),
            "GetUpload": grpc.unary_unary_rpc_method_handler(self._get_upload),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BLOB_SERVICE, handlers),))
        try:
            bound = self._server.add_secure_port(
                listen,
                grpc.ssl_server_credentials(
                    [(key.pem, certificate.public_bytes(Encoding.PEM))],
                    root_certificates=self._credentials.authority_pem,
                    require_client_auth=True,
                ),
            )
        except RuntimeError as error:
            raise FallowError(
                Reason.FIELD_INVALID, f"nothing can listen at {listen}: {error}", field="--serve-cache"
            ) from None
        await self._server.start()
        shown = own_address(self._credentials.control_endpoint) if host in {"0.0.0.0", "[::]"} else host.strip("[]")  # noqa: S104
        endpoint = f"[{shown}]:{bound}" if ":" in shown else f"{shown}:{bound}"
        _log.info("pool_cache.listens endpoint=%s", endpoint)
        return PoolCache(endpoint, certificate.public_bytes(Encoding.DER))

    async def stop(self) -> None:
        """Cuts what is under way."""
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    # ------------------------------------------------------------------------------------------------------ methods

    async def _get(self, raw: bytes, context: Context) -> AsyncGenerator[bytes]:
        async with self._told(context):
            try:
                request = blob_service_pb2.GetRequest.FromString(raw)
            except DecodeError:
                raise malformed("GetRequest") from None
            grant, peer = self._admitted(grant_from_message(request.grant), context)
            if request.offset_bytes > grant.blob.length_bytes:
                raise FallowError(Reason.OFFSET_MISMATCH, "the offset is beyond the end", field="offset_bytes")
            path = self._cache.found(grant.blob)
            if path is None:
                self.counts.blobs_lacking += 1
                raise FallowError(Reason.BLOB_UNKNOWN, "this cache has no such blob")
            with self._gates[BlobOperation.GET].entered(peer), path.open("rb") as file:
                file.seek(request.offset_bytes)
                while piece := await asyncio.to_thread(file.read, BLOB_CHUNK_BYTES):
                    self.counts.bytes_served += len(piece)
                    yield encode_get_part(piece)
            self.counts.blobs_served += 1

    async def _put(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        async with self._told(context):
            first = await _next_part(requests)
            if first is None or first.grant is None:
                raise FallowError(Reason.FIELD_MISSING, "an upload begins with its grant", field="grant")
            grant, peer = self._admitted(first.grant, context)
            if first.offset_bytes:
                raise FallowError(Reason.OFFSET_MISMATCH, "uploads begin at the beginning here", field="offset_bytes")
            if self._cache.found(grant.blob) is None:
                with self._gates[BlobOperation.PUT].entered(peer):
                    self._cache.make_room_for(grant.blob)
                    await context.send_initial_metadata(((LET_IN_METADATA, "1"),))
                    await self._take_in(grant.blob, first, requests)
        return blob_service_pb2.PutResponse().SerializeToString()

    async def _get_upload(self, raw: bytes, context: Context) -> bytes:
        answer = blob_service_pb2.GetUploadResponse()
        async with self._told(context):
            try:
                request = blob_service_pb2.GetUploadRequest.FromString(raw)
            except DecodeError:
                raise malformed("GetUploadRequest") from None
            grant, _ = self._admitted(grant_from_message(request.grant), context)
            if self._cache.found(grant.blob) is not None:
                answer.offset_bytes = grant.blob.length_bytes
                answer.receipt.SetInParent()
        return answer.SerializeToString()

    # ------------------------------------------------------------------------------------------------------ the rest

    def _admitted(self, signed: SignedBytes, context: Context) -> tuple[Grant, KeyFingerprint]:
        """The grant and its holder. Raises GRANT_INVALID or GRANT_EXPIRED."""
        peer = _peer_of(context)
        grant = checked_grant(
            signed,
            operation=BlobOperation.GET,
            coordinator_public_key=self._credentials.coordinator_public_key,
            peer=peer,
            now_ms=self._now_ms(),
        )
        if grant.cache_pool_id != self._credentials.pool_id:
            raise FallowError(
                Reason.GRANT_INVALID,
                "the grant is not for caches of this pool",
                field="grant.cache_pool_id",
                limit=self._credentials.pool_id,
            )
        return grant, peer

    async def _take_in(self, blob: BlobReference, first: PutPart, requests: AsyncIterator[bytes]) -> None:
        path = self._cache.incoming_path()
        digest, length = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                part: PutPart | None = first
                while part is not None:
                    length += len(part.chunk)
                    if length > blob.length_bytes:
                        raise _wrong(blob)
                    digest.update(part.chunk)
                    await asyncio.to_thread(file.write, part.chunk)
                    part = await _next_part(requests) if length < blob.length_bytes else None
            if length != blob.length_bytes or digest.digest() != blob.digest:
                raise _wrong(blob)
            self._cache.keep(blob, path)
        except OSError as error:
            raise FallowError(Reason.STORAGE_FULL, f"the blob cannot be kept: {error.strerror}") from None
        finally:
            path.unlink(missing_ok=True)
        self.counts.blobs_kept += 1

    @contextlib.asynccontextmanager
    async def _told(self, context: Context) -> AsyncGenerator[None]:
        """What goes wrong inside is told to the caller, shortly and in full."""
        try:
            yield
        except (FallowError, OSError) as error:
            told = error if isinstance(error, FallowError) else FallowError(Reason.BLOB_UNKNOWN, "the blob is gone")
            if told.reason is not Reason.BLOB_UNKNOWN:
                self.counts.refused += 1
                _log.info("pool_cache.refused reason=%s %s", told.reason.value, told.message)
            status = _STATUS_OF.get(told.reason, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(status, told.message, trailing_metadata=((ERROR_METADATA_KEY, encode_error(told)),))


class _Gate:
    """Counts streams of one kind, in all and of each peer."""

    def __init__(self, what: str, streams_max: int) -> None:
        self._what = what
        self._streams_max = streams_max
        self._of_peer: Counter[KeyFingerprint] = Counter()

    @contextlib.contextmanager
    def entered(self, peer: KeyFingerprint) -> Generator[None]:
        """Counts a stream while it runs. Raises OVERLOADED."""
        if self._of_peer[peer] >= STREAMS_OF_A_PEER_MAX or self._of_peer.total() >= self._streams_max:
            raise FallowError(Reason.OVERLOADED, f"too many {self._what}", field="streams", hint="ask elsewhere")
        self._of_peer[peer] += 1
        try:
            yield
        finally:
            self._of_peer[peer] -= 1
            if not self._of_peer[peer]:
                del self._of_peer[peer]


def own_address(towards: str) -> str:
    """The address of this machine from which `towards` (host:port) is reached. Nothing is sent."""
    host, _, port = towards.rpartition(":")
    for family, kind, _, _, address in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return socket.gethostname()


async def _next_part(requests: AsyncIterator[bytes]) -> PutPart | None:
    """The next message of an upload; None at its end. Raises DEADLINE_EXCEEDED or MALFORMED_MESSAGE."""
    try:
        async with asyncio.timeout(CHUNK_PATIENCE_S):
            raw = await anext(requests, None)
    except TimeoutError:
        raise FallowError(Reason.DEADLINE_EXCEEDED, f"no chunk came within {CHUNK_PATIENCE_S:g} s") from None
    return None if raw is None else decode_put_part(raw)


def _wrong(blob: BlobReference) -> FallowError:
    return FallowError(
        Reason.DIGEST_MISMATCH, "the bytes are not the blob", field="chunk", limit=f"digest {blob.digest.hex()}"
    )


def _peer_of(context: Context) -> KeyFingerprint:
    """The key at the other end, as TLS proves it."""
    for pem in context.auth_context().get("x509_pem_cert", ()):
        return fingerprint_of(public_der_of_certificate(load_certificate(bytes(pem))))
    raise FallowError(Reason.GRANT_INVALID, "a grant is for the key of a certificate, and none was shown")


def _certificate(key: PrivateKey) -> x509.Certificate:
    """A certificate under nobody: others learn of it from the coordinator, and accept no other."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, POOL_CACHE_NAME)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.raw.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_ALLOWANCE)
        .not_valid_after(now + CERTIFICATE_VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(POOL_CACHE_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key.raw, hashes.SHA256())
    )


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
        ("grpc.max_concurrent_streams", STREAMS_OF_A_PEER_MAX * 2),
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", CHUNK_MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", CHUNK_MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", 8 * KIB),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", int(SEND_PATIENCE_S * 1_000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
