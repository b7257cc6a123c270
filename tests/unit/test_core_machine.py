"""Any commands in any order: invariants hold, an observer of events alone agrees, and replay gives the same state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fallow.errors import FallowError
from fallow.ids import JobId, PartyId
from fallow.job import JobOptions
from fallow.roles import DataClass
from fallow.session import Cause, RowFailure
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.state import Lease
from simulation.core_world import World
from simulation.oracle import Oracle

CAUSES = st.sampled_from([Cause.WORKER, Cause.PLATFORM, Cause.OWNER_PREEMPT, Cause.PROGRAM, Cause.ROW])


class CoreMachine(RuleBasedStateMachine):
    """Workers, clients and the clock do what they like."""

    @initialize(inspected=st.booleans())
    def start(self, inspected: bool) -> None:
        self.world = World().start()
        self.workers: list[PartyId] = []
        self.jobs: list[JobId] = []
        self.old: list[c.Command] = []
        self.oracle, self.seen = Oracle(), 0
        if inspected:
            self.world.ready_bundle(per_row=100_000)
        else:
            self.world.register()
            self.world.inspector()

    def attempt(self, command: c.Command) -> None:
        """A command that may be refused; it may come again later, stale."""
        self.old.append(command)
        before = repr(self.world.state)
        try:
            self.world.take(command)
        except FallowError:
            assert repr(self.world.state) == before, "a refusal changes nothing"

    def pick(self, draw: int) -> Lease | None:
        leases = [lease for lease in self.world.state.leases.values() if self.world.state.tasks[lease.task_id].job_id]
        return leases[draw % len(leases)] if leases else None

    def with_lease(self, draw: int, make: Callable[[Lease], c.Command]) -> None:
        lease = self.pick(draw)
        if lease is not None:
            self.attempt(make(lease))

    # ---------------------------------------------------------------------------------------------- workers

    @precondition(lambda self: len(self.workers) < 4)
    @rule(window=st.integers(0, 4), slots=st.integers(1, 3))
    def join(self, window: int, slots: int) -> None:
        self.workers.append(self.world.volunteer(f"w{len(self.workers)}", window=window, slots=slots))

    @precondition(lambda self: self.workers)
    @rule(draw=st.integers(0, 99), keep=st.integers(0, 99), honest=st.booleans(), window=st.integers(0, 4))
    def reconnect(self, draw: int, keep: int, honest: bool, window: int) -> None:
        worker_id = self.workers[draw % len(self.workers)]
        worker = self.world.state.workers[worker_id]
        leases = self.world.leases_of(worker_id)
        held = self.world.held(*leases[keep % (len(leases) + 1) :])
        token = f"{worker_id}#{worker.sessions}" if honest else None
        try:
            self.world.connect(worker_id, token=token, held=held, window=window)
        except FallowError:
            assert not honest or worker.quarantined

    @precondition(lambda self: self.world.state.sessions)
    @rule(draw=st.integers(0, 99))
    def hang_up(self, draw: int) -> None:
        sessions = list(self.world.state.sessions)
        self.attempt(c.CloseSession(sessions[draw % len(sessions)], "gone"))

    @precondition(lambda self: self.world.state.sessions)
    @rule(draw=st.integers(0, 99), window=st.integers(0, 5))
    def change_window(self, draw: int, window: int) -> None:
        sessions = list(self.world.state.sessions)
        self.attempt(c.ChangeCapability(sessions[draw % len(sessions)], None, window))

    @precondition(lambda self: self.workers)
    @rule(draw=st.integers(0, 99), bar=st.booleans())
    def quarantine_or_release(self, draw: int, bar: bool) -> None:
        worker_id = self.workers[draw % len(self.workers)]
        self.attempt(c.QuarantineWorker(worker_id, "odd") if bar else c.ReleaseWorker(worker_id))

    # ---------------------------------------------------------------------------------------------- work

    @rule()
    def inspect(self) -> None:
        state = self.world.state
        if any(state.tasks[lease.task_id].job_id is None for lease in state.leases.values()):
            with contextlib.suppress(FallowError):
                self.world.inspect(per_row=100_000)

    @rule(rows=st.integers(1, 60), blocks=st.integers(1, 3), limit=st.integers(0, 60), public=st.booleans())
    def submit(self, rows: int, blocks: int, limit: int, public: bool) -> None:
        submission = self.world.submission(
            rows,
            blocks=min(rows, blocks),
            key=f"job {len(self.old)}",
            options=JobOptions(failed_rows_max=limit),
            data_class=DataClass.PUBLIC if public else DataClass.INTERNAL,
        )
        self.attempt(submission)
        self.jobs = list(self.world.state.jobs)

    @rule(draw=st.integers(0, 99), fails=st.sampled_from([None, True, False]))
    def pack(self, draw: int, fails: bool | None) -> None:
        packing = [task_id for lane in self.world.state.lanes.values() for task_id in lane.packing]
        if packing:
            task = self.world.state.tasks[packing[draw % len(packing)]]
            if fails is None:
                self.world.pack(task.task_id)
            else:
                self.attempt(c.PackFailed(task.task_id, task.pack_number, "away", retryable=fails or draw % 5 > 0))

    @rule(draw=st.integers(0, 99), inline=st.booleans(), failed=st.booleans())
    def commit(self, draw: int, inline: bool, failed: bool) -> None:
        failures = (RowFailure(0, Cause.ROW, "bad"),) if failed else ()
        self.with_lease(draw, lambda lease: self.world.commit_command(lease, inline=inline, failures=failures))

    @rule(draw=st.integers(0, 99), lie=st.booleans())
    def deliver(self, draw: int, lie: bool) -> None:
        lease = self.pick(draw)
        if lease is not None and lease.commitment is not None:
            self.attempt(self.world.deliver_command(lease, **({"rows": 99_999} if lie else {})))

    @rule(draw=st.integers(0, 99), cause=CAUSES, returns=st.booleans())
    def fail(self, draw: int, cause: Cause, returns: bool) -> None:
        make = self.world.return_command if returns else self.world.fail_command
        self.with_lease(draw, lambda lease: make(lease, cause))

    @precondition(lambda self: self.old)
    @rule(draw=st.integers(0, 999))
    def say_again(self, draw: int) -> None:
        command = self.old[draw % len(self.old)]
        before = dict(self.world.state.jobs)
        self.attempt(command)
        if isinstance(command, c.SubmitMapJob) and before:
            keys = [key for key in self.world.state.idempotency if key[1] == command.idempotency_key]
            assert len(keys) <= 1

    @precondition(lambda self: self.jobs)
    @rule(draw=st.integers(0, 99))
    def cancel(self, draw: int) -> None:
        self.attempt(c.CancelJob(self.world.account_id, self.jobs[draw % len(self.jobs)]))

    # ---------------------------------------------------------------------------------------------- the clock

    @rule(ms=st.sampled_from([0, 300, 5_000, 15_000, 61_000, 600_000]))
    def time_passes(self, ms: int) -> None:
        self.world.pass_time(ms)

    @rule(ms=st.sampled_from([0, 1_000, 120_000]))
    def restart(self, ms: int) -> None:
        self.world.now_ms += ms
        self.world.take(c.Restart(self.world.state.epoch + 1, ms))

    @rule(behind=st.integers(0, 20))
    def archive(self, behind: int) -> None:
        self.world.take(c.ArchiveJobs(self.world.state.sequence - behind))

    # ---------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def an_observer_agrees(self) -> None:
        if not hasattr(self, "world"):
            return
        for at_ms, event in self.world.records[self.seen :]:
            self.oracle.see(at_ms, event)
        self.seen = len(self.world.records)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            replayed = self.world.replayed()
            assert replayed == self.world.state
            assert repr(replayed) == repr(self.world.state)


CoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestCoreMachine = CoreMachine.TestCase
