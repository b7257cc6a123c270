"""Durable settled tasks per second: one coordinator, a thousand workers that compute nothing, one signature a task."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from scripts.benches.fleet import (
    OUTPUT_DIGEST,
    RunningCoordinator,
    descriptors_needed,
    running_coordinator,
    spread,
    submitter,
)
from scripts.benches.load_generator import Counts, Generators, Load
from scripts.benches.report import Report, percentile, say
from scripts.benches.system import cpu_seconds, resident_mb

from fallow_coordinator.latency import quantile_ms

BUDGET_TASKS_PER_S = 2_000.0
BUDGET_ASSIGN_P99_MS = 50.0
BUDGET_RSS_MB = 400.0
OPEN_PATIENCE_S = 300.0
QUIET_PATIENCE_S = 60.0
ROWS_AHEAD_S = 5.0
"""Rows that wait for a worker, in seconds of the fleet's work as budgeted."""


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--sessions", type=int, default=1_000, help="workers, each with a key and a connection")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long is measured")
    parser.add_argument("--warm-up-seconds", type=float, default=5.0)
    parser.add_argument("--window", type=int, default=2, help="leases that each worker is ready to hold")
    parser.add_argument("--task-ms", type=float, default=0.0, help="how long a stub task takes; 0: answered at once")
    parser.add_argument("--generators", type=int, default=2, help="processes that the workers are spread over")
    parser.add_argument("--quick", action="store_true", help="a small fleet for a few seconds: does it run?")


@dataclass(frozen=True, slots=True)
class _Moment:
    """Everything that is counted, at one moment."""

    at_s: float
    settled: int
    commitments: int
    commits: int
    signatures: int
    assigns: list[int]
    cpu_s: dict[str, float]


async def measure(chosen: argparse.Namespace) -> Report:
    """Loads the coordinator to saturation and reads both sides' counts."""
    if chosen.quick:
        chosen.sessions, chosen.seconds, chosen.warm_up_seconds, chosen.generators = 40, 3.0, 1.0, 1
    descriptors_needed(chosen.sessions)
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as name:
        folder = Path(name)
        async with running_coordinator(folder) as coordinator, submitter(coordinator, folder) as client:
            line = coordinator.join_line("volunteer", chosen.sessions)
            loads = [
                Load(folder / f"workers-{part}", line, sessions, chosen.window, chosen.task_ms, OUTPUT_DIGEST)
                for part, sessions in enumerate(spread(chosen.sessions, chosen.generators))
            ]
            generators = Generators(loads)
            try:
                say(f"{chosen.sessions} workers enrol …")
                await generators.enrolled()
                await client.submit()
                rows_ahead = int(max(ROWS_AHEAD_S * BUDGET_TASKS_PER_S, 2 * chosen.sessions * chosen.window))
                submitting = asyncio.create_task(client.keep_ahead(coordinator, rows_ahead))
                await generators.open()
                await _all_open(generators, chosen.sessions)
                say(f"all sessions are open; {chosen.warm_up_seconds:g} s to warm up, {chosen.seconds:g} s to measure")
                await asyncio.sleep(chosen.warm_up_seconds)
                first, _ = await _moment(coordinator, generators)
                await asyncio.sleep(chosen.seconds)
                last, turnarounds_ms = await _moment(coordinator, generators)
                rss_mb = resident_mb(coordinator.process)
                submitting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await submitting
                total = await _quiet(generators)
                return _report(chosen, coordinator, first, last, turnarounds_ms, total, rss_mb)
            finally:
                generators.stop()


async def _all_open(generators: Generators, sessions: int) -> None:
    deadline = time.monotonic() + OPEN_PATIENCE_S
    while True:
        counts, _ = await generators.counts()
        if sum(one.open for one in counts) == sessions:
            return
        trouble = "; ".join(one.trouble for one in counts if one.trouble)
        assert time.monotonic() < deadline and not trouble, f"{sum(one.open for one in counts)} are open; {trouble}"
        await asyncio.sleep(0.2)


async def _moment(coordinator: RunningCoordinator, generators: Generators) -> tuple[_Moment, list[float]]:
    counts, turnarounds_ms = await generators.counts()
    at_s = time.monotonic()
    status = await coordinator.status()
    cpu_s = {"coordinator": cpu_seconds([coordinator.process]), "generators": sum(one.cpu_s for one in counts)}
    cpu_s |= {name.rpartition(".")[2]: cpu_seconds([child]) for name, child in coordinator.children().items()}
    cpu_s["bench"] = cpu_seconds([psutil.Process()])
    moment = _Moment(
        at_s,
        sum(one.settled for one in counts),
        status.commitments,
        status.commits,
        status.signatures_checked,
        list(status.assign_buckets),
        cpu_s,
    )
    return moment, turnarounds_ms


