"""How a call comes in: raw bytes are decoded here, answered by a plain coroutine, and every failure leaves by one door.

Decoding happens in our own code, not in gRPC's, so that malformed bytes are INVALID_ARGUMENT and the exact bytes of a
request are at hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Generic, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from fallow.errors import FallowError, Reason
from fallow.identity import load_certificate, public_der_of_certificate
from fallow.ids import KeyFingerprint, digest_of
from fallow.limits import CONTROL_MESSAGE_BYTES_MAX, KIB
from fallow_coordinator.service.errors import abort
from fallow_coordinator.service.rate_limit import RateLimit

_log = logging.getLogger(__name__)

UNARY_TIME_MAX_S: Final = 30.0
"""A unary call that takes longer ends with DEADLINE_EXCEEDED, whatever deadline its caller set."""
CERTIFICATES_REMEMBERED_MAX: Final = 4096
BYTES_OF_ONE_CALL: Final = 2048
"""A longer request counts as several calls: decoding and checking it takes as long."""
SIMPLE_REQUEST_BYTES_MAX: Final = 4 * KIB
"""Longest request that has only names and numbers."""
STREAM_OPENING_COST: Final = 20.0
"""Opening a worker's stream writes to the journal."""

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

# gRPC's contexts are generic over raw bytes here; the stubs' parameters add nothing.
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of the connection, as TLS proves it."""

    public_key: bytes
    """DER SubjectPublicKeyInfo; empty on the enrolment endpoint, where nobody shows a certificate."""
    key_fingerprint: KeyFingerprint
    address: str
    """Without the port; for rate limits and logs only."""


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT]):
    """One request with its exact bytes and its peer."""

    request: RequestT
    raw: bytes
    peer: Peer
    charge: Callable[[float], None]
    """Counts further work of this call against its peer, in calls. Raises OVERLOADED."""


_NO_BYTES: Final = b""
"""Takes the place of a refused request before the refusal is raised: gRPC keeps that exception, and with it the frames
it went through, until the garbage collector comes by, which is seldom."""

Answer = Callable[[Call[RequestT]], Awaitable[ResponseT]]
Stream = Callable[[Call[RequestT]], AsyncGenerator[ResponseT, None]]


def unary(
    method: str, request_type: type[RequestT], answer: Answer[RequestT, ResponseT], limit: RateLimit
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that answers one request with one response. `limit` counts by key, or by address without one."""

    async def handle(raw: bytes, context: Context) -> bytes:
        call: Call[RequestT] | None = None
        try:
            call = admitted(raw, context, request_type, limit)
            async with asyncio.timeout(UNARY_TIME_MAX_S):
                response = await answer(call)
        except TimeoutError:
            late = FallowError(Reason.DEADLINE_EXCEEDED, "the call took too long", limit=f"{UNARY_TIME_MAX_S:g} s")
            raw, call = _NO_BYTES, None
            await abort(context, late, method)
        except Exception as error:
            raw, call = _NO_BYTES, None
            await abort(context, error, method)
        return response.SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)


