"""One process full of workers that compute nothing: they enrol, open sessions, and commit to what they are leased.

Each is a party of its own with a key and a connection of its own; each task is answered by one signed message with an
output block of its own. Of what the coordinator signs, every `CHECKED_ONE_IN`-th message is checked.
"""

from __future__ import annotations

import asyncio
import heapq
import multiprocessing
import random
import selectors
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from scripts.benches.lean_session import LeanStream, StreamEnded, tls_context

from fallow.credentials import Credentials
from fallow.enrollment import join
from fallow.errors import FallowError, Reason
from fallow.identity import CONTROL_NAME
from fallow.ids import Digest, LeaseId, SessionId, digest_of
from fallow.join_line import parse_join_line
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.merkle import leaf_digest
from fallow.row_block import HEADER_BYTES, pack, with_nonce
from fallow.session import (
    BlobReference,
    Capability,
    Commitment,
    Device,
    DeviceKind,
    DeviceLevel,
    Heartbeat,
    Hello,
    SandboxLevel,
    TaskKind,
    Usage,
    WorkerMessage,
)
from fallow.session_signature import NO_SESSION, check_coordinator_signature, sign_worker_payload
from fallow.v1 import session_pb2
from fallow.v1 import worker_service_pb2 as pb
from fallow.wire.session import encode_worker_message

