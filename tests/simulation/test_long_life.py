"""What is over leaves the state: twice the work leaves no more behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallow_coordinator.core import evolve_jobs, evolve_tasks
from simulation import long_writer
from simulation.long_life import begun, entries, one_job


def test_state_does_not_grow_with_what_was_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it may count settled tasks but what has a limit: leases remembered, keys of a day."""
    monkeypatch.setattr(evolve_tasks, "LEASES_REMEMBERED_MAX", 50)
    monkeypatch.setattr(evolve_jobs, "IDEMPOTENCY_MS", 1_000)
    world = begun(workers=5)
    settled = [sum(one_job(world, number, rows=100) for number in range(10))]
    once = entries(world.state)
    settled.append(sum(one_job(world, number, rows=100) for number in range(10, 40)))
    assert 10 * settled[0] >= settled[1] >= 2 * settled[0] >= 200
    assert entries(world.state) == once


async def test_writer_lets_go_of_each_job_that_is_done(tmp_path: Path) -> None:
    """What `long_writer` measures is a real life: every row is settled, and nothing of a job stays in the state."""
    world, workers = await long_writer.begun(tmp_path, workers=3)
    tasks = [await long_writer.one_job(world, workers, number, rows=40) for number in range(3)]
    state = world.engine.state
    assert all(tasks) and sum(worker.tasks_settled for worker in state.workers.values()) == sum(tasks) + 1
    assert not state.jobs and not state.tasks and not state.leases
    assert not state.accounts[world.operator_account_id].outputs
    await world.engine.stop()
