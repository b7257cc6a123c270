"""Whatever happens, in whatever order: what a worker's plan keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fallow.bundle import Precision
from fallow.errors import Reason
from fallow.ids import Digest, LeaseId, PoolId, SessionId
from fallow.limits import LEASES_PER_WORKER_MAX
from fallow.session import (
    BlobReference,
    BundleOffer,
    Cause,
    Commitment,
    Delivery,
    GrantsRenewed,
    GrantsWanted,
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
from fallow_worker.core.world import Connecting, Offline, Online, Terms, World

BUNDLES = tuple(Digest(bytes([n]) * 32) for n in range(3))
GRANT = SignedBytes(b"grant", b"signature")
JITTER = st.floats(0, 1, exclude_max=True)
TROUBLES = st.sampled_from(FetchTrouble)


def offer_of(bundle: Digest) -> BundleOffer:
    return BundleOffer(bundle, b"manifest", (GRANT,), 4, slot_dependent=False, memory_bytes_peak=0)


class AnyOrder(RuleBasedStateMachine):
    """A daemon and a coordinator that do everything they may, in any order; the daemon obeys the plan to the letter."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 1_000
        self.slots = 1
        self.world = World(Terms(1, frozenset({TaskKind.MAP})), Offline(0, 0))
        self.granted: dict[LeaseId, Lease] = {}
        self.fetching: set[LeaseId] = set()
        self.running: set[LeaseId] = set()
        self.hashing: set[LeaseId] = set()
        self.cancelled: set[LeaseId] = set()
        self.uploading: set[LeaseId] = set()
        self.outputs: set[LeaseId] = set()
        self.commitments: dict[LeaseId, Commitment] = {}
        self.runs_begun: Counter[LeaseId] = Counter()
        self.wants_grants: set[LeaseId] = set()
        self.sessions = 0
        self.left = False

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        self.slots = slots
        self.world = World(
            Terms(slots, frozenset({TaskKind.MAP}), idle_release_ms=5_000), Offline(0, 0), busy_at_ms=self.now_ms
        )
        self._settle_down()

    # --------------------------------------------------------------------------------------- carrying out

    def _happens(self, happening: Happening) -> None:
        before = self.world
        self.world = observe(self.world, happening, self.now_ms)
        assert before == before, "worlds are values"
        self._settle_down()

    def _settle_down(self) -> None:
        for _ in range(4):
            actions = plan(self.world, self.now_ms)
            if not actions:
                break
            for action in actions:
                self.world = begun(self.world, action, self.now_ms)
                self._carry_out(action)
        assert plan(self.world, self.now_ms) == (), "a plan comes to rest"

    def _carry_out(self, action: Action) -> None:
        assert not self.left, "after leaving nothing is done"
        match action:
            case Connect():
                assert isinstance(self.world.session, Connecting)
            case Say(message=message):
                assert isinstance(self.world.session, Online)
                self._said(message)
            case SayHeartbeat():
                assert isinstance(self.world.session, Online)
            case Fetch(lease=lease, offer=offer):
                assert offer.bundle_digest == lease.bundle_digest
                assert lease.lease_id not in self.fetching
                self.fetching.add(lease.lease_id)
                assert len(self.fetching) <= limits.FETCHES_AT_ONCE_MAX
            case Run(lease=lease):
                assert lease.lease_id not in self.running
                self.running.add(lease.lease_id)
                self.runs_begun[lease.lease_id] += 1
                assert self.runs_begun[lease.lease_id] == 1, "a lease is run once"
                assert len(self.running) <= self.slots, "never more runs than slots"
            case Cancel(lease_id=lease_id):
                assert lease_id in self.running
                assert lease_id not in self.cancelled, "a run is cancelled once"
                self.cancelled.add(lease_id)
            case Upload(lease_id=lease_id):
                assert lease_id in self.outputs, "only what was computed and kept is uploaded"
                assert lease_id not in self.uploading
                self.uploading.add(lease_id)
                assert len(self.uploading) <= limits.UPLOADS_AT_ONCE_MAX
            case Forget(lease_id=lease_id):
                self.fetching.discard(lease_id)
                self.uploading.discard(lease_id)
                self.outputs.discard(lease_id)
            case ReleaseExecutor():
                assert not self.running
            case Leave():
                self.left = True

    def _said(self, message: object) -> None:
        match message:
            case Commitment(lease_id=lease_id):
                known = self.commitments.setdefault(lease_id, message)
                assert known == message, "a commitment is repeated word for word"
            case GrantsWanted(lease_id=lease_id):
                self.wants_grants.add(lease_id)
            case TaskFailed(lease_id=lease_id) | LeaseReturned(lease_id=lease_id):
                assert lease_id in self.granted
            case Delivery(lease_id=lease_id):
                assert lease_id in self.commitments, "a delivery follows a commitment"
            case _:
                pass

    # --------------------------------------------------------------------------------------- what may happen

    @rule(milliseconds=st.sampled_from([1, 10, 500, 2_000, 31_000, 120_000]))
    def time_passes(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        self._happens(TimePassed())

    @precondition(lambda self: isinstance(self.world.session, Connecting))
    @rule(data=st.data())
    def a_session_opens(self, data: st.DataObject) -> None:
        held = [h.lease_id for h in self.world.held_leases()]
        keep = data.draw(st.sets(st.sampled_from(held))) if held else set()
        self.sessions += 1
        self._happens(SessionOpened(SessionId(f"s{self.sessions}"), 5_000, frozenset(keep)))
        for lease_id in self.world.leases:
            assert lease_id in keep or lease_id in self.running, "only what is kept goes on"

    @precondition(lambda self: not isinstance(self.world.session, Offline))
    @rule(jitter=JITTER)
    def the_session_ends(self, jitter: float) -> None:
        self._happens(SessionEnded(jitter))

    @precondition(lambda self: isinstance(self.world.session, Online))
    @rule(bundle=st.sampled_from(BUNDLES), offered=st.booleans(), urgent=st.booleans(), known=st.booleans())
    def a_lease_comes(self, bundle: Digest, offered: bool, urgent: bool, known: bool) -> None:
        if known and self.granted:
            lease = next(iter(self.granted.values()))
            if lease.lease_id not in self.world.leases:
                return
        else:
            lease = Lease(
                lease_id=LeaseId(f"lease-{len(self.granted)}"),
                fence=5,
                kind=TaskKind.MAP,
                bundle_digest=bundle,
                offer=offer_of(bundle) if offered else None,
                rows=1,
                input=BlobReference(Digest(b"i" * 32), 60 << 20),
                inline_input=b"",
                input_grant=GRANT,
                deadline_ms=1,
                runtime_max_ms=1,
                precision=Precision.FP32,
                output_bytes_max=1,
                unit_micros=1,
                pool_id=PoolId("p"),
                latency_ms_max=50 if urgent else 0,
            )
            self.granted[lease.lease_id] = lease
        self._happens(Received(lease))

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), trouble=st.none() | TROUBLES, jitter=JITTER)
    def a_fetch_ends(self, data: st.DataObject, trouble: FetchTrouble | None, jitter: float) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.discard(lease_id)
        self._happens(Fetched(lease_id) if trouble is None else FetchFailed(lease_id, trouble, "network", jitter))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), good=st.booleans(), cause=st.sampled_from(Cause), jitter=JITTER, hashes=st.booleans())
    def a_run_ends(self, data: st.DataObject, good: bool, cause: Cause, jitter: float, hashes: bool) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(lease_id)
        if good and hashes:
            self.hashing.add(lease_id)
            self._happens(SlotFreed(lease_id))
            if lease_id in self.cancelled:
                self.running.add(lease_id)
                self.hashing.discard(lease_id)
        elif good:
            self._ran(lease_id)
        else:
            self._happens(RunFailed(lease_id, cause, "no", jitter))

    @precondition(lambda self: self.hashing)
    @rule(data=st.data())
    def a_root_is_computed(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.hashing)))
        self.hashing.discard(lease_id)
        self._ran(lease_id)

    def _ran(self, lease_id: LeaseId) -> None:
        if lease_id in self.world.leases:
            self.outputs.add(lease_id)
        output = BlobReference(Digest(b"o" * 32), 1)
        self._happens(Ran(lease_id, Commitment(lease_id, 5, Digest(b"r" * 32), 1, output)))

    @precondition(lambda self: self.uploading)
    @rule(data=st.data(), trouble=st.none() | TROUBLES, jitter=JITTER)
    def an_upload_ends(self, data: st.DataObject, trouble: FetchTrouble | None, jitter: float) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.uploading)))
        self.uploading.discard(lease_id)
        self._happens(
            Uploaded(lease_id, GRANT) if trouble is None else UploadFailed(lease_id, trouble, "network", jitter)
        )

    @precondition(lambda self: self.granted and isinstance(self.world.session, Online))
    @rule(data=st.data(), fence=st.sampled_from([4, 5, 6]), kind=st.integers(0, 4))
    def the_coordinator_speaks(self, data: st.DataObject, fence: int, kind: int) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.granted)))
        reason = data.draw(st.sampled_from([Reason.OVERLOADED, Reason.LEASE_ENDED])).value
        offer = data.draw(st.none() | st.just(offer_of(self.granted[lease_id].bundle_digest)))
        message = (
            UploadOffer(lease_id, fence, GRANT),
            Settled(lease_id, fence, 0),
            LeaseRevoked(lease_id, fence, "over"),
            Refused(1, lease_id, reason, "no"),
            GrantsRenewed(lease_id, fence, GRANT, offer),
        )[kind]
        before = self.world
        self._happens(Received(message))
        if fence != 5 and not isinstance(message, Refused):
            assert {i: h.phase for i, h in self.world.leases.items()} == {
                i: h.phase for i, h in before.leases.items()
            }, "a message with another fence changes nothing"

    @rule(grace_ms=st.sampled_from([0, 1_000, 60_000]), rarely=st.integers(0, 9))
    def the_owner_wants_the_machine(self, grace_ms: int, rarely: int) -> None:
        if rarely == 0:
            self._happens(DrainAsked("stop", grace_ms))

    # --------------------------------------------------------------------------------------- what holds

    @invariant()
    def counts_are_those_of_the_daemon(self) -> None:
        if self.left:
            return
        assert self.world.runs == len(self.running) <= self.slots
        assert self.world.fetches == len(self.fetching)
        assert self.world.uploads == len(self.uploading)

    @invariant()
    def the_window_is_within_its_limits(self) -> None:
        assert 0 <= window_wanted(self.world, self.now_ms) <= LEASES_PER_WORKER_MAX
        if self.world.drain is not None:
            assert window_wanted(self.world, self.now_ms) == 0

    @invariant()
    def nothing_falls_due_before_the_next_wake(self) -> None:
        wake_ms = next_wake_ms(self.world, self.now_ms)
        assert wake_ms is None or wake_ms > self.now_ms
        last_quiet_ms = self.now_ms + 600_000 if wake_ms is None else wake_ms - 1
        assert plan(self.world, last_quiet_ms) == ()

    @invariant()
    def what_is_forgotten_takes_no_memory(self) -> None:
        assert self.outputs <= self.world.leases.keys()


