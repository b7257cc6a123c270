"""Blobs, bundles and jobs: what is accepted, what is refused and how, and how a job moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import TaskId
from fallow.job import DatasetBlock, JobOptions, JobState
from fallow.limits import BLOCK_BYTES_MAX, JOB_BLOCKS_MAX
from fallow.roles import DataClass, Role
from fallow.session import BlobReference, Cause, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import questions, row_plans
from fallow_coordinator.core.answers import AccountMade, JobAccepted
from fallow_coordinator.core.limits import IDEMPOTENCY_MS, PACK_ATTEMPTS_MAX, PACK_PATIENCE_MS
from simulation.core_world import INPUT_SCHEMA, World, blob, digest, of_kind


def refused(world: World, command: c.Command) -> FallowError:
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    return caught.value


def packing_of(world: World) -> list[TaskId]:
    return [task_id for lane in world.state.lanes.values() for task_id in lane.packing]


# -------------------------------------------------------------------------------------------------- blobs and bundles


def test_blobs_are_recorded_once_and_owned_by_their_account_alone() -> None:
    world = World().start()
    stored = c.StoredBlob(blob("data"), rows=3, root=digest("root"), schema_digest=INPUT_SCHEMA)
    assert len(world.take(c.RecordBlobs(world.account_id, (stored, stored))).events) == 1
    assert world.take(c.RecordBlobs(world.account_id, (stored,))).events == ()
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    assert questions.has_blobs(world.state, world.account_id, [stored.blob.digest, digest("no")]) == (True, False)
    assert questions.has_blobs(world.state, other.account_id, [stored.blob.digest]) == (False,)
    assert not questions.may_read_blob(world.state, other.account_id, stored.blob.digest)


def test_a_bundle_is_inspected_by_an_operator_worker_that_can_and_by_no_other() -> None:
    world = World().start()
    world.volunteer("v")
    world.register()
    status = questions.bundle_status(world.state, world.account_id, world.bundle_digest)
    assert status is not None and status.reason_code == "NO_OPERATOR_WORKER"
    assert world.state.leases == {}
    inspector = world.inspector()
    (lease,) = world.leases_of(inspector)
    sent = questions.lease_to_send(world.state, lease.lease_id)
    assert sent is not None and (sent.kind, sent.rows, sent.input) == (TaskKind.INSPECT, 0, None)
    turn = world.inspect()
    assert [type(event) for event in turn.events] == [e.BundleInspected, e.TaskSettled]
    assert of_kind(turn.effects, f.SendSettled)[0].lease_id == lease.lease_id
    assert of_kind(turn.effects, f.WakeBundleWatchers) == [f.WakeBundleWatchers(world.bundle_digest)]


def test_a_bundle_is_inspected_once_for_all_accounts_but_each_must_own_its_files() -> None:
    world = World().start().ready_bundle()
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    command = c.RegisterBundle(
        account_id=other.account_id,
        party_id=world.client_id,
        bundle_digest=world.bundle_digest,
        files=(blob("model.onnx"),),
        input_schema_digest=INPUT_SCHEMA,
        output_schema_digest=INPUT_SCHEMA,
        size_feature_count=0,
        bytes_feature_index=-1,
    )
    error = refused(world, command)
    assert (error.reason, error.field) == (Reason.BLOB_UNKNOWN, "files[0]")
    turn = world.register(other.account_id)
    assert [type(event) for event in turn.events] == [e.BundleRegistered], "no second inspection"
    assert world.register(other.account_id).events == ()


def test_a_refused_bundle_fails_its_waiting_jobs_and_takes_no_more() -> None:
    world = World().start()
    world.inspector()
    world.register()
    job_id = world.submit(5)
    assert world.status(job_id).state is JobState.PENDING
    world.inspect(accepted=False)
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.FAILED, "PROGRAM_REFUSED")
    assert "node 3 (Loop): unbounded" in status.reason
    error = refused(world, world.submission(key="later"))
    assert error.reason is Reason.PROGRAM_REFUSED and "unbounded" in error.message


def test_a_program_that_brings_down_its_inspector_is_refused() -> None:
    world = World().start()
    inspector = world.inspector()
    world.register()
    (lease,) = world.leases_of(inspector)
    world.take(world.fail_command(lease, Cause.PROGRAM, "killed at 4 GiB"))
    report = world.state.bundles[world.bundle_digest].report
    assert report is not None and not report.accepted and report.refusals == ("killed at 4 GiB",)


def test_an_inspection_that_fails_for_other_causes_is_tried_again_and_given_up_in_the_end() -> None:
    world = World().start()
    inspector = world.inspector()
    world.register()
    job_id = world.submit(5)
    for _ in range(5):
        world.pass_time(60_000)
        (lease,) = world.leases_of(inspector)
        world.take(world.fail_command(lease, Cause.PLATFORM, "no disk"))
    assert world.status(job_id).state is JobState.FAILED
    error = refused(world, world.submission(key="later"))
    assert error.reason is Reason.BUNDLE_INVALID and "no disk" in error.message
    world.register()
    world.inspect()
    assert world.status(world.submit(5, key="again")).state is JobState.QUEUED


def test_a_nonsense_report_is_the_inspectors_fault() -> None:
    world = World().start()
    inspector = world.inspector()
    world.register()
    (lease,) = world.leases_of(inspector)
    world.inspect(batch=0)
    assert world.state.ended_leases[lease.lease_id].outcome is e.LeaseOutcome.FAILED
    assert world.state.bundles[world.bundle_digest].report is None


def test_a_bundle_whose_feature_index_is_out_of_range_is_invalid() -> None:
    world = World().start()
    with pytest.raises(FallowError) as caught:
        world.register(size_feature_count=1, bytes_feature_index=1)
    assert (caught.value.reason, caught.value.field) == (Reason.BUNDLE_INVALID, "bytes_feature_index")


# -------------------------------------------------------------------------------------------------- submission


def test_a_job_runs_from_submission_to_success_with_each_row_once() -> None:
    world = World().start().ready_bundle()
    job_id = world.submit(1_000, blocks=3)
    assert world.status(job_id).state is JobState.QUEUED
    world.volunteer("a")
    world.volunteer("b")
    world.pack_all()
    assert world.status(job_id).state is JobState.RUNNING
    world.work_off()
    status = world.status(job_id)
    assert (status.state, status.progress.rows_done, status.progress.rows_failed) == (JobState.SUCCEEDED, 1_000, 0)
    results = questions.results_after(world.state, job_id, 0, 10_000)
    positions = sorted(n for r in results for s in r.spans for n in range(s.job_position, s.job_position + s.rows))
    assert positions == list(range(1_000))
    assert questions.results_after(world.state, job_id, 2, 3) == results[2:5]
    assert all(questions.may_read_blob(world.state, world.account_id, r.output.digest) for r in results if r.output)
    assert world.replayed() == world.state


def _second_block(command: c.SubmitMapJob, **changes: object) -> c.SubmitMapJob:
    stored = replace(command.inline_blocks[1], **changes)  # type: ignore[arg-type]
    return replace(command, inline_blocks=(command.inline_blocks[0], stored))


def _first_block(command: c.SubmitMapJob, **changes: object) -> c.SubmitMapJob:
    return replace(command, blocks=(replace(command.blocks[0], **changes), *command.blocks[1:]))  # type: ignore[arg-type]


def test_wrong_submissions_name_reason_and_field() -> None:
    world = World().start().ready_bundle()
    good = world.submission(10, blocks=2)
    big = BlobReference(digest("big"), BLOCK_BYTES_MAX + 1)
    many = tuple(DatasetBlock(blob("b"), 1, inline=False) for _ in range(JOB_BLOCKS_MAX + 1))
    cases: list[tuple[c.SubmitMapJob, Reason, str]] = [
        (replace(good, bundle_digest=digest("none")), Reason.BUNDLE_UNKNOWN, "bundle_digest"),
        (replace(good, blocks=(), inline_blocks=()), Reason.DATASET_EMPTY, "blocks"),
        (_first_block(good, rows=0), Reason.DATASET_EMPTY, "blocks[0].rows"),
        (_first_block(good, rows=1_000_001), Reason.LIMIT_EXCEEDED, "blocks[0].rows"),
        (_first_block(good, blob=big), Reason.BLOCK_TOO_LARGE, "blocks[0].blob.length_bytes"),
        (_first_block(good, rows=4), Reason.FIELD_INVALID, "blocks[0].rows"),
        (_first_block(good, inline=False), Reason.BLOB_UNKNOWN, "blocks[0]"),
        (replace(good, inline_blocks=good.inline_blocks[:1]), Reason.BLOB_UNKNOWN, "blocks[1]"),
        (_second_block(good, schema_digest=digest("other")), Reason.SCHEMA_MISMATCH, "blocks[1]"),
        (_second_block(good, root=None), Reason.ROW_BLOCK_MALFORMED, "blocks[1]"),
        (_second_block(good, size_feature_sums=(1,)), Reason.SCHEMA_MISMATCH, "blocks[1]"),
        (replace(good, blocks=many), Reason.LIMIT_EXCEEDED, "blocks"),
        (replace(good, kept=blob("kept")), Reason.BLOB_UNKNOWN, "kept"),
        (replace(good, title="x" * 201), Reason.LIMIT_EXCEEDED, "title"),
        (replace(good, pool_id="pool-none"), Reason.POOL_UNKNOWN, "pool_id"),  # type: ignore[arg-type]
        (replace(good, account_id="account-none"), Reason.ACCOUNT_UNKNOWN, "account_id"),  # type: ignore[arg-type]
        (replace(good, idempotency_key=b"short"), Reason.FIELD_INVALID, "idempotency_key"),
        (replace(good, options=JobOptions(failed_rows_max=-1)), Reason.FIELD_INVALID, "options.failed_rows_max"),
        (replace(good, options=JobOptions(region="far away")), Reason.FIELD_INVALID, "options.region"),
        (replace(good, options=JobOptions(region="x" * 33)), Reason.FIELD_INVALID, "options.region"),
        (replace(good, options=JobOptions(device_kind="quantum")), Reason.FIELD_INVALID, "options.device_kind"),
        (replace(good, options=JobOptions(priority=10)), Reason.FIELD_INVALID, "options.priority"),
        (replace(good, options=JobOptions(priority=-1)), Reason.FIELD_INVALID, "options.priority"),
        (replace(good, options=JobOptions(memory_bytes_min=1 << 60)), Reason.FIELD_INVALID, "options.memory_bytes_min"),
        (replace(good, options=JobOptions(deadline_ms=world.now_ms)), Reason.FIELD_INVALID, "options.deadline"),
        (replace(good, options=JobOptions(deadline_ms=1 << 62)), Reason.FIELD_INVALID, "options.deadline"),
        (
            replace(good, options=JobOptions(limit_microcredits_per_unit=-1)),
            Reason.FIELD_INVALID,
            "options.limit_microcredits_per_unit",
        ),
        (
            replace(good, options=JobOptions(budget_microcredits=1 << 63)),
            Reason.FIELD_INVALID,
            "options.budget_microcredits",
        ),
        (replace(good, options=JobOptions(assurance="certain")), Reason.FIELD_INVALID, "options.assurance"),
    ]
    for command, reason, field in cases:
        error = refused(world, command)
        assert (error.reason, error.field) == (reason, field)
        assert error.message


def test_inline_blocks_are_small_together() -> None:
    world = World().start().ready_bundle()
    blocks = tuple(DatasetBlock(blob(n, length_bytes=40_000), 1, inline=True) for n in range(2))
    facts = tuple(c.StoredBlob(b.blob, 1, digest("root"), INPUT_SCHEMA) for b in blocks)
    error = refused(world, replace(world.submission(2), blocks=blocks, inline_blocks=facts))
    assert (error.reason, error.limit) == (Reason.LIMIT_EXCEEDED, "65536 bytes")


def test_another_accounts_blob_is_unknown() -> None:
    world = World().start().ready_bundle()
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    theirs = c.StoredBlob(blob("theirs"), rows=3, root=digest("root"), schema_digest=INPUT_SCHEMA)
    world.record(theirs, other.account_id)
    command = replace(world.submission(3), blocks=(DatasetBlock(theirs.blob, 3, inline=False),), inline_blocks=())
    assert refused(world, command).reason is Reason.BLOB_UNKNOWN


def test_the_same_key_gives_the_same_job_for_a_day_and_no_other_request() -> None:
    world = World().start().ready_bundle()
    command = world.submission(10)
    first = world.ask(command)
    assert isinstance(first, JobAccepted) and not first.repeated
    world.now_ms += IDEMPOTENCY_MS - 1
    turn = world.take(command)
    assert turn.answer == JobAccepted(first.job_id, repeated=True) and turn.events == ()
    error = refused(world, replace(command, request_digest=digest("other request")))
    assert error.reason is Reason.IDEMPOTENCY_CONFLICT and first.job_id in error.message
    world.now_ms += 1
    later = world.ask(command)
    assert isinstance(later, JobAccepted) and later.job_id != first.job_id and not later.repeated


def test_a_waiting_job_says_why() -> None:
    world = World().start()
    world.register()
    job_id = world.submit(100)
    assert world.status(job_id).reason_code == "NO_OPERATOR_WORKER"
    inspector = world.inspector()
    assert world.status(job_id).reason_code == "INSPECTING"
    world.inspect()
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.QUEUED, "NO_WORKER")
    assert "public" in status.reason and "default" in status.reason
    assert world.leases_of(inspector) == [], "an inspector that takes no maps gets none"
    world.volunteer("v", window=1)
    assert world.status(job_id).reason_code == "PACKING"
    world.pack_all()
    assert world.status(job_id).reason == ""
    second = world.submit(100, key="second")
    assert world.status(second).reason_code == "BUSY"


@pytest.mark.parametrize("data_class", [DataClass.INTERNAL, DataClass.SENSITIVE])
def test_rows_that_are_not_public_never_go_to_volunteers(data_class: DataClass) -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(10, data_class=data_class)
    world.pack_all()
    assert world.state.leases == {}
    assert world.status(job_id).reason_code == "NO_WORKER"
    worker_id = next(w for w, worker in world.state.workers.items() if worker.tier.value == "operator")
    world.connect(worker_id, able=replace(world.state.workers[worker_id].capability, task_kinds=frozenset(TaskKind)))
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED


# -------------------------------------------------------------------------------------------------- cancelling, packing


def test_cancelling_revokes_leases_and_drops_tasks() -> None:
    world = World().start().ready_bundle()
    worker_id = world.volunteer("v")
    job_id = world.submit(100)
    world.pack_all()
    leases = [lease.lease_id for lease in world.leases_of(worker_id)]
    turn = world.take(c.CancelJob(world.account_id, job_id))
    assert [effect.lease_id for effect in of_kind(turn.effects, f.SendRevoked)] == leases
    assert world.state.tasks == {} and world.state.leases == {}
    assert world.status(job_id).state is JobState.CANCELLED
    assert world.take(c.CancelJob(world.account_id, job_id)).events == ()


def test_nobody_cancels_anothers_job_nor_one_that_is_done() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(10)
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    assert refused(world, c.CancelJob(other.account_id, job_id)).reason is Reason.JOB_UNKNOWN
    world.work_off()
    assert refused(world, c.CancelJob(world.account_id, job_id)).reason is Reason.JOB_FINISHED


def test_an_answer_to_an_old_packing_changes_nothing() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    world.submit(4)
    (task_id,) = packing_of(world)
    world.now_ms += PACK_PATIENCE_MS
    turn = world.take(c.Tick())
    assert turn.events == (e.PackRequested(task_id=task_id, pack_number=2),)
    assert world.pack(task_id, pack_number=1).events == ()
    assert world.take(c.PackFailed(task_id, 1, "late", retryable=False)).events == ()
    assert [type(event) for event in world.pack(task_id).events][:2] == [e.TaskInputPacked, e.LeaseGranted]


def test_a_packing_that_fails_for_now_is_asked_for_again_after_a_while_but_not_for_ever() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(4)
    (task_id,) = packing_of(world)
    task = world.state.tasks[task_id]
    for failures in range(1, PACK_ATTEMPTS_MAX):
        world.take(c.PackFailed(task.task_id, task.pack_number, "blob service away", retryable=True))
        assert packing_of(world) == [] and task.pack_failures == failures
        world.pass_time(10_000)
        assert packing_of(world) == [task_id]
    world.take(c.PackFailed(task.task_id, task.pack_number, "blob service away", retryable=True))
    assert world.status(job_id).state is JobState.FAILED


def test_a_source_that_is_gone_ends_the_job_with_that_reason() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(4)
    (task_id,) = packing_of(world)
    world.take(c.PackFailed(task_id, 1, "blob 12ab is gone", retryable=False))
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.FAILED, "BLOB_UNKNOWN")
    assert "blob 12ab is gone" in status.reason


def test_a_pack_plan_names_each_source_once_and_the_rows_in_order() -> None:
    world = World().start().ready_bundle(per_row=1)
    world.volunteer("v")
    job_id = world.submit(10, blocks=3)
    (task_id,) = packing_of(world)
    plan = row_plans.pack_plan(world.state, task_id)
    assert plan is not None and plan.inline and plan.job_id == job_id
    assert [source.digest for source in plan.sources] == [b.blob.digest for b in world.state.jobs[job_id].blocks]
    assert plan.spans == ((0, 0, 3), (1, 0, 3), (2, 0, 4))


# -------------------------------------------------------------------------------------------------- archiving


def test_a_finished_job_leaves_only_when_the_views_show_its_end() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(10)
    world.work_off()
    end = world.state.finished[job_id]
    output = world.state.jobs[job_id].results[0].output
    assert output is not None
    assert world.take(c.ArchiveJobs(end - 1)).events == ()
    assert world.take(c.ArchiveJobs(end)).events == (e.JobArchived(job_id),)
    assert questions.job_status(world.state, job_id) is None
    assert not questions.may_read_blob(world.state, world.account_id, output.digest)
    assert world.ask(world.submission(10)) == JobAccepted(job_id, repeated=True), "its key is remembered"


def test_payloads_of_unfinished_work_are_live_and_others_are_not() -> None:
    world = World().start().ready_bundle()
    world.volunteer("v")
    job_id = world.submit(10)
    world.pack_all()
    inputs = {task.input.digest for task in world.state.tasks.values() if task.input is not None}
    live = questions.live_payloads(world.state)
    assert world.bundle_digest in live
    assert {block.blob.digest for block in world.state.jobs[job_id].blocks} <= live
    assert inputs and inputs <= live
    world.work_off()
    world.take(c.ArchiveJobs(world.state.sequence))
    assert questions.live_payloads(world.state) == frozenset({world.bundle_digest})


def test_a_client_of_another_pool_submits_to_its_own() -> None:
    world = World().start().ready_bundle()
    made = world.ask(c.CreatePool("lab", world.account_id))
    token = world.token(Role.CLIENT, account_id=world.account_id, pool_id=made.pool_id)  # type: ignore[union-attr]
    client = world.enroll("lab client", token)
    job_id = world.submit(10, party_id=client.party_id)
    assert world.state.jobs[job_id].pool_id == made.pool_id  # type: ignore[union-attr]
    world.volunteer("of the default pool")
    assert packing_of(world) == []
    assert world.status(job_id).reason_code == "NO_WORKER"
    assert "lab" in world.status(job_id).reason


def test_too_many_unfinished_jobs_of_one_account_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fallow_coordinator.core import jobs

    monkeypatch.setattr(jobs, "JOBS_UNFINISHED_PER_ACCOUNT_MAX", 2)
    world = World().start().ready_bundle()
    world.submit(1, key="a")
    world.submit(1, key="b")
    error = refused(world, world.submission(1, key="c"))
    assert (error.reason, error.limit) == (Reason.OVERLOADED, "2 unfinished jobs")
