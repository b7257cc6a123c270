"""The daemon over the real protocol, mTLS and signatures, against a coordinator that says what the test tells it to."""

from __future__ import annotations

import asyncio
import datetime
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.bundle import BundleFile, BundleManifest, Precision, ProgramFormat, ProgramStage
from fallow.comparison import Finding
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import Digest, LeaseId, PoolId, digest_of
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack
from fallow.schema import BytesColumn, Schema
from fallow.session import (
    BlobReference,
    BundleOffer,
    Candidate,
    Capability,
    CapabilityChanged,
    Cause,
    Commitment,
    Delivery,
    Draining,
    GrantsRenewed,
    GrantsWanted,
    Heartbeat,
    Lease,
    LeaseReturned,
    LeaseRevoked,
    Refereed,
    Settled,
    SignedBytes,
    TaskFailed,
    TaskKind,
    UploadOffer,
)
from fallow.wire.bundle import encode_manifest
from fallow_worker import link
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.core.world import Terms
from fallow_worker.daemon import Daemon, Looks
from fallow_worker.executor import WorkFailed
from fallow_worker.link import Greeting, ResumeToken, open_session
from fallow_worker.renewal import Renewal
from fallow_worker.testing import (
    PATIENCE_S,
    Conversation,
    FakeExecutor,
    MemoryBlobs,
    ScriptedCoordinator,
    TestAuthority,
)
from fallow_worker.transfers import Transfers

SCHEMA_DIGEST = Digest(b"s" * 32)
PROGRAM = b"a program that nobody runs" * 100


class Bench:
    """A scripted coordinator, a blob store and daemons that may come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator = ScriptedCoordinator(folder)
        self.blobs = MemoryBlobs()
        self.executor = FakeExecutor()
        self.daemon: Daemon | None = None
        self._running: asyncio.Task[FallowError | None] | None = None
        self._leases = 0
        program, grant = self.blobs.add(PROGRAM)
        manifest = encode_manifest(
            BundleManifest(
                name="test",
                files=(BundleFile("program.onnx", program.digest, program.length_bytes),),
                stages=(ProgramStage(ProgramFormat.ONNX, "program.onnx", (), ()),),
                input_schema=Schema((BytesColumn("row"),)),
                output_schema=Schema((BytesColumn("row"),)),
            )
        )
        self.offer = BundleOffer(digest_of(manifest), manifest, (grant,), 4, slot_dependent=False, memory_bytes_peak=0)

    async def starts(
        self,
        credentials: Credentials | None = None,
        *,
        renewal: Renewal | None = None,
        idle_release_ms: int = 300_000,
        looks: Looks | None = None,
        task_kinds: frozenset[TaskKind] = frozenset({TaskKind.MAP}),
    ) -> Daemon:
        token = ResumeToken(self.folder / "resume_token")
        terms = Terms(self.executor.slots, task_kinds, idle_release_ms=idle_release_ms)
        self.daemon = Daemon(
            terms=terms,
            capability=await self.executor.capability(),
            credentials=credentials or self.coordinator.credentials(),
            executor=self.executor,
            transfers=Transfers(BundleCache(self.folder / "cache"), self.blobs),
            blobs_of=lambda _credentials: self.blobs,
            dial=lambda papers, greeting: open_session(papers, greeting, token),
            renewal=renewal or Renewal(),
            looks=looks,
        )
        self._running = asyncio.create_task(self.daemon.run())
        return self.daemon

    async def ends(self) -> FallowError | None:
        assert self._running is not None
        async with asyncio.timeout(PATIENCE_S):
            return await self._running

    async def dies(self) -> None:
        """Stops the daemon without a word, as near to kill -9 as one process allows."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def lease(self, rows: list[bytes], *, offer: bool = True, inline: bool = True) -> Lease:
        self._leases += 1
        block = pack(SCHEMA_DIGEST, rows, [], bytes(16))
        reference, grant = self.blobs.add(block)
        return Lease(
            lease_id=LeaseId(f"lease-{self._leases}"),
            fence=self._leases,
            kind=TaskKind.MAP,
            bundle_digest=self.offer.bundle_digest,
            offer=self.offer if offer else None,
            rows=len(rows),
            input=reference,
            inline_input=block if inline else b"",
            input_grant=None if inline else grant,
            deadline_ms=1 << 41,
            runtime_max_ms=60_000,
            precision=Precision.FP32,
            output_bytes_max=1 << 26,
            unit_micros=1,
            pool_id=PoolId("pool-test"),
        )

    def grant_of(self, output: BlobReference) -> SignedBytes:
        return SignedBytes(output.digest, b"grant")


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr("fallow_worker.core.limits.RECONNECT_BASE_MS", 50)
    bench = Bench(tmp_path)
    await bench.coordinator.start()
    yield bench
    await bench.dies()
    await bench.coordinator.stop()