async def _quiet(generators: Generators) -> Counts:
    """Waits until everything that was committed is settled or refused; the sum of all counts."""
    generators.pause()
    deadline = time.monotonic() + QUIET_PATIENCE_S
    while True:
        parts, _ = await generators.counts()
        total = Counts()
        for part in parts:
            for name in ("open", "leases", "commitments", "settled", "refused", "revoked", "broken", "checked"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.trouble = total.trouble or part.trouble
        if total.commitments == total.settled + total.refused or time.monotonic() > deadline:
            return total
        await asyncio.sleep(0.2)


def _report(
    chosen: argparse.Namespace,
    coordinator: RunningCoordinator,
    first: _Moment,
    last: _Moment,
    turnarounds_ms: list[float],
    total: Counts,
    rss_mb: float,
) -> Report:
    elapsed_s = last.at_s - first.at_s
    settled = last.settled - first.settled
    events = coordinator.events()
    in_journal = events.get("task_settled", 0)
    commits = last.commits - first.commits
    signatures = last.signatures - first.signatures
    assigns = [after - before for before, after in zip(first.assigns, last.assigns, strict=True)]
    assign_p99_ms = quantile_ms(assigns, 0.99)
    cpu_s = {name: last.cpu_s[name] - first.cpu_s.get(name, 0.0) for name in last.cpu_s}
    tasks_per_s = settled / elapsed_s
    void = [
        words
        for holds, words in (
            (settled > 0, "nothing was settled"),
            (total.settled == total.commitments, f"{total.commitments} commitments, {total.settled} settled"),
            # The inspection is settled by its report.
            (in_journal == total.settled + 1, f"{in_journal} settled in the journal, {total.settled} told"),
            (events.get("commitment_recorded", 0) == total.settled, "commitments in the journal and settled differ"),
            (total.checked > 0, "no signature of the coordinator was checked"),
            (commits > 0, "nothing was synced to disk"),
            (
                last.signatures >= last.commitments and signatures > 0,
                f"{last.signatures} signatures checked for {last.commitments} commitments",
            ),
            (sum(assigns) > 0, "no lease was sent"),
            (
                not total.broken and not total.refused,
                f"{total.broken} broken, {total.refused} refused: {total.trouble}",
            ),
        )
        if not holds
    ]
    facts: dict[str, Any] = {
        "settled_tasks_per_s": round(tasks_per_s, 1),
        "assign_p99_ms": round(assign_p99_ms, 2),
        "assign_p50_ms": round(quantile_ms(assigns, 0.5), 2),
        "coordinator_rss_mb": rss_mb,
        "coordinator_cpu_us_per_task": round(1e6 * cpu_s["coordinator"] / max(1, settled), 1),
        "cpu_share": {name: round(seconds / elapsed_s, 3) for name, seconds in cpu_s.items()},
        "turnaround_p50_ms": round(percentile(turnarounds_ms, 0.5), 1) if turnarounds_ms else None,
        "turnaround_p99_ms": round(percentile(turnarounds_ms, 0.99), 1) if turnarounds_ms else None,
        "budget": f"settled_tasks_per_s >= {BUDGET_TASKS_PER_S:g}, assign_p99_ms <= {BUDGET_ASSIGN_P99_MS:g}, "
        f"coordinator_rss_mb <= {BUDGET_RSS_MB:g}",
        "holds": tasks_per_s >= BUDGET_TASKS_PER_S
        and assign_p99_ms <= BUDGET_ASSIGN_P99_MS
        and rss_mb <= BUDGET_RSS_MB
        and not void,
        "settled": settled,
        "signatures_checked": signatures,
        "leases_sent": sum(assigns),
        "commits": commits,
        "tasks_per_commit": round(settled / max(1, commits), 1),
        "settled_in_journal": in_journal,
        "settled_told": total.settled,
        "signatures_checked_by_generators": total.checked,
        "sessions": chosen.sessions,
        "window": chosen.window,
        "task_ms": chosen.task_ms,
        "seconds": round(elapsed_s, 2),
        "events": events,
    }
    return Report(facts, void)
