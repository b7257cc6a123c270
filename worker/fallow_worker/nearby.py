"""Reads blobs from caches of the pool in this network, where that is possible; the blob service has the last word.

A cache is believed nothing: digests are checked, wrong bytes are refused and their cache rests. What a cache lacks it
is given afterwards, so that the next worker of the network finds it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import grpc

from fallow.blob_client import BlobClient
from fallow.channel import pool_cache_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import KIB
from fallow.session import BlobReference, PoolCache, SignedBytes
from fallow.wire.blob import decode_grant
from fallow_worker.bundle_cache import BlobReader

_log = logging.getLogger(__name__)

NEARBY_BYTES_MIN: Final = 64 * KIB
"""Smaller blobs come from the blob service as quickly."""
SILENCE_S: Final = 3.0
"""A cache that sends nothing for so long is left."""
REST_S_MIN: Final = 30.0
REST_S_MAX: Final = 1_800.0
"""A cache that failed rests: doubling with each failure in a row."""
REST_POISONED_S: Final = 1_800.0
CHANNELS_MAX: Final = 8
LEAVINGS_AT_ONCE_MAX: Final = 2
LEAVE_SECONDS_MAX: Final = 600.0
_TASKS_MAX: Final = 32


class Outcome(StrEnum):
    """What came of asking a cache."""

    HERE = "here"
    LACKING = "lacking"
    FAILED = "failed"


@dataclass(slots=True)
class NearbyCounts:
    """What caches were good for, for status and tests."""

    pool_blobs_fetched: int = 0
    pool_bytes_fetched: int = 0
    pool_blobs_left: int = 0
    pool_blobs_wrong: int = 0
    pool_caches_failed: int = 0


@dataclass(slots=True)
class _Rest:
    until: float
    failures: int


class Nearby:
    """The caches that this worker was told of. Used from one event loop."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        dial: Callable[[Credentials, PoolCache], grpc.aio.Channel] = pool_cache_channel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`dial` makes channels; `clock` counts seconds."""
        self.counts = NearbyCounts()
        self._credentials = credentials
        self._dial = dial
        self._clock = clock
        self._channels: OrderedDict[PoolCache, grpc.aio.Channel] = OrderedDict()
        self._rests: dict[PoolCache, _Rest] = {}
        self._leaving = asyncio.Semaphore(LEAVINGS_AT_ONCE_MAX)
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, credentials: Credentials) -> None:
        """From now on shows this certificate."""
        self._credentials = credentials
        old, self._channels = self._channels, OrderedDict()
        for channel in old.values():
            self._start(channel.close())

    def reader(self, caches: Sequence[PoolCache], blobs: BlobReader) -> BlobReader:
        """Reads from `caches` where that works, and else from `blobs`."""
        return _NearbyReader(self, caches, blobs) if caches else blobs

    def awake(self, caches: Sequence[PoolCache], digest: Digest) -> list[PoolCache]:
        """Those that do not rest, in an order that all workers have for a blob."""
        now = self._clock()
        for cache in [cache for cache, rest in self._rests.items() if rest.until + REST_S_MAX <= now]:
            del self._rests[cache]
        ready = [cache for cache in caches if cache not in self._rests or self._rests[cache].until <= now]
        return sorted(ready, key=lambda cache: hashlib.sha256(digest + cache.endpoint.encode()).digest())

    async def fetch(self, cache: PoolCache, grant: SignedBytes, reference: BlobReference, path: Path) -> Outcome:
        """Brings a blob from a cache into a file that appears whole and right, or not at all."""
        loop = asyncio.get_running_loop()
        # A file of its own: half of what a liar sent must not become the beginning of what the blob service sends.
        arriving = path.with_name(f"{path.name}.near")
        try:
            async with asyncio.timeout(SILENCE_S) as patience:
                await self._client(cache).get_to_file(
                    grant,
                    reference,
                    arriving,
                    progress=lambda _: patience.reschedule(loop.time() + SILENCE_S),
                )
        except (FallowError, TimeoutError) as error:
            return self._failed(cache, reference, error)
        else:
            arriving.replace(path)
            self._rests.pop(cache, None)
            self.counts.pool_blobs_fetched += 1
            self.counts.pool_bytes_fetched += reference.length_bytes
            return Outcome.HERE
        finally:
            for left in (arriving, arriving.with_name(f"{arriving.name}.part")):
                left.unlink(missing_ok=True)

    def leave_soon(self, cache: PoolCache, grant: SignedBytes, path: Path) -> None:
        """Gives a cache what it lacked, beside everything else, if it can be."""
        if len(self._tasks) < _TASKS_MAX:
            self._start(self._leave(cache, grant, path))

    async def close(self) -> None:
        """Cuts what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def _failed(self, cache: PoolCache, reference: BlobReference, error: FallowError | TimeoutError) -> Outcome:
        if isinstance(error, FallowError) and error.reason is Reason.BLOB_UNKNOWN:
            return Outcome.LACKING
        wrong = isinstance(error, FallowError) and error.reason in {Reason.DIGEST_MISMATCH, Reason.MALFORMED_MESSAGE}
        failures = self._rests[cache].failures + 1 if cache in self._rests else 1
        seconds = REST_POISONED_S if wrong else min(REST_S_MAX, REST_S_MIN * 2 ** (failures - 1))
        self._rests[cache] = _Rest(self._clock() + seconds, failures)
        if wrong:
            self.counts.pool_blobs_wrong += 1
        else:
            self.counts.pool_caches_failed += 1
        _log.warning(
            "pool_cache.left endpoint=%s blob=%s wrong=%s rest_s=%g reason=%s",
            cache.endpoint, reference.digest.hex()[:16], wrong, seconds, str(error) or "it fell silent",
        )  # fmt: skip
        return Outcome.FAILED

    async def _leave(self, cache: PoolCache, grant: SignedBytes, path: Path) -> None:
        async with self._leaving:
            # It has room or not, and the file may be dropped meanwhile: nothing of it matters here.
            with contextlib.suppress(FallowError, OSError, TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS_MAX):
                    await self._client(cache).put(grant, path)
                self.counts.pool_blobs_left += 1

    def _client(self, cache: PoolCache) -> BlobClient:
        channel = self._channels.pop(cache, None) or self._dial(self._credentials, cache)
        self._channels[cache] = channel
        if len(self._channels) > CHANNELS_MAX:
            _, oldest = self._channels.popitem(last=False)
            self._start(oldest.close())
        return BlobClient(channel, attempts_max=1, direct=False)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _NearbyReader:
    """Caches first, the blob service last."""

    def __init__(self, nearby: Nearby, caches: Sequence[PoolCache], blobs: BlobReader) -> None:
        self._nearby = nearby
        self._caches = caches
        self._blobs = blobs

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        """As the blob service's."""
        lacking: PoolCache | None = None
        if reference.length_bytes >= NEARBY_BYTES_MIN and decode_grant(grant.payload).cache_pool_id is not None:
            for cache in self._nearby.awake(self._caches, reference.digest):
                outcome = await self._nearby.fetch(cache, grant, reference, path)
                if outcome is Outcome.HERE:
                    return
                if outcome is Outcome.LACKING:
                    lacking = lacking or cache
        await self._blobs.get_to_file(grant, reference, path)
        if lacking is not None:
            self._nearby.leave_soon(lacking, grant, path)
