"""The worker's stream: Hello, Welcome, then leases and results until one side ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Final, assert_never

import grpc

from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import Digest, LeaseId, digest_of
from fallow.limits import (
    LEASES_PER_WORKER_MAX,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN_SUPPORTED,
)
from fallow.roles import Role
from fallow.session import (
    CapabilityChanged,
    Checked,
    Commitment,
    Delivery,
    Draining,
    Goodbye,
    GrantsWanted,
    Heartbeat,
    Hello,
    Inspection,
    LeaseReturned,
    LeaseSeen,
    Refereed,
    TaskFailed,
    Welcome,
)
from fallow.session_signature import NO_SESSION
from fallow.v1 import worker_service_pb2 as pb
from fallow.wire.explanation import worker_explanation_to_message
from fallow_coordinator.core.answers import Decision, SessionGranted
from fallow_coordinator.core.commands import (
    ChangeCapability,
    CloseSession,
    Commit,
    Deliver,
    DrainSession,
    FailTask,
    OpenSession,
    ReportCheck,
    ReportInspection,
    ReportReferee,
    ReturnLease,
    StoredBlob,
)
from fallow_coordinator.core.explaining import explain_worker
from fallow_coordinator.core.questions import LeaseToSend
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.auth import Caller, Doorkeeper
from fallow_coordinator.service.calls import (
    Call,
    Context,
    Peer,
    both_streams,
    decoded,
    method_name,
    service_handlers,
    unary,
)
from fallow_coordinator.service.errors import told
from fallow_coordinator.service.grants import stored_blob
from fallow_coordinator.service.inline_blocks import inspected_block
from fallow_coordinator.service.lease_messages import LeaseMessages
from fallow_coordinator.service.live_streams import LiveStreams
from fallow_coordinator.service.opening_pace import OpeningPace
from fallow_coordinator.service.outbox import Outbox
from fallow_coordinator.service.pool_caches import PoolCaches
from fallow_coordinator.service.protocol import check_versions
from fallow_coordinator.service.rate_limit import RateLimit
from fallow_coordinator.service.worker_session import (
    Incoming,
    Regrant,
    WorkerSession,
    check_sequence,
    checked_message,
    read_message,
)

_log = logging.getLogger(__name__)

HELLO_PATIENCE_S: Final = 10.0
REFUSAL_PATIENCE_S: Final = 2.0
"""How long a refusal waits for the message that it answers."""
RESUME_TOKEN_BYTES: Final = 32
SILENT_HEARTBEATS_MAX: Final = 3
"""Heartbeat intervals without any message after which a stream is half-open and closed."""
GOODBYE_PATIENCE_S: Final = 2.0
CHANGES_PER_S: Final = 0.5
CHANGES_BURST: Final = 128
"""Changes of capability, and requests for grants, of one session: the first fill the journal, the second need
signatures. As many at once as a worker may hold leases, twice."""

_SERVICE = pb.DESCRIPTOR.services_by_name["WorkerService"]


class WorkerService:
    """Session: one stream for each worker."""

    def __init__(
        self,
        *,
        engine: Engine,
        doorkeeper: Doorkeeper,
        streams: LiveStreams,
        outbox: Outbox,
        leases: LeaseMessages,
        caches: PoolCaches,
        key: PrivateKey,
        blob_service_key: bytes,
        blob_endpoint: str,
        heartbeat_interval_ms: int,
        now_ms: Callable[[], int],
    ) -> None:
        """`key` signs what is sent; `blob_service_key` is the public key whose receipts are believed."""
        self._engine = engine
        self._doorkeeper = doorkeeper
        self._streams = streams
        self._outbox = outbox
        self._leases = leases
        self._caches = caches
        self._key = key
        self._blob_service_key = blob_service_key
        self._blob_endpoint = blob_endpoint
        self._heartbeat_interval_ms = heartbeat_interval_ms
        self._now_ms = now_ms
        self._pace = OpeningPace(time.monotonic)
        self._closing: set[asyncio.Task[None]] = set()

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """Both methods; `limit` counts openings and calls by key."""
        return service_handlers(
            _SERVICE,
            {
                "Session": both_streams(method_name(_SERVICE, "Session"), self.session, limit),
                "GetWhy": unary(method_name(_SERVICE, "GetWhy"), pb.GetWhyRequest, self.get_why, limit),
            },
        )

    async def get_why(self, call: Call[pb.GetWhyRequest]) -> pb.GetWhyResponse:
        """Why the calling worker has no more work now."""
        caller = await self._doorkeeper.admit(call.peer, Role.WORKER)
        now_ms = self._now_ms()
        told = await self._engine.read(lambda state: explain_worker(state, caller.party_id, now_ms))
        assert told is not None, "a party of role worker is a worker"
        return pb.GetWhyResponse(explanation=worker_explanation_to_message(told))

    async def session(self, context: Context, peer: Peer) -> None:
        """The whole life of one stream."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                caller = await self._doorkeeper.admit(peer, Role.WORKER)
                stream = stack.enter_context(self._streams.open(caller.party_id, caller.not_after_ms))
            except FallowError:
                # A status that overtakes the worker's first message is lost in its gRPC, which then says INTERNAL.
                with contextlib.suppress(TimeoutError, FallowError):
                    await asyncio.wait_for(read_message(context), REFUSAL_PATIENCE_S)
                raise
            hello, sequence = await self._hello(context, caller)
            resume_token = secrets.token_bytes(RESUME_TOKEN_BYTES)
            with self._outbox.opening():
                async with self._pace.turn():
                    granted = await self._open(caller, hello, resume_token)
                session = WorkerSession(
                    context=context,
                    caller=caller,
                    stream=stream,
                    key=self._key,
                    engine=self._engine,
                    leases=self._leases,
                    session_id=granted.session_id,
                    last_sequence=sequence,
                    takes_several=hello.takes_several,
                )
                session.send(
                    Welcome(
                        protocol_version=PROTOCOL_VERSION,
                        protocol_min_supported=PROTOCOL_VERSION_MIN_SUPPORTED,
                        session_id=granted.session_id,
                        resume_token=resume_token,
                        heartbeat_interval_ms=self._heartbeat_interval_ms,
                        keep_lease_ids=granted.kept,
                        now_ms=self._now_ms(),
                        blob_endpoint=self._blob_endpoint,
                    )
                )
                self._caches.opened(granted.session_id, caller, peer.address, hello.pool_cache)
                self._outbox.register(granted.session_id, session.send)
            _log.info(
                "session.opened session=%s worker=%s address=%s", session.session_id, caller.party_id, peer.address
            )
            reason = "the connection was lost"
            try:
                reason = await self._run(session)
            finally:
                self._outbox.forget(session.session_id)
                self._caches.closed(session.session_id)
                self._in_background(self._submit_close(session, reason))

    async def drain(self) -> None:
        """Waits until the ends of all streams have been submitted."""
        while self._closing:
            await asyncio.wait(self._closing)

    # ------------------------------------------------------------------------------------------- opening

    async def _hello(self, context: Context, caller: Caller) -> tuple[Hello, int]:
        try:
            raw = await asyncio.wait_for(read_message(context), HELLO_PATIENCE_S)
        except TimeoutError:
            raw = None
        if raw is None:
            raise FallowError(
                Reason.DEADLINE_EXCEEDED, "no Hello came", limit=f"{HELLO_PATIENCE_S:g} s after the stream opened"
            )
        request = decoded(raw, pb.SessionRequest)
        check_sequence(request, last_sequence=0)
        incoming = checked_message(request, caller=caller, coordinator=self._key, session_id=NO_SESSION)
        hello = incoming.message
        if not isinstance(hello, Hello):
            raise FallowError(
                Reason.MALFORMED_MESSAGE, f"the first message is a {type(hello).__name__}", limit="a Hello first"
            )
        check_versions(version=hello.protocol_version, min_supported=hello.protocol_min_supported)
        if len(hello.resume_token) not in (0, RESUME_TOKEN_BYTES):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"a resume token of {len(hello.resume_token)} bytes",
                field="hello.resume_token",
                limit=f"{RESUME_TOKEN_BYTES} bytes, or none on a first session",
            )
        _check_window(hello.window)
        return hello, request.sequence

    async def _open(self, caller: Caller, hello: Hello, resume_token: bytes) -> SessionGranted:
        command = OpenSession(
            worker_id=caller.party_id,
            resume_token_digest=digest_of(hello.resume_token) if hello.resume_token else None,
            next_resume_token_digest=digest_of(resume_token),
            capability=hello.capability,
            window=hello.window,
            held_leases=hello.held_leases,
            machine_digest=hello.machine_digest,
        )
        deciding = asyncio.create_task(self._engine.submit(command))
        try:
            decision = await asyncio.shield(deciding)
        except asyncio.CancelledError:
            # The worker hung up while the disk was busy: a session that nobody knows of must not keep it out.
            self._in_background(self._close_unknown(deciding))
            raise
        self._pace.led_to(len(decision.events))
        answer = decision.answer
        assert isinstance(answer, SessionGranted), "opening grants a session"
        return answer

    async def _close_unknown(self, deciding: asyncio.Task[Decision]) -> None:
        with contextlib.suppress(FallowError):
            answer = (await deciding).answer
            assert isinstance(answer, SessionGranted), "opening grants a session"
            await self._engine.submit(CloseSession(answer.session_id, "the connection was lost before the Welcome"))

    # ------------------------------------------------------------------------------------------- running

    async def _run(self, session: WorkerSession) -> str:
        """Runs both directions until something ends the stream; says why. Raises what the worker is to be told."""
        limit = RateLimit(per_s=CHANGES_PER_S, burst=CHANGES_BURST, peers_max=2, clock=asyncio.get_running_loop().time)

        def handle(incoming: Incoming) -> asyncio.Future[Decision] | None:
            if isinstance(incoming.message, CapabilityChanged | GrantsWanted):
                limit.take(type(incoming.message).__name__)
            return self._handle(session, incoming)

        reading = asyncio.create_task(session.read_all(handle))
        writing = asyncio.create_task(session.write_all())
        watching = asyncio.create_task(self._until_silent(session))
        parts = (reading, writing, watching)
        try:
            await asyncio.wait((*parts, session.stream.ended), return_when=asyncio.FIRST_COMPLETED)
            if session.stream.ended.done():
                error = session.stream.ended.result()
                await _say_goodbye(session, writing, error)
                raise error
            for part in parts:
                if part.done() and part.exception() is not None:
                    raise part.exception() or AssertionError
            return "the worker ended its stream" if reading.done() else "the worker went silent"
        finally:
            reading.cancel()
            watching.cancel()
            await session.end_writing(writing, GOODBYE_PATIENCE_S)
            await asyncio.gather(reading, watching, return_exceptions=True)

    async def _until_silent(self, session: WorkerSession) -> None:
        patience_s = SILENT_HEARTBEATS_MAX * self._heartbeat_interval_ms / 1000
        loop = asyncio.get_running_loop()
        # Each message moves the end of the patience; an event for every message would cost more than this look.
        while (left_s := session.last_heard + patience_s - loop.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        """Runs on although the stream's coroutine is cancelled; `drain` waits for it."""
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _submit_close(self, session: WorkerSession, reason: str) -> None:
        ended = session.stream.ended
        if ended.done() and not ended.cancelled():
            reason = ended.result().message
        _log.info("session.closed session=%s worker=%s reason=%s", session.session_id, session.caller.party_id, reason)
        # The core may have closed it already, and a coordinator that stops closes all sessions when it is back.
        with contextlib.suppress(FallowError):
            await self._engine.submit(CloseSession(session.session_id, reason))

    # ------------------------------------------------------------------------------------------- messages

    def _handle(self, session: WorkerSession, incoming: Incoming) -> asyncio.Future[Decision] | None:
        """Acts on one message; what it waits for, if anything. Raises what the worker is to be refused with."""
        worker_id, session_id = session.caller.party_id, session.session_id
        match incoming.message:
            case Heartbeat():
                pass
            case CapabilityChanged(capability, window):
                _check_window(window)
                return self._engine.submit_soon(ChangeCapability(session_id, capability, window))
            case Commitment():
                return self._commit(session, incoming, incoming.message)
            case Delivery():
                return self._deliver(session, incoming.message)
            case Inspection(lease_id, fence, report, usage):
                return self._engine.submit_soon(
                    ReportInspection(
                        session_id=session_id,
                        worker_id=worker_id,
                        lease_id=lease_id,
                        fence=fence,
                        report=report,
                        usage=usage,
                        message_digest=digest_of(incoming.payload),
                        signature=incoming.signature,
                        sequence=incoming.sequence,
                    )
                )
            case TaskFailed(lease_id, fence, cause, reason):
                return self._engine.submit_soon(FailTask(session_id, worker_id, lease_id, fence, cause, reason))
            case LeaseReturned(lease_id, fence, cause, reason):
                return self._engine.submit_soon(ReturnLease(session_id, worker_id, lease_id, fence, cause, reason))
            case Checked(lease_id, fence, verdict):
                return self._engine.submit_soon(ReportCheck(session_id, worker_id, lease_id, fence, verdict))
            case Refereed():
                refereed = incoming.message
                return self._engine.submit_soon(
                    ReportReferee(
                        session_id=session_id,
                        worker_id=worker_id,
                        lease_id=refereed.lease_id,
                        fence=refereed.fence,
                        own_root=refereed.own_root,
                        findings=refereed.rows,
                        execution_class=refereed.execution_class,
                        usage=refereed.usage,
                        message_digest=digest_of(incoming.payload),
                        signature=incoming.signature,
                        sequence=incoming.sequence,
                    )
                )
            case LeaseSeen(lease_id, _):
                session.lease_seen(lease_id)
            case GrantsWanted():
                self._regrant(session, incoming.message)
            case Draining():
                return self._engine.submit_soon(DrainSession(session_id))
            case Hello():
                raise FallowError(Reason.MALFORMED_MESSAGE, "a second Hello in one session")
            case _:
                assert_never(incoming.message)
        return None

    def _commit(self, session: WorkerSession, incoming: Incoming, commitment: Commitment) -> asyncio.Future[Decision]:
        if commitment.partial:
            raise FallowError(
                Reason.FIELD_INVALID, "partial results are not taken yet", field="commitment.partial", limit="false"
            )
        payloads: dict[Digest, bytes] = {}
        stored: StoredBlob | None = None
        if commitment.inline_output:
            stored = checked_inline_output(commitment)
            payloads[commitment.output.digest] = commitment.inline_output
        elapsed_ms, round_trip_ms = session.challenge_times_ms(commitment.lease_id)
        return self._engine.submit_soon(
            Commit(
                session_id=session.session_id,
                worker_id=session.caller.party_id,
                lease_id=commitment.lease_id,
                fence=commitment.fence,
                output_root=commitment.output_root,
                rows=commitment.rows,
                output=commitment.output,
                inline=bool(commitment.inline_output),
                failures=commitment.failures,
                usage=commitment.usage,
                execution_class=commitment.execution_class,
                message_digest=digest_of(incoming.payload),
                signature=incoming.signature,
                sequence=incoming.sequence,
                stored=stored,
                elapsed_ms=elapsed_ms,
                round_trip_ms=round_trip_ms,
            ),
            payloads,
        )

    def _deliver(self, session: WorkerSession, delivery: Delivery) -> asyncio.Future[Decision]:
        facts = self._facts(session, delivery.lease_id)
        stored = stored_blob(delivery.receipt, self._blob_service_key, facts.account_id, "delivery.receipt")
        return self._engine.submit_soon(
            Deliver(session.session_id, session.caller.party_id, delivery.lease_id, delivery.fence, stored)
        )

    def _regrant(self, session: WorkerSession, wanted: GrantsWanted) -> None:
        facts = self._facts(session, wanted.lease_id)
        if facts.fence != wanted.fence:
            raise FallowError(Reason.FENCE_STALE, f"the lease has fence {facts.fence}", field="fence")
        session.send(Regrant(wanted.lease_id))

    def _facts(self, session: WorkerSession, lease_id: LeaseId) -> LeaseToSend:
        facts = self._leases.facts(session.session_id, lease_id)
        if facts is None:
            raise FallowError(Reason.LEASE_UNKNOWN, "this session holds no such lease", field="lease_id")
        return facts


def checked_inline_output(commitment: Commitment) -> StoredBlob:
    """What stands in the inline block's frame, once it is what the commitment says: digest, length, rows and root.

    Raises DIGEST_MISMATCH, ROOT_MISMATCH, FIELD_INVALID or what parsing the block's frame raises.
    """
    block, stored = inspected_block(commitment.inline_output, commitment.output, "commitment.inline_output")
    if stored.rows != commitment.rows:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the block has {stored.rows} rows where the commitment says {commitment.rows}",
            field="commitment.rows",
        )
    if stored.root != commitment.output_root:
        raise FallowError(
            Reason.ROOT_MISMATCH, "the root is not that of the block's rows", field="commitment.output_root"
        )
    offsets = block.offsets
    for failure in commitment.failures:
        if failure.row >= len(block) or offsets[failure.row] != offsets[failure.row + 1]:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"row {failure.row} is told as failed but has a value, or is not there",
                field="commitment.failures",
            )
    return stored


async def _say_goodbye(session: WorkerSession, writing: asyncio.Task[None], error: FallowError) -> None:
    """Tells the worker in the stream too: a status alone is lost when a proxy ends the connection."""
    await session.end_writing(writing, GOODBYE_PATIENCE_S)
    detail = told(error)
    with contextlib.suppress(TimeoutError, grpc.RpcError):
        async with asyncio.timeout(GOODBYE_PATIENCE_S):
            await session.write_now(Goodbye(detail.reason.value, str(detail)))


def _check_window(window: int) -> None:
    if not 0 <= window <= LEASES_PER_WORKER_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a window of {window} leases",
            field="window",
            limit=f"0 to {LEASES_PER_WORKER_MAX} leases",
        )
