"""Verifying jobs under faults: every job ends well, no honest worker is ever called a liar, replay gives the same."""

from __future__ import annotations

import random

import pytest

from fallow.ids import JobId
from fallow.roles import Tier
from fallow.session import Cause, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import State
from fallow_coordinator.store.encoding import decode_event, encode_event
from simulation.verification import Zoo, after, at_times, colluding, honest, junk, withholding

FAST_SEEDS = 4


def life(seed: int) -> tuple[Zoo, list[JobId]]:
    """A fleet of honest workers and liars, some jobs, and 400 steps during which things go wrong."""
    zoo = Zoo(seed)
    rng = random.Random(seed + 1)
    zoo.begin(slot_dependent=seed % 7 == 0)
    zoo.operator_worker(TaskKind.REFEREE)
    for _ in range(rng.randint(2, 4)):
        zoo.volunteer(execution_class=rng.choice(("cpu", "cpu", "gpu")))
    for _ in range(rng.randint(0, 3)):
        zoo.volunteer(rng.choice((junk, colluding, withholding, at_times(junk, 0.2, rng), after(30, junk))))
    if seed % 3 == 0:
        zoo.volunteer(tier=Tier.MANAGED)
    jobs = [
        zoo.submit(rng.randint(3, 120), rng.choice(("basic", "standard", "strict", "")), blocks=rng.randint(1, 3))
        for _ in range(rng.randint(1, 3))
    ]
    for _ in range(400):
        zoo.go_on()
        disturb(zoo, rng)
    reconnect_all(zoo)
    zoo.run()
    return zoo, jobs


def disturb(zoo: Zoo, rng: random.Random) -> None:
    """Now and then somebody goes, comes back, fails, or the coordinator restarts."""
    fate = rng.random()
    there = [one for one in zoo.actors.values() if zoo.state.workers[one.worker_id].session_id is not None]
    if fate < 0.01 and there:
        zoo.disconnect(rng.choice(there))
    elif fate < 0.02:
        reconnect_all(zoo)
    elif fate < 0.03:
        zoo.pass_ms(rng.choice((100, 5_000, 60_000)))
    elif fate < 0.035:
        for actor in there:
            for lease in zoo.leases_of(actor)[:1]:
                failed = c.FailTask(
                    actor.session_id, actor.worker_id, lease.lease_id, lease.fence, Cause.WORKER, "it broke"
                )
                zoo.tell(failed)
    elif fate < 0.038:
        zoo.pending.clear()
        zoo.tell(c.Restart(zoo.state.epoch + 1, 1_000))
        reconnect_all(zoo)


def reconnect_all(zoo: Zoo) -> None:
    for actor in zoo.actors.values():
        worker = zoo.state.workers[actor.worker_id]
        if worker.session_id is None:
            zoo.reconnect(actor, worker.capability.task_kinds)


def check(seed: int) -> None:
    zoo, jobs = life(seed)
    assert all(zoo.succeeded(job_id) for job_id in jobs), [zoo.state.jobs[job_id].state for job_id in jobs]
    innocent = {actor.worker_id for actor in zoo.actors.values() if actor.behaviour is honest}
    assert not innocent & zoo.distrusted()
    released = {event.lease_id for event in zoo.of_kind(v.EvidenceReleased)}
    withdrawn = {event.lease_id for event in zoo.of_kind(v.RowsCorrected) if event.verdict is v.Verdict.PROVEN_WRONG}
    assert not released & withdrawn
    state = State()
    for at_ms, event in zoo.events:
        evolve(state, decode_event(encode_event(event)), at_ms)
    assert state == zoo.state


@pytest.mark.parametrize("seed", range(FAST_SEEDS))
def test_verifying_jobs_end_well_under_faults(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 400, 20))
def test_verifying_jobs_end_well_under_faults_for_many_seeds(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)
