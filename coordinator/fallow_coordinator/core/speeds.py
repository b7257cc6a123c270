"""How fast workers are, from work that was accepted: units of work for each second of one slot, in thousandths."""

from __future__ import annotations

from fallow.ids import Digest
from fallow_coordinator.core.limits import SPEED_MILLIUNITS_PER_S_MAX, UNIT_MICROS
from fallow_coordinator.core.state import Lease, State, Task, Worker

_REFERENCE = 1_000
"""A reference core: one unit a second."""


def speed_after(worker: Worker, task: Task, lease: Lease, *, wall_us: int, now_ms: int) -> int:
    """The worker's speed with the task's bundle once this lease has settled; 0: nothing can be said.

    The worker's own word for the time counts as far as the coordinator's clock allows: no more than has passed since
    the grant and, with one slot, no less than half of what passed since the task before. Smoothed by quarters.
    """
    elapsed_us = (now_ms - lease.granted_at_ms) * 1_000
    least_us = 0
    if worker.slots == 1:
        least_us = (now_ms - max(lease.granted_at_ms, worker.settled_at_ms)) * 1_000 // 2
    took_us = min(max(wall_us, least_us), elapsed_us)
    if took_us <= 0 or not task.unit_micros or task.job_id is None:
        return 0
    speed = max(1, min(SPEED_MILLIUNITS_PER_S_MAX, task.unit_micros * 1_000 // took_us))
    known = worker.speeds.get(task.bundle_digest, 0)
    return (3 * known + speed) // 4 if known else speed


def expected_ms(state: State, worker: Worker, bundle_digest: Digest, unit_micros: int) -> int:
    """How long one slot of the worker should take for so much work with a bundle.

    By its speed with this bundle, else by its speed at large, else by that of others with the bundle, else as long as
    a reference core.
    """
    speed = worker.speeds.get(bundle_digest) or worker.speed_milliunits_per_s
    if not speed:
        holders = state.bundles[bundle_digest].holders
        known = sorted(v for v in (state.workers[h].speeds.get(bundle_digest, 0) for h in holders) if v)
        speed = known[len(known) // 2] if known else _REFERENCE
    return unit_micros * 1_000_000 // (UNIT_MICROS * speed)
