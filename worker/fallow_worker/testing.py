"""For tests: an executor that computes nothing, a blob store in memory, a coordinator that says what it is told to.

The fake executor passes the same contract suite as the real ones; the scripted coordinator speaks the real protocol
over mTLS under an authority of its own.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from fallow.comparison import CandidateFinding, Finding, RowFinding
from fallow.credentials import Credentials, key_of_folder
from fallow.errors import FallowError, Reason
from fallow.explanation import WorkerExplanation
from fallow.identity import BLOBS_NAME, CONTROL_NAME, ENROLLMENT_NAME, PrivateKey, fingerprint_of
from fallow.ids import AccountId, Digest, LeaseId, PartyId, PoolId, SessionId, digest_of
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.roles import Role, Tier
from fallow.row_block import RowBlock, pack
from fallow.session import (
    SIGNED_COORDINATOR_MESSAGES,
    SIGNED_WORKER_MESSAGES,
    BlobReference,
    Capability,
    CoordinatorMessage,
    Device,
    DeviceKind,
    DeviceLevel,
    Hello,
    SandboxLevel,
    SignedBytes,
    TaskKind,
    Usage,
    Welcome,
    WorkerMessage,
)
from fallow.session_signature import NO_SESSION, check_worker_signature, sign_coordinator_payload
from fallow.v1 import worker_service_pb2 as pb
from fallow.v1 import worker_service_pb2_grpc
from fallow.wire.errors import ERROR_METADATA_KEY, encode_error
from fallow.wire.explanation import worker_explanation_to_message
from fallow.wire.session import decode_worker_message, encode_coordinator_message
from fallow_worker.ports import Outcome, RefereeWork, Work

_Message = TypeVar("_Message")
PATIENCE_S = 20.0
"""Longest wait of a test for something that should come at once."""

# ------------------------------------------------------------------------------------------------- executor


class FakeExecutor:
    """Gives every row back reversed; referees by bytes. Runs wait for `gate`; `failures` fail the leases they name."""

    def __init__(self, *, slots: int = 1, level: SandboxLevel = SandboxLevel.FULL) -> None:
        """Says it has one CPU with `slots` slots."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: dict[LeaseId, Exception] = {}
        self.next_failures: list[Exception] = []
        """Fail whatever runs next, one each."""
        self.started: list[LeaseId] = []
        self.cancelled: list[LeaseId] = []
        self.at_once = 0
        self.at_once_most = 0
        self.released = 0
        self.stopped = False
        self.slots = slots
        self._level = level

    async def start(self) -> None:
        """Nothing to start."""

    async def capability(self) -> Capability:
        """One made-up CPU."""
        device = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, model="made up", cores=1, slots=self.slots)
        return Capability(devices=(device,), sandbox_level=self._level, executor="process")

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """The reversed rows, once the gate is open."""
        self.started.append(work.lease_id)
        self.at_once += 1
        self.at_once_most = max(self.at_once, self.at_once_most)
        try:
            await self.gate.wait()
            if self.next_failures:
                raise self.next_failures.pop(0)
            if work.lease_id in self.failures:
                raise self.failures[work.lease_id]
            if work.referee is not None:
                return Outcome(b"", (), Usage(), "made-up", findings=_by_bytes(work.referee, work.rows))
            block = RowBlock.parse(work.input_block)
            progress(len(block))
            rows = [bytes(row)[::-1] for row in block]
            output = pack(block.schema_digest, rows, [], work.nonce)
            return Outcome(output, (), Usage(wall_microseconds=1), "made-up")
        except asyncio.CancelledError:
            self.cancelled.append(work.lease_id)
            raise
        finally:
            self.at_once -= 1

    async def release(self) -> None:
        """Counts."""
        self.released += 1

    async def stop(self) -> None:
        """Remembers."""
        self.stopped = True


