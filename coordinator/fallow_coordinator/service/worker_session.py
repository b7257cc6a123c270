"""One open stream of one worker: what comes in is checked and submitted, what becomes durable goes out in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import grpc

from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import Digest, LeaseId, SessionId
from fallow.limits import KIB, MESSAGES_TOGETHER_MAX, SESSION_MESSAGE_BYTES_MAX
from fallow.session import (
    SIGNED_COORDINATOR_MESSAGES,
    SIGNED_WORKER_MESSAGES,
    CoordinatorMessage,
    GrantsRenewed,
    Lease,
    LeaseRevoked,
    Refused,
    Settled,
    TaskKind,
    Welcome,
    WorkerMessage,
)
from fallow.session_signature import check_worker_signature, sign_coordinator_payload
from fallow.v1 import worker_service_pb2 as pb
from fallow.wire.session import decode_worker_message, encode_coordinator_messages
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.effects import (
    EndSession,
    SendLease,
    SendRevoked,
    SendSettled,
    SendStanding,
    SendUploadOffer,
)
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.auth import Caller
from fallow_coordinator.service.calls import Context, decoded
from fallow_coordinator.service.errors import told
from fallow_coordinator.service.lease_messages import LeaseMessages
from fallow_coordinator.service.live_streams import LiveStream
from fallow_coordinator.service.outbox import SessionEffect, session_ended
from fallow_coordinator.service.rate_limit import Pace

_log = logging.getLogger(__name__)

OUTBOUND_MAX: Final = 1024
"""Messages that wait for a worker that reads slowly; one more ends its session, and it reconciles when it is back."""
INBOUND_MAX: Final = 64
"""Messages of one worker that wait for the disk; then its stream is read no further until one is done."""
MESSAGES_PER_S: Final = 1_000
MESSAGES_BURST: Final = 4_000
BYTES_OF_ONE_MESSAGE: Final = 16 * KIB
"""A longer message counts as several: a worker that sends faster than this is read later, not refused."""
TOGETHER_BYTES_MAX: Final = 32 * KIB
"""Bytes after which no further message joins those that travel as one: with the largest message there is they stay
below `SESSION_MESSAGE_BYTES_MAX`."""
REFUSALS_LOGGED_MAX: Final = 20
"""Refusals of one session that the log shows; a worker must not fill the disk with its mistakes."""


@dataclass(frozen=True, slots=True)
class Regrant:
    """The worker asked for fresh grants of a lease."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message of the worker, its signature checked if its kind needs one."""

    message: WorkerMessage
    payload: bytes
    signature: bytes
    sequence: int


Outgoing = CoordinatorMessage | SessionEffect | Regrant
Handle = Callable[[Incoming], "asyncio.Future[Decision] | None"]
"""Acts on a message, without waiting: what is left to wait for, or None. Raises what the worker is refused with."""


