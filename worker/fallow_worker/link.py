"""The worker's stream to the coordinator: opened, signed, checked, closed. Whether to open another is the plan's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import grpc

from fallow.call_ending import CallEnding
from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.diagnosis import explain_control
from fallow.errors import FallowError, Reason
from fallow.identity import write_private
from fallow.ids import SessionId
from fallow.limits import (
    LEASES_PER_WORKER_MAX,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN_SUPPORTED,
    SESSION_MESSAGE_BYTES_MAX,
)
from fallow.machine_identity import machine_digest
from fallow.session import (
    SIGNED_COORDINATOR_MESSAGES,
    SIGNED_WORKER_MESSAGES,
    Capability,
    CoordinatorMessage,
    Goodbye,
    HeldLease,
    Hello,
    PoolCache,
    Welcome,
    WorkerMessage,
)
from fallow.session_signature import NO_SESSION, check_coordinator_signature, sign_worker_payload
from fallow.v1 import worker_service_pb2 as pb
from fallow.v1 import worker_service_pb2_grpc
from fallow.wire.errors import error_from_rpc
from fallow.wire.session import decode_coordinator_messages, encode_worker_message
from fallow_worker.full_disk import told_when_full

_log = logging.getLogger(__name__)

WELCOME_WAIT_S: Final = 20.0
"""From dialling to the Welcome."""
FLUSH_WAIT_S: Final = 5.0
"""For words still on their way when this worker closes its side."""
OUTBOX_MAX: Final = 8 * LEASES_PER_WORKER_MAX
"""Words that wait for the network. One more ends the session; everything is said again in the next."""
RESUME_TOKEN_BYTES_MAX: Final = 1024


class After(Enum):
    """What to do when a session could not be opened, or ended."""

    RECONNECT = "reconnect"
    RENEW = "renew"
    """Get a fresh certificate, then reconnect."""
    RECONNECT_SLOWLY = "reconnect-slowly"
    """Somebody has to do something first; look again now and then."""
    END = "end"


_AFTER: Final[dict[Reason, After]] = {
    Reason.CERTIFICATE_EXPIRED: After.RENEW,
    Reason.PARTY_REVOKED: After.END,
    Reason.PROTOCOL_TOO_OLD: After.END,
    Reason.PROTOCOL_TOO_NEW: After.END,
    Reason.SESSION_REPLACED: After.END,
    Reason.PERMISSION_DENIED: After.END,
    Reason.CERTIFICATE_FOREIGN: After.RECONNECT_SLOWLY,
    Reason.UNAUTHENTICATED: After.RECONNECT_SLOWLY,
    Reason.PARTY_QUARANTINED: After.RECONNECT_SLOWLY,
    Reason.KEY_IN_USE: After.RECONNECT_SLOWLY,
    Reason.SIGNATURE_INVALID: After.RECONNECT_SLOWLY,
    Reason.MALFORMED_MESSAGE: After.RECONNECT_SLOWLY,
}


def after(error: FallowError) -> After:
    """What a worker does about an ended session."""
    return _AFTER.get(error.reason, After.RECONNECT)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a Hello says beside who is speaking."""

    capability: Capability
    window: int
    held_leases: tuple[HeldLease, ...]


