"""What is over leaves the state: twice the work leaves no more behind."""

from __future__ import annotations

import pytest

from fallow_coordinator.core import evolve_jobs, evolve_tasks
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
