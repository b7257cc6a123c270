"""Bugs planted on purpose, each of which the seeds must find: if one goes unseen, the simulation is blind there.

Each takes pytest's MonkeyPatch and gives the engine's bugs. What needs a real disk is planted in the store's own tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fallow.ids import LeaseId, PartyId, SessionId, TaskId
from fallow.session import Cause, HeldLease
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import (
    decide,
    draft,
    duplicates,
    evolve_sessions,
    evolve_tasks,
    groups,
    health,
    jobs,
    lanes,
    leases,
    matching,
    needs,
    row_plans,
    sessions,
    time_passing,
)
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Job, Lease, State, Task, TaskPhase, Token, Worker
from simulation.coordinator_side import EngineBugs

Plant = Callable[[pytest.MonkeyPatch], EngineBugs]


def fence_compared_with_greater_or_equal(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A fence that was never given out is taken."""
    right = leases._live_lease

    def wrong(state: State, session_id: SessionId, worker_id: PartyId, lease_id: LeaseId, fence: int) -> Lease:
        lease = state.leases.get(lease_id)
        if lease is not None and fence >= lease.fence:
            fence = lease.fence
        return right(state, session_id, worker_id, lease_id, fence)

    patch.setattr(leases, "_live_lease", wrong)
    return EngineBugs()


