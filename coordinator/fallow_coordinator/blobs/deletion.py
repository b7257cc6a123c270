"""Which blobs may really go: none that was stored, or for which a receipt was given out, too short a time ago.

Nothing of it is stored: whatever this process does not know, it takes for touched when it began.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from fallow.ids import Digest
from fallow_coordinator.blobs.storage import BlobStorage


class Touches:
    """When each blob was last stored or receipted, never later than the truth is earlier."""

    def __init__(self, *, began_at_ms: int, remembered_max: int) -> None:
        """`began_at_ms`: of what was before, nothing is known; so everything counts as touched then."""
        self._floor_ms = began_at_ms
        self._remembered_max = remembered_max
        self._touched_at_ms: OrderedDict[Digest, int] = OrderedDict()

    def touch(self, digest: Digest, now_ms: int) -> None:
        """The blob was stored, or a receipt for it is about to be given out."""
        self._touched_at_ms[digest] = max(now_ms, self._touched_at_ms.pop(digest, 0))
        if len(self._touched_at_ms) > self._remembered_max:
            _, forgotten_ms = self._touched_at_ms.popitem(last=False)
            self._floor_ms = max(self._floor_ms, forgotten_ms)

    def known(self, digest: Digest) -> bool:
        """Whether it was stored or receipted, as far back as is remembered."""
        return digest in self._touched_at_ms

    def last_ms(self, digest: Digest) -> int:
        """The latest moment at which it may have been stored or receipted."""
        return max(self._floor_ms, self._touched_at_ms.get(digest, 0))


@dataclass(slots=True)
class _Held:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class DigestLocks:
    """One at a time for each blob: finding it and giving a receipt, storing it, deleting it."""

    def __init__(self) -> None:
        self._held: dict[Digest, _Held] = {}

    @contextlib.asynccontextmanager
    async def held(self, digest: Digest) -> AsyncGenerator[None, None]:
        """While the block runs, nobody else holds the same digest."""
        held = self._held.setdefault(digest, _Held())
        held.users += 1
        try:
            async with held.lock:
                yield
        finally:
            held.users -= 1
            if not held.users:
                del self._held[digest]


async def delete_blobs(
    storage: BlobStorage,
    touches: Touches,
    locks: DigestLocks,
    digests: Sequence[Digest],
    *,
    untouched_since_ms: int,
    packed_only: bool,
) -> list[Digest]:
    """Deletes what may go; gives what is gone, or was not there.

    `packed_only`: blobs that no account ever uploaded go whatever their age, and no others.
    """
    gone: list[Digest] = []
    for digest in digests:
        async with locks.held(digest):
            if packed_only:
                may_go = not touches.known(digest) and not await storage.has_notes(digest)
            else:
                may_go = touches.last_ms(digest) < untouched_since_ms
            if may_go:
                await storage.delete(digest)
                gone.append(digest)
    return gone
