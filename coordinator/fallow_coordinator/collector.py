"""Lets go of what nobody needs any more: expired jobs, blobs that nothing refers to, inputs of leases that are over.

A blob goes in this order: the blob service names blobs that lie there longer than its grace; the views say to which of
them a job refers; the core looks into the state and journals the rest as forgotten, so that no account has them any
more; only then is the blob service told, and it keeps whatever it stored or gave a receipt for since the grace began.
A receipt is recorded only while it is younger than half of that grace. So whoever has a receipt that counts, has the
blob.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow_coordinator.config import CollectionSettings
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.commands import Command, ExpireJobs, ForgetBlobs
from fallow_coordinator.core.effects import DropInput, Effect
from fallow_coordinator.core.events import BlobsForgotten
from fallow_coordinator.core.limits import EXPIRED_PER_COMMAND_MAX, FORGOTTEN_PER_COMMAND_MAX
from fallow_coordinator.ports import BlobKeeper, EffectSink, StorageFailed, Views

logger = logging.getLogger(__name__)

SHELVES: Final = 256
INPUTS_WAITING_MAX: Final = 100_000
"""Inputs waiting to be dropped; beyond it the oldest are left to the sweep."""
INPUTS_PER_CALL_MAX: Final = 1_000
INPUTS_GATHER_S: Final = 0.2
_PASSING: Final = frozenset(
    {Reason.COORDINATOR_UNREACHABLE, Reason.OVERLOADED, Reason.COORDINATOR_STOPPING, Reason.DEADLINE_EXCEEDED}
)


class Decider(Protocol):
    """What the collector needs of the engine."""

    async def submit(self, command: Command) -> Decision:
        """The decision, once it is durable."""
        ...


class BlobCollector:
    """One for each coordinator. Whatever is missed, by a crash for instance, is found by a later sweep."""

    def __init__(
        self, keeper: BlobKeeper, views: Views, settings: CollectionSettings, *, clock: Callable[[], int]
    ) -> None:
        """`clock` is the wall clock, in milliseconds since 1970."""
        self._keeper = keeper
        self._views = views
        self._settings = settings
        self._clock = clock
        self._inputs: deque[Digest] = deque(maxlen=INPUTS_WAITING_MAX)
        self._inputs_there = asyncio.Event()

    def apply(self, effects: Sequence[Effect]) -> None:
        """Takes note of inputs that can go."""
        for effect in effects:
            if isinstance(effect, DropInput):
                self._inputs.append(effect.input)
                self._inputs_there.set()

    async def drop_inputs_for_ever(self) -> None:
        """Has the blob service drop inputs soon after their leases."""
        while True:
            await self._inputs_there.wait()
            await asyncio.sleep(INPUTS_GATHER_S)
            await self.drop_inputs()

    async def drop_inputs(self) -> int:
        """Has the waiting inputs dropped; gives how many went."""
        dropped = 0
        while self._inputs:
            digests = [self._inputs.popleft() for _ in range(min(len(self._inputs), INPUTS_PER_CALL_MAX))]
            try:
                gone = await self._keeper.delete_blobs(digests, decided_at_ms=self._clock(), packed_only=True)
            except FallowError as error:
                logger.warning("inputs.left_to_the_sweep count=%d error=%s", len(digests), error)
                continue
            dropped += len(gone)
        self._inputs_there.clear()
        if dropped:
            logger.debug("inputs.dropped count=%d", dropped)
        return dropped

    async def sweep_for_ever(self, engine: Decider) -> None:
        """Looks for expired jobs and superfluous blobs, round after round."""
        while True:
            await asyncio.sleep(self._settings.interval_ms / 1_000)
            try:
                expired = await self.expire(engine)
                deleted = await self.sweep(engine)
            except StorageFailed as error:
                logger.warning("blobs.kept error=%s", error)
            except FallowError as error:
                if error.reason not in _PASSING:
                    raise
                logger.warning("blobs.kept error=%s", error)
            else:
                logger.info("blobs.collected jobs_expired=%d blobs_deleted=%d", expired, deleted)

    async def expire(self, engine: Decider) -> int:
        """Deletes jobs whose retention is over, as many as one command takes; gives how many."""
        overdue = await asyncio.to_thread(self._views.expired_jobs, self._clock(), EXPIRED_PER_COMMAND_MAX)
        if not overdue:
            return 0
        decision = await engine.submit(ExpireJobs(tuple(overdue)))
        return len(decision.events)

    async def sweep(self, engine: Decider) -> int:
        """Deletes blobs to which nothing refers; gives how many."""
        stored_before_ms = self._clock() - self._settings.blob_grace_ms
        deleted = 0
        for shelf in range(SHELVES):
            after: Digest | None = None
            while True:
                page = await self._keeper.list_blobs(
                    shelf, stored_before_ms=stored_before_ms, after=after, limit=FORGOTTEN_PER_COMMAND_MAX
                )
                if page:
                    deleted += await self._delete_unreferenced(engine, page)
                if len(page) < FORGOTTEN_PER_COMMAND_MAX:
                    break
                after = page[-1]
        return deleted

    async def _delete_unreferenced(self, engine: Decider, digests: Sequence[Digest]) -> int:
        view_sequence, referred = await asyncio.to_thread(self._views.references, digests)
        candidates = tuple(digest for digest in digests if digest not in referred)
        if not candidates:
            return 0
        decided_at_ms = self._clock()
        decision = await engine.submit(ForgetBlobs(candidates, view_sequence, self._settings.upload_grace_ms))
        forgotten = [
            digest for event in decision.events if isinstance(event, BlobsForgotten) for digest in event.digests
        ]
        if not forgotten:
            return 0
        gone = await self._keeper.delete_blobs(forgotten, decided_at_ms=decided_at_ms)
        logger.info("blobs.deleted named=%d gone=%d", len(forgotten), len(gone))
        return len(gone)


class EffectSinks:
    """Several sinks as one; each hears everything."""

    def __init__(self, *sinks: EffectSink) -> None:
        """In the order in which they hear."""
        self._sinks = sinks

    def apply(self, effects: Sequence[Effect]) -> None:
        """Hands the effects on."""
        for sink in self._sinks:
            sink.apply(effects)
