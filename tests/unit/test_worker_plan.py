"""What a worker decides next, given what it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.bundle import InspectionReport, Precision
from fallow.errors import Reason
from fallow.ids import Digest, LeaseId, PoolId, SessionId
from fallow.session import (
    BlobReference,
    BundleOffer,
    Capability,
    CapabilityChanged,
    Cause,
    Commitment,
    CoordinatorMessage,
    Delivery,
    Draining,
    GrantsRenewed,
    GrantsWanted,
    Inspection,
    Lease,
    LeaseReturned,
    LeaseRevoked,
    Refused,
    Settled,
    SignedBytes,
    TaskFailed,
    TaskKind,
    UploadOffer,
)
from fallow_worker.core import limits
from fallow_worker.core.actions import (
    Action,
    Cancel,
    Connect,
    Fetch,
    Forget,
    Leave,
    ReleaseExecutor,
    Run,
    Say,
    SayHeartbeat,
    Upload,
)
from fallow_worker.core.happenings import (
    CapabilitySeen,
    DrainAsked,
    Fetched,
    FetchFailed,
    FetchTrouble,
    Happening,
    Ran,
    Received,
    RunFailed,
    SessionEnded,
    SessionOpened,
    SlotFreed,
    TimePassed,
    Uploaded,
    UploadFailed,
)
from fallow_worker.core.observe import observe
from fallow_worker.core.plan import begun, next_wake_ms, plan, window_wanted
from fallow_worker.core.world import Offline, Online, Ready, Running, Terms, World

BUNDLE = Digest(b"b" * 32)
GRANT = SignedBytes(b"grant", b"signature")
RECEIPT = SignedBytes(b"receipt", b"signature")
OFFER = BundleOffer(BUNDLE, b"manifest", (GRANT,), 4, slot_dependent=False, memory_bytes_peak=0)


def lease(number: int, *, fence: int = 1, kind: TaskKind = TaskKind.MAP, latency_ms_max: int = 0) -> Lease:
    return Lease(
        lease_id=LeaseId(f"lease-{number}"),
        fence=fence,
        kind=kind,
        bundle_digest=BUNDLE,
        offer=OFFER,
        rows=1,
        input=BlobReference(Digest(b"i" * 32), 1000),
        inline_input=b"",
        input_grant=GRANT,
        deadline_ms=1 << 50,
        runtime_max_ms=60_000,
        precision=Precision.FP32,
        output_bytes_max=1 << 20,
        unit_micros=1,
        pool_id=PoolId("pool-1"),
        latency_ms_max=latency_ms_max,
    )


def over(of: Lease) -> LeaseRevoked:
    """How the coordinator answers what ended a lease."""
    return LeaseRevoked(of.lease_id, of.fence, "over")


def commitment(of: Lease, *, inline: bytes = b"") -> Commitment:
    return Commitment(
        of.lease_id,
        of.fence,
        Digest(b"r" * 32),
        1,
        BlobReference(Digest(b"o" * 32), 100),
        inline_output=inline,
    )


class Worker:
    """A world with a clock that carries out nothing: every due action is taken as begun and noted."""

    def __init__(self, slots: int = 1, *, kinds: frozenset[TaskKind] = frozenset({TaskKind.MAP})) -> None:
        self.now_ms = 1_000
        self.world = World(Terms(slots, kinds, idle_release_ms=10_000), Offline(0, 0), busy_at_ms=self.now_ms)
        self.sessions = 0

    def due(self) -> list[Action]:
        actions: list[Action] = []
        for _ in range(3):
            due = plan(self.world, self.now_ms)
            for action in due:
                self.world = begun(self.world, action, self.now_ms)
            actions += due
        assert plan(self.world, self.now_ms) == (), "what has begun is not due again"
        return actions

    def after(self, happening: Happening) -> list[Action]:
        self.world = observe(self.world, happening, self.now_ms)
        return self.due()

    def hears(self, message: CoordinatorMessage) -> list[Action]:
        assert isinstance(message, Lease | UploadOffer | Settled | LeaseRevoked | Refused | GrantsRenewed)
        return self.after(Received(message))

    def later(self, milliseconds: int) -> list[Action]:
        self.now_ms += milliseconds
        return self.after(TimePassed())

    def opens(self, *keep: Lease) -> list[Action]:
        assert self.due() == [Connect()]
        self.sessions += 1
        return self.after(
            SessionOpened(SessionId(f"session-{self.sessions}"), 5_000, frozenset(k.lease_id for k in keep))
        )

    def loses_session(self) -> None:
        actions = self.after(SessionEnded(jitter=0.0))
        assert actions == []
        self.now_ms += limits.RECONNECT_LEAST_MS

    def runs(self, granted: Lease) -> list[Action]:
        self.hears(granted)
        return self.after(Fetched(granted.lease_id))


def without_offer(granted: Lease) -> Lease:
    return replace(granted, offer=None)


@pytest.fixture
def worker() -> Worker:
    worker = Worker()
    assert worker.opens() == []
    return worker


def test_an_inline_result_goes_from_lease_to_settlement(worker: Worker) -> None:
    granted = lease(1)
    assert worker.hears(granted) == [Fetch(without_offer(granted), OFFER)]
    assert worker.after(Fetched(granted.lease_id)) == [Run(without_offer(granted), OFFER)]
    committed = commitment(granted, inline=b"output")
    assert worker.after(Ran(granted.lease_id, committed)) == [Say(committed)]
    assert worker.hears(Settled(granted.lease_id, 1, 0)) == [Forget(granted.lease_id)]
    assert not worker.world.leases


def test_a_large_result_is_uploaded_after_the_offer(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    committed = commitment(granted)
    assert worker.after(Ran(granted.lease_id, committed)) == [Say(committed)]
    assert worker.hears(UploadOffer(granted.lease_id, 1, GRANT)) == [Upload(granted.lease_id, GRANT)]
    delivery = Delivery(granted.lease_id, 1, RECEIPT)
    assert worker.after(Uploaded(granted.lease_id, RECEIPT)) == [Say(delivery)]
    assert worker.hears(Settled(granted.lease_id, 1, 0)) == [Forget(granted.lease_id)]


def test_never_more_runs_than_slots_and_the_next_begins_at_once() -> None:
    worker = Worker(slots=2)
    worker.opens()
    leases = [lease(number) for number in range(4)]
    for granted in leases:
        worker.runs(granted)
    assert worker.world.runs == 2
    assert Run(without_offer(leases[2]), OFFER) in worker.after(Ran(leases[0].lease_id, commitment(leases[0])))
    assert worker.world.runs == 2


def test_a_lease_waits_inside_the_executor_so_that_its_children_never_do(worker: Worker) -> None:
    worker.world = replace(worker.world, terms=replace(worker.world.terms, runs_queued=1))
    leases = [lease(number) for number in range(3)]
    for granted in leases:
        worker.runs(granted)
    assert worker.world.runs == worker.world.terms.slots + 1
    assert Run(without_offer(leases[2]), OFFER) in worker.after(Ran(leases[0].lease_id, commitment(leases[0])))


def test_the_next_run_begins_while_the_root_of_the_last_is_computed(worker: Worker) -> None:
    first, second = lease(1), lease(2)
    worker.runs(first)
    worker.runs(second)
    assert worker.after(SlotFreed(first.lease_id)) == [Run(without_offer(second), OFFER)]
    committed = commitment(first)
    assert worker.after(Ran(first.lease_id, committed)) == [Say(committed)]


def test_a_lease_somebody_waits_for_runs_before_older_ones(worker: Worker) -> None:
    first, patient, urgent = lease(1), lease(2), lease(3, latency_ms_max=50)
    for granted in (first, patient, urgent):
        worker.runs(granted)
    actions = worker.after(Ran(first.lease_id, commitment(first)))
    assert [action.lease.lease_id for action in actions if isinstance(action, Run)] == [urgent.lease_id]


def test_fetches_go_ahead_while_something_runs(worker: Worker) -> None:
    worker.runs(lease(1))
    second = lease(2)
    assert worker.hears(second) == [Fetch(without_offer(second), OFFER)]


def test_a_stale_fence_changes_nothing(worker: Worker) -> None:
    granted = lease(1, fence=7)
    worker.runs(granted)
    before = worker.world
    for message in (
        Settled(granted.lease_id, 6, 0),
        LeaseRevoked(granted.lease_id, 6, "old"),
        UploadOffer(granted.lease_id, 6, GRANT),
        lease(1, fence=6),
    ):
        assert worker.hears(message) == []
        assert worker.world.leases == before.leases


def test_a_commitment_without_answer_is_said_word_for_word_in_the_next_session(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    committed = commitment(granted)
    worker.after(Ran(granted.lease_id, committed))
    worker.loses_session()
    assert worker.world.held_leases()[0].committed
    assert worker.opens(granted) == [Say(committed)]


def test_a_run_goes_on_through_a_lost_session_and_its_result_waits(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    worker.loses_session()
    committed = commitment(granted)
    assert worker.after(Ran(granted.lease_id, committed)) == [Connect()]
    assert not worker.world.held_leases()[0].committed
    actions = worker.after(SessionOpened(SessionId("next"), 5_000, frozenset({granted.lease_id})))
    assert actions == [Say(committed)]


def test_leases_that_a_welcome_does_not_keep_are_dropped(worker: Worker) -> None:
    running, waiting = lease(1), lease(2)
    worker.runs(running)
    worker.runs(waiting)
    worker.loses_session()
    actions = worker.opens()
    assert actions == [Forget(waiting.lease_id), Cancel(running.lease_id)]
    assert worker.world.runs == 1, "its slot is taken until the run has really ended"
    assert worker.after(RunFailed(running.lease_id, Cause.WORKER, "cancelled", 0.0)) == [Forget(running.lease_id)]
    assert not worker.world.leases
    assert worker.world.trouble is None


def test_a_revoked_run_is_cancelled_and_its_result_is_not_told(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    assert worker.hears(LeaseRevoked(granted.lease_id, 1, "job cancelled")) == [Cancel(granted.lease_id)]
    assert worker.after(Ran(granted.lease_id, commitment(granted))) == [Forget(granted.lease_id)]


def test_an_unanswered_commitment_is_said_again_and_then_dropped(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    committed = commitment(granted)
    worker.after(Ran(granted.lease_id, committed))
    for _ in range(limits.ANSWERS_ASKED_MAX - 1):
        assert Say(committed) in worker.later(limits.ANSWER_WAIT_MS)
    assert Forget(granted.lease_id) in worker.later(limits.ANSWER_WAIT_MS)
    assert not worker.world.leases


def test_a_refused_commitment_ends_the_lease_unless_it_may_pass_later(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    committed = commitment(granted)
    worker.after(Ran(granted.lease_id, committed))
    assert worker.hears(Refused(3, granted.lease_id, Reason.OVERLOADED.value, "wait")) == []
    assert Say(committed) in worker.later(limits.ANSWER_WAIT_MS)
    assert worker.hears(Refused(4, granted.lease_id, Reason.LEASE_ENDED.value, "over")) == [Forget(granted.lease_id)]


def test_expired_grants_are_asked_for_again(worker: Worker) -> None:
    granted = lease(1)
    worker.hears(granted)
    actions = worker.after(FetchFailed(granted.lease_id, FetchTrouble.GRANT_EXPIRED, "expired", 0.5))
    assert actions == [Say(GrantsWanted(granted.lease_id, 1))]
    fresh = SignedBytes(b"fresh", b"signature")
    assert worker.hears(GrantsRenewed(granted.lease_id, 1, fresh, OFFER)) == [
        Fetch(replace(without_offer(granted), input_grant=fresh), OFFER)
    ]


def test_a_lease_of_an_unknown_bundle_asks_for_its_offer(worker: Worker) -> None:
    granted = without_offer(lease(1))
    assert worker.hears(granted) == [Say(GrantsWanted(granted.lease_id, 1))]
    assert worker.hears(GrantsRenewed(granted.lease_id, 1, None, OFFER)) == [Fetch(granted, OFFER)]


def test_fetches_are_tried_again_with_growing_pauses_and_then_given_back(worker: Worker) -> None:
    granted = lease(1)
    worker.hears(granted)
    for _ in range(limits.FETCH_ATTEMPTS_MAX - 1):
        assert worker.after(FetchFailed(granted.lease_id, FetchTrouble.TRY_AGAIN, "network", 0.5)) == []
        wake_ms = next_wake_ms(worker.world, worker.now_ms)
        assert wake_ms is not None
        assert any(isinstance(action, Fetch) for action in worker.later(limits.TRANSFER_RETRY_CAP_MS))
    actions = worker.after(FetchFailed(granted.lease_id, FetchTrouble.TRY_AGAIN, "network", 0.5))
    returned = LeaseReturned(granted.lease_id, 1, Cause.PLATFORM, "network")
    forget = Forget(granted.lease_id)
    assert actions == [forget, Say(CapabilityChanged(None, 0)), Say(returned)]
    assert worker.hears(over(granted)) == [forget]
    assert not worker.world.leases


def test_an_expired_upload_grant_is_renewed_by_repeating_the_commitment(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    committed = commitment(granted)
    worker.after(Ran(granted.lease_id, committed))
    worker.hears(UploadOffer(granted.lease_id, 1, GRANT))
    actions = worker.after(UploadFailed(granted.lease_id, FetchTrouble.GRANT_EXPIRED, "expired", 0.0))
    assert actions == [Say(committed)]


def test_a_program_that_fails_is_told_and_nothing_else_is_hurt(worker: Worker) -> None:
    granted, other = lease(1), lease(2)
    worker.runs(granted)
    worker.runs(other)
    actions = worker.after(RunFailed(granted.lease_id, Cause.PROGRAM, "it crashed", 0.0))
    assert actions == [
        Say(TaskFailed(granted.lease_id, 1, Cause.PROGRAM, "it crashed")),
        Run(without_offer(other), OFFER),
    ]
    assert worker.hears(over(granted)) == [Forget(granted.lease_id)]


@pytest.mark.parametrize("worth_it", [True, False])
def test_why_a_lease_was_given_up_is_told_until_it_is_answered(worker: Worker, worth_it: bool) -> None:
    granted = lease(1)
    worker.runs(granted)
    failed = Say(TaskFailed(granted.lease_id, 1, Cause.PROGRAM, "it crashed"))
    assert worker.after(RunFailed(granted.lease_id, Cause.PROGRAM, "it crashed", 0.0)) == [failed]
    worker.loses_session()
    assert [held.lease_id for held in worker.world.held_leases()] == [granted.lease_id]
    assert worker.opens(granted) == [failed], "the stream may have broken before it arrived"
    assert failed not in worker.later(limits.ANSWER_WAIT_MS - 1)
    assert failed in worker.later(1)
    if worth_it:
        worker.hears(Refused(1, granted.lease_id, Reason.OVERLOADED.value, "not now"))
        assert failed in worker.later(limits.ANSWER_WAIT_MS)
    assert worker.hears(Refused(1, granted.lease_id, Reason.LEASE_ENDED.value, "over")) == [Forget(granted.lease_id)]


def test_what_was_taken_in_before_the_stream_broke_is_not_told_again(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    worker.after(RunFailed(granted.lease_id, Cause.PROGRAM, "it crashed", 0.0))
    worker.loses_session()
    assert worker.opens() == [Forget(granted.lease_id)]
    assert not worker.world.leases


def test_an_executor_in_trouble_pauses_closes_the_window_and_gives_leases_back() -> None:
    worker = Worker()
    worker.opens()
    number = 0
    seen_returned = False
    for _ in range(6):
        number += 2
        first, second = lease(number), lease(number + 1)
        worker.runs(first)
        worker.runs(second)
        actions = worker.after(RunFailed(first.lease_id, Cause.PLATFORM, "no Ray here", 0.9))
        assert Say(CapabilityChanged(None, 0)) in actions
        assert not any(isinstance(action, Run) for action in actions)
        assert worker.world.trouble is not None
        pause_ms = worker.world.trouble.until_ms - worker.now_ms
        if pause_ms > limits.TROUBLE_RETURN_MS:
            seen_returned = True
            assert Say(LeaseReturned(second.lease_id, 1, Cause.PLATFORM, "no Ray here")) in actions
        actions = worker.later(pause_ms + limits.WINDOW_SAID_EVERY_MS)
        assert Say(CapabilityChanged(None, 1)) in actions
        for held in tuple(worker.world.leases.values()):
            worker.hears(LeaseRevoked(held.lease_id, held.fence, "test"))
            worker.after(RunFailed(held.lease_id, Cause.WORKER, "cancelled", 0.0))
    assert seen_returned


def test_the_window_opens_for_short_runs_so_that_a_fast_worker_never_waits(worker: Worker) -> None:
    assert window_wanted(worker.world, worker.now_ms) == 3
    said: list[int] = []
    for number in range(20):
        granted = lease(number)
        worker.runs(granted)
        worker.now_ms += 10
        actions = worker.after(Ran(granted.lease_id, commitment(granted)))
        actions += worker.hears(Settled(granted.lease_id, 1, 0))
        actions += worker.later(limits.WINDOW_SAID_EVERY_MS // 10)
        said += [a.message.window for a in actions if isinstance(a, Say) and isinstance(a.message, CapabilityChanged)]
    assert said
    assert said[-1] == window_wanted(worker.world, worker.now_ms) == 2 + limits.AHEAD_PER_SLOT_MAX


def test_heartbeats_come_at_the_interval_of_the_welcome(worker: Worker) -> None:
    assert next_wake_ms(worker.world, worker.now_ms) == worker.now_ms + 5_000
    assert worker.later(4_999) == []
    assert worker.later(1) == [SayHeartbeat()]


def test_draining_finishes_what_runs_returns_the_rest_and_leaves_when_all_is_settled(worker: Worker) -> None:
    running, waiting = lease(1), lease(2)
    worker.runs(running)
    worker.runs(waiting)
    actions = worker.after(DrainAsked("the owner stops this worker", 30_000))
    assert actions == [
        Forget(waiting.lease_id),
        Say(Draining("the owner stops this worker")),
        Say(LeaseReturned(waiting.lease_id, 1, Cause.OWNER_PREEMPT, "the owner stops this worker")),
    ]
    assert worker.hears(over(waiting)) == [Forget(waiting.lease_id)]
    late = lease(3)
    assert worker.hears(late) == [
        Say(LeaseReturned(late.lease_id, 1, Cause.OWNER_PREEMPT, "the owner stops this worker")),
    ]
    assert worker.hears(over(late)) == [Forget(late.lease_id)]
    committed = commitment(running, inline=b"output")
    assert Say(committed) in worker.after(Ran(running.lease_id, committed))
    assert worker.hears(Settled(running.lease_id, 1, 0)) == [Forget(running.lease_id), Leave()]
    assert worker.world.left
    assert worker.later(100_000) == []


def test_what_still_runs_after_the_grace_is_cancelled_and_returned(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    worker.after(DrainAsked("stop", 30_000))
    assert Cancel(granted.lease_id) in worker.later(30_000)
    assert worker.after(RunFailed(granted.lease_id, Cause.WORKER, "cancelled", 0.0)) == [
        Say(LeaseReturned(granted.lease_id, 1, Cause.OWNER_PREEMPT, "stop")),
    ]
    assert worker.hears(over(granted)) == [Forget(granted.lease_id), Leave()]


def test_a_challenge_is_given_back_when_the_machine_goes_on_battery() -> None:
    worker = Worker(slots=2, kinds=frozenset({TaskKind.MAP, TaskKind.CHALLENGE}))
    worker.opens()
    challenge, rows = lease(1, kind=TaskKind.CHALLENGE), lease(2)
    worker.runs(challenge)
    worker.runs(rows)
    actions = worker.after(CapabilitySeen(Capability(on_battery=True)))
    assert [action for action in actions if isinstance(action, Cancel)] == [Cancel(challenge.lease_id)]
    assert worker.after(RunFailed(challenge.lease_id, Cause.OWNER_PREEMPT, "cancelled", 0.0)) == [
        Say(LeaseReturned(challenge.lease_id, 1, Cause.OWNER_PREEMPT, "the machine runs on its battery")),
    ]
    assert worker.hears(over(challenge)) == [Forget(challenge.lease_id)]


def test_a_drain_without_a_coordinator_ends_all_the_same(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    worker.loses_session()
    worker.due()
    worker.after(SessionEnded(jitter=0.99))
    worker.after(DrainAsked("stop", 1_000))
    worker.after(Ran(granted.lease_id, commitment(granted)))
    assert Leave() in worker.later(1_000 + limits.DRAIN_WORDS_GRACE_MIN_MS)


def test_memory_goes_back_after_idle_time_and_only_once(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    worker.after(Ran(granted.lease_id, commitment(granted)))
    worker.hears(Settled(granted.lease_id, 1, 0))
    assert ReleaseExecutor() not in worker.later(9_999)
    assert ReleaseExecutor() in worker.later(1)
    assert ReleaseExecutor() not in worker.later(50_000)


def test_a_worker_that_never_ran_releases_nothing(worker: Worker) -> None:
    assert ReleaseExecutor() not in worker.later(1_000_000)


def test_kinds_and_programs_that_are_not_taken_go_back_with_the_reason(worker: Worker) -> None:
    inspect = lease(1, kind=TaskKind.INSPECT)
    assert worker.hears(inspect) == [
        Say(LeaseReturned(inspect.lease_id, 1, Cause.PLATFORM, "this worker does not take inspect tasks"))
    ]
    worker.world = replace(worker.world, terms=replace(worker.world.terms, refusal="sandbox too weak"))
    granted = lease(2)
    assert Say(LeaseReturned(granted.lease_id, 1, Cause.PLATFORM, "sandbox too weak")) in worker.hears(granted)
    assert window_wanted(worker.world, worker.now_ms) == 0


def test_an_inspection_is_told_until_it_is_settled() -> None:
    worker = Worker(kinds=frozenset({TaskKind.INSPECT}))
    worker.opens()
    granted = replace(lease(1, kind=TaskKind.INSPECT), input=None, input_grant=None, rows=0)
    worker.runs(granted)
    report = InspectionReport(BUNDLE, True, (), (), 1, False, False, 1, 0, 0, "", 0.1)
    inspection = Inspection(granted.lease_id, 1, report)
    assert worker.after(Ran(granted.lease_id, inspection)) == [Say(inspection)]
    worker.loses_session()
    assert worker.opens(granted) == [Say(inspection)]
    assert worker.hears(Settled(granted.lease_id, 1, 0)) == [Forget(granted.lease_id)]


def test_reconnects_wait_longer_after_each_failure_up_to_a_cap_and_start_small_after_a_good_session() -> None:
    worker = Worker()
    waits: list[int] = []
    for _ in range(12):
        assert worker.due() == [Connect()]
        worker.after(SessionEnded(jitter=0.999))
        assert isinstance(worker.world.session, Offline)
        wait_ms = worker.world.session.retry_at_ms - worker.now_ms
        waits.append(wait_ms)
        assert worker.later(wait_ms - 1) == []
        worker.now_ms += 1
    assert waits == sorted(waits)
    assert waits[-1] <= limits.RECONNECT_CAP_MS
    worker.opens()
    worker.later(limits.SESSION_HOLDS_MS)
    worker.after(SessionEnded(jitter=0.999))
    assert isinstance(worker.world.session, Offline)
    assert worker.world.session.retry_at_ms - worker.now_ms < limits.RECONNECT_BASE_MS


def test_a_repeated_lease_is_worked_on_once(worker: Worker) -> None:
    granted = lease(1)
    worker.runs(granted)
    assert worker.hears(granted) == []
    assert isinstance(worker.world.leases[granted.lease_id].phase, Running)
    assert isinstance(worker.world.session, Online)


def test_a_fetched_lease_waits_ready_for_a_slot(worker: Worker) -> None:
    worker.runs(lease(1))
    second = lease(2)
    assert worker.runs(second) == []
    assert isinstance(worker.world.leases[second.lease_id].phase, Ready)