class WorkerSession:
    """The two directions of a stream after its Hello. `run` lasts until one of them, or the coordinator, ends it."""

    def __init__(
        self,
        *,
        context: Context,
        caller: Caller,
        stream: LiveStream,
        key: PrivateKey,
        engine: Engine,
        leases: LeaseMessages,
        session_id: SessionId,
        last_sequence: int,
        takes_several: bool,
    ) -> None:
        """`key` is the coordinator's; `last_sequence` and `takes_several` are the Hello's."""
        self._engine = engine
        self._together_max = MESSAGES_TOGETHER_MAX if takes_several else 1
        self.session_id = session_id
        self.caller = caller
        self.stream = stream
        self._context = context
        self._key = key
        self._leases = leases
        self._received = last_sequence
        self._sent = 0
        self._outbound: deque[tuple[float, Outgoing]] = deque()
        self._outbound_ready = asyncio.Event()
        self._writing_ends = False
        self._waiting = 0
        """Messages of the worker that wait for the disk."""
        self._settled_down = asyncio.Event()
        """Set whenever one of them is done."""
        self._offered: set[Digest] = set()
        self._refusals = 0
        self.last_heard = asyncio.get_running_loop().time()
        """When the last message came, on the loop's clock."""
        self._challenges_sent: dict[LeaseId, float] = {}
        """When the lease of each challenge of this session went out; the core has one at a time for a device."""
        self._round_trip_s = 0.0

    # ------------------------------------------------------------------------------------------- out

    def send(self, item: Outgoing) -> None:
        """Queues a message or effect; ends the stream when the worker does not keep up."""
        if isinstance(item, EndSession):
            self.stream.end(session_ended(item))
            return
        if len(self._outbound) >= OUTBOUND_MAX:
            self.stream.end(
                FallowError(
                    Reason.OVERLOADED, "the worker reads too slowly", limit=f"{OUTBOUND_MAX} messages", hint="reconnect"
                )
            )
            return
        self._outbound.append((self._engine.effects_since_s, item))
        self._outbound_ready.set()

    async def end_writing(self, writing: asyncio.Task[None], patience_s: float) -> None:
        """Lets the write under way finish: gRPC refuses the status of a stream while one is, and the peer waits on."""
        self._writing_ends = True
        self._outbound_ready.set()
        await asyncio.wait({writing}, timeout=patience_s)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    async def write_all(self) -> None:
        """Sends what is queued, in order, until `end_writing`."""
        while not self._writing_ends:
            await self._outbound_ready.wait()
            self._outbound_ready.clear()
            while self._outbound and not self._writing_ends:
                messages, leases_since_s = self._next_outbound()
                if messages:
                    response = self._signed(messages)
                    now_s = time.monotonic()
                    for since_s in leases_since_s:
                        self._engine.counters.assigns.add(now_s - since_s)
                    await self._context.write(response)

    def _next_outbound(self) -> tuple[list[CoordinatorMessage], list[float]]:
        """What is queued, as far as it may travel as one, and when its leases were decided: one signature for all."""
        messages: list[CoordinatorMessage] = []
        leases_since_s: list[float] = []
        length_bytes = 0
        while self._outbound and len(messages) < self._together_max and length_bytes < TOGETHER_BYTES_MAX:
            since_s, item = self._outbound[0]
            if messages and isinstance(item, Welcome):
                break
            self._outbound.popleft()
            message = self._message(item)
            if message is None:
                continue
            messages.append(message)
            length_bytes += _bulk_bytes(message)
            if isinstance(message, Lease):
                leases_since_s.append(since_s)
                if message.kind is TaskKind.CHALLENGE:
                    self._challenges_sent[message.lease_id] = asyncio.get_running_loop().time()
        return messages, leases_since_s

    async def write_now(self, message: CoordinatorMessage) -> None:
        """Sends one message past the queue."""
        await self._context.write(self._signed([message]))

    def _signed(self, messages: Sequence[CoordinatorMessage]) -> bytes:
        """Messages as they travel, as one."""
        payload = encode_coordinator_messages(messages)
        self._sent += 1
        signature = b""
        if any(isinstance(message, SIGNED_COORDINATOR_MESSAGES) for message in messages):
            signature = sign_coordinator_payload(
                self._key,
                payload,
                session=self.session_id,
                sequence=self._sent,
                worker=self.caller.key_fingerprint,
            )
        return pb.SessionResponse(sequence=self._sent, payload=payload, signature=signature).SerializeToString()

    def _message(self, item: Outgoing) -> CoordinatorMessage | None:
        """The message for an item; None when its lease has ended in the meantime, which has a message of its own."""
        match item:
            case SendLease(_, lease_id) | Regrant(lease_id):
                facts = self._leases.facts(self.session_id, lease_id)
                if facts is None:
                    return None
                if isinstance(item, Regrant):
                    return self._leases.renewed(facts, self.caller.key_fingerprint)
                fresh = facts.bundle_digest not in self._offered
                if facts.kind is not TaskKind.INSPECT:
                    # What inspection finds, such as the canonical batch, is not in the offer that comes with it.
                    self._offered.add(facts.bundle_digest)
                return self._leases.lease(facts, self.caller.key_fingerprint, with_offer=fresh)
            case SendUploadOffer(_, lease_id):
                return self._leases.upload_offer(self.session_id, lease_id, self.caller.key_fingerprint)
            case SendSettled(_, lease_id, fence, microcredits):
                return Settled(lease_id, fence, microcredits)
            case SendStanding(_, worker_id, device_id):
                return self._leases.standing(worker_id, device_id)
            case SendRevoked(_, lease_id, fence, reason):
                self._challenges_sent.pop(lease_id, None)
                return LeaseRevoked(lease_id, fence, reason)
            case EndSession():
                return None
            case _:
                return item

    # ------------------------------------------------------------------------------------------- time

    def lease_seen(self, lease_id: LeaseId) -> None:
        """The worker says that a challenge's lease has arrived: one round trip, ended when this was heard."""
        sent_at = self._challenges_sent.get(lease_id)
        if sent_at is not None:
            took_s = max(0.0, self.last_heard - sent_at)
            self._round_trip_s = min(self._round_trip_s or took_s, took_s)

    def challenge_times_ms(self, lease_id: LeaseId) -> tuple[int, int]:
        """(time from a challenge's lease to the message just heard, shortest round trip); zeros: not known.

        Only of leases that went out in this session: a worker that came back is asked anew.
        """
        sent_at = self._challenges_sent.pop(lease_id, None)
        if sent_at is None:
            return 0, 0
        return max(1, round((self.last_heard - sent_at) * 1_000)), round(self._round_trip_s * 1_000)

    # ------------------------------------------------------------------------------------------- in

    async def read_all(self, handle: Handle) -> None:
        """Reads until the worker ends its side. `handle` acts on messages in order; up to `INBOUND_MAX` wait at once.

        Raises what ends the stream: MALFORMED_MESSAGE, SIGNATURE_INVALID, SEQUENCE_REPLAYED.
        """
        pace = Pace(per_s=MESSAGES_PER_S, burst=MESSAGES_BURST, clock=asyncio.get_running_loop().time)
        while True:
            raw = await read_message(self._context)
            if raw is None:
                break
            self.last_heard = asyncio.get_running_loop().time()
            if wait_s := pace.wait_s(1.0 + len(raw) / BYTES_OF_ONE_MESSAGE):
                await asyncio.sleep(wait_s)
            request = self._next(raw)
            if self._waiting >= INBOUND_MAX:
                await self._until_waiting(INBOUND_MAX - 1)
            self._begin(request, handle)
        await self._until_waiting(0)

    async def _until_waiting(self, count_max: int) -> None:
        while self._waiting > count_max:
            self._settled_down.clear()
            await self._settled_down.wait()

    def _next(self, raw: bytes) -> pb.SessionRequest:
        request = decoded(raw, pb.SessionRequest)
        check_sequence(request, last_sequence=self._received)
        self._received = request.sequence
        return request

    def _begin(self, request: pb.SessionRequest, handle: Handle) -> None:
        """Checks a message and acts on it; what is left is done when it is durable. No task for each: they are many."""
        lease_id: LeaseId | None = None
        try:
            incoming = checked_message(request, caller=self.caller, coordinator=self._key, session_id=self.session_id)
            if isinstance(incoming.message, SIGNED_WORKER_MESSAGES):
                self._engine.counters.signatures_checked += 1
            lease_id = getattr(incoming.message, "lease_id", None)
            future = handle(incoming)
        except Exception as error:
            self._failed(request.sequence, lease_id, error)
            return
        if future is not None:
            self._waiting += 1
            future.add_done_callback(partial(self._done, request.sequence, lease_id))

    def _done(self, sequence: int, lease_id: LeaseId | None, future: asyncio.Future[Decision]) -> None:
        self._waiting -= 1
        self._settled_down.set()
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed(sequence, lease_id, error)

    def _failed(self, sequence: int, lease_id: LeaseId | None, error: BaseException) -> None:
        if not isinstance(error, FallowError):
            _log.error("session.failed session=%s worker=%s", self.session_id, self.caller.party_id, exc_info=error)
            self.stream.end(told(error))
            return
        if error.reason in _ENDS_THE_SESSION:
            self.stream.end(error)
            return
        self._refusals += 1
        _log.log(
            logging.INFO if self._refusals <= REFUSALS_LOGGED_MAX else logging.DEBUG,
            "session.refused session=%s worker=%s lease=%s reason=%s message=%s",
            self.session_id, self.caller.party_id, lease_id, error.reason.value, error.message,
        )  # fmt: skip
        self.send(Refused(sequence, lease_id, error.reason.value, str(error)))