def _by_bytes(task: RefereeWork, rows: int) -> tuple[RowFinding, ...]:
    """Findings of a comparison by bytes alone."""
    own = RowBlock.parse(task.own_block)
    by_row = [[CandidateFinding(None)] * len(task.candidates) for _ in range(rows)]
    for index, candidate in enumerate(task.candidates):
        for row, theirs in zip(candidate.rows, RowBlock.parse(candidate.block), strict=True):
            by_row[row][index] = CandidateFinding(Finding.EQUAL if theirs == own[row] else Finding.WRONG)
    return tuple(RowFinding(row, tuple(found)) for row, found in enumerate(by_row))


# ------------------------------------------------------------------------------------------------- blobs


class MemoryBlobs:
    """A blob store: a grant's payload is the digest, a receipt's too. `errors` are raised by the next calls."""

    def __init__(self) -> None:
        self.stored: dict[Digest, bytes] = {}
        self.errors: list[Exception] = []
        self.gets = 0
        self.closed = False

    def add(self, data: bytes) -> tuple[BlobReference, SignedBytes]:
        """Stores data; gives its reference and a grant to read it."""
        digest = digest_of(data)
        self.stored[digest] = data
        return BlobReference(digest, len(data)), SignedBytes(digest, b"grant")

    async def get(self, grant: SignedBytes, reference: BlobReference) -> bytes:
        """The bytes."""
        await asyncio.sleep(0)
        self._fail()
        self.gets += 1
        assert grant.payload == reference.digest
        return self.stored[reference.digest]

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        """The bytes, into a file."""
        path.write_bytes(await self.get(grant, reference))

    async def put(self, grant: SignedBytes, source: bytes) -> SignedBytes:
        """Stores what the grant names."""
        await asyncio.sleep(0)
        self._fail()
        digest = digest_of(source)
        assert grant.payload == digest
        self.stored[digest] = source
        return SignedBytes(digest, b"receipt")

    async def close(self) -> None:
        """Remembers."""
        self.closed = True

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


# ------------------------------------------------------------------------------------------------- authority


class TestAuthority:
    """A certificate authority for one test."""

    __test__ = False

    def __init__(self) -> None:
        self._key = PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test authority {secrets.token_hex(4)}")])
        self._certificate = (
            _builder(datetime.timedelta(days=1))
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.raw.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key.raw, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return _pem(self._certificate)

    def certificate(
        self, key: PrivateKey, names: tuple[str, ...], *, valid_for: datetime.timedelta = datetime.timedelta(hours=1)
    ) -> bytes:
        """A PEM certificate for a key, under DNS names."""
        certificate = (
            _builder(valid_for)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]))
            .issuer_name(self._certificate.subject)
            .public_key(key.raw.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .sign(self._key.raw, hashes.SHA256())
        )
        return _pem(certificate)


def _builder(valid_for: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + valid_for)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


# ------------------------------------------------------------------------------------------------- coordinator


