"""What worker and coordinator take of a machine while nobody needs them."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import psutil
import pyarrow as pa
from scripts.benches.report import Report, say
from scripts.benches.rows import contents_of, fresh, standard_library
from scripts.benches.system import System, cpu_seconds, family, resident_mb, running_system, until

from fallow.bundle import BytesCodec
from fallow.bundle_file import Bundle

BUDGET_WORKER_MB = 100.0
BUDGET_WORKER_CPU_PERCENT = 0.2
BUDGET_COORDINATOR_MB = 150.0
IDLE_RELEASE_S = 3
RELEASE_PATIENCE_S = 120.0
JOB_ROWS = 1_000


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--idle-seconds", type=float, default=60.0, help="how long CPU is watched")
    parser.add_argument("--settle-seconds", type=float, default=5.0, help="rest before anything is read")
    parser.add_argument("--executor", choices=("ray", "process"), default="ray")


async def measure(chosen: argparse.Namespace) -> Report:
    """Reads a worker before and after one job, and its CPU after Ray has stopped again."""
    bundle = Bundle.magika()
    codec = bundle.manifest.stages[0]
    assert isinstance(codec, BytesCodec)
    rows = fresh(contents_of(standard_library(), codec), JOB_ROWS, seed=0)
    async with running_system("--executor", chosen.executor, "--idle-release", str(IDLE_RELEASE_S)) as system:
        await asyncio.sleep(chosen.settle_seconds)
        before_mb = resident_mb(system.worker)
        say(f"worker before: {before_mb} MB; now one job of {len(rows)} rows …")
        before = await system.counts()
        job = await system.client.map(bundle, pa.table({codec.column: pa.array(rows, pa.binary())}), data="public")
        result = await job.table()
        assert result.num_rows == len(rows)
        after = await system.counts(rows_settled_min=before.rows_settled + len(rows))
        below_during = [process.name() for process in family(system.worker)[1:]]
        say(f"{len(below_during)} processes below the worker; waiting for it to give them up …")
        await until(lambda: not family(system.worker)[1:], "the worker to stop what it started", RELEASE_PATIENCE_S)
        await asyncio.sleep(chosen.settle_seconds)
        after_mb = resident_mb(system.worker)
        say(f"worker after: {after_mb} MB; watching its CPU for {chosen.idle_seconds:g} s …")
        percents = await _idle_cpu(system, chosen.idle_seconds)
        facts: dict[str, Any] = {
            "worker_idle_rss_mb": max(before_mb, after_mb),
            "worker_idle_rss_before_mb": before_mb,
            "worker_idle_rss_after_mb": after_mb,
            **percents,
            "coordinator_rss_mb": resident_mb(system.coordinator),
            "coordinator_children_rss_mb": _below(system.coordinator),
            "processes_below_worker_during_job": len(below_during),
            "idle_seconds": chosen.idle_seconds,
            "executor": chosen.executor,
            **after.since(before),
        }
    return _report(facts, after.since(before), below_during)


async def _idle_cpu(system: System, seconds: float) -> dict[str, float]:
    """CPU of the worker and of the coordinator with all below them, in percent of one core."""
    processes = {"worker": family(system.worker), "coordinator": family(system.coordinator)[:1]}
    began = time.perf_counter()
    before = {name: cpu_seconds(members) for name, members in processes.items()}
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - began
    return {
        f"{name}_idle_cpu_percent": round(100 * (cpu_seconds(members) - before[name]) / elapsed, 3)
        for name, members in processes.items()
    }


def _below(process: psutil.Process) -> dict[str, float]:
    """Resident memory of each child, by the module that it runs."""
    found: dict[str, float] = {}
    for child in family(process)[1:]:
        words = child.cmdline()
        module = next(
            (word for word in words if word.startswith("fallow_") and word != "fallow_coordinator.attended"), ""
        )
        found[f"{module or ' '.join(words[-2:])[-60:]} ({child.pid})"] = resident_mb(child)
    return found


def _report(facts: dict[str, Any], counts: dict[str, int], below: list[str]) -> Report:
    void = [f"{name} is {count}" for name, count in counts.items() if count <= 0]
    if not below:
        void.append("the job ran without any process below the worker")
    holds = (
        facts["worker_idle_rss_mb"] <= BUDGET_WORKER_MB
        and facts["worker_idle_cpu_percent"] <= BUDGET_WORKER_CPU_PERCENT
        and facts["coordinator_rss_mb"] <= BUDGET_COORDINATOR_MB
    )
    budget = (
        f"worker_idle_rss_mb <= {BUDGET_WORKER_MB:g}, worker_idle_cpu_percent <= {BUDGET_WORKER_CPU_PERCENT:g}, "
        f"coordinator_rss_mb <= {BUDGET_COORDINATOR_MB:g}"
    )
    return Report({**facts, "budget": budget, "holds": holds and not void}, void)
