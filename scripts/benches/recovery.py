"""What a coordinator takes to come back: with many live tasks, and after each of many `kill -9` under load."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scripts.benches.fleet import (
    OUTPUT_DIGEST,
    ROWS_PER_JOB,
    RunningCoordinator,
    Submitter,
    descriptors_needed,
    running_coordinator,
    spread,
    submitter,
)
from scripts.benches.load_generator import Generators, Load
from scripts.benches.report import Report, percentile, say
from scripts.benches.system import resident_mb

from fallow.errors import FallowError

BUDGET_RESTART_S: Final = 10.0
BUDGET_RECOVERY_S: Final = 5.0
KILLS_MIN: Final = 40
LIVE_TASKS_MIN: Final = 100_000
SETTLED_PER_S_MIN: Final = 200.0
SETTLED_PER_S_VOID: Final = 50.0
WINDOW: Final = 64
SLOTS: Final = 64
"""A worker with so many slots has as many tasks packed ahead for it as it holds."""
PATIENCE_S: Final = 300.0
SETTLED_BEFORE_KILL: Final = (100, 500)
ROWS_AHEAD: Final = 2 * ROWS_PER_JOB


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--kills", type=int, default=KILLS_MIN, help=f"at least {KILLS_MIN}")
    parser.add_argument("--live-tasks", type=int, default=LIVE_TASKS_MIN, help=f"at least {LIVE_TASKS_MIN}")
    parser.add_argument("--sessions", type=int, default=100, help="workers while it is killed")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--quick", action="store_true", help="a few kills, a few tasks: does it run?")


@dataclass
class _Kills:
    """What the kills found."""

    recovery_s: list[float] = field(default_factory=list[float])
    """From the start of the process until it is ready, each time."""
    resumed_s: list[float] = field(default_factory=list[float])
    """From the kill until a worker is told again that a task is settled."""
    settled: int = 0
    up_s: float = 0.0
    """From the first settlement after each start until the kill."""
    settled_told: int = 0
    jobs_told: int = 0
    acks_lost: int = 0
    settled_twice: int = 0


async def measure(chosen: argparse.Namespace) -> Report:
    """First the kills, then one restart with many live tasks; each on a journal of its own."""
    if chosen.quick:
        chosen.kills, chosen.live_tasks, chosen.sessions = 3, 1_000, 20
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as name:
        kills = await _killed(chosen, Path(name))
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as name:
        restart = await _restarted(chosen.live_tasks, Path(name))
    return _report(chosen, kills, restart)


# ---------------------------------------------------------------------------------------------- kills


async def _killed(chosen: argparse.Namespace, folder: Path) -> _Kills:
    descriptors_needed(chosen.sessions)
    chance, found = random.Random(chosen.seed), _Kills()
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_coordinator(folder))
        client = await stack.enter_async_context(submitter(coordinator, folder))
        line = coordinator.join_line("volunteer", chosen.sessions)
        load = Load(folder / "workers", line, chosen.sessions, 2, 0.0, OUTPUT_DIGEST, reconnect=True)
        generators = Generators([load])
        stack.callback(generators.stop)
        await generators.enrolled()
        generators.remember()
        await client.submit()
        await generators.open()
        for number in range(chosen.kills):
            await _ahead(client, generators)
            await _under_load(found, generators, chance)
            killed_s, before = time.monotonic(), await _settled(generators)
            coordinator.kill()
            began_s = time.monotonic()
            coordinator = await stack.enter_async_context(running_coordinator(folder))
            found.recovery_s.append(time.monotonic() - began_s)
            await _until_settled(generators, before + 1)
            found.resumed_s.append(time.monotonic() - killed_s)
            if not number % 10:
                say(f"kill {number + 1}: ready after {found.recovery_s[-1]:.2f} s")
        await _quiet(generators)
        told, journal = await generators.settled(), coordinator.events_of("task_settled")
        settled = [event.task_settled.lease_id for event in journal]
        accepted = {event.job_submitted.job_id for event in coordinator.events_of("job_submitted")}
        found.settled_told, found.jobs_told = len(told), len(client.jobs)
        found.acks_lost = len(set(told) - set(settled)) + len({job.id for job in client.jobs} - accepted)
        found.settled_twice = len(journal) - len({event.task_settled.task_id for event in journal})
    return found


async def _ahead(client: Submitter, generators: Generators) -> None:
    """There are rows for a while; each job that was accepted must survive, too."""
    settled = await _settled(generators)
    while client.rows - settled < ROWS_AHEAD:
        await client.submit()


async def _under_load(found: _Kills, generators: Generators, chance: random.Random) -> None:
    """Lets tasks settle until a random moment; what was settled meanwhile counts for the rate."""
    first, began_s = await _settled(generators), time.monotonic()
    await _until_settled(generators, first + chance.randrange(*SETTLED_BEFORE_KILL))
    await asyncio.sleep(0.05 * chance.random())
    found.settled += await _settled(generators) - first
    found.up_s += time.monotonic() - began_s


async def _settled(generators: Generators) -> int:
    counts, _ = await generators.counts()
    return sum(one.settled for one in counts)


async def _until_settled(generators: Generators, least: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while await _settled(generators) < least:
        assert time.monotonic() < deadline, "nothing is settled any more"
        await asyncio.sleep(0.01)


async def _quiet(generators: Generators) -> None:
    """Until no more is settled."""
    generators.pause()
    last = -1
    while (now := await _settled(generators)) != last:
        last = now
        await asyncio.sleep(1.0)


# ---------------------------------------------------------------------------------------------- restart


async def _restarted(live_tasks: int, folder: Path) -> dict[str, Any]:
    """A restart, by kill, of a coordinator with so many tasks that are cut, packed and, half of them, leased."""
    sessions = max(1, -(-live_tasks // (WINDOW + SLOTS)))
    descriptors_needed(sessions)
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_coordinator(folder))
        client = await stack.enter_async_context(submitter(coordinator, folder))
        line = coordinator.join_line("volunteer", sessions)
        loads = [
            Load(folder / f"workers-{part}", line, share, WINDOW, 0.0, OUTPUT_DIGEST, slots=SLOTS)
            for part, share in enumerate(spread(sessions, min(2, sessions)))
        ]
        generators = Generators(loads)
        stack.callback(generators.stop)
        say(f"{sessions} workers enrol, to hold and wait for {live_tasks} tasks …")
        await generators.enrolled()
        generators.pause()
        while client.rows < live_tasks + ROWS_PER_JOB:
            await client.submit()
        await generators.open()
        before = await _until_live(coordinator, live_tasks)
        rss_mb = resident_mb(coordinator.process)
        events = sum(coordinator.events().values())
        coordinator.kill()
        began_s = time.monotonic()
        coordinator = await stack.enter_async_context(running_coordinator(folder))
        restart_s = time.monotonic() - began_s
        after = await coordinator.status()
        return {
            "restart_s": round(restart_s, 2),
            "live_tasks": before.tasks,
            "live_tasks_after": after.tasks,
            "leases": before.leases,
            "leases_after": after.leases,
            "records": events,
            "rss_before_mb": rss_mb,
            "rss_after_mb": resident_mb(coordinator.process),
        }


async def _until_live(coordinator: RunningCoordinator, live_tasks: int) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    tasks, last = 0, -1
    while True:
        # A whole fleet that comes at once keeps it busy for a while.
        with contextlib.suppress(FallowError):
            last, status = tasks, await coordinator.status()
            tasks = status.tasks
            if tasks >= live_tasks and tasks == last:
                return status
        assert time.monotonic() < deadline, f"{tasks} of {live_tasks} tasks are live"
        await asyncio.sleep(1.0)


# ---------------------------------------------------------------------------------------------- report


def _report(chosen: argparse.Namespace, kills: _Kills, restart: dict[str, Any]) -> Report:
    settled_per_s = kills.settled / max(1e-9, kills.up_s)
    reasons = (
        (chosen.quick or chosen.kills >= KILLS_MIN, f"{chosen.kills} kills, fewer than {KILLS_MIN}"),
        (chosen.quick or restart["live_tasks"] >= LIVE_TASKS_MIN, f"{restart['live_tasks']} live tasks"),
        (settled_per_s >= SETTLED_PER_S_VOID, f"{settled_per_s:.0f} settlements/s, fewer than {SETTLED_PER_S_VOID:g}"),
        (kills.settled_told > 0, "no settlement was told"),
        (restart["live_tasks_after"] == restart["live_tasks"], "a live task was lost or made by the restart"),
    )
    void = [words for holds, words in reasons if not holds]
    recovery_s = max(kills.recovery_s)
    return Report(
        {
            **restart,
            "acks_lost": kills.acks_lost,
            "settled_twice": kills.settled_twice,
            "kills": len(kills.recovery_s),
            "recovery_s_max": round(recovery_s, 2),
            "recovery_s_p50": round(percentile(kills.recovery_s, 0.5), 2),
            "settling_again_s_max": round(max(kills.resumed_s), 2),
            "settled_per_s": round(settled_per_s, 1),
            "settlements_told": kills.settled_told,
            "jobs_told": kills.jobs_told,
            "budget": f"restart_s <= {BUDGET_RESTART_S:g}, acks_lost = 0, recovery_s_max <= {BUDGET_RECOVERY_S:g}, "
            f"settled_per_s >= {SETTLED_PER_S_MIN:g}",
            "holds": restart["restart_s"] <= BUDGET_RESTART_S
            and not kills.acks_lost
            and not kills.settled_twice
            and recovery_s <= BUDGET_RECOVERY_S
            and settled_per_s >= SETTLED_PER_S_MIN
            and not void,
        },
        void,
    )