@dataclass
class Conversation:
    """One session as the scripted coordinator sees it. Everything heard is kept in order; signatures are checked."""

    hello: Hello
    heard: list[WorkerMessage] = field(default_factory=list[WorkerMessage])
    session_id: SessionId = NO_SESSION
    over: bool = False
    outgoing: asyncio.Queue[CoordinatorMessage | FallowError | None] = field(
        default_factory=asyncio.Queue[CoordinatorMessage | FallowError | None]
    )
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _read: int = 0

    def say(self, message: CoordinatorMessage) -> None:
        """Sends a message."""
        self.outgoing.put_nowait(message)

    def end(self, error: FallowError | None = None) -> None:
        """Ends the stream, with the status of an error if one is given."""
        self.outgoing.put_nowait(error)

    async def hears(self, kind: type[_Message]) -> _Message:
        """The next message of a kind, skipping others. Fails after `PATIENCE_S`."""

        def found() -> _Message | None:
            for index in range(self._read, len(self.heard)):
                message = self.heard[index]
                if isinstance(message, kind):
                    self._read = index + 1
                    return message
            return None

        async with asyncio.timeout(PATIENCE_S), self._news:
            while True:
                message = found()
                if message is not None:
                    return message
                assert not self.over, f"the session ended; it heard {self.heard[self._read :]}"
                await self._news.wait()

    async def ends(self) -> None:
        """Returns when the worker has ended its side."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            while not self.over:
                await self._news.wait()

    async def note(self, message: WorkerMessage | None) -> None:
        """Keeps what came; None when nothing more will."""
        async with self._news:
            if message is None:
                self.over = True
            else:
                self.heard.append(message)
            self._news.notify_all()


class ScriptedCoordinator:
    """Speaks the worker's protocol over mTLS on loopback; a test says what it says."""

    def __init__(self, folder: Path) -> None:
        """Workers' credentials are made below `folder`."""
        self.authority = TestAuthority()
        self.key = PrivateKey.generate()
        self.heartbeat_interval_ms = 1_000
        self.keep: Callable[[Hello], tuple[LeaseId, ...]] = lambda hello: tuple(h.lease_id for h in hello.held_leases)
        self.why = WorkerExplanation(PartyId("worker"), True, 0, 1, 1, 0, 0, 0, (), ())
        """What it says to a worker that asks why it has no work."""
        self.refusal: FallowError | None = None
        """Every Hello is refused with it while it is set."""
        self._folder = folder
        self._sessions: asyncio.Queue[Conversation] = asyncio.Queue()
        self._worker_keys: dict[bytes, PrivateKey] = {}
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listens; on the same port again after `stop`."""
        server_key = PrivateKey.generate()
        certificate = self.authority.certificate(server_key, (CONTROL_NAME, BLOBS_NAME, ENROLLMENT_NAME))
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(_Servicer(self), self._server)
        credentials = grpc.ssl_server_credentials(
            [(server_key.pem, certificate)], self.authority.pem, require_client_auth=True
        )
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await self._server.start()

    async def stop(self) -> None:
        """Cuts every session, as a killed process would."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    def credentials(self, name: str = "worker", *, authority: TestAuthority | None = None) -> Credentials:
        """A worker that has joined; by another authority if one is given."""
        folder = self._folder / name
        key = key_of_folder(folder)
        self._worker_keys[key.fingerprint] = key
        credentials = Credentials(
            folder=folder,
            key=key,
            certificate_pem=(authority or self.authority).certificate(key, (f"{name}.workers.test",)),
            authority_pem=(authority or self.authority).pem,
            party_id=PartyId(name),
            account_id=AccountId("account-test"),
            role=Role.WORKER,
            tier=Tier.VOLUNTEER,
            pool_id=PoolId("pool-test"),
            enrollment_endpoint=f"127.0.0.1:{self.port}",
            control_endpoint=f"127.0.0.1:{self.port}",
            blob_endpoint=f"127.0.0.1:{self.port}",
            coordinator_public_key=self.key.public_der,
        )
        credentials.save()
        return credentials

    async def session(self) -> Conversation:
        """The next session that a worker opens."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._sessions.get()

    # ------------------------------------------------------------------------------------------- one stream

    async def serve(
        self,
        requests: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
        peer_certificate: bytes,
    ) -> None:
        """Carries one stream from Hello to its end."""
        worker_key = x509.load_pem_x509_certificate(peer_certificate).public_key()
        der = worker_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        hello = await self._receive(requests, der, NO_SESSION, 1)
        assert isinstance(hello, Hello), "a worker begins with Hello"
        if self.refusal is not None:
            await _abort(requests, self.refusal)
        session_id = SessionId(f"session-{secrets.token_hex(4)}")
        conversation = Conversation(hello, session_id=session_id)
        conversation.say(
            Welcome(
                protocol_version=PROTOCOL_VERSION,
                protocol_min_supported=PROTOCOL_VERSION_MIN_SUPPORTED,
                session_id=session_id,
                resume_token=secrets.token_bytes(16),
                heartbeat_interval_ms=self.heartbeat_interval_ms,
                keep_lease_ids=self.keep(hello),
                now_ms=1,
                blob_endpoint="",
            )
        )
        listening = asyncio.create_task(self._listen(requests, der, conversation))
        try:
            await self._speak(requests, der, conversation, listening)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await conversation.note(None)

    async def _speak(
        self,
        stream: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
        worker_der: bytes,
        conversation: Conversation,
        listening: asyncio.Task[None],
    ) -> None:
        sequence = 0
        while True:
            saying = asyncio.create_task(conversation.outgoing.get())
            await asyncio.wait((saying, listening), return_when=asyncio.FIRST_COMPLETED)
            if not saying.done():
                saying.cancel()
                return
            message = saying.result()
            if message is None:
                return
            if isinstance(message, FallowError):
                await _abort(stream, message)
                return
            sequence += 1
            payload = encode_coordinator_message(message)
            signature = b""
            if isinstance(message, SIGNED_COORDINATOR_MESSAGES):
                signature = sign_coordinator_payload(
                    self.key,
                    payload,
                    session=conversation.session_id,
                    sequence=sequence,
                    worker=fingerprint_of(worker_der),
                )
            await stream.write(pb.SessionResponse(sequence=sequence, payload=payload, signature=signature))
            if isinstance(message, Welcome):
                self._sessions.put_nowait(conversation)

    async def _listen(
        self,
        stream: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
        worker_der: bytes,
        conversation: Conversation,
    ) -> None:
        sequence = 1
        while True:
            sequence += 1
            message = await self._receive(stream, worker_der, conversation.session_id, sequence)
            await conversation.note(message)
            if message is None:
                return

    async def _receive(
        self,
        stream: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
        worker_der: bytes,
        session: SessionId,
        sequence: int,
    ) -> WorkerMessage | None:
        request = await stream.read()
        # types-grpcio gives the end of a stream no type of its own.
        if not hasattr(request, "payload"):
            return None
        assert request.sequence == sequence, "sequences count without gaps"
        message = decode_worker_message(request.payload)
        if isinstance(message, SIGNED_WORKER_MESSAGES):
            check_worker_signature(
                worker_der,
                request.signature,
                request.payload,
                session=session,
                sequence=sequence,
                coordinator_key=self.key.public_der,
            )
        return message


class _Servicer(worker_service_pb2_grpc.WorkerServiceServicer):
    def __init__(self, coordinator: ScriptedCoordinator) -> None:
        self._coordinator = coordinator

    async def Session(self, request_iterator, context):  # type: ignore[no-untyped-def, override] # noqa: N802
        del request_iterator
        await self._coordinator.serve(context, bytes(context.auth_context()["x509_pem_cert"][0]))

    async def GetWhy(self, request, context):  # type: ignore[no-untyped-def] # noqa: N802
        del request
        del context
        return pb.GetWhyResponse(explanation=worker_explanation_to_message(self._coordinator.why))


_STATUSES: Mapping[Reason, grpc.StatusCode] = {
    Reason.PARTY_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.CERTIFICATE_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PARTY_QUARANTINED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.PROTOCOL_TOO_OLD: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SESSION_REPLACED: grpc.StatusCode.ABORTED,
    Reason.KEY_IN_USE: grpc.StatusCode.ALREADY_EXISTS,
    Reason.COORDINATOR_STOPPING: grpc.StatusCode.UNAVAILABLE,
}


async def _abort(stream: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse], error: FallowError) -> None:
    await stream.abort(
        _STATUSES.get(error.reason, grpc.StatusCode.INTERNAL),
        error.message,
        trailing_metadata=((ERROR_METADATA_KEY, encode_error(error)),),
    )


MAP_ONLY = frozenset({TaskKind.MAP})
