"""Late tasks are given out once more, within limits, to somebody faster; the first delivers, the late one is paid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.credits import PoolMode, Purse
from fallow.errors import FallowError, Reason
from fallow.ids import JobId, PartyId
from fallow.job import JobOptions, JobState, Objective
from fallow.roles import Role, Tier
from fallow.session import Cause, HeldLease, RowFailure
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import duplicates, groups, questions
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core.ledger import available, held, pending
from fallow_coordinator.core.limits import DUPLICATES_PER_JOB_MIN, DUPLICATES_PER_TASK_MAX, LATE_MS_MAX
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Lease, TaskPhase
from fallow_coordinator.core.turn import Turn
from simulation.core_world import World, capability, digest, of_kind

UNIT = 1_000_000
CREDIT = 1_000_000
LONG_MS = 20_000
"""Far longer than one row of a unit should take."""


@pytest.fixture(autouse=True)
def everybody_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "measured", lambda worker: True)


def late_world(mode: PoolMode = PoolMode.DONATION, **options: object) -> tuple[World, PartyId, PartyId, JobId]:
    """One row of one unit in the hands of `slow`, who should have been done long ago; `quick` is free."""
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    if mode is not PoolMode.DONATION:
        world.take(c.SetPoolMode(world.state.default_pool_id, mode))
        world.ask(c.GrantCredits(world.account_id, 100 * CREDIT, "", digest("grant")[:16]))
    slow = world.volunteer("slow", window=1)
    job_id = world.submit(1, options=JobOptions(**options))  # type: ignore[arg-type]
    world.pack_all()
    assert len(world.leases_of(slow)) == 1
    quick = world.volunteer("quick", window=1)
    return world, slow, quick, job_id


def doubled(world: World, quick: PartyId) -> Lease:
    turn = world.pass_time(LONG_MS)
    (granted,) = grants(turn)
    assert granted.duplicate and granted.worker_id == quick
    assert of_kind(turn.effects, f.SendLease)[0].lease_id == granted.lease_id
    return world.state.leases[granted.lease_id]


def grants(turn: Turn) -> list[e.LeaseGranted]:
    return [event for event in turn.events if isinstance(event, e.LeaseGranted)]


def settled_late(world: World) -> e.LateLeaseSettled:
    (found,) = [event for _, event in world.records if isinstance(event, e.LateLeaseSettled)]
    return found


def refusal(world: World, command: c.Command) -> Reason:
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    return caught.value.reason


def test_a_late_lease_is_given_out_a_second_time_with_a_fence_of_its_own() -> None:
    world, slow, quick, job_id = late_world()
    assert not world.pass_time(1_000).events, "nothing is late yet"
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    assert (first.fence, second.fence, first.task_id) == (1, 2, second.task_id)
    assert world.state.jobs[job_id].rows_leased == 1, "rows are counted once"
    sent = [questions.lease_to_send(world.state, lease.lease_id) for lease in (first, second)]
    assert sent[0] is not None and sent[1] is not None and sent[0].input == sent[1].input
    assert not world.pass_time(LONG_MS).events, "two leases, and no third"


@pytest.mark.parametrize("first_done", ["slow", "quick"])
def test_who_settles_first_delivers_and_the_other_one_is_compared(first_done: str) -> None:
    world, slow, quick, job_id = late_world()
    doubled(world, quick)
    order = (slow, quick) if first_done == "slow" else (quick, slow)
    first, late = (world.leases_of(worker_id)[0] for worker_id in order)
    world.take(world.commit_command(first))
    assert world.status(job_id).state is JobState.SUCCEEDED, "nobody waits for the late one"
    command = world.commit_command(late, inline=False)
    turn = world.take(command)
    assert [type(event) for event in turn.events] == [e.CommitmentRecorded, e.LateLeaseSettled]
    assert not of_kind(turn.effects, f.SendUploadOffer), "what is compared by its root need not be uploaded"
    (told,) = of_kind(turn.effects, f.SendSettled)
    assert (told.lease_id, told.fence) == (late.lease_id, late.fence)
    event = settled_late(world)
    assert (event.delivered_lease_id, event.agreement) == (first.lease_id, e.Agreement.SAME)
    assert len(world.state.jobs[job_id].results) == 1, "never twice"
    assert not world.state.tasks and not world.state.leases and not world.state.duplicated
    assert world.take(command).events == (), "said twice, it is harmless"


def test_other_roots_disagree_only_within_an_execution_class() -> None:
    for execution_class, agreement in (("test", e.Agreement.DIFFERENT), ("other", e.Agreement.INCOMPARABLE)):
        world, slow, quick, _ = late_world()
        doubled(world, quick)
        world.take(world.commit_command(world.leases_of(quick)[0]))
        (late,) = world.leases_of(slow)
        other = digest("another root")
        world.take(world.commit_command(late, inline=False, output_root=other, execution_class=execution_class))
        assert settled_late(world).agreement is agreement


def test_two_that_committed_settle_one_after_the_other() -> None:
    world, slow, quick, job_id = late_world()
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    world.take(world.commit_command(first, inline=False))
    world.take(world.commit_command(second, inline=False))
    too_late = world.deliver_command(first)
    turn = world.take(world.deliver_command(second))
    assert [type(x) for x in turn.events] == [e.TaskSettled, e.LateLeaseSettled, e.JobStateChanged]
    assert settled_late(world).lease_id == first.lease_id
    assert {told.lease_id for told in of_kind(turn.effects, f.SendSettled)} == {first.lease_id, second.lease_id}
    assert world.take(too_late).events == (), "a late delivery is harmless"
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_a_stale_fence_changes_nothing_while_two_leases_live() -> None:
    world, slow, quick, _ = late_world()
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    assert refusal(world, world.commit_command(first, fence=second.fence)) is Reason.FENCE_STALE
    assert refusal(world, world.commit_command(second, fence=first.fence)) is Reason.FENCE_STALE
    stolen = world.commit_command(first, session_id=second.session_id, worker_id=quick)
    assert refusal(world, stolen) is Reason.LEASE_UNKNOWN


@pytest.mark.parametrize("end", ["fails", "returns", "goes away", "expires"])
def test_when_one_of_two_ends_the_other_goes_on_and_nothing_is_tried_again(end: str) -> None:
    world, slow, quick, job_id = late_world()
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    task = world.state.tasks[first.task_id]
    if end == "fails":
        world.take(world.fail_command(first, Cause.WORKER))
    elif end == "returns":
        world.take(c.ReturnLease(first.session_id, slow, first.lease_id, first.fence, Cause.OWNER_PREEMPT, "back"))
    elif end == "goes away":
        world.take(c.RevokeParty(slow, "gone"))
    else:
        world.pass_time(first.deadline_ms - world.now_ms)
    assert (task.phase, task.lease_id, task.duplicate_id) == (TaskPhase.LEASED, second.lease_id, None)
    assert (task.attempts, task.losses, world.state.jobs[job_id].rows_leased) == (0, 0, 1)
    assert not of_kind(tuple(world.effects), f.DropInput), "the other one still reads the input"
    assert refusal(world, world.commit_command(first)) in (Reason.FENCE_STALE, Reason.SESSION_REPLACED)
    world.take(world.commit_command(second))
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_an_input_in_the_blob_service_goes_with_the_last_lease() -> None:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    slow = world.volunteer("slow", window=1)
    world.submit(1)
    (task_id,) = world.state.tasks
    task = world.state.tasks[task_id]
    assert task.phase is TaskPhase.PACKING
    world.pack(task_id, inline=False)
    quick = world.volunteer("quick", window=1)
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    assert task.input is not None
    packed = task.input.digest
    assert not of_kind(world.take(world.commit_command(second)).effects, f.DropInput)
    turn = world.take(world.commit_command(first))
    assert [drop.input for drop in of_kind(turn.effects, f.DropInput)] == [packed]


def test_both_leases_are_kept_by_workers_that_come_back() -> None:
    world, slow, quick, job_id = late_world()
    doubled(world, quick)
    for worker_id in (slow, quick):
        (lease,) = world.leases_of(worker_id)
        listed = (HeldLease(lease.lease_id, lease.fence, committed=False),)
        again = world.connect(worker_id, window=1, token=f"{worker_id}#1", held=listed)
        assert again.kept == (lease.lease_id,)
    world.take(c.Restart(epoch=2, down_time_ms=5_000))
    assert len(world.state.leases) == 2
    assert world.replayed() == world.state
    world.pass_time(60_000)
    assert not world.state.leases, "who does not come back loses what it holds"
    assert world.state.jobs[job_id].rows_leased == 0


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.FAILED])
def test_the_end_of_a_job_that_came_to_nothing_takes_back_both_and_late_ones(state: JobState) -> None:
    world = World().start().ready_bundle(per_row=4 * UNIT, batch=1)
    slow = world.volunteer("slow", window=2, slots=2)
    job_id = world.submit(2, options=JobOptions(failed_rows_max=0))
    world.pack_all()
    assert len(world.leases_of(slow)) == 2
    first_quick, second_quick = world.volunteer("a", window=1), world.volunteer("b", window=1)
    world.pass_time(60_000 - 1_000)
    world.pass_time(500)
    leases = [lease for worker_id in (first_quick, second_quick) for lease in world.leases_of(worker_id)]
    assert len(leases) == 2 and len(world.state.leases) == 4
    world.take(world.commit_command(leases[0]))
    assert world.state.jobs[job_id].late, "one is late"
    if state is JobState.CANCELLED:
        world.take(c.CancelJob(world.account_id, job_id))
    else:
        world.take(world.commit_command(leases[1], failures=(RowFailure(0, Cause.ROW, "bad row"),)))
    ended = [event for _, event in world.records if isinstance(event, e.LeaseEnded)]
    assert world.status(job_id).state is state
    assert {event.outcome for event in ended} == {e.LeaseOutcome.REVOKED}
    assert not world.state.leases and not world.state.tasks


def test_a_late_lease_outlives_its_job_for_a_while_and_no_longer() -> None:
    world, slow, quick, job_id = late_world()
    second = doubled(world, quick)
    world.take(world.commit_command(second))
    (late,) = world.leases_of(slow)
    assert late.deadline_ms <= world.now_ms + LATE_MS_MAX
    world.take(c.ArchiveJobs(world.state.sequence))
    assert job_id in world.state.jobs, "a job stays while somebody works for it"
    world.pass_time(late.deadline_ms - world.now_ms)
    assert not world.state.leases and not world.state.tasks
    world.take(c.ArchiveJobs(world.state.sequence))
    assert job_id not in world.state.jobs


def test_deleting_a_job_takes_back_its_late_leases() -> None:
    world, slow, quick, job_id = late_world()
    world.take(world.commit_command(doubled(world, quick)))
    (late,) = world.leases_of(slow)
    command = world.commit_command(late)
    turn = world.take(c.DeleteJob(world.account_id, job_id, archived=False))
    assert [type(event) for event in turn.events] == [e.LeaseEnded, e.JobDeleted]
    assert refusal(world, command) is Reason.LEASE_ENDED
    assert not world.state.workers[slow].strikes, "nobody is blamed"


def test_a_host_that_hangs_is_blamed_although_another_one_did_its_task() -> None:
    world, slow, quick, _ = late_world()
    second = doubled(world, quick)
    (late,) = world.leases_of(slow)
    world.pass_time(late.runtime_max_ms)
    world.take(world.commit_command(second))
    if late.lease_id in world.state.leases:
        world.pass_time(LATE_MS_MAX)
    assert world.state.workers[slow].strikes == 1


def test_the_late_one_teaches_how_slow_its_worker_is() -> None:
    world, slow, quick, _ = late_world()
    second = doubled(world, quick)
    world.now_ms += 1_000
    world.take(world.commit_command(second))
    world.take(world.commit_command(world.leases_of(slow)[0]))
    bundle = world.bundle_digest
    speeds = {name: world.state.workers[name].speeds[bundle] for name in (slow, quick)}
    assert 0 < speeds[slow] < 100
    assert world.state.workers[slow].tasks_settled == 1


# ------------------------------------------------------------------------------------------------- money


def priced(budget: int) -> tuple[World, PartyId, PartyId, JobId]:
    return late_world(PoolMode.MARKET, budget_microcredits=budget * CREDIT, limit_microcredits_per_unit=CREDIT)


def ask(world: World, worker_id: PartyId, microcredits: int) -> None:
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    able = replace(capability(), ask_microcredits_per_unit=microcredits)
    world.take(c.ChangeCapability(session_id, able, 1))


def test_both_leases_are_reserved_and_both_workers_are_paid_what_they_asked() -> None:
    world, slow, quick, job_id = priced(3)
    ask(world, quick, CREDIT // 2)
    second = doubled(world, quick)
    job = world.state.jobs[job_id]
    assert second.reserved_microcredits == CREDIT // 2
    assert job.reserved_microcredits == second.reserved_microcredits, "the first asked nothing"
    world.take(world.commit_command(second))
    world.take(world.commit_command(world.leases_of(slow)[0]))
    ledger = world.state.ledger
    assert ledger.balance(pending(world.state.workers[quick].account_id)) == CREDIT // 2
    assert job.microcredits == CREDIT // 2 and ledger.balance(held(job_id, Purse.CREDITS)) == 0


def test_a_late_lease_is_paid_after_its_job_has_ended_from_what_was_kept_for_it() -> None:
    world, slow, quick, job_id = late_world()
    assert slow and quick and job_id
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    world.take(c.SetPoolMode(world.state.default_pool_id, PoolMode.MARKET))
    world.ask(c.GrantCredits(world.account_id, 100 * CREDIT, "", digest("grant")[:16]))
    dear = world.volunteer("dear", window=1)
    ask(world, dear, 300_000)
    job_id = world.submit(1, options=JobOptions(budget_microcredits=CREDIT, limit_microcredits_per_unit=CREDIT))
    world.pack_all()
    cheap = world.volunteer("cheap", window=1)
    ask(world, cheap, 200_000)
    second = doubled(world, cheap)
    (first,) = world.leases_of(dear)
    ledger, job = world.state.ledger, world.state.jobs[job_id]
    assert job.reserved_microcredits == 500_000
    world.take(world.commit_command(second))
    assert ledger.balance(available(world.account_id)) == 100 * CREDIT - 500_000, "the rest came back at once"
    world.take(world.commit_command(first))
    assert ledger.balance(pending(world.state.workers[dear].account_id)) == 300_000
    assert (job.microcredits, job.reserved_microcredits) == (500_000, 0)
    assert ledger.balance(available(world.account_id)) == 100 * CREDIT - 500_000


def test_what_a_late_lease_does_not_cost_comes_back() -> None:
    world, slow, quick, job_id = priced(3)
    ask(world, slow, 0)
    ask(world, quick, CREDIT)
    second = doubled(world, quick)
    (first,) = world.leases_of(slow)
    world.take(world.commit_command(first))
    assert world.state.jobs[job_id].state is JobState.SUCCEEDED
    assert world.state.ledger.balance(available(world.account_id)) == 99 * CREDIT
    world.take(c.ReturnLease(second.session_id, quick, second.lease_id, second.fence, Cause.OWNER_PREEMPT, "back"))
    assert world.state.ledger.balance(available(world.account_id)) == 100 * CREDIT


def test_what_nothing_confirms_is_paid_as_pending_whoever_did_it() -> None:
    for root, released in ((digest("another root"), False), (None, True)):
        world = World().start().ready_bundle(per_row=UNIT, batch=1)
        world.take(c.SetPoolMode(world.state.default_pool_id, PoolMode.MARKET))
        world.ask(c.GrantCredits(world.account_id, 100 * CREDIT, "", digest("grant")[:16]))
        managed = world.enroll("lab", world.token(tier=Tier.MANAGED)).party_id
        world.connect(managed, window=1, able=replace(capability(), ask_microcredits_per_unit=CREDIT))
        world.submit(1, options=JobOptions(budget_microcredits=3 * CREDIT, limit_microcredits_per_unit=CREDIT))
        world.pack_all()
        quick = world.volunteer("quick", window=1)
        world.take(world.commit_command(doubled(world, quick)))
        changes = {} if root is None else {"output_root": root, "inline": False}
        world.take(world.commit_command(world.leases_of(managed)[0], **changes))  # type: ignore[arg-type]
        event = settled_late(world)
        assert (event.microcredits, event.released) == (CREDIT, released)


def test_a_job_that_cannot_pay_twice_is_not_doubled_and_does_not_pause() -> None:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    world.take(c.SetPoolMode(world.state.default_pool_id, PoolMode.MARKET))
    world.ask(c.GrantCredits(world.account_id, 100 * CREDIT, "", digest("grant")[:16]))
    dear = world.volunteer("dear", window=1)
    ask(world, dear, CREDIT)
    job_id = world.submit(1, options=JobOptions(budget_microcredits=CREDIT, limit_microcredits_per_unit=CREDIT))
    world.pack_all()
    ask(world, world.volunteer("other", window=1), CREDIT)
    assert not world.pass_time(LONG_MS).events
    assert world.status(job_id).state is JobState.RUNNING


# ------------------------------------------------------------------------------------------------- limits


def test_no_second_lease_for_work_that_shall_cost_little_carbon() -> None:
    world, *_ = late_world(objective=Objective.CARBON)
    assert not grants(world.pass_time(LONG_MS))


def test_another_account_is_preferred_and_the_same_one_taken_when_there_is_no_other() -> None:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    token = world.token(account_id=world.state.accounts[world.account_id].account_id, role=Role.WORKER)
    mine = [world.enroll(name, token).party_id for name in ("one", "two")]
    world.connect(mine[0], window=1)
    world.submit(1)
    world.pack_all()
    world.connect(mine[1], window=1)
    stranger = world.volunteer("stranger", window=1)
    assert grants(world.pass_time(LONG_MS))[0].worker_id == stranger
    (second,) = world.leases_of(stranger)
    world.take(c.QuarantineWorker(stranger, "odd"))
    assert second.lease_id not in world.state.leases
    assert grants(world.pass_time(1_000))[0].worker_id == mine[1]


def test_a_task_is_doubled_so_often_and_no_more() -> None:
    world, slow, _, _ = late_world()
    (first,) = world.leases_of(slow)
    task = world.state.tasks[first.task_id]
    for number in range(DUPLICATES_PER_TASK_MAX + 3):
        world.pass_time(2_000 if number else LONG_MS)
        if task.duplicate_id is not None:
            lease = world.state.leases[task.duplicate_id]
            world.take(c.RevokeParty(lease.worker_id, "gone"))
            world.volunteer(f"next {number}", window=1)
    assert task.duplicates == DUPLICATES_PER_TASK_MAX


def test_a_small_job_has_few_duplicates() -> None:
    world = World().start().ready_bundle(per_row=4 * UNIT, batch=1)
    slow = world.volunteer("slow", window=12, slots=12)
    job_id = world.submit(12)
    world.pack_all()
    job = world.state.jobs[job_id]
    assert len(world.leases_of(slow)) == job.tasks_created == 12
    for number in range(12):
        world.volunteer(f"quick {number}", window=1)
    for _ in range(15):
        world.pass_time(60_000 // 15)
    assert job.duplicates == DUPLICATES_PER_JOB_MIN == duplicates.duplicates_allowed(job)


def test_no_more_tasks_are_in_two_hands_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "DUPLICATES_LIVE_MAX", 0)
    world, *_ = late_world()
    assert not world.pass_time(LONG_MS).events


def test_nobody_is_looked_at_beyond_the_oldest_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "STRAGGLERS_LOOKED_AT_MAX", 0)
    world, *_ = late_world()
    assert duplicates.duplicates_due(world.state, world.now_ms + LONG_MS, Names(bytes(32))) == []


def test_while_there_is_other_work_only_what_is_far_too_late_is_doubled() -> None:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    slow = world.volunteer("slow", window=1)
    job_id = world.submit(400)
    world.pack_all()
    assert world.leases_of(slow)
    job = world.state.jobs[job_id]
    assert not duplicates.is_near_its_end(job)
    (lease,) = world.leases_of(slow)
    task = world.state.tasks[lease.task_id]
    soon = duplicates.straggler_of(world.state, task, lease, world.now_ms + 20_000)
    late = duplicates.straggler_of(world.state, task, lease, world.now_ms + 60_000)
    assert (soon.far, late.far) == (False, True) and late.left_ms > soon.left_ms


def test_doing_work_twice_counts_for_the_account_s_share() -> None:
    world, _, quick, _ = late_world()
    before = world.state.accounts[world.account_id].share_key
    doubled(world, quick)
    assert world.state.accounts[world.account_id].share_key > before
