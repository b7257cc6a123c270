"""Token buckets: who asks too often is told to back off before anything is parsed; a fast stream is read later."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable

from fallow.errors import FallowError, Reason


class RateLimit:
    """One bucket a peer. Holds at most `peers_max` of them: the one longest unseen is forgotten first."""

    def __init__(self, *, per_s: float, burst: int, peers_max: int, clock: Callable[[], float]) -> None:
        """Lets each peer spend `burst` at once and `per_s` a second in the long run; `clock` gives seconds."""
        self._per_s = per_s
        self._burst = burst
        self._peers_max = peers_max
        self._clock = clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, peer: Hashable, cost: float = 1.0) -> None:
        """Takes what a call of `peer` costs; dear ones may leave a debt. Raises OVERLOADED when its bucket is empty."""
        now = self._clock()
        level, seen = self._buckets.pop(peer, (float(self._burst), now))
        level = min(float(self._burst), level + (now - seen) * self._per_s)
        empty = level < 1.0
        self._buckets[peer] = (level if empty else level - cost, now)
        while len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        if empty:
            raise FallowError(
                Reason.OVERLOADED,
                "too many calls from this address or key",
                limit=f"{self._burst} at once, {self._per_s:g} a second",
                hint="wait a little and try again",
            )


class Pace:
    """One stream's steady pace: who sends faster is read later, and the transport's flow control holds it back."""

    def __init__(self, *, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        """Lets `burst` through at once and `per_s` a second in the long run; `clock` gives seconds."""
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._level = self._burst
        self._seen = clock()

    async def keep(self, cost: float) -> None:
        """Returns when something of that cost may come in."""
        wait_s = self.wait_s(cost)
        if wait_s:
            await asyncio.sleep(wait_s)

    def wait_s(self, cost: float) -> float:
        """Takes something of that cost; how long it must wait to come in, 0 for not at all."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._seen) * self._per_s) - cost
        self._seen = now
        return -self._level / self._per_s if self._level < 0 else 0.0
