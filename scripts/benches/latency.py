"""How long a one-row job takes on a warm system, from `client.map` until its durable result is in hand."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import pyarrow as pa
from scripts.benches.report import Report, percentile, say
from scripts.benches.rows import contents_of, fresh, standard_library
from scripts.benches.system import running_system

from fallow.bundle import BytesCodec
from fallow.bundle_file import Bundle

BUDGET_P50_MS = 25.0
WARM_UP_JOBS = 30


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--jobs", type=int, default=300, help="one-row jobs, one after the other")
    parser.add_argument(
        "--executor", choices=("auto", "ray", "process"), default="auto", help="auto: as a worker chooses"
    )


async def measure(chosen: argparse.Namespace) -> Report:
    """Runs jobs of one fresh row each."""
    bundle = Bundle.magika()
    codec = bundle.manifest.stages[0]
    assert isinstance(codec, BytesCodec)
    rows = fresh(contents_of(standard_library(), codec), chosen.jobs + WARM_UP_JOBS, seed=0)
    ended_ms: list[float] = []
    submitted_ms: list[float] = []
    async with running_system("--executor", chosen.executor) as system:
        say("warming up: inspection, Ray, engine …")
        before = await system.counts()
        for number, row in enumerate(rows):
            table = pa.table({codec.column: pa.array([row], pa.binary())})
            began = time.perf_counter()
            job = await system.client.map(bundle, table, data="public")
            submitted = time.perf_counter()
            # A table is given only of a job that has succeeded, and that it has is durable before it is told.
            result = await job.table()
            ended = time.perf_counter()
            assert result.num_rows == 1 and result.column("label")[0].is_valid
            if number >= WARM_UP_JOBS:
                ended_ms.append((ended - began) * 1e3)
                submitted_ms.append((submitted - began) * 1e3)
        after = await system.counts(rows_settled_min=before.rows_settled + len(rows))
    return _report(chosen, ended_ms, submitted_ms, after.since(before))


def _report(
    chosen: argparse.Namespace, ended_ms: Sequence[float], submitted_ms: Sequence[float], counts: dict[str, int]
) -> Report:
    p50_ms = percentile(ended_ms, 0.5)
    void = [f"{name} is {count}" for name, count in counts.items() if count <= 0]
    return Report(
        {
            "p50_ms": round(p50_ms, 2),
            "p99_ms": round(percentile(ended_ms, 0.99), 2),
            "budget": f"p50_ms <= {BUDGET_P50_MS:g}",
            "holds": p50_ms <= BUDGET_P50_MS and not void,
            "submitted_p50_ms": round(percentile(submitted_ms, 0.5), 2),
            "min_ms": round(min(ended_ms), 2),
            "max_ms": round(max(ended_ms), 2),
            "jobs": len(ended_ms),
            "executor": chosen.executor,
            **counts,
        },
        void,
    )
