"""A worker's stream by hand: every message, sequence number and signature is the test's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc

from fallow.call_ending import CallEnding
from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.enrollment import join
from fallow.errors import FallowError
from fallow.ids import SessionId
from fallow.join_line import parse_join_line
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.session import (
    Capability,
    CoordinatorMessage,
    Device,
    DeviceKind,
    DeviceLevel,
    Hello,
    SandboxLevel,
    TaskKind,
    Welcome,
    WorkerMessage,
)
from fallow.session_signature import check_coordinator_signature, sign_worker_payload
from fallow.v1 import worker_service_pb2 as pb
from fallow.v1 import worker_service_pb2_grpc
from fallow.wire.errors import error_from_rpc
from fallow.wire.session import decode_coordinator_messages, encode_worker_message

PATIENCE_S = 20.0


def capability(*kinds: TaskKind) -> Capability:
    """One usable CPU that takes these kinds of task."""
    return Capability(
        devices=(Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, cores=2, slots=2),),
        sandbox_level=SandboxLevel.FULL,
        task_kinds=frozenset(kinds or (TaskKind.MAP,)),
    )


def hello(*kinds: TaskKind, window: int = 2) -> Hello:
    """A first Hello."""
    return Hello(PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED, "test", b"", capability(*kinds), window)


async def joined(line: str, folder: Path, name: str = "test") -> Credentials:
    """Credentials by a join line."""
    return await join(parse_join_line(line), folder, name)


class RawSession:
    """One open stream. `receive` checks every signature that must be there."""

    def __init__(self, credentials: Credentials, channel: grpc.aio.Channel) -> None:
        self.credentials = credentials
        self.session_id = SessionId("")
        self.sequence = 0
        self.unread: deque[CoordinatorMessage] = deque()
        """What came as one with the message that was received last."""
        self.welcome: Welcome | None = None
        self._call = worker_service_pb2_grpc.WorkerServiceStub(channel).Session()
        self._ending = CallEnding(self._call)
        self._received = 0
        self._writing = asyncio.Lock()

    async def send(
        self,
        message: WorkerMessage,
        *,
        sign: bool = True,
        sequence: int | None = None,
        session: SessionId | None = None,
        tamper: bool = False,
    ) -> None:
        """Sends a message, signed as it should be unless told otherwise."""
        self.sequence = self.sequence + 1 if sequence is None else sequence
        payload = encode_worker_message(message)
        signature = b""
        if sign:
            signature = sign_worker_payload(
                self.credentials.key,
                payload,
                session=self.session_id if session is None else session,
                sequence=self.sequence,
                coordinator_key=self.credentials.coordinator_public_key,
            )
        if tamper:
            signature = signature[:-1] + bytes((signature[-1] ^ 1,))
        await self.send_request(pb.SessionRequest(sequence=self.sequence, payload=payload, signature=signature))

    async def send_request(self, request: pb.SessionRequest) -> None:
        """Sends an envelope as it is; a stream that has ended already says why at the next `receive`."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            # A stream takes one write at a time; heartbeats come from a task of their own.
            async with self._writing:
                await self._call.write(request)

    async def receive(self) -> CoordinatorMessage:
        """The next message. Raises the FallowError with which the coordinator ended the stream."""
        if self.unread:
            return self.unread.popleft()
        try:
            async with asyncio.timeout(PATIENCE_S):
                response = await self._call.read()
                if response is grpc.aio.EOF:
                    raise grpc.aio.AioRpcError(
                        await self._call.code(),
                        await self._call.initial_metadata(),
                        await self._call.trailing_metadata(),
                        await self._call.details(),
                    )
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(await self._ending.failure(failure)) from None
        assert isinstance(response, pb.SessionResponse)
        assert response.sequence == self._received + 1, "the coordinator counts without gaps"
        self._received = response.sequence
        messages = decode_coordinator_messages(response.payload)
        message, *others = messages
        self.unread.extend(others)
        if isinstance(message, Welcome):
            self.session_id, self.welcome = message.session_id, message
        if any(type(one).__name__ in ("Welcome", "Lease", "Settled") for one in messages):
            check_coordinator_signature(
                self.credentials.coordinator_public_key,
                response.signature,
                response.payload,
                session=self.session_id,
                sequence=response.sequence,
                worker=self.credentials.key.fingerprint,
            )
        return message

    async def open(self, first: Hello | None = None) -> Welcome:
        """Says Hello and waits for the Welcome."""
        await self.send(first or hello())
        message = await self.receive()
        assert isinstance(message, Welcome), message
        return message

    async def reopen_hello(self, **changes: object) -> Hello:
        """The Hello of an honest reconnect."""
        assert self.welcome is not None
        return replace(hello(), resume_token=self.welcome.resume_token, **changes)  # type: ignore[arg-type]

    async def until(self, kind: type[CoordinatorMessage]) -> CoordinatorMessage:
        """The next message of this kind; others before it are dropped."""
        while True:
            message = await self.receive()
            if isinstance(message, kind):
                return message

    async def ended(self) -> FallowError:
        """How the coordinator ended the stream; what it still said before is dropped."""
        try:
            while True:
                await self.receive()
        except FallowError as error:
            return error

    def close(self) -> None:
        """Drops the stream without a word."""
        self._call.cancel()


@contextlib.asynccontextmanager
async def raw_session(credentials: Credentials) -> AsyncIterator[RawSession]:
    """A stream that has said nothing yet."""
    async with control_channel(credentials) as channel:
        session = RawSession(credentials, channel)
        try:
            yield session
        finally:
            session.close()
