"""How many streams run at once, and who goes on with an upload that two streams want."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Generator

from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint


class Gate:
    """Counts streams of one kind, in all and of each peer."""

    def __init__(self, what: str, *, streams_max: int, per_peer_max: int) -> None:
        """`what` names them to the one who is refused."""
        self._what = what
        self._streams_max = streams_max
        self._per_peer_max = per_peer_max
        self._of_peer: Counter[KeyFingerprint] = Counter()
        self._streams = 0

    @contextlib.contextmanager
    def entered(self, peer: KeyFingerprint) -> Generator[None, None, None]:
        """Counts this stream while it runs. Raises OVERLOADED."""
        if self._of_peer[peer] >= self._per_peer_max:
            raise _overloaded(f"too many {self._what} of this peer", self._per_peer_max)
        if self._streams >= self._streams_max:
            raise _overloaded(f"too many {self._what}", self._streams_max)
        self._streams += 1
        self._of_peer[peer] += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._of_peer[peer] -= 1
            if not self._of_peer[peer]:
                del self._of_peer[peer]


class Turn:
    """One stream's right to write one upload; it says when it advances, and is cut off when it stands still."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self.advanced_at_s = self._loop.time()
        self.ended = asyncio.Event()
        self.taken_over = False
        """A newcomer goes on with this upload."""
        self.deadline = asyncio.timeout(patience_s)
        """Runs around the reading of the stream."""

    def advance(self) -> None:
        """Another chunk came."""
        self.advanced_at_s = self._loop.time()
        self.deadline.reschedule(self.advanced_at_s + self._patience_s)

    def take_over(self) -> None:
        """Cuts the stream off at once."""
        self.taken_over = True
        with contextlib.suppress(RuntimeError):
            # Not entered yet or just ended: it will see `taken_over`, or gives up its turn anyway.
            self.deadline.reschedule(self._loop.time())


class Turns:
    """One turn at a time for each upload. A half-open predecessor is pushed aside; a live one is waited for."""

    def __init__(self, *, patience_s: float, takeover_patience_s: float) -> None:
        """`patience_s`: standing still at all; `takeover_patience_s`: standing still while another one waits."""
        self._patience_s = patience_s
        self._takeover_patience_s = takeover_patience_s
        self._turns: dict[str, Turn] = {}

    @contextlib.asynccontextmanager
    async def taken(self, key: str) -> AsyncGenerator[Turn, None]:
        """Waits until nobody else writes this upload."""
        while (predecessor := self._turns.get(key)) is not None:
            await self._outwait(predecessor)
        turn = self._turns[key] = Turn(self._patience_s)
        try:
            yield turn
        finally:
            del self._turns[key]
            turn.ended.set()

    async def _outwait(self, predecessor: Turn) -> None:
        loop = asyncio.get_running_loop()
        while not predecessor.ended.is_set():
            stalled_at_s = predecessor.advanced_at_s + self._takeover_patience_s
            if loop.time() >= stalled_at_s and not predecessor.taken_over:
                predecessor.take_over()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.1, stalled_at_s - loop.time())):
                    await predecessor.ended.wait()


def _overloaded(message: str, limit: int) -> FallowError:
    return FallowError(
        Reason.OVERLOADED, message, field="streams", limit=f"{limit} at once", hint="wait a moment and try again"
    )