AnyOrder.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_any_order = AnyOrder.TestCase


@given(attempts=st.integers(-1, 200), jitter=JITTER, base=st.integers(1, 5_000), cap=st.integers(1, 600_000))
def test_a_back_off_stays_below_its_ceiling(attempts: int, jitter: float, base: int, cap: int) -> None:
    delay_ms = limits.backoff_ms(attempts, jitter, base_ms=base, cap_ms=cap)
    assert 0 <= delay_ms <= cap
    assert delay_ms <= base << max(0, min(attempts, 30))


def settled_run(slots: int, leases: int) -> World:
    """A world in which every lease went its way, all of it in order."""
    machine = AnyOrder()
    machine.begin(slots)
    machine._happens(SessionOpened(SessionId("s"), 5_000, frozenset()))
    for _ in range(leases):
        machine.a_lease_comes(BUNDLES[0], True, False, False)
        machine.now_ms += 10
        for lease_id in sorted(machine.fetching):
            machine.fetching.discard(lease_id)
            machine._happens(Fetched(lease_id))
        for lease_id in sorted(machine.running):
            machine.running.discard(lease_id)
            machine._ran(lease_id)
            machine._happens(Received(UploadOffer(lease_id, 5, GRANT)))
        for lease_id in sorted(machine.uploading):
            machine.uploading.discard(lease_id)
            machine._happens(Uploaded(lease_id, GRANT))
            machine._happens(Received(Settled(lease_id, 5, 0)))
    return machine.world


@given(slots=st.integers(1, 4), leases=st.integers(0, 20))
def test_when_nothing_goes_wrong_every_lease_settles_and_nothing_is_kept(slots: int, leases: int) -> None:
    world = settled_run(slots, leases)
    assert not world.leases
    assert not world.forgotten
    assert replace(world, session=Offline(0, 0)).leases_seen == leases
