"""Virtual time and seeded chance: everything that happens in a simulation is a callback at a moment."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[], None]


class SimulationError(AssertionError):
    """The system broke a promise; the message says which."""


@dataclass(frozen=True)
class Faults:
    """How bad the world is while faults last."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_ms_max: int = 20
    worker_crash: float = 0.0
    """Chance for each worker and second."""
    coordinator_crash: float = 0.0
    """Chance for each second."""
    link_break: float = 0.0
    """Chance for each link and second."""
    task_trouble: float = 0.0
    """Chance for each lease to fail, hang, return or lie."""
    pack_trouble: float = 0.0


class Schedule:
    """What happens when; callbacks at one moment run in the order in which they were asked for."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now_ms = 0
        self._count = 0
        self._heap: list[tuple[int, int, Action]] = []

    def after(self, delay_ms: int, action: Action) -> None:
        """Calls `action` in `delay_ms`."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_ms + max(0, delay_ms), self._count, action))

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return self.dice.randint(low, high)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return probability > 0 and self.dice.random() < probability

    def run(self, *, until_ms: int, done: Callable[[], bool]) -> bool:
        """Runs until `done` or `until_ms`; whether it is done."""
        while self._heap and not done():
            at_ms, _, action = self._heap[0]
            if at_ms > until_ms:
                break
            heapq.heappop(self._heap)
            self.now_ms = at_ms
            action()
        return done()
