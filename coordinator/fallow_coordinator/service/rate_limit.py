"""Token buckets for peers: who asks too often is told to back off before anything is parsed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from fallow.errors import FallowError, Reason


class RateLimit:
    """One bucket a peer. Holds at most `peers_max` of them: the one longest unseen is forgotten first."""

    def __init__(self, *, per_s: float, burst: int, peers_max: int, clock: Callable[[], float]) -> None:
        """Lets each peer make `burst` calls at once and `per_s` a second in the long run; `clock` gives seconds."""
        self._per_s = per_s
        self._burst = burst
        self._peers_max = peers_max
        self._clock = clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, peer: Hashable) -> None:
        """Counts one call of `peer`. Raises OVERLOADED when its bucket is empty."""
        now = self._clock()
        level, seen = self._buckets.pop(peer, (float(self._burst), now))
        level = min(float(self._burst), level + (now - seen) * self._per_s)
        empty = level < 1.0
        self._buckets[peer] = (level if empty else level - 1.0, now)
        while len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        if empty:
            raise FallowError(
                Reason.OVERLOADED,
                "too many calls from this address or key",
                limit=f"{self._burst} at once, {self._per_s:g} a second",
                hint="wait a little and try again",
            )
