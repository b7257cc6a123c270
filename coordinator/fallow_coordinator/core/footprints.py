"""What is believed of a worker's energy, and what it emitted: decided once, recorded as integers."""

from __future__ import annotations

import math

from fallow.job import Footprint
from fallow.session import EnergySource, Usage
from fallow_coordinator.core.carbon import grams_at, micrograms
from fallow_coordinator.core.limits import NODES_BELIEVED_MAX, SECOND_MS, WATTS_PER_NODE_MAX
from fallow_coordinator.core.state import Lease, State


def believed_energy(state: State, lease: Lease, usage: Usage, now_ms: int) -> tuple[int, bool]:
    """(millijoules, whether sensors counted them) of a lease.

    What is no quantity counts for nothing. Nobody spends more than `WATTS_PER_NODE_MAX` on each of its machines since
    the lease was granted, by our clock: what is beyond that is cut off, and then nothing of it counts as measured.
    """
    joules = usage.energy_joules
    if not math.isfinite(joules) or joules <= 0 or usage.energy_source is None:
        return 0, False
    nodes = min(max(1, state.workers[lease.worker_id].capability.nodes), NODES_BELIEVED_MAX)
    # Watts times milliseconds are millijoules; a second more, because clocks tick.
    bound = nodes * WATTS_PER_NODE_MAX * (max(0, now_ms - lease.granted_at_ms) + SECOND_MS)
    if joules * 1_000 > bound:
        return bound, False
    return int(joules * 1_000), usage.energy_source is EnergySource.MEASURED


def footprint_of(state: State, lease: Lease, millijoules: int, *, measured: bool, now_ms: int) -> Footprint:
    """The footprint of a task that settles now: its energy by the electricity of its worker's region in this hour.

    NOTE: a lease that ran over several hours counts by the last of them; hours would need its energy hour by hour.
    """
    if not millijoules:
        return Footprint()
    grams = grams_at(state.forecasts, state.workers[lease.worker_id].capability.region, now_ms)
    return Footprint(
        millijoules=millijoules,
        millijoules_measured=millijoules if measured else 0,
        micrograms=micrograms(millijoules, grams) if grams is not None else 0,
        millijoules_unplaced=millijoules if grams is None else 0,
    )
