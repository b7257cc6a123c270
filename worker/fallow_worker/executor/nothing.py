"""The executor of a worker that takes no leases."""

from __future__ import annotations

import platform
from collections.abc import Callable

from fallow.session import Capability, Cause, SandboxLevel
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.choice import ExecutorKind
from fallow_worker.ports import Outcome, Work


class NoExecutor:
    """Has no device and runs nothing."""

    async def start(self) -> None:
        """Nothing to start."""

    async def capability(self) -> Capability:
        """No device; nothing foreign runs here, so nothing has to be locked in."""
        return Capability(
            sandbox_level=SandboxLevel.FULL,
            executor=ExecutorKind.PROCESS.value,
            operating_system=f"{platform.system()} {platform.release()}",
            task_kinds=frozenset(),
        )

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Raises WorkFailed(platform)."""
        raise WorkFailed(Cause.PLATFORM, "this worker runs nothing")

    async def release(self) -> None:
        """Nothing to release."""

    async def stop(self) -> None:
        """Nothing to stop."""
