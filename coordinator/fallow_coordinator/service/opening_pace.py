"""When sessions open: a few at a time, and after one that brought much work there is room for everybody else.

A fleet that was cut off comes back at one moment. Each session that opens may be leased a whole window at once, which
takes the writer and the signer tens of milliseconds; a thousand of them in a row would keep every other call waiting
until the last has its work.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

OPENINGS_AT_ONCE: Final = 8
"""They may share a commit."""
ROOM_S_PER_EVENT: Final = 40e-6
"""Time for others after an opening, for each event that it led to: about a third of what deciding, packing, signing and
sending takes for it."""
ROOM_S_MAX: Final = 0.05


class OpeningPace:
    """Who opens next: first come, first served."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._turns = asyncio.Semaphore(OPENINGS_AT_ONCE)
        self._next_at_s = 0.0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncGenerator[None, None]:
        """Begins when it is one's turn; the session opens inside. Whoever gives up waiting keeps nobody."""
        async with self._turns:
            # Who opens meanwhile moves the moment; nobody tells when it comes.
            while (wait_s := self._next_at_s - self._clock()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(wait_s)
            yield

    def led_to(self, events: int) -> None:
        """An opening led to so many events: the next begins only when others had their time."""
        room_s = min(ROOM_S_MAX, events * ROOM_S_PER_EVENT)
        self._next_at_s = max(self._next_at_s, self._clock()) + room_s