CHECKED_ONE_IN: Final = 64
ENROL_AT_ONCE: Final = 8
ENROL_PATIENCE_S: Final = 180.0
CONNECT_PATIENCE_S: Final = 30.0
OPENED_AT_ONCE: Final = 4
"""Connections made before the others are listened to again."""
HEARTBEATS_LOOKED_AT_S: Final = 2.0
SILENT_S_MAX: Final = 8.0
"""A session that said nothing for so long sends a heartbeat: the coordinator takes a silent one for half-open."""
RECONNECT_AFTER_S: Final = 0.5
_NONCE_BYTES: Final = 16
_POLL_S: Final = 0.02
_PATIENT_WITH: Final = (Reason.OVERLOADED, Reason.COORDINATOR_UNREACHABLE, Reason.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class Load:
    """What one generator does."""

    folder: Path
    join_line: str
    sessions: int
    window: int
    """Leases that each worker is ready to hold."""
    task_ms: float
    """How long a task pretends to take, on average; 0: answered at once."""
    output_schema_digest: bytes
    slots: int = 1
    reconnect: bool = False
    """Whether sessions that break are opened again, as worker daemons do."""


@dataclass(slots=True)
class Counts:
    """What one generator did so far."""

    open: int = 0
    """Sessions that are open now."""
    leases: int = 0
    commitments: int = 0
    settled: int = 0
    refused: int = 0
    revoked: int = 0
    broken: int = 0
    """Sessions that ended unasked."""
    checked: int = 0
    """Signatures of the coordinator that were checked."""
    cpu_s: float = 0.0
    trouble: str = ""


@dataclass(slots=True)
class _Worker:
    credentials: Credentials
    folder: Path
    stream: LeanStream | None = None
    session_id: SessionId = NO_SESSION
    resume_token: bytes = b""
    sent: int = 0
    said_s: float = 0.0
    """When it said something last."""
    held: dict[str, float] = field(default_factory=dict[str, float])
    """Leases that are not settled yet, and when a commitment for them went out (0: not yet)."""


class LoadGenerator:
    """Many workers on one thread; the parent process says when to begin, to count and to stop."""

    def __init__(self, load: Load, parent: Connection) -> None:
        self._load = load
        self._parent = parent
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._counts = Counts()
        self._turnarounds_ms: list[float] = []
        self._settled_ids: list[str] | None = None
        self._due: list[tuple[float, int, _Worker, Commitment]] = []
        self._again: list[tuple[float, int, _Worker]] = []
        self._number = 0
        self._paused = False
        self._number_received = 0
        self._beat_at_s = 0.0
        self._chance = random.Random(load.sessions)
        row = bytes(_NONCE_BYTES)
        self._template = pack(Digest(load.output_schema_digest), [row], (), bytes(_NONCE_BYTES))
        self._row_at = HEADER_BYTES + 8

    def run(self) -> None:
        """Enrols, tells the parent, then does as it says until it says `stop`."""
        self._workers = asyncio.run(_enrolled(self._load))
        self._parent.send("enrolled")
        self._selector.register(self._parent, selectors.EVENT_READ, None)
        while self._step():
            pass

    # ------------------------------------------------------------------------------------------- the loop

    def _step(self) -> bool:
        wait_s = _POLL_S if self._due or self._again else 1.0
        if self._again and self._again[0][0] <= time.monotonic():
            wait_s = 0.0
        if self._due:
            wait_s = max(0.0, min(wait_s, self._due[0][0] - time.monotonic()))
        for key, events in self._selector.select(wait_s):
            if key.data is None:
                if not self._obey():
                    return False
                continue
            worker: _Worker = key.data
            if worker.stream is None:
                continue
            try:
                if events & selectors.EVENT_WRITE:
                    worker.stream.flush()
                if events & selectors.EVENT_READ:
                    worker.stream.receive()
            except StreamEnded as ended:
                self._lost(worker, str(ended))
        self._let_fall_due()
        return True

    def _let_fall_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, worker, commitment = heapq.heappop(self._due)
            if worker.stream is not None and commitment.lease_id in worker.held and not self._paused:
                try:
                    self._say(worker, commitment)
                except StreamEnded as ended:
                    self._lost(worker, str(ended))
        opened = 0
        while self._again and self._again[0][0] <= now and opened < OPENED_AT_ONCE:
            _, _, worker = heapq.heappop(self._again)
            self._open(worker)
            opened += 1
        if now >= self._beat_at_s:
            self._beat_at_s = now + HEARTBEATS_LOOKED_AT_S
            self._beat(now)

    def _beat(self, now: float) -> None:
        """Lets sessions be heard of that had nothing else to say."""
        for worker in self._workers:
            if worker.stream is not None and worker.session_id and now - worker.said_s > SILENT_S_MAX:
                try:
                    self._say(worker, Heartbeat())
                except StreamEnded as ended:
                    self._lost(worker, str(ended))

    def _obey(self) -> bool:
        """Does what the parent says; False when that is to stop."""
        word: Any = self._parent.recv()
        if word == "open":
            for worker in self._workers:
                self._number += 1
                heapq.heappush(self._again, (0.0, self._number, worker))
            self._parent.send("opened")
        elif word == "count":
            self._counts.cpu_s = time.process_time()
            self._parent.send((self._counts, self._turnarounds_ms))
            self._turnarounds_ms = []
        elif word == "pause":
            self._paused = True
        elif word == "remember":
            self._settled_ids = []
        elif word == "settled":
            self._parent.send(self._settled_ids)
        else:
            for worker in self._workers:
                if worker.stream is not None:
                    worker.stream.close()
            return False
        return True

    # ------------------------------------------------------------------------------------------- sessions

    def _open(self, worker: _Worker) -> None:
        try:
            tls = _connected(worker)
        except OSError as error:
            self._lost(worker, f"no connection: {error}")
            return
        worker.sent, worker.session_id = 0, NO_SESSION
        worker.stream = LeanStream(tls, lambda data: self._take(worker, data))
        self._selector.register(tls, selectors.EVENT_READ, worker)
        capability = Capability(
            devices=(Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, cores=2, slots=self._load.slots),),
            sandbox_level=SandboxLevel.FULL,
            task_kinds=frozenset((TaskKind.MAP,)),
        )
        self._say(
            worker,
            Hello(
                PROTOCOL_VERSION,
                PROTOCOL_VERSION_MIN_SUPPORTED,
                "bench",
                worker.resume_token,
                capability,
                self._load.window,
                takes_several=True,
            ),
        )

    def _lost(self, worker: _Worker, why: str) -> None:
        if worker.stream is not None:
            self._selector.unregister(worker.stream.tls)
            worker.stream.close()
            worker.stream = None
            if worker.session_id:
                self._counts.open -= 1
        self._counts.broken += 1
        self._counts.trouble = self._counts.trouble or why
        worker.held.clear()
        if self._load.reconnect:
            self._number += 1
            after_s = RECONNECT_AFTER_S * (0.5 + self._chance.random())
            heapq.heappush(self._again, (time.monotonic() + after_s, self._number, worker))

    def _say(self, worker: _Worker, message: WorkerMessage) -> None:
        stream = worker.stream
        assert stream is not None, "there is a stream to speak on"
        payload = encode_worker_message(message)
        worker.sent += 1
        worker.said_s = time.monotonic()
        signature = sign_worker_payload(
            worker.credentials.key,
            payload,
            session=worker.session_id,
            sequence=worker.sent,
            coordinator_key=worker.credentials.coordinator_public_key,
        )
        stream.send(pb.SessionRequest(sequence=worker.sent, payload=payload, signature=signature))
        if isinstance(message, Commitment):
            self._counts.commitments += 1
            worker.held[message.lease_id] = time.monotonic()

    def _take(self, worker: _Worker, data: bytes) -> None:
        response = pb.SessionResponse.FromString(data)
        message = session_pb2.CoordinatorMessage.FromString(response.payload)
        kind = message.WhichOneof("kind")
        if kind == "several":
            for one in message.several.messages:
                self._hear(worker, one, one.WhichOneof("kind"))
        else:
            self._hear(worker, message, kind)
        self._check(worker, response, kind)

    def _hear(self, worker: _Worker, message: session_pb2.CoordinatorMessage, kind: str | None) -> None:
        if kind == "settled":
            self._counts.settled += 1
            committed_s = worker.held.pop(message.settled.lease_id, 0.0)
            if committed_s:
                self._turnarounds_ms.append((time.monotonic() - committed_s) * 1e3)
            if self._settled_ids is not None:
                self._settled_ids.append(message.settled.lease_id)
        elif kind == "lease":
            self._counts.leases += 1
            self._work(worker, message.lease)
        elif kind == "welcome":
            worker.session_id = SessionId(message.welcome.session_id)
            worker.resume_token = message.welcome.resume_token
            self._counts.open += 1
        elif kind == "refused":
            self._counts.refused += 1
            self._counts.trouble = f"{message.refused.error.reason}: {message.refused.error.message}"
        elif kind == "lease_revoked":
            self._counts.revoked += 1
            worker.held.pop(message.lease_revoked.lease_id, None)
        elif kind == "goodbye":
            self._counts.trouble = f"{message.goodbye.error.reason}: {message.goodbye.error.message}"

    def _check(self, worker: _Worker, response: pb.SessionResponse, kind: str | None) -> None:
        if kind not in ("settled", "lease", "welcome", "several"):
            return
        self._number_received += 1
        if self._number_received % CHECKED_ONE_IN and kind != "welcome":
            return
        self._counts.checked += 1
        check_coordinator_signature(
            worker.credentials.coordinator_public_key,
            response.signature,
            response.payload,
            session=worker.session_id,
            sequence=response.sequence,
            worker=worker.credentials.key.fingerprint,
        )

    # ------------------------------------------------------------------------------------------- work

    def _work(self, worker: _Worker, lease: session_pb2.Lease) -> None:
        """Commits to a made-up output of the lease's one row: at once, or when the task would have been done."""
        assert lease.rows == 1, f"one row a task was asked for, {lease.rows} came"
        self._number += 1
        row = self._number.to_bytes(_NONCE_BYTES, "little")
        output = with_nonce(self._template, self._chance.randbytes(_NONCE_BYTES))
        output = output[: self._row_at] + row
        commitment = Commitment(
            lease_id=LeaseId(lease.lease_id),
            fence=lease.fence,
            output_root=leaf_digest(0, row),
            rows=1,
            output=BlobReference(digest_of(output), len(output)),
            usage=Usage(wall_microseconds=1000, cpu_microseconds=1000),
            execution_class="bench",
            inline_output=output,
        )
        worker.held[lease.lease_id] = 0.0
        if self._paused:
            return
        if self._load.task_ms:
            # Tasks of a fleet do not end in step.
            after_s = self._load.task_ms / 1e3 * (0.5 + self._chance.random())
            heapq.heappush(self._due, (time.monotonic() + after_s, self._number, worker, commitment))
        else:
            self._say(worker, commitment)


