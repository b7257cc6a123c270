"""What the time that a lease took says: about its worker's speed, and about the work that it was."""

from __future__ import annotations

from dataclasses import dataclass

from fallow_coordinator.core.learning import reference_unit_micros
from fallow_coordinator.core.speeds import believed_us, speed_after
from fallow_coordinator.core.state import Lease, State, Task


@dataclass(frozen=True, slots=True)
class Timing:
    """Two conclusions from one time."""

    speed_milliunits_per_s: int = 0
    """The worker's speed with the bundle from here on; 0: unchanged."""
    worked_unit_micros: int = 0
    """What the task was, by its device's measured speed; 0: nothing can be said."""


NO_TIMING = Timing()


def timing(state: State, task: Task, lease: Lease, *, wall_us: int, now_ms: int) -> Timing:
    """What a lease says that settles now, by its worker's word and the coordinator's clock."""
    worker = state.workers[lease.worker_id]
    took_us = believed_us(worker, lease, wall_us=wall_us, now_ms=now_ms)
    return Timing(
        speed_after(worker, task, lease, wall_us=wall_us, now_ms=now_ms), reference_unit_micros(worker, task, took_us)
    )
