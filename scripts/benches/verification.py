"""How surely cheaters are found, what honest workers suffer, and what it costs: on the real core, with a numeric stub.

The core decides (`take_turn`, virtual time); outputs are values in a table instead of bytes, so that a run of a whole
job takes milliseconds and hundreds of them give a rate. What cheaters do to real bytes is tried one by one in
`tests/adversarial`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benches.report import Report, percentile, say

from fallow.assurance import PPM, wrong_rows_bound_ppm
from fallow.ids import JobId, digest_of
from fallow.session import TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v

if TYPE_CHECKING:
    from simulation.verification import Actor, Behaviour, Row, Zoo

CATCH_RATE_MIN = 0.99
OVERHEAD_MAX = 0.05
FRESH_OVERHEAD_MAX = 0.25
FLEET = 20
TASK_MS = 60_000
"""What a task takes; workers of a fleet end theirs one after the other."""
VETERAN_ROWS = 100_000


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--runs", type=int, default=300, help="runs of each cheater")
    parser.add_argument("--rows", type=int, default=1_000, help="rows of a run's job")
    parser.add_argument("--honest", type=int, default=3_000, help="jobs of honest workers, counted by worker")
    parser.add_argument("--fleet-rows", type=int, default=100_000, help="rows for the overhead of fresh fleets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few runs of each: figures mean nothing")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of cheater, and how many of them work beside honest workers."""

    name: str
    behaviour: Callable[[random.Random], Behaviour]
    cheaters: int = 1
    honest: int = 5
    alters_ppm: int = PPM
    """Share of rows that it alters, while it does."""
    counts: bool = True
    """False: it lies too seldom for a rate to be asked for."""
    rows: int = 0
    """Rows of the job; 0: as the bench says."""


def kinds() -> tuple[Kind, ...]:
    """Those of the numeric stub. Copying, caching and smaller models are lies about values like any other here."""
    from simulation.verification import after, at_times, colluding, junk

    def always(lie: Behaviour) -> Callable[[random.Random], Behaviour]:
        return lambda rng: lie

    def share(lie: Behaviour, part: float) -> Callable[[random.Random], Behaviour]:
        return lambda rng: at_times(lie, part, rng)

    return (
        Kind("junk", always(junk)),
        Kind("constant", always(_constant)),
        Kind("smaller-model", share(junk, 0.35), alters_ppm=350_000),
        Kind("skips-50-percent", share(junk, 0.5), alters_ppm=500_000),
        Kind("skips-10-percent", share(junk, 0.1), alters_ppm=100_000),
        Kind("skips-5-percent", share(junk, 0.05), alters_ppm=50_000, counts=False),
        Kind("sleeper-10", always(after(10, junk))),
        Kind("sleeper-100", always(after(100, junk))),
        Kind("sleeper-1000", always(after(1_000, junk)), rows=12_000, honest=3),
        Kind("colluders-2", always(colluding), cheaters=2),
        Kind("colluders-3", always(colluding), cheaters=3),
        Kind("colluders-5", always(colluding), cheaters=5, honest=6),
        Kind("majority", always(colluding), cheaters=5, honest=2),
    )


async def measure(chosen: argparse.Namespace) -> Report:
    """Cheaters one kind after the other, honest fleets, and what checking costs."""
    return await asyncio.to_thread(_measured, chosen)