class ResumeToken:
    """The token of the last Welcome, on disk for the owner alone: a restarted worker replaces its old session by it."""

    def __init__(self, path: Path) -> None:
        """Kept in the file at `path`, mode 0600."""
        self._path = path

    def load(self) -> bytes:
        """The token, or nothing when there is none."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        return data if len(data) <= RESUME_TOKEN_BYTES_MAX else b""

    def save(self, token: bytes) -> None:
        """Makes `token` durable."""
        write_private(self._path, token)


class Session:
    """An open stream. `say` never blocks and keeps order; `hear` gives what the coordinator says, checked."""

    def __init__(
        self,
        credentials: Credentials,
        channel: grpc.aio.Channel,
        call: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse],
    ) -> None:
        """Call `open_session`."""
        self._credentials = credentials
        self._channel = channel
        self._call = call
        self._ending = CallEnding(call)
        self._session_id = NO_SESSION
        self._said = 0
        self._heard = 0
        self._unread: deque[CoordinatorMessage] = deque()
        """Messages that came as one with the last that was read."""
        self._outbox: deque[WorkerMessage] = deque()
        self._outbox_ready = asyncio.Event()
        self._closing = False
        self._writer: asyncio.Task[None] | None = None

    async def greet(self, hello: Hello) -> Welcome:
        """Says Hello and gives the Welcome. Raises what the coordinator refuses with, in words for people."""
        try:
            async with asyncio.timeout(WELCOME_WAIT_S):
                await self._write(hello)
                welcome = await self._read()
        except TimeoutError:
            raise FallowError(
                Reason.COORDINATOR_UNREACHABLE,
                f"{self._credentials.control_endpoint} did not answer within {WELCOME_WAIT_S:g} s",
            ) from None
        if isinstance(welcome, Goodbye):
            raise goodbye_error(welcome)
        if not isinstance(welcome, Welcome):
            raise FallowError(
                Reason.MALFORMED_MESSAGE, f"the coordinator began with a {type(welcome).__name__}", limit="a Welcome"
            )
        self._session_id = welcome.session_id
        self._writer = asyncio.create_task(self._write_outbox(), name="session-writer")
        return welcome

    def say(self, message: WorkerMessage) -> None:
        """Sends a message after all said before. A session that is full or over swallows it: the next repeats it."""
        if len(self._outbox) >= OUTBOX_MAX:
            _log.warning("session.outbox_full session=%s limit=%d", self._session_id, OUTBOX_MAX)
            self._call.cancel()
            return
        self._outbox.append(message)
        self._outbox_ready.set()

    async def hear(self) -> CoordinatorMessage:
        """The next message. Raises FallowError when the session has ended, whoever ended it."""
        return await self._read()

    async def close(self) -> None:
        """Sends what was said, ends this side, and waits a little for the coordinator to take it."""
        self._closing = True
        self._outbox_ready.set()
        with contextlib.suppress(TimeoutError, FallowError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(FLUSH_WAIT_S):
                if self._writer is not None:
                    await asyncio.shield(self._writer)
                await self._call.done_writing()
                await self._call.code()
        await self.abandon()

    async def abandon(self) -> None:
        """Ends the stream and its channel at once."""
        self._call.cancel()
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._channel.close()

    async def _write_outbox(self) -> None:
        while True:
            while self._outbox:
                await self._write(self._outbox.popleft())
            if self._closing:
                return
            self._outbox_ready.clear()
            await self._outbox_ready.wait()

    async def _write(self, message: WorkerMessage) -> None:
        payload = encode_worker_message(message)
        if len(payload) > SESSION_MESSAGE_BYTES_MAX:
            # Everything in a message is bounded by its own limit; together they stay below this one.
            raise AssertionError(f"a {type(message).__name__} of {len(payload)} bytes")
        self._said += 1
        signature = b""
        if isinstance(message, SIGNED_WORKER_MESSAGES):
            signature = sign_worker_payload(
                self._credentials.key,
                payload,
                session=self._session_id,
                sequence=self._said,
                coordinator_key=self._credentials.coordinator_public_key,
            )
        request = pb.SessionRequest(sequence=self._said, payload=payload, signature=signature)
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            # A call that has ended says so to whoever reads; here it is only too late.
            await self._call.write(request)

    async def _looked_into(self, error: FallowError) -> FallowError:
        """A failed connection in better words, where a look at the server gives them."""
        return await explain_control(self._credentials)(error)

    async def _read(self) -> CoordinatorMessage:
        if self._unread:
            return self._unread.popleft()
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            told = await self._ending.failure(failure)
            raise await self._looked_into(explained(told, self._credentials)) from None
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
            raise _stream_over() from None
        if not isinstance(response, pb.SessionResponse):
            raise await self._how_it_ended()
        self._heard += 1
        if response.sequence != self._heard:
            raise FallowError(
                Reason.SEQUENCE_REPLAYED,
                f"the coordinator's message {response.sequence} came where {self._heard} was due",
                field="sequence",
            )
        first, *others = messages = decode_coordinator_messages(response.payload)
        if any(isinstance(message, SIGNED_COORDINATOR_MESSAGES) for message in messages):
            session = first.session_id if isinstance(first, Welcome) else self._session_id
            self._check(response, session)
        self._unread.extend(others)
        return first

    def _check(self, response: pb.SessionResponse, session: SessionId) -> None:
        check_coordinator_signature(
            self._credentials.coordinator_public_key,
            response.signature,
            response.payload,
            session=session,
            sequence=response.sequence,
            worker=self._credentials.key.fingerprint,
        )

    async def _how_it_ended(self) -> FallowError:
        """The stream gave no more messages: its status says why."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return _stream_over()
        failure = grpc.aio.AioRpcError(
            code,
            await self._call.initial_metadata(),
            await self._call.trailing_metadata(),
            await self._call.details(),
        )
        return explained(await self._ending.failure(failure), self._credentials)


