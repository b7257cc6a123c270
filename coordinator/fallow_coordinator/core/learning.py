"""What accepted work teaches about the cost of a bundle: for the quotes and jobs to come, never for one that runs.

A lease on a measured device tells how much work it was: time on a slot times the slot's measured speed. Against what
inspection had estimated, summed over `LEARNED_SETTLEMENTS` tasks, that gives a correction; a quarter of the way to it
is taken at a time.
"""

from __future__ import annotations

from fallow_coordinator.core.devices import measured, speed_measured
from fallow_coordinator.core.events import BundleCostLearned
from fallow_coordinator.core.limits import (
    COST_PERMILLE_MAX,
    COST_PERMILLE_MIN,
    LEARNED_SETTLEMENTS,
    TASK_UNIT_MICROS_MAX,
)
from fallow_coordinator.core.state import Bundle, Job, Task, Worker

NOTHING_LEARNED = 1_000


def reference_unit_micros(worker: Worker, task: Task, took_us: int) -> int:
    """The work that the task was, by the time that it took on a measured device; 0: nothing can be said.

    No more than eight times what was estimated, and no less than an eighth: a claim beyond that is not believed.
    """
    if took_us <= 0 or task.job_id is None or not measured(worker):
        return 0
    worked = took_us * speed_measured(worker) // worker.slots // 1_000
    return max(1, task.unit_micros // 8, min(worked, 8 * task.unit_micros, TASK_UNIT_MICROS_MAX))


def inspected_unit_micros(job: Job, task: Task) -> int:
    """What inspection had estimated for the task, without what was learned before the job began."""
    return max(1, task.unit_micros * NOTHING_LEARNED // job.cost_permille)


def learned(bundle: Bundle, *, inspected: int, worked: int) -> BundleCostLearned | None:
    """The correction once this task is counted too, or None while there are too few."""
    if not worked or bundle.learning_tasks + 1 < LEARNED_SETTLEMENTS:
        return None
    found = (bundle.learning_worked + worked) * NOTHING_LEARNED // (bundle.learning_inspected + inspected)
    found = min(COST_PERMILLE_MAX, max(COST_PERMILLE_MIN, found))
    return BundleCostLearned(bundle.bundle_digest, (3 * bundle.cost_permille + found) // 4)
