"""The actor that owns the engine children of one node of the owner's Ray. It holds the same supervisor as a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

from fallow.ids import LeaseId
from fallow.session import Cause
from fallow_worker.engine.protocol import clipped_reason
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.capability import NodeFacts, node_facts
from fallow_worker.executor.supervisor import Supervisor, SupervisorSettings
from fallow_worker.ports import Outcome, Work


class NodeSupervisor:
    """Runs shards of leases on one node. All methods are called through Ray, by our own driver."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._supervisor = Supervisor(settings)
        self._running: dict[LeaseId, asyncio.Task[Outcome]] = {}
        self._rows_done: dict[LeaseId, int] = {}
        self._folder = ""

    async def describe(self) -> NodeFacts | WorkFailed:
        """The node's facts; the child that told them stays as the spare."""
        try:
            return node_facts(self._supervisor, await self._supervisor.probe(keep=True))
        except WorkFailed as failed:
            return failed

    async def run(self, work: Work) -> Outcome | WorkFailed:
        """Runs one lease, or this node's part of one. Never raises."""

        def progress(rows_done: int) -> None:
            self._rows_done[work.lease_id] = rows_done

        task = asyncio.get_running_loop().create_task(self._supervisor.run(work, progress))
        self._running[work.lease_id] = task
        try:
            return await task
        except WorkFailed as failed:
            return failed
        except asyncio.CancelledError:
            return WorkFailed(Cause.OWNER_PREEMPT, "cancelled")
        except Exception as error:
            return WorkFailed(Cause.PLATFORM, clipped_reason(f"the node's supervisor made a mistake: {error!r}"))
        finally:
            self._running.pop(work.lease_id, None)
            self._rows_done.pop(work.lease_id, None)

    async def rows_done(self) -> dict[LeaseId, int]:
        """How far each lease is."""
        return dict(self._rows_done)

    async def holds(self, lease_id: LeaseId) -> bool:
        """Whether a lease, or this node's part of it, has arrived and is not over."""
        return lease_id in self._running

    async def cancel(self, lease_id: LeaseId) -> None:
        """Stops a lease at once."""
        task = self._running.get(lease_id)
        if task is not None:
            task.cancel()

    async def put_file(self, name: str, offset: int, piece: bytes) -> str:
        """Keeps a piece of a bundle's file on a node that does not share the daemon's disk; gives its path here.

        `name` is a digest in hex, so nothing of a submitter decides where files stand.
        """
        if not self._folder:
            self._folder = tempfile.mkdtemp(prefix="fallow-node-")
        path = Path(self._folder) / name
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(piece)
        return str(path)

    async def stop(self) -> None:
        """Ends every child."""
        await self._supervisor.release()
        if self._folder:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder)
            self._folder = ""
