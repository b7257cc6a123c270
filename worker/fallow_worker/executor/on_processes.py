"""The executor without Ray: engine children of the daemon itself."""

from __future__ import annotations

from collections.abc import Callable

from fallow.session import Capability
from fallow_worker.executor.capability import capability_of, node_facts
from fallow_worker.executor.choice import ExecutorKind
from fallow_worker.executor.supervisor import Supervisor, SupervisorSettings
from fallow_worker.ports import Outcome, Work


class ProcessExecutor:
    """Runs leases in engine children of this process. Use it inside one event loop."""

    def __init__(self, settings: SupervisorSettings | None = None) -> None:
        self._supervisor = Supervisor(settings)
        self._capability: Capability | None = None

    @property
    def supervisor(self) -> Supervisor:
        """Who owns the children."""
        return self._supervisor

    async def start(self) -> None:
        """Nothing runs before the first lease."""

    async def capability(self) -> Capability:
        """This machine's processor and the sandbox level that a child really reached. Raises WorkFailed(platform)."""
        if self._capability is None:
            ready = await self._supervisor.probe()
            self._capability = capability_of([node_facts(self._supervisor, ready)], ExecutorKind.PROCESS)
        return self._capability

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Runs one lease. Raises WorkFailed; cancelling stops the work."""
        return await self._supervisor.run(work, progress)

    async def release(self) -> None:
        """Ends all children."""
        await self._supervisor.release()

    async def stop(self) -> None:
        """Ends all children."""
        await self._supervisor.release()
