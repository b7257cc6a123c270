"""When a certificate is renewed: at half its life, with jitter, and again after growing pauses when that fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from fallow.credentials import Credentials
from fallow.enrollment import renew
from fallow_worker.core.limits import backoff_ms
from fallow_worker.full_disk import told_when_full

RENEW_AT: Final = 0.5
RENEW_JITTER: Final = 0.1
"""Part of the life over which renewals are spread: a thousand workers may have joined in the same minute."""
LOOK_EVERY_S: Final = 600.0
"""A sleeping laptop's timers stand still, its certificate does not."""
PAUSE_BASE_MS: Final = 60_000
PAUSE_CAP_MS: Final = 3_600_000


class Renewal:
    """Waits for the moment, and renews."""

    def __init__(
        self,
        *,
        renew: Callable[[Credentials], Awaitable[Credentials]] = renew,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        """`renew` asks the coordinator and keeps the answer on disk; `now_ms` is the wall clock."""
        self._renew = renew
        self._now_ms = now_ms
        self._jitter = random.SystemRandom().random()
        self._failures = 0

    async def due(self, credentials: Credentials) -> None:
        """Returns when it is time to renew these credentials."""
        at_ms = renewal_due_ms(credentials.not_before_ms, credentials.not_after_ms, self._jitter)
        for left_ms in iter(lambda: at_ms - self._now_ms(), None):
            if left_ms <= 0:
                return
            await asyncio.sleep(min(left_ms / 1000, LOOK_EVERY_S))

    async def renew(self, credentials: Credentials) -> Credentials:
        """Fresh credentials, on disk. Raises FallowError, STORAGE_FULL when there is no room for them."""
        with told_when_full(credentials.folder):
            fresh = await self._renew(credentials)
        self._failures = 0
        return fresh

    async def pause(self) -> None:
        """Waits before the next try."""
        delay_ms = backoff_ms(self._failures, 0.5 + self._jitter / 2, base_ms=PAUSE_BASE_MS, cap_ms=PAUSE_CAP_MS)
        self._failures += 1
        await asyncio.sleep(delay_ms / 1000)


def renewal_due_ms(not_before_ms: int, not_after_ms: int, jitter: float) -> int:
    """The moment to renew a certificate: at half its life, or up to a tenth of it later as `jitter` in [0, 1) says."""
    life_ms = not_after_ms - not_before_ms
    return not_before_ms + int(life_ms * (RENEW_AT + RENEW_JITTER * jitter))