async def open_session(
    credentials: Credentials, greeting: Greeting, token: ResumeToken, pool_cache: PoolCache | None = None
) -> tuple[Session, Welcome]:
    """Dials, says Hello, checks the Welcome and keeps its resume token. Raises FallowError in words for people."""
    channel = control_channel(credentials)
    stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
    session = Session(credentials, channel, stub.Session())
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        protocol_min_supported=PROTOCOL_VERSION_MIN_SUPPORTED,
        software=software(),
        resume_token=token.load(),
        capability=greeting.capability,
        window=greeting.window,
        held_leases=greeting.held_leases[:LEASES_PER_WORKER_MAX],
        takes_several=True,
        machine_digest=machine_digest(),
        pool_cache=pool_cache,
    )
    try:
        welcome = await session.greet(hello)
        _check_protocol(welcome)
        # Before anything of this session is used: losing the newest token would make this worker a stranger to itself.
        with told_when_full(credentials.folder):
            await asyncio.to_thread(token.save, welcome.resume_token)
    except BaseException:
        await session.abandon()
        raise
    return session, welcome


def goodbye_error(goodbye: Goodbye) -> FallowError:
    """A Goodbye as an error."""
    try:
        return _hinted(FallowError(Reason(goodbye.reason), goodbye.message))
    except ValueError:
        return FallowError(Reason.INTERNAL, f"{goodbye.reason}: {goodbye.message}")


def software() -> str:
    """What this is, for people."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fallow {version('fallow')}"
    except PackageNotFoundError:
        return "fallow"


def explained(failure: grpc.aio.AioRpcError, credentials: Credentials) -> FallowError:
    """A failed stream in words that somebody can act on: TLS tells its troubles only in the text of UNAVAILABLE."""
    error = error_from_rpc(failure)
    if error.reason is Reason.COORDINATOR_UNREACHABLE:
        return _transport_error(error.message, credentials)
    return _hinted(error)


def _hinted(error: FallowError) -> FallowError:
    """The error with what to do about it here."""
    hint = _HINTS.get(error.reason)
    if hint is None:
        return error
    return FallowError(error.reason, error.message, field=error.field, limit=error.limit, hint=hint)


_UPGRADE: Final = "upgrade this worker: pip install --upgrade fallow"
_HINTS: Final[dict[Reason, str]] = {
    Reason.PROTOCOL_TOO_OLD: _UPGRADE,
    Reason.SESSION_REPLACED: "another daemon works under this worker's key: join in a folder of its own",
    Reason.PARTY_REVOKED: "ask the coordinator's operator for a new join line",
    Reason.PARTY_QUARANTINED: "ask the coordinator's operator, who can release it",
}
_SERVER_EXPIRED: Final = ("certificate has expired", "certificate is not yet valid")
_SERVER_FOREIGN: Final = ("CERTIFICATE_VERIFY_FAILED", "certificate signature failure")
_CLOSED: Final = "Socket closed"


def _transport_error(detail: str, credentials: Credentials) -> FallowError:
    """The texts are those of gRPC's TLS stack; the integration tests meet them for real."""
    endpoint = credentials.control_endpoint
    if any(mark in detail for mark in _SERVER_EXPIRED):
        return FallowError(
            Reason.COORDINATOR_UNREACHABLE,
            f"the certificate of the server at {endpoint} is not valid now",
            hint="is this machine's clock right? If so, the coordinator's operator has to renew it",
        )
    if any(mark in detail for mark in _SERVER_FOREIGN):
        return FallowError(
            Reason.CERTIFICATE_FOREIGN,
            f"the server at {endpoint} shows a certificate of another authority than the one this worker joined",
            hint="if the coordinator was set up anew, join again: fallow-worker join LINE",
        )
    if _CLOSED in detail:
        return FallowError(
            Reason.COORDINATOR_UNREACHABLE,
            f"the server at {endpoint} closed the connection",
            hint="it may be stopping; if this goes on, it does not accept this worker's certificate: join again",
        )
    return FallowError(
        Reason.COORDINATOR_UNREACHABLE,
        f"no coordinator at {endpoint}: {detail}",
        hint="is it running, and is its address reachable from here?",
    )


def _check_protocol(welcome: Welcome) -> None:
    if welcome.protocol_min_supported > PROTOCOL_VERSION:
        raise FallowError(
            Reason.PROTOCOL_TOO_OLD,
            f"the coordinator needs protocol {welcome.protocol_min_supported}, this worker speaks {PROTOCOL_VERSION}",
            hint=_UPGRADE,
        )
    if welcome.protocol_version < PROTOCOL_VERSION_MIN_SUPPORTED:
        raise FallowError(
            Reason.PROTOCOL_TOO_NEW,
            f"the coordinator speaks protocol {welcome.protocol_version}, this worker needs "
            f"{PROTOCOL_VERSION_MIN_SUPPORTED} or newer",
            hint="ask its operator to upgrade the coordinator",
        )


def _stream_over() -> FallowError:
    return FallowError(Reason.COORDINATOR_UNREACHABLE, "the coordinator ended the session")