def _bulk_bytes(message: CoordinatorMessage) -> int:
    """About how long the message is, its few hundred bytes of names and numbers not counted."""
    match message:
        case Lease():
            return len(message.inline_input) + (len(message.offer.manifest) if message.offer is not None else 0)
        case GrantsRenewed():
            return len(message.offer.manifest) if message.offer is not None else 0
        case _:
            return 0


_ENDS_THE_SESSION: Final = frozenset(
    {
        Reason.MALFORMED_MESSAGE,
        Reason.SIGNATURE_INVALID,
        Reason.SEQUENCE_REPLAYED,
        Reason.SESSION_REPLACED,
        Reason.COORDINATOR_STOPPING,
    }
)


async def read_message(context: Context) -> bytes | None:
    """The next raw message; None when the peer has ended its side. Raises LIMIT_EXCEEDED."""
    raw = await context.read()
    # types-grpcio gives the end of a stream no type of its own.
    if raw is grpc.aio.EOF:
        return None
    if len(raw) > SESSION_MESSAGE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a message of {len(raw)} bytes",
            field="payload",
            limit=f"{SESSION_MESSAGE_BYTES_MAX} bytes a message",
        )
    return bytes(raw)


def check_sequence(request: pb.SessionRequest, *, last_sequence: int) -> None:
    """Returns when a message comes after the last one. Raises SEQUENCE_REPLAYED."""
    if request.sequence <= last_sequence:
        raise FallowError(
            Reason.SEQUENCE_REPLAYED,
            f"message {request.sequence} came after message {last_sequence}",
            field="sequence",
            limit="counts from 1 and only rises",
        )


def checked_message(
    request: pb.SessionRequest, *, caller: Caller, coordinator: PrivateKey, session_id: SessionId
) -> Incoming:
    """A worker's message, its signature checked if its kind needs one; nothing in it has been acted on.

    `session_id` is `NO_SESSION` for a Hello, which is signed before there is one. Raises MALFORMED_MESSAGE,
    SIGNATURE_INVALID, and what the decoder raises for fields out of range.
    """
    message = decode_worker_message(request.payload)
    if isinstance(message, SIGNED_WORKER_MESSAGES):
        check_worker_signature(
            caller.public_key,
            request.signature,
            request.payload,
            session=session_id,
            sequence=request.sequence,
            coordinator_key=coordinator.public_der,
        )
    return Incoming(message, request.payload, request.signature, request.sequence)
