"""A process that hosts an executor on Ray and keeps a lease at work, to be killed by a test."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from executor_rig import looping_bundle, looping_rows, silent
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.executor.supervisor import SupervisorSettings


async def main(folder: str) -> None:
    """Runs until killed."""
    executor = RayExecutor(RaySettings(supervisor=SupervisorSettings(cores=2)))
    await executor.start()
    await executor.run(looping_bundle(Path(folder)).work(looping_rows(10**12), runtime_max_ms=10**9), silent)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
