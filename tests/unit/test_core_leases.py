"""Leases in workers' hands: commitments, deliveries, failures, returns; stale words change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import JobId, PartyId
from fallow.job import JobOptions, JobRowFailure, JobState, WorkerShare
from fallow.limits import NODE_RUNS_PER_TASK_MAX, ROW_FAILURES_LISTED_PER_TASK_MAX, TASK_ATTEMPTS_MAX
from fallow.session import BlobReference, Cause, NodeRows, RowFailure, TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import questions
from fallow_coordinator.core.holding import CLEARANCES_MAX
from fallow_coordinator.core.limits import COOL_DOWN_MS_MAX, INSPECTION_RUNTIME_MS, TASK_LOSSES_MAX
from fallow_coordinator.core.questions import lease_to_send
from fallow_coordinator.core.state import Lease
from simulation.core_world import World, digest, of_kind


def leased_world(rows: int = 4, *, window: int = 1, **options: int) -> tuple[World, PartyId, JobId, Lease]:
    """One volunteer with the first lease of a job."""
    world = World().start().ready_bundle()
    worker_id = world.volunteer("v", window=window)
    job_id = world.submit(rows, options=JobOptions(**options))  # type: ignore[arg-type]
    world.pack_all()
    return world, worker_id, job_id, world.leases_of(worker_id)[0]


def refused(world: World, command: c.Command) -> FallowError:
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    return caught.value


def test_an_inline_commitment_settles_in_the_same_turn() -> None:
    world, _, job_id, lease = leased_world()
    turn = world.take(world.commit_command(lease))
    assert [type(event) for event in turn.events] == [e.CommitmentRecorded, e.TaskSettled, e.JobStateChanged]
    (settled,) = of_kind(turn.effects, f.SendSettled)
    assert settled == f.SendSettled(lease.session_id, lease.lease_id, lease.fence, 0)
    assert f.WakeWatchers(job_id) in turn.effects
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_rows_by_node_are_counted_for_the_job_and_told_with_each_result() -> None:
    world, worker_id, job_id, lease = leased_world(rows=40)
    rows = world.state.tasks[lease.task_id].rows
    nodes = (NodeRows(1, 3), NodeRows(0, rows - 5), NodeRows(1, 2))
    world.take(world.commit_command(lease, usage=Usage(node=1, nodes=nodes)))
    job = world.state.jobs[job_id]
    assert job.results[0].nodes == nodes
    assert job.shares == {(worker_id, 0): rows - 5, (worker_id, 1): 5}
    assert questions.shares_told(job)[0] == WorkerShare(worker_id, 0, rows - 5), "the most first"


@pytest.mark.parametrize("nodes", [(NodeRows(0, 1),), (NodeRows(0, 1),) * (NODE_RUNS_PER_TASK_MAX + 1)])
def test_rows_by_node_that_are_not_the_rows_fail_the_lease(nodes: tuple[NodeRows, ...]) -> None:
    world, _, job_id, lease = leased_world(rows=40)
    world.take(world.commit_command(lease, usage=Usage(nodes=nodes)))
    assert lease.lease_id not in world.state.leases
    assert not world.state.jobs[job_id].results


def test_a_large_output_is_asked_for_and_settles_when_it_lies_there() -> None:
    world, _, job_id, lease = leased_world()
    turn = world.take(world.commit_command(lease, inline=False))
    assert turn.effects == (f.SendUploadOffer(lease.session_id, lease.lease_id),)
    offer = questions.upload_to_offer(world.state, lease.lease_id)
    assert offer is not None and lease.commitment is not None and offer.output == lease.commitment.output
    world.take(world.deliver_command(lease))
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert questions.upload_to_offer(world.state, lease.lease_id) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"root": digest("another root")},
        {"rows": 3},
        {"blob": BlobReference(digest("another"), 1_000)},
        {"schema_digest": digest("another schema")},
        {"rows_failed": 1},
    ],
)
def test_a_delivery_that_is_not_what_was_committed_fails_the_lease_and_settles_nothing(
    changes: dict[str, object],
) -> None:
    world, _, job_id, lease = leased_world()
    world.take(world.commit_command(lease, inline=False))
    turn = world.take(world.deliver_command(lease, **changes))
    ended = turn.events[0]
    assert isinstance(ended, e.LeaseEnded)
    assert (ended.outcome, ended.cause) == (e.LeaseOutcome.FAILED, Cause.WORKER)
    assert of_kind(turn.effects, f.SendRevoked)[0].reason == ended.reason
    assert world.state.jobs[job_id].results == []


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 3},
        {"output": BlobReference(digest("x"), 70_000)},
        {"output": BlobReference(digest("x"), 0)},
        {"failures": (RowFailure(4, Cause.ROW, "beyond"),)},
        {"failures": (RowFailure(-1, Cause.ROW, "before"),)},
        {"failures": (RowFailure(1, Cause.ROW, "once"), RowFailure(1, Cause.ROW, "twice"))},
        {"failures": (RowFailure(1, Cause.ROW, "not in the block"),)},
    ],
)
def test_a_commitment_with_wrong_content_is_the_workers_failure(changes: dict[str, object]) -> None:
    world, _, _, lease = leased_world()
    honest = world.commit_command(lease)
    turn = world.take(replace(honest, **changes))  # type: ignore[arg-type]
    assert [type(event) for event in turn.events] == [e.LeaseEnded, e.WorkerStruck]
    assert world.state.ended_leases[lease.lease_id].outcome is e.LeaseOutcome.FAILED


def test_an_inline_output_without_facts_is_the_services_mistake_and_named() -> None:
    world, _, _, lease = leased_world()
    error = refused(world, world.commit_command(lease, stored=None))
    assert (error.reason, error.field) == (Reason.FIELD_MISSING, "stored")


def test_the_same_commitment_again_is_harmless_and_another_is_refused() -> None:
    world, _, _, lease = leased_world()
    command = world.commit_command(lease, inline=False)
    world.take(command)
    again = replace(command, message_digest=digest("signed anew"), sequence=9)
    assert world.take(again).events == ()
    assert refused(world, replace(command, output_root=digest("other"))).reason is Reason.FENCE_STALE
    delivery = world.deliver_command(lease)
    world.take(delivery)
    assert world.take(command).events == (), "also when it has settled"
    assert world.take(delivery).events == ()
    assert refused(world, replace(command, output_root=digest("other"))).reason is Reason.LEASE_ENDED


@pytest.mark.parametrize("fence", [0, 2, 99])
def test_only_the_leases_own_fence_is_taken(fence: int) -> None:
    world, _, _, lease = leased_world()
    for command in (
        replace(world.commit_command(lease), fence=fence),
        replace(world.fail_command(lease, Cause.WORKER), fence=fence),
        replace(world.return_command(lease, Cause.OWNER_PREEMPT), fence=fence),
    ):
        assert refused(world, command).reason is Reason.FENCE_STALE


def test_a_late_word_about_an_expired_lease_changes_nothing() -> None:
    world, worker_id, _, lease = leased_world()
    late = world.commit_command(lease)
    failure = world.fail_command(lease, Cause.WORKER)
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.ChangeCapability(session_id, None, 0))
    turn = world.pass_time(lease.deadline_ms - world.now_ms)
    assert isinstance(turn.events[0], e.LeaseEnded) and turn.events[0].outcome is e.LeaseOutcome.EXPIRED
    assert of_kind(turn.effects, f.SendRevoked)[0].lease_id == lease.lease_id
    assert refused(world, late).reason is Reason.LEASE_ENDED
    world.take(c.ChangeCapability(session_id, None, 1))
    world.pack_all()
    (again,) = world.leases_of(worker_id)
    assert again.fence == lease.fence + 1 and again.task_id == lease.task_id
    assert refused(world, late).reason is Reason.FENCE_STALE
    assert refused(world, failure).reason is Reason.FENCE_STALE
    world.take(world.commit_command(again))


def test_a_retried_task_is_packed_afresh() -> None:
    world, worker_id, _, lease = leased_world()
    first = world.state.tasks[lease.task_id].input
    world.take(world.return_command(lease, Cause.OWNER_PREEMPT))
    world.pass_time(1_000)
    assert world.state.tasks[lease.task_id].pack_number == 2
    world.pack_all()
    second = world.state.tasks[lease.task_id].input
    assert first is not None and second is not None and first.digest != second.digest
    assert len(world.leases_of(worker_id)) == 1


def test_nobody_speaks_for_anothers_lease_or_on_a_closed_session() -> None:
    world, _, _, lease = leased_world()
    other_id = world.volunteer("other")
    other_session = world.state.workers[other_id].session_id
    assert other_session is not None
    command = world.commit_command(lease)
    stolen = replace(command, worker_id=other_id, session_id=other_session)
    assert refused(world, stolen).reason is Reason.LEASE_UNKNOWN
    assert refused(world, replace(command, session_id=other_session)).reason is Reason.SESSION_REPLACED
    world.take(c.CloseSession(lease.session_id, "gone"))
    assert refused(world, command).reason is Reason.SESSION_REPLACED


# -------------------------------------------------------------------------------------------------- failed rows


def test_failed_rows_are_delivered_as_failures_at_their_job_positions() -> None:
    world, _, job_id, lease = leased_world(8)
    world.take(world.commit_command(lease, failures=(RowFailure(2, Cause.ROW, "not an image" + "!" * 300),)))
    (result,) = questions.results_after(world.state, job_id, 0, 10)
    (failure,) = result.failures
    assert failure.job_position == 2 and failure.cause is Cause.ROW
    assert failure.reason.startswith("not an image") and len(failure.reason) == 256
    status = world.status(job_id)
    assert (status.state, status.progress.rows_failed, status.progress.rows_done) == (JobState.SUCCEEDED, 1, 8)


def test_more_failed_rows_than_allowed_end_the_job_with_counts() -> None:
    world, _, job_id, lease = leased_world(8, failed_rows_max=1)
    failures = tuple(RowFailure(row, Cause.ROW, "bad") for row in (1, 2))
    world.take(world.commit_command(lease, failures=failures))
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.FAILED, "JOB_FAILED")
    assert status.reason == "2 of 8 rows failed, 6 succeeded; allowed: 1 failed rows"


def test_a_job_without_a_single_value_has_failed_unless_that_was_asked_for() -> None:
    failures = tuple(RowFailure(row, Cause.ROW, "not an image") for row in range(4))
    world, _, job_id, lease = leased_world(4)
    world.take(world.commit_command(lease, failures=failures))
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.FAILED, "JOB_FAILED")
    assert status.reason == "none of its 4 rows has a value: not an image"
    world, _, job_id, lease = leased_world(4, all_rows_may_fail=True)
    world.take(world.commit_command(lease, failures=failures))
    assert world.status(job_id).state is JobState.SUCCEEDED
    world, _, job_id, lease = leased_world(4)
    world.take(world.commit_command(lease, failures=failures[:3]))
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_a_full_list_of_failures_may_stand_for_more() -> None:
    rows = ROW_FAILURES_LISTED_PER_TASK_MAX + 44
    world = World().start().ready_bundle(per_row=1)
    worker_id = world.volunteer("v", window=1)
    job_id = world.submit(rows)
    world.pack_all()
    (lease,) = world.leases_of(worker_id)
    failures = tuple(RowFailure(row, Cause.ROW, "bad") for row in range(ROW_FAILURES_LISTED_PER_TASK_MAX))
    command = world.commit_command(lease, failures=failures)
    assert command.stored is not None
    world.take(replace(command, stored=replace(command.stored, rows_failed=rows)))
    assert world.status(job_id).progress.rows_failed == rows


# -------------------------------------------------------------------------------------------------- failures and causes


def test_a_failed_task_avoids_the_worker_where_it_failed_while_there_is_another() -> None:
    world, worker_id, _, lease = leased_world()
    other_id = world.volunteer("other", window=1)
    world.take(world.fail_command(lease, Cause.WORKER))
    assert world.state.tasks[lease.task_id].attempts == 1
    world.pass_time(10_000)
    world.pack_all()
    assert [held.task_id for held in world.leases_of(other_id)] == [lease.task_id]
    assert world.leases_of(worker_id) == []


def test_a_worker_that_takes_no_work_is_no_other_worker() -> None:
    world, worker_id, _, lease = leased_world()
    world.volunteer("draining", window=0)
    world.take(world.fail_command(lease, Cause.WORKER))
    world.pass_time(10_000)
    world.pack_all()
    assert [held.task_id for held in world.leases_of(worker_id)] == [lease.task_id]


def test_a_committed_worker_has_time_to_upload_on_a_slow_link() -> None:
    world, _, _, lease = leased_world()
    world.now_ms = lease.deadline_ms - 1
    output = BlobReference(digest("large"), 60_000_000)
    world.take(world.commit_command(lease, inline=False, output=output))
    assert world.pass_time(500_000).events == ()
    assert isinstance(world.pass_time(30_000).events[0], e.LeaseEnded)


def test_a_task_that_fails_too_often_is_given_up_and_its_rows_fail() -> None:
    world, worker_id, job_id, lease = leased_world(failed_rows_max=100)
    for attempt in range(TASK_ATTEMPTS_MAX):
        (lease,) = world.leases_of(worker_id)
        assert lease.fence == attempt + 1
        world.take(world.fail_command(lease, Cause.WORKER, "no memory"))
        world.pass_time(COOL_DOWN_MS_MAX)
        world.pack_all()
    (result,) = questions.results_after(world.state, job_id, 0, 10)
    assert result.output is None and result.cursor == 1
    assert result.failures == tuple(JobRowFailure(n, Cause.WORKER, "no memory") for n in range(4))
    assert world.status(job_id).progress.rows_failed == 4


def test_pre_emption_is_not_a_failure_but_does_not_go_on_for_ever() -> None:
    world, worker_id, job_id, lease = leased_world(failed_rows_max=100)
    for _ in range(TASK_LOSSES_MAX):
        (lease,) = world.leases_of(worker_id)
        assert world.state.tasks[lease.task_id].attempts == 0
        world.take(world.return_command(lease, Cause.OWNER_PREEMPT))
        world.pass_time(10_000)
        world.pack_all()
    assert world.status(job_id).progress.rows_failed == 4


def suspected_world() -> tuple[World, JobId, Lease]:
    """Workers of two accounts say that a program crashed them: the job, and the inspection that follows."""
    world, _, job_id, lease = leased_world(10_000)
    other_id = world.volunteer("other")
    inspector = world.inspector()
    world.pack_all()
    turn = world.take(world.fail_command(lease, Cause.PROGRAM, "segfault"))
    assert [type(event) for event in turn.events][:2] == [e.BundleCrashed, e.LeaseEnded]
    turn = world.take(world.fail_command(world.leases_of(other_id)[0], Cause.PROGRAM, "segfault"))
    kinds = [type(event) for event in turn.events]
    assert kinds[:4] == [e.BundleCrashed, e.TaskCreated, e.InspectionRowsGiven, e.LeaseEnded]
    (inspection,) = [held for held in world.leases_of(inspector) if world.state.tasks[held.task_id].job_id is None]
    return world, job_id, inspection


def test_claims_of_two_accounts_hold_nothing_before_an_operators_worker_finds_the_same() -> None:
    world, job_id, inspection = suspected_world()
    assert world.status(job_id).state is JobState.RUNNING
    turn = world.take(world.fail_command(inspection, Cause.PROGRAM, "segfault"))
    assert [type(event) for event in turn.events][:2] == [e.TaskSettled, e.BundleHeld]
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.FAILED, "PROGRAM_HELD")
    assert "operator's inspection says: segfault" in status.reason
    assert world.state.leases == {} and world.state.tasks == {}
    assert refused(world, world.submission(key="next")).reason is Reason.PROGRAM_HELD
    world.take(c.ReleaseBundle(world.bundle_digest))
    assert world.state.bundles[world.bundle_digest].crashed_accounts == {}
    assert world.submit(4, key="after") != job_id
    assert world.take(c.ReleaseBundle(world.bundle_digest)).events == ()


def test_an_inspection_on_claims_runs_the_rows_of_the_last_and_keeps_them_until_it_ends() -> None:
    world = World().start().ready_bundle()
    first_id, other_id, inspector = world.volunteer("v", window=1), world.volunteer("other"), world.inspector()
    world.submit(10_000)
    for task_id in [task_id for lane in world.state.lanes.values() for task_id in lane.packing]:
        world.pack(task_id, inline=False)
    lease = world.leases_of(first_id)[0]
    world.take(world.fail_command(lease, Cause.PROGRAM, "segfault"))
    claimed = world.leases_of(other_id)[0]
    task = world.state.tasks[claimed.task_id]
    block, rows, runtime_ms = task.input, task.rows, claimed.runtime_max_ms
    turn = world.take(world.fail_command(claimed, Cause.PROGRAM, "segfault"))
    dropped = [effect.input for effect in turn.effects if isinstance(effect, f.DropInput)]
    assert block is not None and block.digest not in dropped
    for _ in range(2):
        (inspection,) = [held for held in world.leases_of(inspector) if not world.state.tasks[held.task_id].job_id]
        told = lease_to_send(world.state, inspection.lease_id)
        assert told is not None and told.kind is TaskKind.INSPECT
        assert (told.input, told.rows) == (block, rows)
        assert told.runtime_max_ms == INSPECTION_RUNTIME_MS + runtime_ms
        # It is tried again, with the same rows.
        turn = world.take(world.fail_command(inspection, Cause.PLATFORM, "no child"))
        assert block.digest not in [effect.input for effect in turn.effects if isinstance(effect, f.DropInput)]
        world.pass_time(10_000)
    inspection = next(held for held in world.state.leases.values() if not world.state.tasks[held.task_id].job_id)
    turn = world.take(world.fail_command(inspection, Cause.PROGRAM, "segfault"))
    assert block.digest in [effect.input for effect in turn.effects if isinstance(effect, f.DropInput)]


def test_a_bundle_that_is_inspected_well_is_cleared_of_what_was_claimed() -> None:
    world, job_id, inspection = suspected_world()
    report = world.state.bundles[world.bundle_digest].report
    assert report is not None
    command = c.ReportInspection(
        inspection.session_id,
        inspection.worker_id,
        inspection.lease_id,
        inspection.fence,
        report,
        Usage(),
        digest("m"),
        b"",
        1,
    )
    turn = world.take(command)
    assert [type(event) for event in turn.events][:2] == [e.BundleCleared, e.TaskSettled]
    bundle = world.state.bundles[world.bundle_digest]
    assert (bundle.held_reason, bundle.crashed_accounts, bundle.clearances) == ("", {}, 1)
    assert world.status(job_id).state is JobState.RUNNING


def test_claims_bring_about_so_many_inspections_and_no_more() -> None:
    world, _, _, lease = leased_world(10_000)
    world.state.bundles[world.bundle_digest].clearances = CLEARANCES_MAX
    turn = world.take(world.fail_command(lease, Cause.PROGRAM, "segfault"))
    assert isinstance(turn.events[0], e.LeaseEnded)


def test_an_inspection_on_claims_that_cannot_be_had_ends_no_job() -> None:
    world, job_id, inspection = suspected_world()
    for _ in range(TASK_ATTEMPTS_MAX):
        world.take(world.fail_command(inspection, Cause.PLATFORM, "no child"))
        world.pass_time(10_000)
        inspections = [held for held in world.state.leases.values() if world.state.tasks[held.task_id].job_id is None]
        if inspections:
            (inspection,) = inspections
    assert world.state.bundles[world.bundle_digest].inspection_task_id is None
    assert world.status(job_id).state is JobState.RUNNING


def test_crashes_on_one_account_alone_do_not_hold_a_program() -> None:
    world, worker_id, job_id, lease = leased_world(failed_rows_max=100)
    for _ in range(TASK_ATTEMPTS_MAX):
        (lease,) = world.leases_of(worker_id)
        world.take(world.fail_command(lease, Cause.PROGRAM, "segfault"))
        world.pass_time(10_000)
        world.pack_all()
    assert world.state.bundles[world.bundle_digest].held_reason == ""
    (result,) = questions.results_after(world.state, job_id, 0, 10)
    assert {failure.cause for failure in result.failures} == {Cause.PROGRAM}


def test_two_tasks_given_up_in_one_decision_are_counted_one_after_the_other() -> None:
    world, worker_id, job_id, _ = leased_world(200, window=2, failed_rows_max=1_000)
    for lease in world.leases_of(worker_id):
        world.state.tasks[lease.task_id].losses = TASK_LOSSES_MAX - 1
    world.take(c.CloseSession(world.leases_of(worker_id)[0].session_id, "gone"))
    world.pass_time(60_000)
    results = questions.results_after(world.state, job_id, 0, 10)
    assert [result.cursor for result in results] == [1, 2]


def test_a_report_for_a_map_lease_and_a_commitment_for_an_inspection_are_refused() -> None:
    world, _, _, lease = leased_world()
    report = c.ReportInspection(
        lease.session_id,
        lease.worker_id,
        lease.lease_id,
        lease.fence,
        world.state.bundles[world.bundle_digest].report,  # type: ignore[arg-type]
        Usage(),
        digest("m"),
        b"",
        1,
    )
    assert refused(world, report).reason is Reason.FIELD_INVALID
    fresh = World().start()
    inspector = fresh.inspector()
    fresh.register()
    (inspection,) = fresh.leases_of(inspector)
    assert refused(fresh, fresh.commit_command(inspection)).reason is Reason.FIELD_INVALID


def test_a_delivery_before_its_commitment_is_refused() -> None:
    world, _, _, lease = leased_world()
    stored = world.commit_command(lease).stored
    assert stored is not None
    delivery = c.Deliver(lease.session_id, lease.worker_id, lease.lease_id, lease.fence, stored)
    assert refused(world, delivery).reason is Reason.FIELD_INVALID