def reversed_rows(block: bytes) -> list[bytes]:
    return [bytes(row) for row in RowBlock.parse(block)]


async def settle(conversation: Conversation, lease: Lease) -> Commitment:
    committed = await conversation.hears(Commitment)
    assert committed.lease_id == lease.lease_id
    conversation.say(Settled(lease.lease_id, lease.fence, 0))
    return committed


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - polled, with a deadline
            await asyncio.sleep(0.01)


async def test_a_small_result_travels_inline_and_is_forgotten_when_settled(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    assert conversation.hello.window == 3
    lease = bench.lease([b"one", b"two"])
    conversation.say(lease)
    committed = await settle(conversation, lease)
    assert reversed_rows(committed.inline_output) == [b"eno", b"owt"]
    assert committed.output_root == RowBlock.parse(committed.inline_output).root()
    assert committed.output.digest == digest_of(committed.inline_output)
    await eventually(lambda: not daemon.world.leases)
    assert daemon.counts.settled == 1
    assert daemon.counts.rows == 2


async def test_a_large_result_is_committed_then_uploaded_then_delivered(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    lease = bench.lease([bytes([n % 256]) * 1000 for n in range(100)], inline=False)
    conversation.say(lease)
    committed = await conversation.hears(Commitment)
    assert committed.inline_output == b""
    assert committed.output.length_bytes > INLINE_PAYLOAD_BYTES_MAX
    assert committed.output.digest not in bench.blobs.stored, "nothing is uploaded before the commitment is recorded"
    conversation.say(UploadOffer(lease.lease_id, lease.fence, bench.grant_of(committed.output)))
    delivery = await conversation.hears(Delivery)
    assert delivery.receipt.payload == committed.output.digest
    assert RowBlock.parse(bench.blobs.stored[committed.output.digest]).root() == committed.output_root


async def test_a_second_lease_of_a_bundle_needs_no_offer_and_fetches_nothing_again(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    for number, offer in enumerate((True, False, False)):
        lease = bench.lease([b"row %d" % number], offer=offer)
        conversation.say(lease)
        await settle(conversation, lease)
    assert bench.blobs.gets == 1, "the program alone, once"


async def test_a_broken_stream_keeps_the_run_and_the_next_session_hears_the_same_commitment(bench: Bench) -> None:
    await bench.starts()
    first = await bench.coordinator.session()
    bench.executor.gate.clear()
    lease = bench.lease([b"row"])
    first.say(lease)
    await eventually(lambda: bench.executor.at_once == 1)
    await bench.coordinator.stop()
    bench.executor.gate.set()
    await bench.coordinator.start()
    second = await bench.coordinator.session()
    assert [(h.lease_id, h.fence) for h in second.hello.held_leases] == [(lease.lease_id, lease.fence)]
    committed = await second.hears(Commitment)
    second.end()
    third = await bench.coordinator.session()
    assert third.hello.held_leases[0].committed
    assert await third.hears(Commitment) == committed
    third.say(Settled(lease.lease_id, lease.fence, 0))
    assert bench.executor.started == [lease.lease_id], "the work was done once"


async def test_a_lease_that_the_welcome_drops_is_cancelled(bench: Bench) -> None:
    daemon = await bench.starts()
    first = await bench.coordinator.session()
    bench.executor.gate.clear()
    lease = bench.lease([b"row"])
    first.say(lease)
    await eventually(lambda: bench.executor.at_once == 1)
    bench.coordinator.keep = lambda _hello: ()
    first.end()
    await bench.coordinator.session()
    await eventually(lambda: bench.executor.cancelled == [lease.lease_id])
    await eventually(lambda: not daemon.world.leases)


async def test_a_restarted_daemon_presents_the_token_of_its_last_session(bench: Bench) -> None:
    await bench.starts()
    first = await bench.coordinator.session()
    assert first.hello.resume_token == b""
    await first.hears(Heartbeat)
    token = (bench.folder / "resume_token").read_bytes()
    assert (bench.folder / "resume_token").stat().st_mode & 0o777 == 0o600
    await bench.dies()
    await bench.starts()
    second = await bench.coordinator.session()
    assert second.hello.resume_token == token
    assert second.hello.held_leases == ()


async def test_a_revoked_lease_stops_and_says_nothing(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    bench.executor.gate.clear()
    lease = bench.lease([b"row"])
    conversation.say(lease)
    await eventually(lambda: bench.executor.at_once == 1)
    conversation.say(LeaseRevoked(lease.lease_id, lease.fence, "the job was cancelled"))
    await eventually(lambda: not daemon.world.leases)
    bench.executor.gate.set()
    follower = bench.lease([b"next"])
    conversation.say(follower)
    await settle(conversation, follower)
    assert not any(isinstance(message, TaskFailed | LeaseReturned) for message in conversation.heard)


async def test_a_failure_of_the_executor_is_told_with_cause_and_words(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    lease = bench.lease([b"row"])
    bench.executor.failures[lease.lease_id] = WorkFailed(Cause.PROGRAM, "it divides by zero")
    conversation.say(lease)
    failed = await conversation.hears(TaskFailed)
    assert (failed.cause, failed.reason) == (Cause.PROGRAM, "it divides by zero")
    defect = bench.lease([b"row"])
    bench.executor.failures[defect.lease_id] = RuntimeError("a defect")
    conversation.say(defect)
    failed = await conversation.hears(TaskFailed)
    assert failed.cause is Cause.PLATFORM
    assert "a defect" in failed.reason


async def test_why_a_lease_failed_is_told_again_when_the_stream_breaks_before_the_answer(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    lease = bench.lease([b"row"])
    bench.executor.failures[lease.lease_id] = WorkFailed(Cause.PROGRAM, "it divides by zero")
    conversation.say(lease)
    failed = await conversation.hears(TaskFailed)
    conversation.end()
    conversation = await bench.coordinator.session()
    assert [held.lease_id for held in conversation.hello.held_leases] == [lease.lease_id]
    assert await conversation.hears(TaskFailed) == failed
    conversation.say(LeaseRevoked(lease.lease_id, lease.fence, "it divides by zero"))
    await eventually(lambda: not daemon.world.leases)
    conversation.end()
    conversation = await bench.coordinator.session()
    assert conversation.hello.held_leases == ()


async def test_expired_grants_are_renewed_while_the_lease_waits(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    lease = bench.lease([b"row"], inline=False)
    bench.blobs.errors.append(FallowError(Reason.GRANT_EXPIRED, "too late"))
    conversation.say(lease)
    wanted = await conversation.hears(GrantsWanted)
    assert wanted.lease_id == lease.lease_id
    conversation.say(GrantsRenewed(lease.lease_id, lease.fence, lease.input_grant, bench.offer))
    await settle(conversation, lease)


async def test_a_referee_fetches_candidates_and_tells_findings_until_they_are_heard(bench: Bench) -> None:
    daemon = await bench.starts(task_kinds=frozenset({TaskKind.REFEREE}))
    conversation = await bench.coordinator.session()
    theirs = pack(SCHEMA_DIGEST, [b"eno", b"a lie", b"eerht"], [], bytes(16))
    some = pack(SCHEMA_DIGEST, [b"eerht"], [], bytes(16))
    (whole, grant), (part, _) = bench.blobs.add(theirs), bench.blobs.add(some)
    stale = SignedBytes(b"stale", b"grant")
    lease = replace(
        bench.lease([b"one", b"two", b"three"]),
        kind=TaskKind.REFEREE,
        candidates=(Candidate(whole, stale, b"", (0, 0, 0)), Candidate(part, None, some, (1,), (2,))),
        execution_classes=("made-up", "other"),
    )
    bench.blobs.errors += [FallowError(Reason.GRANT_EXPIRED, "too late")]
    conversation.say(lease)
    assert (await conversation.hears(GrantsWanted)).lease_id == lease.lease_id
    conversation.say(GrantsRenewed(lease.lease_id, lease.fence, None, bench.offer, (grant, grant)))
    refereed = await conversation.hears(Refereed)
    own = pack(SCHEMA_DIGEST, [b"eno", b"owt", b"eerht"], [], bytes(16))
    assert refereed.own_root == RowBlock.parse(own).root()
    assert refereed.execution_class == "made-up"
    assert [[one.finding for one in row.candidates] for row in refereed.rows] == [
        [Finding.EQUAL, None],
        [Finding.WRONG, None],
        [Finding.EQUAL, Finding.EQUAL],
    ]
    # It is evidence: said again, word for word, in the next session, until somebody has heard it.
    conversation.end()
    again = await bench.coordinator.session()
    assert await again.hears(Refereed) == refereed
    again.say(Settled(lease.lease_id, lease.fence, 0))
    await eventually(lambda: not daemon.world.leases)


async def test_a_drain_delivers_what_runs_gives_back_the_rest_and_ends(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    bench.executor.gate.clear()
    running, waiting = bench.lease([b"row"]), bench.lease([b"row"])
    conversation.say(running)
    conversation.say(waiting)
    await eventually(lambda: len(daemon.world.leases) == 2 and bench.executor.at_once == 1)
    daemon.drain("the owner stops this worker", 10_000)
    await conversation.hears(Draining)
    returned = await conversation.hears(LeaseReturned)
    assert (returned.lease_id, returned.cause) == (waiting.lease_id, Cause.OWNER_PREEMPT)
    conversation.say(LeaseRevoked(waiting.lease_id, waiting.fence, "returned"))
    bench.executor.gate.set()
    await settle(conversation, running)
    await conversation.ends()
    assert await bench.ends() is None
    assert bench.executor.stopped


async def test_what_runs_beyond_the_grace_is_given_back(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    bench.executor.gate.clear()
    lease = bench.lease([b"row"])
    conversation.say(lease)
    await eventually(lambda: bench.executor.at_once == 1)
    daemon.drain("stop", 100)
    returned = await conversation.hears(LeaseReturned)
    assert returned.cause is Cause.OWNER_PREEMPT
    conversation.say(LeaseRevoked(lease.lease_id, lease.fence, "returned"))
    assert await bench.ends() is None


async def test_memory_goes_back_after_idle_time(bench: Bench) -> None:
    await bench.starts(idle_release_ms=200)
    conversation = await bench.coordinator.session()
    lease = bench.lease([b"row"])
    conversation.say(lease)
    await settle(conversation, lease)
    await eventually(lambda: bench.executor.released == 1)


async def test_heartbeats_tell_the_progress_of_what_runs(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    bench.executor.gate.clear()
    lease = bench.lease([b"row"])
    conversation.say(lease)
    await eventually(lambda: bench.executor.at_once == 1)
    heartbeat = await conversation.hears(Heartbeat)
    while not heartbeat.progress:
        heartbeat = await conversation.hears(Heartbeat)
    assert [(p.lease_id, p.fence, p.rows_done) for p in heartbeat.progress] == [(lease.lease_id, lease.fence, 0)]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason.PARTY_REVOKED, "revoked"),
        (Reason.PROTOCOL_TOO_OLD, "upgrade this worker"),
        (Reason.SESSION_REPLACED, "replaced"),
        (Reason.PARTY_QUARANTINED, "quarantined"),
    ],
)
async def test_the_daemon_ends_with_the_coordinators_words(bench: Bench, reason: Reason, words: str) -> None:
    bench.coordinator.refusal = FallowError(reason, f"this worker is {words}")
    await bench.starts()
    error = await bench.ends()
    assert error is not None
    assert error.reason is reason
    assert words in str(error)


async def test_a_revocation_in_an_open_session_ends_the_daemon(bench: Bench) -> None:
    await bench.starts()
    conversation = await bench.coordinator.session()
    conversation.end(FallowError(Reason.PARTY_REVOKED, "this party was revoked"))
    error = await bench.ends()
    assert error is not None
    assert error.reason is Reason.PARTY_REVOKED


async def test_a_server_under_another_authority_is_named_as_such(bench: Bench) -> None:
    credentials = bench.coordinator.credentials(authority=TestAuthority())
    await bench.starts(credentials)
    error = await bench.ends()
    assert error is not None
    assert error.reason is Reason.CERTIFICATE_FOREIGN
    assert "join again" in str(error)


async def test_an_expired_certificate_is_renewed_before_dialling(bench: Bench) -> None:
    fresh = bench.coordinator.credentials()
    expired = TestAuthority.certificate(
        bench.coordinator.authority, fresh.key, ("worker.test",), valid_for=datetime.timedelta(minutes=-1)
    )
    renewals: list[Credentials] = []

    async def renew(credentials: Credentials) -> Credentials:
        renewals.append(credentials)
        return fresh

    await bench.starts(replace(fresh, certificate_pem=expired), renewal=Renewal(renew=renew))
    await bench.coordinator.session()
    assert renewals


async def test_a_renewal_at_half_life_leaves_session_and_work_alone(bench: Bench) -> None:
    credentials = bench.coordinator.credentials()
    clock_ms = float(credentials.not_before_ms)
    renewals: list[Credentials] = []

    async def renew(old: Credentials) -> Credentials:
        renewals.append(old)
        return old

    def now_ms() -> float:
        return clock_ms if not renewals else float(credentials.not_before_ms)

    clock_ms = float(credentials.not_after_ms)
    daemon = await bench.starts(credentials, renewal=Renewal(renew=renew, now_ms=now_ms))
    conversation = await bench.coordinator.session()
    await eventually(lambda: len(renewals) == 1)
    lease = bench.lease([b"row"])
    conversation.say(lease)
    await settle(conversation, lease)
    assert daemon.counts.sessions == 1


async def test_a_message_that_the_coordinator_did_not_sign_is_not_believed(bench: Bench) -> None:
    daemon = await bench.starts()
    conversation = await bench.coordinator.session()
    honest, bench.coordinator.key = bench.coordinator.key, PrivateKey.generate()
    conversation.say(bench.lease([b"row"]))
    await eventually(lambda: daemon.last_error is not None)
    assert daemon.last_error is not None
    assert daemon.last_error.reason is Reason.SIGNATURE_INVALID
    assert bench.executor.started == []
    bench.coordinator.key = honest


async def test_an_unreachable_coordinator_is_tried_again_until_it_is_there(bench: Bench) -> None:
    await bench.coordinator.stop()
    daemon = await bench.starts()
    await eventually(lambda: daemon.last_error is not None)
    assert daemon.last_error is not None
    assert daemon.last_error.reason is Reason.COORDINATOR_UNREACHABLE
    await bench.coordinator.start()
    await bench.coordinator.session()


async def test_a_session_that_does_not_welcome_in_time_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "WELCOME_WAIT_S", 0.3)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        credentials = replace(bench.coordinator.credentials(), control_endpoint=f"127.0.0.1:{silent.getsockname()[1]}")
        greeting = Greeting(await bench.executor.capability(), 1, ())
        with pytest.raises(FallowError) as caught:
            await open_session(credentials, greeting, ResumeToken(bench.folder / "none"))
    assert caught.value.reason is Reason.COORDINATOR_UNREACHABLE


async def test_a_change_of_what_the_worker_can_do_is_told_in_the_session_and_said_in_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow_worker.core.limits.CAPABILITY_SAID_EVERY_MS", 20)
    unplugged = asyncio.Event()

    async def looks(capability: Capability) -> AsyncIterator[Capability]:
        yield capability
        await unplugged.wait()
        yield replace(capability, on_battery=True)

    daemon = await bench.starts(looks=looks)
    first = await bench.coordinator.session()
    assert not first.hello.capability.on_battery
    unplugged.set()
    told = await first.hears(CapabilityChanged)
    assert told.capability == replace(first.hello.capability, on_battery=True)
    assert told.window == first.hello.window
    first.end()
    second = await bench.coordinator.session()
    assert second.hello.capability == told.capability
    await eventually(lambda: daemon.counts.sessions == 2)