def fence_does_not_grow(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A task's next lease carries the fence of the one before."""
    right_grant, right_evolve = matching._grant, evolve_tasks._grant

    def wrong(
        state: State, task: Task, worker: Worker, now_ms: int, names: Names, *, runner_up_ask: int | None
    ) -> tuple[e.Event, ...]:
        granted, *rest = right_grant(state, task, worker, now_ms, names, runner_up_ask=runner_up_ask)
        assert isinstance(granted, e.LeaseGranted)
        return (replace(granted, fence=max(1, task.fence)), *rest)

    def lenient(state: State, event: e.LeaseGranted, at_ms: int) -> None:
        state.tasks[event.task_id].fence = event.fence - 1
        right_evolve(state, event, at_ms)

    patch.setattr(matching, "_grant", wrong)
    patch.setattr(evolve_tasks, "_grant", lenient)
    return EngineBugs()


def settles_twice(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A lease that is over may settle again: a commitment said twice delivers twice."""
    _revive_ended_leases(patch, only_settled=True)
    patch.setattr(leases, "_is_same", lambda facts, command: False)
    return EngineBugs()


def stale_commit_after_expiry(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A lease that expired or was lost is still taken for live."""
    _revive_ended_leases(patch, only_settled=False)
    return EngineBugs()


def _revive_ended_leases(patch: pytest.MonkeyPatch, *, only_settled: bool) -> None:
    right = leases._live_lease

    def wrong(state: State, session_id: SessionId, worker_id: PartyId, lease_id: LeaseId, fence: int) -> Lease:
        ended = state.ended_leases.get(lease_id)
        if ended is None or ended.task_id not in state.tasks or (ended.outcome is None) != only_settled:
            return right(state, session_id, worker_id, lease_id, fence)
        return Lease(lease_id, ended.task_id, worker_id, session_id, fence, 0, 0, 0, None)

    def forgetful(state: State, task: Task) -> None:
        """The task stays although it is done."""
        evolve_tasks._wait(state, task, state.clock_ms)

    patch.setattr(leases, "_live_lease", wrong)
    if only_settled:
        patch.setattr(evolve_tasks, "_remove", forgetful)


def lost_drop_on_reconnect(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A worker that comes back is told to keep leases that it does not have."""
    right = sessions.open_session

    def wrong(state: State, command: c.OpenSession, now_ms: int, names: Names) -> Decision:
        worker = state.workers[command.worker_id]
        everything = tuple(
            HeldLease(lease_id, state.leases[lease_id].fence, committed=False) for lease_id in worker.leases
        )
        return right(state, replace(command, held_leases=everything), now_ms, names)

    patch.setattr(sessions, "open_session", wrong)
    return EngineBugs()


def dropped_leases_never_end(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Leases that the worker lost are neither kept nor ended."""
    right = sessions.open_session

    def wrong(state: State, command: c.OpenSession, now_ms: int, names: Names) -> Decision:
        decision = right(state, command, now_ms, names)
        return replace(decision, events=tuple(x for x in decision.events if not isinstance(x, e.LeaseEnded)))

    patch.setattr(sessions, "open_session", wrong)
    return EngineBugs()


def forgotten_requeue(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A task whose lease ended goes nowhere."""

    def wrong(state: State, task: Task, not_before_ms: int) -> None:
        evolve_tasks._leave_phase(state, task)
        task.phase, task.not_before_ms = TaskPhase.WAITING, not_before_ms

    patch.setattr(evolve_tasks, "_wait", wrong)
    return EngineBugs()


def window_overrun(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Workers get one lease more than they asked for."""

    def wrong(worker: Worker) -> int:
        return max(0, worker.window + 1 - len(worker.leases)) if worker.group >= 0 else 0

    patch.setattr(Worker, "free", property(wrong))
    return EngineBugs()


def clock_goes_back(patch: pytest.MonkeyPatch) -> EngineBugs:
    """After a restart the journal's clock is the wall clock."""
    return EngineBugs(clock_goes_back=True)


def reply_before_commit(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Answers go out before their events are on disk."""
    return EngineBugs(reply_before_commit=True)


def silent_restart(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A new coordinator believes that the old one's streams are open."""
    return EngineBugs(restart_is_silent=True)


def idempotency_forgotten_after_restart(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A restart forgets which keys made jobs."""
    right = evolve_sessions.evolve_session

    def wrong(state: State, event: evolve_sessions.SessionEvent, at_ms: int) -> None:
        right(state, event, at_ms)
        if isinstance(event, e.Restarted):
            state.idempotency.clear()
            state.idempotency_order.clear()
            for account in state.accounts.values():
                account.idempotency_keys = 0

    patch.setattr(evolve_sessions, "evolve_session", wrong)
    return EngineBugs()


def rows_cut_twice(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A job whose task was given back starts to be cut one row too early."""

    def wrong(job: Job, task: Task) -> None:
        job.next_row = max(end for _, end in task.spans) - (1 if job.rows_leased and task.rows > 1 else 0)

    patch.setattr(evolve_tasks, "_cut", wrong)
    return EngineBugs()


def packs_the_neighbour_rows(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A task that spans two blocks takes the wrong rows of the second."""
    right = row_plans._pieces

    def wrong(job: Job, start: int, end: int) -> list[tuple[int, int, int]]:
        first, *rest = right(job, start, end)
        fitting = [(b, 1 if n < job.blocks[b].rows else 0, n) for b, _, n in rest]
        return [first, *fitting]

    patch.setattr(row_plans, "_pieces", wrong)
    return EngineBugs()


def packing_number_ignored(patch: pytest.MonkeyPatch) -> EngineBugs:
    """An answer to an old packing is taken for the newest."""

    def wrong(state: State, task_id: TaskId, pack_number: int) -> Task | None:
        task = state.tasks.get(task_id)
        return task if task is not None and task.phase is TaskPhase.PACKING else None

    patch.setattr(jobs, "_task_in_packing", wrong)
    return EngineBugs()


def evolve_draws_chance(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The wait before a retry depends on something that is not in the journal."""
    patch.setattr(evolve_tasks, "retry_delay_ms", lambda attempts: random.randint(1, 10_000))
    return EngineBugs()


def root_not_compared(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A delivered output is taken whatever was committed to."""
    patch.setattr(leases, "_fault_of_output", lambda committed, stored, schema_digest: "")
    return EngineBugs()


def grace_never_ends(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Leases of a worker that went away wait for their deadline."""
    right = time_passing.tick

    def wrong(state: State, command: c.Tick, now_ms: int, names: Names) -> Decision:
        decision = right(state, command, now_ms, names)
        lost = e.LeaseOutcome.LOST
        kept = [x for x in decision.events if not (isinstance(x, e.LeaseEnded) and x.outcome is lost)]
        return replace(decision, events=tuple(kept))

    patch.setattr(time_passing, "tick", wrong)
    return EngineBugs()


def leases_expire_early(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A deadline is taken for due long before it is."""
    right = time_passing.tick
    patch.setattr(
        time_passing, "tick", lambda state, command, now_ms, names: right(state, command, now_ms + 55_000, names)
    )
    return EngineBugs()


def deadlines_ignore_down_time(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Leases run on while the coordinator is down."""

    def wrong(state: State, down_time_ms: int) -> None:
        return

    patch.setattr(evolve_sessions, "_lengthen_leases", wrong)
    return EngineBugs()


def token_let_in_one_more(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A join token counts its uses from one too low."""
    right = decide._decide_identity

    def wrong(state: State, command: decide.IdentityCommand, now_ms: int, entropy: bytes) -> Decision:
        if isinstance(command, c.Enroll):
            token: Token = state.tokens[command.token_id]
            token.uses_max += 1 if token.uses == token.uses_max else 0
        return right(state, command, now_ms, entropy)

    patch.setattr(decide, "_decide_identity", wrong)
    return EngineBugs()


def archived_before_the_views_have_it(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A finished job leaves the state although the views do not show its end."""
    right = jobs.archive_jobs

    def wrong(state: State, command: c.ArchiveJobs) -> Decision:
        return right(state, replace(command, view_sequence=command.view_sequence + 100))

    patch.setattr(jobs, "archive_jobs", wrong)
    return EngineBugs()


def success_without_all_rows(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A job ends when its tasks end, although rows are still uncut."""
    right = draft.Draft._judge

    def wrong(self: draft.Draft, job: Job, tally: draft._Tally) -> None:
        if len(job.tasks) == 1:
            tally.rows_done = job.rows
        right(self, job, tally)

    patch.setattr(draft.Draft, "_judge", wrong)
    return EngineBugs()


def welcome_lost_locks_out(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Only the newest token opens the door, also when the Welcome that carried it was lost and nothing is open."""
    right = sessions._check_token

    def wrong(worker: Worker, command: c.OpenSession) -> None:
        if worker.resume_token_digest not in (None, command.resume_token_digest):
            worker = replace(worker, session_id=SessionId("any"), presented_token_digest=None)
        right(worker, command)

    patch.setattr(sessions, "_check_token", wrong)
    return EngineBugs()


def requeued_without_packing(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A requeued task is put where the ready ones stand, with its old input gone."""

    def wrong(state: State, task: Task, not_before_ms: int) -> None:
        evolve_tasks._leave_phase(state, task)
        task.phase = TaskPhase.READY
        lanes.enter_lane(state, task)

    patch.setattr(evolve_tasks, "_wait", wrong)
    return EngineBugs()


def cancelled_job_keeps_its_leases(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The end of a job leaves its tasks in workers' hands."""
    right = draft.Draft.finish

    def wrong(self: draft.Draft, job: Job, *rest: Any) -> None:
        before = len(self.events)
        right(self, job, *rest)
        self.events[before:] = [x for x in self.events[before:] if isinstance(x, e.JobStateChanged)]

    patch.setattr(draft.Draft, "finish", wrong)
    return EngineBugs()


def region_ignored(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Work goes wherever somebody is free."""
    right = needs.misfit

    def wrong(wanted: needs.Needs, ability: needs.Ability) -> needs.Misfit | None:
        return right(wanted._replace(region=""), ability)

    patch.setattr(groups, "misfit", wrong)
    return EngineBugs()


def resting_hosts_get_work(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A host that keeps failing goes on as if nothing were."""
    patch.setattr(Worker, "room", property(lambda worker: worker.window))
    return EngineBugs()


def owners_are_blamed(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Whoever takes his machine back has failed."""
    patch.setattr(draft, "is_strike", lambda state, lease, outcome, cause: cause is not Cause.PLATFORM)
    return EngineBugs()


def no_amnesty(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Workers pay for our own outages."""
    patch.setattr(draft, "is_strike", lambda state, lease, outcome, cause: cause is Cause.WORKER)
    return EngineBugs()


def rests_never_end(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A host that failed too often is never tried again."""
    patch.setattr(health, "warmed", lambda state, now_ms: [])
    return EngineBugs()


def late_leases_deliver_again(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Rows that are there are delivered once more."""

    def wrong(self: draft.Draft, task: Task, lease: Lease, answer: Any, **rest: Any) -> None:
        self.settle(task, lease, rows_failed=0)

    patch.setattr(draft.Draft, "settle_late", wrong)
    return EngineBugs()


def late_leases_always_agree(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Nobody looks what a late commitment says."""
    right = draft.Draft.settle_late

    def wrong(self: draft.Draft, *rest: Any, **more: Any) -> None:
        right(self, *rest, **more)
        for index, event in enumerate(self.events):
            if isinstance(event, e.LateLeaseSettled):
                self.events[index] = replace(event, agreement=e.Agreement.SAME)

    patch.setattr(draft.Draft, "settle_late", wrong)
    return EngineBugs()


def late_leases_stay(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Who is late keeps on working long after the job has ended."""
    from fallow_coordinator.core import evolve_jobs

    patch.setattr(evolve_jobs, "move_deadline", lambda state, lease, deadline_ms: None)
    return EngineBugs()


def a_worker_outruns_itself(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A late task is given to the very worker that has it."""
    right = duplicates._taker

    def wrong(state: State, job: Job, straggler: duplicates.Straggler, taken: set[PartyId]) -> Worker | None:
        holder = state.workers[straggler.lease.worker_id]
        return holder if holder.free else right(state, job, straggler, taken)

    patch.setattr(duplicates, "_taker", wrong)
    return EngineBugs()


def input_goes_with_the_first_of_two_leases(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The input of a task in two hands is dropped when one of them is done."""
    right = evolve_tasks._release

    def wrong(state: State, lease_id: LeaseId, outcome: e.LeaseOutcome | None) -> Task:
        task = right(state, lease_id, outcome)
        if task.input is not None and not task.input_inline:
            state.ended_leases[lease_id] = replace(state.ended_leases[lease_id], input=task.input.digest)
        return task

    patch.setattr(evolve_tasks, "_release", wrong)
    return EngineBugs()


def the_other_lease_is_forgotten(patch: pytest.MonkeyPatch) -> EngineBugs:
    """When one of two leases ends its task is tried again, whatever the other one does."""
    patch.setattr(draft.Draft, "_other_live", lambda self, task, lease: None)
    right = evolve_tasks._end

    def wrong(state: State, event: e.LeaseEnded, at_ms: int) -> None:
        task = state.tasks[state.leases[event.lease_id].task_id]
        right(state, event, at_ms)
        if task.lease_id is not None and task.answer is None:
            task.lease_id = None
            evolve_tasks._wait(state, task, at_ms)

    patch.setattr(evolve_tasks, "_end", wrong)
    return EngineBugs()


def fleets_idle_beside_work(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Stock that was leased is never made anew."""
    patch.setattr(lanes, "_unstock", lambda state, task: None)
    return EngineBugs()


PLANTED: tuple[Plant, ...] = (
    fence_compared_with_greater_or_equal,
    fence_does_not_grow,
    settles_twice,
    stale_commit_after_expiry,
    lost_drop_on_reconnect,
    dropped_leases_never_end,
    forgotten_requeue,
    window_overrun,
    clock_goes_back,
    reply_before_commit,
    silent_restart,
    idempotency_forgotten_after_restart,
    rows_cut_twice,
    packs_the_neighbour_rows,
    packing_number_ignored,
    evolve_draws_chance,
    root_not_compared,
    grace_never_ends,
    leases_expire_early,
    deadlines_ignore_down_time,
    token_let_in_one_more,
    archived_before_the_views_have_it,
    success_without_all_rows,
    welcome_lost_locks_out,
    requeued_without_packing,
    cancelled_job_keeps_its_leases,
    region_ignored,
    resting_hosts_get_work,
    owners_are_blamed,
    no_amnesty,
    fleets_idle_beside_work,
    rests_never_end,
    late_leases_deliver_again,
    late_leases_always_agree,
    late_leases_stay,
    a_worker_outruns_itself,
    input_goes_with_the_first_of_two_leases,
    the_other_lease_is_forgotten,
)