def _connected(worker: _Worker) -> ssl.SSLSocket:
    host, _, port = worker.credentials.control_endpoint.rpartition(":")
    plain = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_PATIENCE_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tls = tls_context(worker.credentials, worker.folder).wrap_socket(plain, server_hostname=CONTROL_NAME)
    tls.setblocking(False)
    return tls


async def _enrolled(load: Load) -> list[_Worker]:
    """All workers of this process, joined under one token."""
    line, room = parse_join_line(load.join_line), asyncio.Semaphore(ENROL_AT_ONCE)

    async def enrol(number: int) -> _Worker:
        folder = load.folder / f"worker-{number}"
        deadline = time.monotonic() + ENROL_PATIENCE_S
        async with room:
            while True:
                try:
                    return _Worker(await join(line, folder, f"bench-{number}"), folder)
                except FallowError as error:
                    # The door lets a burst through and then so many a second; on a busy machine handshakes run out.
                    if error.reason not in _PATIENT_WITH or time.monotonic() > deadline:
                        raise
                await asyncio.sleep(0.5)

    return list(await asyncio.gather(*(enrol(number) for number in range(load.sessions))))


def run_generator(load: Load, parent: Connection) -> None:
    """Entry point of the process."""
    LoadGenerator(load, parent).run()


class Generators:
    """The generator processes, from the parent's side."""

    def __init__(self, loads: Sequence[Load]) -> None:
        """Starts one process for each load; they begin to enrol at once."""
        spawn = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        for load in loads:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=run_generator, args=(load, theirs), daemon=True)
            process.start()
            self._links.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [process.pid for process in self._processes]

    async def enrolled(self) -> None:
        """Waits until every worker has joined."""
        for link in self._links:
            assert await asyncio.to_thread(link.recv) == "enrolled"

    async def open(self) -> None:
        """Has all sessions opened; some may still wait for their Welcome."""
        for link in self._links:
            link.send("open")
        for link in self._links:
            assert await asyncio.to_thread(link.recv) == "opened"

    async def counts(self) -> tuple[list[Counts], list[float]]:
        """The counts of each process, and all turnarounds since they were asked last, in milliseconds."""
        for link in self._links:
            link.send("count")
        answers = [await asyncio.to_thread(link.recv) for link in self._links]
        return [counts for counts, _ in answers], [one for _, turnarounds in answers for one in turnarounds]

    def pause(self) -> None:
        """From now on no lease is answered."""
        for link in self._links:
            link.send("pause")

    def remember(self) -> None:
        """From now on they remember which leases they were told are settled."""
        for link in self._links:
            link.send("remember")

    async def settled(self) -> list[str]:
        """Leases they were told are settled, since `remember`."""
        for link in self._links:
            link.send("settled")
        answers: list[list[str]] = [await asyncio.to_thread(link.recv) for link in self._links]
        return [lease_id for answer in answers for lease_id in answer]

    def stop(self) -> None:
        """Ends all processes."""
        for link in self._links:
            try:
                link.send("stop")
            except OSError:
                continue
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
