"""A coordinator's core over very many settled tasks, and what of it grows: `python long_life.py --tasks 1000000`.

It is the real core: every task is submitted, packed, leased, committed and settled by a turn of its own, finished jobs
leave the state as the engine lets them leave. What an engine adds (queues, caches, SQLite) has limits of its own.
Prints one JSON object a sample: settled tasks, resident memory, and the number of entries of each part of the state.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fallow.job import JobOptions
from fallow.ranges import RangeSet
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import turn as turns
from fallow_coordinator.core.state import State
from simulation.core_world import World

ROWS_PER_JOB = 400
TASKS_SPACED_MS = 5
"""Of the clock: 200 settled tasks a second, for hours."""


class ForgetfulWorld(World):
    """As the engine: it keeps the state and nothing else."""

    def take(self, command: c.Command) -> turns.Turn:
        self.draws += 1
        entropy = hashlib.sha256(self.draws.to_bytes(8, "big")).digest()
        return turns.take_turn(self.state, command, self.now_ms, entropy)


def entries(value: object, name: str = "", found: Counter[str] | None = None) -> Counter[str]:
    """How many entries the collections of a state have, by the way to them."""
    found = Counter() if found is None else found
    if isinstance(value, RangeSet):
        found[name] += value.range_count
    elif isinstance(value, dict | list | tuple | deque | frozenset | set) and not hasattr(value, "_fields"):
        found[name] += len(value)
        for part in value.values() if isinstance(value, dict) else value:
            entries(part, name, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            entries(getattr(value, field.name), f"{name}.{field.name}", found)
    return found


def begun(workers: int, rows_per_task: int = 4) -> ForgetfulWorld:
    """A world with that many volunteers and a bundle whose tasks have a few rows."""
    world = ForgetfulWorld()
    world.start()
    world.ready_bundle(per_row=30_000_000 // rows_per_task)
    for number in range(workers):
        world.volunteer(f"volunteer {number}", window=4, slots=2)
    return world


def one_job(world: World, number: int, rows: int = ROWS_PER_JOB) -> int:
    """Submits a job, works it off and lets it leave; gives how many tasks it had."""
    before = world.state.tasks_created
    options = JobOptions(failed_rows_max=0)
    world.submit(rows, key=f"job {number}", blocks=4, options=options)
    while True:
        world.pack_all()
        if not world.state.leases:
            break
        for lease in list(world.state.leases.values())[:64]:
            if lease.lease_id in world.state.leases:
                world.now_ms += TASKS_SPACED_MS
                world.take(world.commit_command(lease))
    world.take(c.Tick())
    world.take(c.ArchiveJobs(world.state.sequence))
    return world.state.tasks_created - before


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def sample(state: State, settled: int, began_s: float) -> dict[str, Any]:
    gc.collect()
    return {
        "settled": settled,
        "resident_mib": round(resident_bytes() / (1 << 20), 1),
        "elapsed_s": round(time.monotonic() - began_s, 1),
        "events": state.sequence,
        "entries": dict(sorted((name, count) for name, count in entries(state).items() if count)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10)
    options = parser.parse_args()
    world, settled, jobs, began_s = begun(options.workers), 0, 0, time.monotonic()
    for step in range(1, options.samples + 1):
        while settled < options.tasks * step // options.samples:
            settled += one_job(world, jobs)
            jobs += 1
        sys.stdout.write(json.dumps(sample(world.state, settled, began_s)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
