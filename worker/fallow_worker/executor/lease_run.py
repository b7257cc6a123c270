"""The state of leases at work in a supervisor: shards, and the children that they were given to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fallow.bundle import BundleManifest
from fallow.ids import Digest
from fallow.row_block import RowBlock
from fallow.session import RowFailure, Usage
from fallow_worker.executor.engine_child import EngineChild
from fallow_worker.executor.layout import Layout, MemoryCap
from fallow_worker.executor.shards import RowRange
from fallow_worker.ports import Outcome, Work


@dataclass(slots=True, eq=False)
class LeaseRun:
    """A lease from its arrival to its outcome."""

    work: Work
    manifest: BundleManifest
    block: RowBlock | None
    layout: Layout
    cap: MemoryCap
    progress: Callable[[int], None]
    outcome: asyncio.Future[Outcome]
    shards: list[Shard] = field(default_factory=list["Shard"])
    started: float = 0.0
    timer: asyncio.TimerHandle | None = None
    execution_class: str = ""
    memory_bytes_peak: int = 0
    rows_survived: int = 0
    """Rows that no child died of, values or not."""
    over: bool = False


@dataclass(slots=True, eq=False)
class Shard:
    """Some rows of a lease, for one child."""

    lease: LeaseRun
    rows: RowRange
    attempts: int = 0
    suspect: bool = False
    """A child died of some of its rows: they are found before anything else is tried."""
    still: asyncio.TimerHandle | None = None
    """Runs out when no batch ends for too long."""
    rows_done: int = 0
    output: bytes = b""
    failures: tuple[RowFailure, ...] = ()
    usage: Usage = field(default_factory=Usage)
    done: bool = False

    def settle(self) -> None:
        """Nothing is awaited of its child any more."""
        if self.still is not None:
            self.still.cancel()
            self.still = None


@dataclass(slots=True, eq=False)
class Seat:
    """A child with the shards it was given: those sent, and those that wait for its load."""

    child: EngineChild | None
    bundle_digest: Digest
    threads: int
    loading: bool = True
    alone: bool = False
    """Its child is for one inspection, or for one suspect shard."""
    given: list[Shard] = field(default_factory=list["Shard"])

    @property
    def idle_since(self) -> float:
        """When its child last had something to do, on the loop's clock."""
        return self.child.idle_since if self.child is not None else 0.0