def _measured(chosen: argparse.Namespace) -> Report:
    tests = str(Path(__file__).resolve().parent.parent.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    runs, honest, fleet_rows = chosen.runs, chosen.honest, chosen.fleet_rows
    if chosen.quick:
        runs, honest, fleet_rows = 3, 24, 2_000
    cheaters: dict[str, Any] = {}
    for kind in kinds():
        cheaters[kind.name] = _cheats(kind, runs, kind.rows or chosen.rows, chosen.seed)
        say(f"{kind.name}: caught {cheaters[kind.name]['catch_rate']:.3f} of {cheaters[kind.name]['runs']}")
    wrongly = _honest(honest, chosen.seed)
    say(f"honest: {wrongly['false_forfeits']} of {wrongly['worker_jobs']} lost anything")
    veterans, fresh = _overhead(fleet_rows, fresh=False), _overhead(fleet_rows, fresh=True)
    rates = [found["catch_rate"] for kind, found in zip(kinds(), cheaters.values(), strict=True) if kind.counts]
    worst = min(rates)
    holds = {
        "worst_catch_rate": worst >= CATCH_RATE_MIN,
        "false_forfeits": wrongly["false_forfeits"] == 0,
        "overhead": veterans["overhead"] <= OVERHEAD_MAX,
        "fresh_fleet_overhead": fresh["overhead"] <= FRESH_OVERHEAD_MAX,
    }
    return Report(
        {
            "worst_catch_rate": round(worst, 4),
            **wrongly,
            "overhead": veterans["overhead"],
            "fresh_fleet_overhead": fresh["overhead"],
            "referee_share": veterans["referee_share"],
            "hours_to_release_p50": fresh["hours_to_release_p50"],
            "budgets": {
                "worst_catch_rate": CATCH_RATE_MIN,
                "false_forfeits": 0,
                "overhead": OVERHEAD_MAX,
                "fresh_fleet_overhead": FRESH_OVERHEAD_MAX,
            },
            "holds": holds,
            "cheaters": cheaters,
            "veterans": veterans,
            "fresh": fresh,
            "runs": runs,
            "rows": chosen.rows,
            "seed": chosen.seed,
        },
        ["a quick run's figures mean nothing"] * chosen.quick
        + [f"{name} never came to lie" for name, found in cheaters.items() if not found["liars"]],
    )


# ------------------------------------------------------------------------------------------------ cheaters


def _cheats(kind: Kind, runs: int, rows: int, seed: int) -> dict[str, Any]:
    """Runs of one kind: whether each cheater was found before any pay of a row that it altered was released."""
    caught = paid = wrong = liars = 0
    tasks: list[int] = []
    for run in range(runs):
        zoo, cheaters, job_id = _run(kind, rows, seed * 1_000_003 + run)
        distrusted = zoo.distrusted()
        for cheater in cheaters:
            found = cheater.worker_id in distrusted
            lied = _lies(zoo, cheater)
            early = any(_released_lie(zoo, cheater))
            liars += lied
            caught += found and not early
            paid += early
            if found:
                tasks.append(_tasks_until_caught(zoo, cheater))
        wrong += zoo.wrong_rows(job_id)
    return {
        "runs": runs,
        "liars": liars,
        "cheaters": kind.cheaters,
        "honest": kind.honest,
        "alters_ppm": kind.alters_ppm,
        "catch_rate": round(caught / max(1, liars), 4),
        "paid_for_a_lie": paid,
        "tasks_until_caught_p50": percentile(tasks, 0.5) if tasks else None,
        "wrong_rows_accepted": wrong,
        "wrong_rows_accepted_ppm": round(PPM * wrong / (rows * runs)),
        "counts": kind.counts,
    }


def _run(kind: Kind, rows: int, seed: int) -> tuple[Zoo, list[Actor], JobId]:
    from simulation.verification import Zoo

    zoo = Zoo(seed=seed, checks=False)
    zoo.begin()
    zoo.operator_worker(TaskKind.REFEREE)
    rng = random.Random(seed)
    for _ in range(kind.honest):
        zoo.volunteer()
    cheaters = [zoo.volunteer(kind.behaviour(rng)) for _ in range(kind.cheaters)]
    job_id = zoo.submit(rows, "standard")
    zoo.run()
    return zoo, cheaters, job_id


def _constant(actor: Actor, position: int) -> Row:
    from simulation.verification import Value

    return Value(0, actor.execution_class, wrong=0 if position == 0 else 1)


def _lies(zoo: Zoo, cheater: Actor) -> bool:
    """Whether it altered a row at all, audits included: a sleeper may never come so far."""
    return any(_holds_a_lie(zoo, lease_id) for lease_id in _leases_of(zoo, cheater))


def _holds_a_lie(zoo: Zoo, lease_id: str) -> bool:
    rows = zoo.outputs.get(digest_of(f"output {lease_id}".encode()), [])
    return any(value is not None and value.wrong for value in rows)


def _leases_of(zoo: Zoo, cheater: Actor) -> set[str]:
    return {event.lease_id for event in zoo.of_kind(e.LeaseGranted) if event.worker_id == cheater.worker_id}


def _released_lie(zoo: Zoo, cheater: Actor) -> list[bool]:
    """Of each of its leases whose rows were delivered and whose pay was released: whether it lied there."""
    settled = {event.lease_id for event in zoo.of_kind(e.TaskSettled) if event.cursor}
    leases = _leases_of(zoo, cheater) & settled
    return [_holds_a_lie(zoo, event.lease_id) for event in zoo.of_kind(v.EvidenceReleased) if event.lease_id in leases]


def _tasks_until_caught(zoo: Zoo, cheater: Actor) -> int:
    """Tasks that it had settled when it was distrusted."""
    leases, settled = _leases_of(zoo, cheater), 0
    for _, event in zoo.events:
        if isinstance(event, e.TaskSettled) and event.lease_id in leases:
            settled += 1
        if isinstance(event, v.WorkerDistrusted) and event.worker_id == cheater.worker_id:
            break
    return settled


# ------------------------------------------------------------------------------------------------ the honest


def _honest(worker_jobs: int, seed: int) -> dict[str, Any]:
    """Honest workers of mixed classes, some of which withhold rows: none may lose anything."""
    from simulation.verification import Zoo, at_times, honest, withholding

    done = forfeits = run = 0
    while done < worker_jobs:
        run += 1
        rng = random.Random(seed * 7_919 + run)
        zoo = Zoo(seed=seed * 7_919 + run, checks=False)
        zoo.begin()
        zoo.operator_worker(TaskKind.REFEREE)
        for number in range(6):
            behaviour = at_times(withholding, 0.05, rng) if number == 5 else honest
            zoo.volunteer(behaviour, execution_class=("cpu", "cpu", "avx2", "neon")[rng.randrange(4)])
        zoo.submit(rng.randrange(50, 600), "standard")
        zoo.run()
        done += 6
        forfeits += len(zoo.distrusted())
    return {
        "false_forfeits": forfeits,
        "worker_jobs": done,
        "false_forfeits_ppm_max": wrong_rows_bound_ppm(audited=done, confidence_ppm=950_000, found_wrong=forfeits),
    }


# ------------------------------------------------------------------------------------------------ what it costs


def _overhead(rows: int, *, fresh: bool) -> dict[str, Any]:
    """Rows worked out to check others, for each row delivered, and how long pay waited."""
    from simulation.verification import Zoo

    zoo = Zoo(seed=11, checks=False)
    zoo.begin()
    zoo.operator_worker(TaskKind.REFEREE)
    workers = [zoo.volunteer(window=4) for _ in range(FLEET)]
    if not fresh:
        for worker in workers:
            # NOTE: a record that a year of work would have given; the bench does not simulate the year.
            veteran = zoo.state.workers[worker.worker_id]
            veteran.rows_verified, veteran.record_class = VETERAN_ROWS, "cpu"
    begin = len(zoo.events)
    zoo.submit(rows, "standard")
    _run_in_time(zoo)
    events = zoo.events[begin:]
    settled = [event for _, event in events if isinstance(event, e.TaskSettled)]
    delivered = sum(event.rows for event in settled if event.cursor)
    drawn = [event for _, event in events if isinstance(event, v.AuditsDrawn)]
    checks = [event for _, event in events if isinstance(event, e.TaskCreated) and event.checks]
    audited = sum(len(event.checks) for event in checks)
    refereed = sum(len(event.checks) for event in checks if event.kind is TaskKind.REFEREE)
    at_ms = {event.lease_id: at for at, event in events if isinstance(event, e.TaskSettled)}
    waits = [at - at_ms[event.lease_id] for at, event in events if isinstance(event, v.EvidenceReleased)]
    return {
        "rows": delivered,
        "rows_drawn": sum(len(event.drawn) for event in drawn),
        "rows_checked": audited,
        "overhead": round(audited / max(1, delivered), 4),
        "referee_share": round(refereed / max(1, audited), 4),
        "hours_to_release_p50": round(percentile(waits, 0.5) / 3_600_000, 3) if waits else None,
    }


def _run_in_time(zoo: Zoo) -> None:
    """As `Zoo.run`, with a clock that goes on as tasks are done."""
    while True:
        if zoo.pending:
            zoo.do_pending()
        elif zoo.step():
            zoo.now_ms += TASK_MS // FLEET
        else:
            before = len(zoo.events)
            zoo.pass_ms(1_000)
            if len(zoo.events) == before and not zoo.pending:
                return
