"""When a change of what a worker can do is worth telling the coordinator: every word of it is journaled over there."""

from __future__ import annotations

from dataclasses import replace

from fallow.session import Capability
from fallow_worker.core import limits


def advertised(before: Capability, seen: Capability) -> Capability:
    """What to advertise after seeing `seen`, when `before` is advertised: what wavers moves in coarse steps alone.

    A step is `MEMORY_STEP_BYTES` or an eighth of what was advertised, whichever is more, so that memory that wavers
    around any value is told once.
    """
    seen = replace(
        seen,
        network_down_bytes_per_s=_coarse(before.network_down_bytes_per_s, seen.network_down_bytes_per_s),
        network_up_bytes_per_s=_coarse(before.network_up_bytes_per_s, seen.network_up_bytes_per_s),
        network_round_trip_microseconds=_coarse(
            before.network_round_trip_microseconds, seen.network_round_trip_microseconds
        ),
    )
    step = max(limits.MEMORY_STEP_BYTES, before.memory_bytes_free // limits.MEMORY_STEP_PART)
    if abs(seen.memory_bytes_free - before.memory_bytes_free) < step:
        return replace(seen, memory_bytes_free=before.memory_bytes_free)
    return seen


def change_due_ms(said: Capability, now: Capability, said_at_ms: int) -> int | None:
    """The moment from which `now` may be told after `said` was told at `said_at_ms`; None when they are the same.

    Whatever changes, and changes back, is told at most every `CAPABILITY_SAID_EVERY_MS`; free memory and the network
    alone more rarely.
    """
    if now == said:
        return None
    wavering_alone = (
        replace(
            now,
            memory_bytes_free=said.memory_bytes_free,
            network_down_bytes_per_s=said.network_down_bytes_per_s,
            network_up_bytes_per_s=said.network_up_bytes_per_s,
            network_round_trip_microseconds=said.network_round_trip_microseconds,
        )
        == said
    )
    return said_at_ms + (limits.MEMORY_SAID_EVERY_MS if wavering_alone else limits.CAPABILITY_SAID_EVERY_MS)


def _coarse(before: int, seen: int) -> int:
    """A figure of the network as it is told: the one before until it has changed by `NETWORK_STEP_PERCENT`."""
    if not seen:
        return before
    low, high = sorted((before, seen))
    return seen if not before or 100 * high >= limits.NETWORK_STEP_PERCENT * low else before
