"""When a change of what a worker can do is worth telling the coordinator: every word of it is journaled over there."""

from __future__ import annotations

from dataclasses import replace

from fallow.session import Capability
from fallow_worker.core import limits


def advertised(before: Capability, seen: Capability) -> Capability:
    """What to advertise after seeing `seen`, when `before` is advertised: free memory moves in coarse steps alone.

    A step is `MEMORY_STEP_BYTES` or an eighth of what was advertised, whichever is more, so that memory that wavers
    around any value is told once.
    """
    step = max(limits.MEMORY_STEP_BYTES, before.memory_bytes_free // limits.MEMORY_STEP_PART)
    if abs(seen.memory_bytes_free - before.memory_bytes_free) < step:
        return replace(seen, memory_bytes_free=before.memory_bytes_free)
    return seen


def change_due_ms(said: Capability, now: Capability, said_at_ms: int) -> int | None:
    """The moment from which `now` may be told after `said` was told at `said_at_ms`; None when they are the same.

    Whatever changes, and changes back, is told at most every `CAPABILITY_SAID_EVERY_MS`; memory alone more rarely.
    """
    if now == said:
        return None
    memory_alone = replace(now, memory_bytes_free=said.memory_bytes_free) == said
    return said_at_ms + (limits.MEMORY_SAID_EVERY_MS if memory_alone else limits.CAPABILITY_SAID_EVERY_MS)
