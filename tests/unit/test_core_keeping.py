"""What is kept and for how long: retention, deletion, forgetting of blobs, and what an account may upload."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, JobId
from fallow.job import DatasetBlock, JobOptions, JobState
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import questions
from fallow_coordinator.core.answers import JobAccepted
from fallow_coordinator.core.limits import (
    BLOB_BYTES_PER_ACCOUNT_DEFAULT,
    RETENTION_MS_DEFAULT,
    UPLOAD_GRACE_MS,
)
from fallow_coordinator.core.references import referenced_blobs
from simulation.core_world import INPUT_SCHEMA, World, blob, digest, of_kind

ROWS = 10


def uploaded(world: World, name: str) -> c.StoredBlob:
    stored = c.StoredBlob(blob(name), rows=ROWS, root=digest("root", name), schema_digest=INPUT_SCHEMA)
    world.record(stored)
    return stored


def job_over(world: World, stored: c.StoredBlob, key: str = "job") -> JobId:
    """A job of one uploaded block."""
    block = DatasetBlock(stored.blob, ROWS, inline=False)
    answer = world.ask(replace(world.submission(ROWS, key=key), blocks=(block,), inline_blocks=()))
    assert isinstance(answer, JobAccepted)
    return answer.job_id


def forgotten(world: World, *digests: Digest, view_sequence: int | None = None) -> set[Digest]:
    """What the core lets go of these, when the views refer to none."""
    sequence = world.state.sequence if view_sequence is None else view_sequence
    turn = world.take(c.ForgetBlobs(digests, sequence))
    return {one for event in turn.events if isinstance(event, e.BlobsForgotten) for one in event.digests}


def finished(world: World) -> None:
    world.volunteer("v")
    world.work_off()


def test_retention_is_written_into_the_job_and_has_bounds() -> None:
    world = World().start().ready_bundle()
    assert world.state.jobs[world.submit(5)].options.retention_ms == RETENTION_MS_DEFAULT
    hour = world.submit(5, key="hour", options=JobOptions(retention_ms=3_600_000))
    assert world.state.jobs[hour].options.retention_ms == 3_600_000
    with pytest.raises(FallowError) as caught:
        world.submit(5, key="ever", options=JobOptions(retention_ms=10**12))
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "options.retention")


def test_a_finished_job_is_deleted_by_its_own_account_and_keeps_a_tombstone() -> None:
    world = World().start().ready_bundle()
    job_id = world.submit(5)
    for account_id, reason in ((world.account_id, Reason.JOB_UNFINISHED), (AccountId("a"), Reason.JOB_UNKNOWN)):
        with pytest.raises(FallowError) as caught:
            world.take(c.DeleteJob(account_id, job_id, archived=False))
        assert caught.value.reason is reason
    finished(world)
    output = world.state.jobs[job_id].results[0].output
    assert output is not None and questions.may_read_blob(world.state, world.account_id, output.digest)
    turn = world.take(c.DeleteJob(world.account_id, job_id, archived=False))
    assert [type(event) for event in turn.events] == [e.JobDeleted]
    assert of_kind(turn.effects, f.WakeWatchers) == [f.WakeWatchers(job_id)]
    status = world.status(job_id)
    assert (status.state, status.results, status.kept) == (JobState.SUCCEEDED, 0, None)
    assert (status.deleted_at_ms, status.reason_code) == (world.now_ms, "JOB_DELETED")
    assert not questions.may_read_blob(world.state, world.account_id, output.digest)
    assert questions.results_after(world.state, job_id, 0, 10) == ()
    assert world.take(c.DeleteJob(world.account_id, job_id, archived=False)).events == (), "once is enough"
    world.take(c.ArchiveJobs(world.state.sequence))
    assert world.replayed() == world.state


def test_an_archived_job_is_deleted_on_the_word_of_the_views() -> None:
    world = World().start().ready_bundle()
    job_id = world.submit(5)
    finished(world)
    world.take(c.ArchiveJobs(world.state.sequence))
    with pytest.raises(FallowError):
        world.take(c.DeleteJob(world.account_id, job_id, archived=False))
    turn = world.take(c.DeleteJob(world.account_id, job_id, archived=True))
    assert turn.events == (e.JobDeleted(job_id, world.account_id, "deleted by its owner"),)
    (event,) = world.take(c.ExpireJobs(((world.account_id, job_id),))).events
    assert isinstance(event, e.JobDeleted) and event.reason == "its retention is over"


def test_a_dataset_is_kept_while_its_job_is_and_forgotten_after_its_grace() -> None:
    world = World().start().ready_bundle()
    stored = uploaded(world, "dataset")
    job_id = job_over(world, stored)
    world.now_ms += UPLOAD_GRACE_MS
    assert forgotten(world, stored.blob.digest) == set(), "an unfinished job needs it"
    world.take(c.CancelJob(world.account_id, job_id))
    assert forgotten(world, stored.blob.digest) == set(), "a retained job refers to it"
    world.take(c.DeleteJob(world.account_id, job_id, archived=False))
    assert questions.has_blobs(world.state, world.account_id, [stored.blob.digest]) == (True,)
    before = world.state.accounts[world.account_id].blob_bytes
    assert forgotten(world, stored.blob.digest, digest("orphan")) == {stored.blob.digest, digest("orphan")}
    assert questions.has_blobs(world.state, world.account_id, [stored.blob.digest]) == (False,), "lack from now on"
    assert world.state.accounts[world.account_id].blob_bytes == before - stored.blob.length_bytes
    with pytest.raises(FallowError) as caught:
        job_over(world, stored, key="again")
    assert caught.value.reason is Reason.BLOB_UNKNOWN
    assert world.replayed() == world.state


def test_files_of_bundles_and_young_uploads_are_never_forgotten() -> None:
    world = World().start().ready_bundle()
    young = uploaded(world, "young")
    assert forgotten(world, blob("model.onnx").digest, young.blob.digest) == set()
    world.now_ms += 10 * UPLOAD_GRACE_MS
    assert forgotten(world, blob("model.onnx").digest, young.blob.digest) == {young.blob.digest}


def test_whoever_is_told_that_a_blob_is_there_can_rely_on_it() -> None:
    world = World().start().ready_bundle()
    stored = uploaded(world, "dataset")
    world.now_ms += UPLOAD_GRACE_MS - 1
    turn = world.take(c.ClaimBlobs(world.account_id, (stored.blob.digest, digest("unknown"))))
    assert [type(event) for event in turn.events] == [e.BlobRecorded]
    world.now_ms += UPLOAD_GRACE_MS // 2
    assert forgotten(world, stored.blob.digest) == set()
    assert world.take(c.ClaimBlobs(world.account_id, (stored.blob.digest,))).events, "half is gone: claimed again"
    assert not world.take(c.ClaimBlobs(world.account_id, (stored.blob.digest,))).events


def test_views_that_do_not_know_an_archived_job_are_not_believed() -> None:
    world = World().start().ready_bundle()
    job_id = world.submit(5)
    finished(world)
    ended = world.state.finished[job_id]
    world.take(c.ArchiveJobs(world.state.sequence))
    assert forgotten(world, digest("orphan"), view_sequence=ended - 1) == set()
    assert forgotten(world, digest("orphan"), view_sequence=ended) == {digest("orphan")}


def test_inputs_go_with_their_lease_and_are_kept_as_long_as_it_lives() -> None:
    world = World().start().ready_bundle()
    worker = world.volunteer("v")
    job_over(world, uploaded(world, "dataset"))
    (task_id,) = [task_id for lane in world.state.lanes.values() for task_id in lane.packing]
    packed = blob("packed")
    world.pack(task_id, input=packed, inline=False)
    (lease,) = world.leases_of(worker)
    world.now_ms += 1
    assert forgotten(world, packed.digest) == set()
    turn = world.take(world.commit_command(lease))
    assert of_kind(turn.effects, f.DropInput) == [f.DropInput(packed.digest)]
    assert forgotten(world, packed.digest) == {packed.digest}


def test_an_account_records_no_more_bytes_than_its_quota() -> None:
    world = World().start()
    world.take(c.SetBlobQuota(world.account_id, 2_500))
    uploaded(world, "one")
    uploaded(world, "two")
    with pytest.raises(FallowError) as caught:
        uploaded(world, "three")
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    assert "2000 of 2500 bytes" in caught.value.message and caught.value.limit.startswith("2500 bytes")
    uploaded(world, "one")
    world.take(c.SetBlobQuota(world.account_id, 0))
    uploaded(world, "three")
    assert BLOB_BYTES_PER_ACCOUNT_DEFAULT > 3_000
    assert world.replayed() == world.state


STEPS = st.lists(
    st.sampled_from(["upload", "submit", "work", "cancel", "delete", "archive", "time", "claim", "forget"]),
    min_size=5,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.randoms(use_true_random=False))
def test_nothing_that_is_referred_to_is_ever_forgotten_and_nothing_stays_for_ever(
    steps: list[str], chance: random.Random
) -> None:
    pick = chance.choice
    world = World().start().ready_bundle()
    world.volunteer("v")
    there: dict[Digest, c.StoredBlob] = {}
    needed_by: dict[JobId, Digest] = {}
    for number, step in enumerate(steps):
        jobs = [job for job in world.state.jobs.values() if job.job_id in needed_by]
        if step == "upload":
            stored = uploaded(world, f"blob {pick(range(4))}")
            there[stored.blob.digest] = stored
        elif step == "submit" and there:
            stored = there[pick(sorted(there))]
            needed_by[job_over(world, stored, key=f"job {number}")] = stored.blob.digest
        elif step == "work":
            world.work_off()
        elif step == "cancel" and jobs:
            job = pick(jobs)
            if job.job_id not in world.state.finished:
                world.take(c.CancelJob(world.account_id, job.job_id))
        elif step == "delete" and needed_by:
            job_id = pick(sorted(needed_by))
            if job_id not in world.state.jobs or job_id in world.state.finished:
                world.take(c.DeleteJob(world.account_id, job_id, archived=job_id not in world.state.jobs))
                del needed_by[job_id]
        elif step == "archive":
            world.take(c.ArchiveJobs(world.state.sequence))
        elif step == "time":
            world.pass_time(UPLOAD_GRACE_MS // 3)
        elif step == "claim" and there:
            world.take(c.ClaimBlobs(world.account_id, tuple(there)))
        elif step == "forget" and there:
            _forget_as_the_collector_does(world, there, needed_by)
        assert set(needed_by.values()) <= there.keys(), "a job's dataset is there"
        owned = world.state.accounts[world.account_id].blobs
        assert there.keys() == {one for one in owned if one != blob("model.onnx").digest}, "have says what is there"
    world.now_ms += 2 * UPLOAD_GRACE_MS
    _forget_as_the_collector_does(world, there, needed_by)
    assert there.keys() == set(needed_by.values()), "what nobody needs is gone in the end"


def _forget_as_the_collector_does(
    world: World, there: dict[Digest, c.StoredBlob], needed_by: dict[JobId, Digest]
) -> None:
    # The views know every job that is not deleted, whether or not it has left the state.
    candidates = [one for one in there if one not in needed_by.values()]
    if not candidates:
        return
    kept = referenced_blobs(world.state, frozenset(candidates), now_ms=world.now_ms, grace_ms=UPLOAD_GRACE_MS)
    gone = forgotten(world, *candidates)
    assert gone == set(candidates) - kept
    for one in gone:
        del there[one]
