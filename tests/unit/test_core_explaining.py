"""Why a job waits, and why a worker has no work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.ids import JobId, PartyId
from fallow.job import JobOptions
from fallow.roles import DataClass, Role, Tier
from fallow.session import Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.explaining import explain_job, explain_worker
from simulation.core_world import World, capability


def job_codes(world: World, job_id: JobId) -> tuple[dict[str, int], list[str]]:
    """Counts of who fell out, and what binds."""
    told = explain_job(world.state, job_id, world.now_ms)
    assert told is not None
    fallen = {reason.code: reason.count for reason in told.fallen_out}
    assert told.workers_considered == told.workers_fitting + sum(fallen.values()), "each worker counts once"
    return fallen, [reason.code for reason in told.waits_for]


def worker_codes(world: World, worker_id: PartyId) -> list[str]:
    told = explain_worker(world.state, worker_id, world.now_ms)
    assert told is not None
    return [reason.code for reason in told.reasons]


def test_a_job_tells_who_fell_out_and_why() -> None:
    world = World().start().ready_bundle()
    world.volunteer("cpu")
    far = world.enroll("far").party_id
    world.connect(far, able=replace(capability(), region="us"))
    gone = world.enroll("gone").party_id
    near = replace(capability(), region="de")
    world.connect(gone, able=near)
    session_id = world.state.workers[gone].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "bye"))
    job_id = world.submit(10, options=JobOptions(region="de"))
    fallen, waits = job_codes(world, job_id)
    assert fallen == {"kind": 1, "region": 2, "away": 1}, "the inspector takes no maps"
    assert waits == ["NO_WORKER"]
    told = explain_job(world.state, job_id, world.now_ms)
    assert told is not None and "not connected" in told.waits_for[0].words, "the nearest way out is told"
    world.connect(gone, able=near, next_token="again")
    told = explain_job(world.state, job_id, world.now_ms)
    assert told is not None and (told.workers_fitting, told.workers_free) == (1, 1)
    assert [reason.code for reason in told.waits_for] == ["PACKING"]
    world.pack_all()
    assert job_codes(world, job_id)[1] == []


def test_a_job_tells_its_place_in_the_queue() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    made = world.ask(c.CreateAccount("other"))
    assert isinstance(made, AccountMade)
    world.register(made.account_id)
    worker = world.volunteer("v", window=1)
    world.submit(1_000, key="first")
    second = world.submit(1_000, key="second")
    for _ in range(5):
        world.pack_all()
        world.work(worker)
    world.submit(1_000, key="theirs", account_id=made.account_id)
    world.pack_all()
    told = explain_job(world.state, second, world.now_ms)
    assert told is not None
    assert (told.accounts_before, told.jobs_before) == (1, 1)
    assert [reason.code for reason in told.waits_for] == ["BUSY", "SHARE", "DUE"]
    assert told.usage_units > 0


def test_pending_failed_and_ended_jobs_say_so() -> None:
    world = World().start()
    world.register()
    job_id = world.submit(10, options=JobOptions(failed_rows_max=100))
    assert job_codes(world, job_id) == ({}, ["NO_OPERATOR_WORKER"])
    inspector = world.inspector()
    world.inspect()
    session_id = world.state.workers[inspector].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "bye"))
    worker = world.volunteer("v")
    world.pack_all()
    world.take(world.fail_command(world.leases_of(worker)[0], Cause.PLATFORM, "no memory"))
    assert job_codes(world, job_id)[1] == ["RETRY"]
    world.pass_time(10_000)
    world.pack_all()
    world.work(worker)
    assert job_codes(world, job_id)[1] == ["ENDED"]
    assert explain_job(world.state, JobId("job-none"), world.now_ms) is None


def test_a_worker_tells_why_it_has_nothing_to_do() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    worker = world.volunteer("v", window=1)
    assert worker_codes(world, worker) == ["NO_JOBS"]
    world.submit(10, key="internal", data_class=DataClass.INTERNAL)
    assert worker_codes(world, worker) == ["NO_FIT"]
    told = explain_worker(world.state, worker, world.now_ms)
    assert told is not None and [(r.code, r.count) for r in told.fallen_out] == [("tier", 1)]
    world.submit(3, key="public")
    assert worker_codes(world, worker) == ["COMING"]
    world.pack_all()
    assert worker_codes(world, worker) == ["WORKING"]
    session_id = world.state.workers[worker].session_id
    assert session_id is not None
    world.take(c.DrainSession(session_id))
    assert worker_codes(world, worker) == ["window-closed"]
    world.take(c.CloseSession(session_id, "bye"))
    assert worker_codes(world, worker) == ["away"]
    world.take(c.QuarantineWorker(worker, "odd results"))
    told = explain_worker(world.state, worker, world.now_ms)
    assert told is not None and told.reasons[0].words.endswith("odd results")
    assert explain_worker(world.state, PartyId("worker-none"), world.now_ms) is None


def test_a_resting_worker_tells_how_long() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    worker = world.volunteer("v", window=4)
    world.submit(1_000, options=JobOptions(failed_rows_max=1_000))
    world.pack_all()
    for _ in range(3):
        world.take(world.fail_command(world.leases_of(worker)[0], Cause.WORKER))
    told = explain_worker(world.state, worker, world.now_ms)
    assert told is not None and told.reasons[0].code == "cooling-down"
    assert "3 strikes, 10 seconds left" in told.reasons[0].words
    fallen, _ = job_codes(world, next(iter(world.state.jobs)))
    assert fallen["cooling-down"] == 1


@pytest.mark.parametrize("tier", [Tier.VOLUNTEER, Tier.MANAGED, Tier.OPERATOR])
def test_explain_says_the_same_as_matching_does(tier: Tier) -> None:
    """Whoever is counted free gets a task, whoever is not gets none."""
    for data_class in DataClass:
        world = World().start().ready_bundle()
        worker = world.enroll("w", world.token(Role.WORKER, tier)).party_id
        world.connect(worker)
        job_id = world.submit(4, data_class=data_class)
        told = explain_job(world.state, job_id, world.now_ms)
        assert told is not None
        world.pack_all()
        assert len(world.leases_of(worker)) == told.workers_free
