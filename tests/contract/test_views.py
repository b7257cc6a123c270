"""What every Views promises: jobs and results as their events left them, also when they have left the state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fallow.ids import AccountId, Digest, JobId, digest_of
from fallow.job import JobState
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.questions import job_status, results_after
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import Views
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.views import SqliteViews
from journal_world import World, WorldWorker

ROWS = [f"row {number}".encode() for number in range(40)]


@dataclass(slots=True)
class Watched:
    """A world, and views of it that can be brought up to date."""

    world: World
    worker: WorldWorker
    views: Views
    update: Callable[[], int]


@pytest.fixture(params=["sqlite"])
async def watched(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Watched]:
    assert request.param == "sqlite"
    store = SqliteStore(tmp_path)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    worker = await world.volunteer()
    views = SqliteViews(tmp_path)
    follower = Follower(tmp_path)
    yield Watched(world, worker, views, follower.catch_up)
    follower.close()
    views.close()
    await world.engine.stop()
    store.close()


@pytest.fixture
def unbegun(tmp_path: Path) -> Iterator[Views]:
    views = SqliteViews(tmp_path)
    yield views
    views.close()


def test_views_that_nobody_wrote_yet_are_empty(unbegun: Views) -> None:
    assert unbegun.view_sequence() == 0
    assert unbegun.job_status(JobId("job")) is None
    assert list(unbegun.jobs(AccountId("account"), before=None, limit=10)) == []
    assert list(unbegun.results(JobId("job"), after_cursor=0, limit=10)) == []


async def test_views_stand_at_the_last_record_once_up_to_date(watched: Watched) -> None:
    watched.update()
    assert watched.views.view_sequence() == watched.world.engine.state.sequence
    await watched.world.submit_job(ROWS)
    assert watched.views.view_sequence() < watched.world.engine.state.sequence
    watched.update()
    assert watched.views.view_sequence() == watched.world.engine.state.sequence


async def test_finished_job_is_told_as_the_core_told_it(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS, title="all of them")
    await world.work_until_idle(watched.worker)
    watched.update()
    told = watched.views.job_status(job_id)
    expected = job_status(world.engine.state, job_id)
    assert told is not None and expected is not None
    assert told.progress.workers == 1, "who delivered"
    assert told.state is JobState.SUCCEEDED
    for name in (
        "job_id",
        "account_id",
        "state",
        "reason",
        "title",
        "policy",
        "submitted_at_ms",
        "finished_at_ms",
        "results",
    ):
        assert getattr(told, name) == getattr(expected, name), name
    assert told.progress.rows_done == len(ROWS)


async def test_results_of_an_archived_job_are_the_results_of_the_core(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS, failed_rows_max=5)
    lease = world.leases_of(watched.worker)[0]
    await world.commit(watched.worker, lease, fail_rows=[0])
    await world.work_until_idle(watched.worker)
    expected = list(results_after(world.engine.state, job_id, 0, 1_000))
    assert len(expected) > 1 and any(result.failures for result in expected)
    watched.update()
    await world.tell(c.ArchiveJobs(watched.views.view_sequence()))
    assert job_id not in world.engine.state.jobs
    watched.update()
    assert list(watched.views.results(job_id, after_cursor=0, limit=1_000)) == expected
    status = watched.views.job_status(job_id)
    assert status is not None and status.state is JobState.SUCCEEDED


async def test_output_blocks_are_known_to_their_owner_alone(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS)
    await world.work_until_idle(watched.worker)
    watched.update()
    result = watched.views.results(job_id, after_cursor=0, limit=1)[0]
    assert result.output is not None
    assert watched.views.output(world.operator_account_id, result.output.digest) == result.output
    assert watched.views.output(watched.worker.account_id, result.output.digest) is None
    assert watched.views.output(world.operator_account_id, digest_of(b"another")) is None


async def test_outputs_and_inline_datasets_are_retained_until_their_job_is_deleted(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS)
    await world.work_until_idle(watched.worker)
    world.clock.now_ms += 1_000
    running = await world.submit_job(ROWS)
    await world.commit(watched.worker, world.leases_of(watched.worker)[0])
    watched.update()

    def outputs(of: JobId) -> set[Digest]:
        results = watched.views.results(of, after_cursor=0, limit=1_000)
        return {result.output.digest for result in results if result.output is not None}

    dataset = {block.blob.digest for block in world.engine.state.jobs[running].blocks}
    everything = sorted(outputs(job_id) | outputs(running) | dataset | {digest_of(b"nobody's")})
    assert watched.views.references(everything)[1] == outputs(job_id) | outputs(running) | dataset
    await world.tell(c.DeleteJob(world.operator_account_id, job_id, archived=False))
    watched.update()
    assert watched.views.references(everything)[1] == outputs(running) | dataset


async def test_a_submission_is_told_until_its_job_is_deleted(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS, title="asked for again")
    job = world.engine.state.jobs[job_id]
    await world.work_until_idle(watched.worker)
    watched.update()
    submission = watched.views.submission(job_id)
    assert submission is not None
    assert (submission.blocks, submission.options, submission.title) == (job.blocks, job.options, "asked for again")
    await world.tell(c.DeleteJob(world.operator_account_id, job_id, archived=False))
    watched.update()
    assert watched.views.submission(job_id) is None


async def test_results_page_by_cursor(watched: Watched) -> None:
    job_id = await watched.world.submit_job(ROWS)
    await watched.world.work_until_idle(watched.worker)
    watched.update()
    everything = list(watched.views.results(job_id, after_cursor=0, limit=1_000))
    assert [result.cursor for result in everything] == list(range(1, len(everything) + 1))
    assert list(watched.views.results(job_id, after_cursor=1, limit=2)) == everything[1:3]
    assert list(watched.views.results(job_id, after_cursor=len(everything), limit=2)) == []


async def test_jobs_of_an_account_page_from_the_newest_and_show_no_other_accounts_jobs(watched: Watched) -> None:
    world = watched.world
    job_ids: list[JobId] = []
    for number in range(5):
        world.clock.now_ms += number % 2
        job_ids.append(await world.submit_job(ROWS[: number + 1]))
    watched.update()
    account_id = world.operator_account_id
    everything = list(watched.views.jobs(account_id, before=None, limit=10))
    assert {status.job_id for status in everything} == set(job_ids)
    keys = [(status.submitted_at_ms, status.job_id) for status in everything]
    assert keys == sorted(keys, reverse=True)
    paged = list(watched.views.jobs(account_id, before=None, limit=2))
    while page := list(watched.views.jobs(account_id, before=(paged[-1].submitted_at_ms, paged[-1].job_id), limit=2)):
        paged.extend(page)
    assert paged == everything
    assert list(watched.views.jobs(watched.worker.account_id, before=None, limit=10)) == []


async def test_cancelled_job_is_told_with_its_reason(watched: Watched) -> None:
    world = watched.world
    job_id = await world.submit_job(ROWS)
    await world.tell(c.CancelJob(world.operator_account_id, job_id))
    watched.update()
    told = watched.views.job_status(job_id)
    assert told is not None
    assert (told.state, told.reason_code) == (JobState.CANCELLED, "JOB_CANCELLED")
    assert told.reason