def server_stream(
    method: str, request_type: type[RequestT], answer: Stream[RequestT, ResponseT], limit: RateLimit
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that answers one request with a stream; gRPC's flow control is the backpressure."""

    async def handle(raw: bytes, context: Context) -> None:
        call: Call[RequestT] | None = None
        try:
            call = admitted(raw, context, request_type, limit)
            async with contextlib.aclosing(answer(call)) as responses:
                async for response in responses:
                    await context.write(response.SerializeToString())
        except Exception as error:
            raw, call = _NO_BYTES, None
            await abort(context, error, method)

    return grpc.unary_stream_rpc_method_handler(handle)


def both_streams(
    method: str, answer: Callable[[Context, Peer], Awaitable[None]], limit: RateLimit
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of a bidirectional stream of raw messages, read and written by `answer`."""

    async def handle(_requests: object, context: Context) -> None:
        try:
            peer = peer_of(context)
            limit.take(peer.key_fingerprint or peer.address, STREAM_OPENING_COST)
            await answer(context, peer)
        except Exception as error:
            await abort(context, error, method)

    return grpc.stream_stream_rpc_method_handler(handle)


def service_handlers(
    descriptor: ServiceDescriptor, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
) -> grpc.GenericRpcHandler:
    """All methods of a service; a method of the contract without a handler is our mistake and fails at start."""
    missing = {method.name for method in descriptor.methods} ^ handlers.keys()
    assert not missing, f"{descriptor.full_name}: {sorted(missing)}"
    return grpc.method_handlers_generic_handler(descriptor.full_name, dict(handlers))


def method_name(descriptor: ServiceDescriptor, method: str) -> str:
    """`/package.Service/Method`, as gRPC and the signing rule write it."""
    return f"/{descriptor.full_name}/{method}"


def admitted(raw: bytes, context: Context, request_type: type[RequestT], limit: RateLimit) -> Call[RequestT]:
    """The call behind `raw`, counted against its peer before it is parsed. Raises OVERLOADED or MALFORMED_MESSAGE."""
    peer = peer_of(context)
    charge = partial(limit.take, peer.key_fingerprint or peer.address)
    charge(1.0 + len(raw) / BYTES_OF_ONE_CALL)
    most = request_bytes_max(request_type)
    if len(raw) > most:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a {request_type.DESCRIPTOR.name} of {len(raw)} bytes",
            field=request_type.DESCRIPTOR.name,
            limit=f"{most} bytes",
        )
    return Call(decoded(raw, request_type), raw, peer, charge)


def request_bytes_max(request_type: type[Message]) -> int:
    """Longest request of a method: a few KiB where it has only names and numbers, else what the server takes.

    It follows from the contract, so that a new method needs no entry anywhere.
    """
    descriptor = request_type.DESCRIPTOR
    known = _request_bytes_max.get(descriptor.full_name)
    if known is None:
        simple = all(
            field.message_type is None and not field.is_repeated and field.type != field.TYPE_BYTES
            for field in descriptor.fields
        )
        known = _request_bytes_max[descriptor.full_name] = (
            SIMPLE_REQUEST_BYTES_MAX if simple else CONTROL_MESSAGE_BYTES_MAX
        )
    return known


_request_bytes_max: dict[str, int] = {}
"""By message; no more entries than the contract has."""


def decoded(raw: bytes, request_type: type[RequestT]) -> RequestT:
    """The message in `raw`. Raises MALFORMED_MESSAGE."""
    try:
        return request_type.FromString(raw)
    except DecodeError:
        raise FallowError(
            Reason.MALFORMED_MESSAGE,
            f"these bytes are no {request_type.DESCRIPTOR.name}",
            field=request_type.DESCRIPTOR.name,
            limit="protobuf, package fallow.v1",
        ) from None


def peer_of(context: Context) -> Peer:
    """The peer, from its TLS certificate alone. Raises UNAUTHENTICATED when the certificate is none of ours."""
    pems = context.auth_context().get("x509_pem_cert", ())
    for pem in pems:
        public_key = _public_key_of(bytes(pem))
        return Peer(public_key, KeyFingerprint(digest_of(public_key)), _address_of(context.peer()))
    return Peer(b"", KeyFingerprint(b""), _address_of(context.peer()))


@lru_cache(maxsize=CERTIFICATES_REMEMBERED_MAX)
def _public_key_of(pem: bytes) -> bytes:
    try:
        return public_der_of_certificate(load_certificate(pem))
    except FallowError as error:
        raise FallowError(Reason.UNAUTHENTICATED, f"the certificate cannot be used: {error.message}") from None


def _address_of(peer: str) -> str:
    """The host of gRPC's `ipv4:host:port`, `ipv6:[host]:port` or `unix:path`."""
    family, _, rest = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return peer
    return unquote(rest).rpartition(":")[0].strip("[]")
