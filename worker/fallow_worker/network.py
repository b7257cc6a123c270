"""How fast the way to the coordinator and the blob service is, from what goes over it anyway: nothing else is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from fallow.session import Capability

TRANSFER_BYTES_MIN: Final = 64 * 1024
"""Shorter transfers say more of the round trip than of the width."""
RATE_BYTES_PER_S_MAX: Final = 1 << 40


@dataclass(slots=True)
class NetworkMeter:
    """The figures of one worker since it started; 0: not known yet."""

    down_bytes_per_s: int = 0
    up_bytes_per_s: int = 0
    round_trip_microseconds: int = 0

    def received(self, length_bytes: int, seconds: float) -> None:
        """A blob came in that time."""
        self.down_bytes_per_s = _smoothed(self.down_bytes_per_s, length_bytes, seconds)

    def sent(self, length_bytes: int, seconds: float) -> None:
        """A blob went out in that time."""
        self.up_bytes_per_s = _smoothed(self.up_bytes_per_s, length_bytes, seconds)

    def answered(self, seconds: float) -> None:
        """A message was answered after that time, the coordinator's disk included: the shortest counts."""
        took = max(1, int(seconds * 1_000_000))
        self.round_trip_microseconds = min(self.round_trip_microseconds or took, took)

    def into(self, capability: Capability) -> Capability:
        """The capability with these figures."""
        return replace(
            capability,
            network_down_bytes_per_s=self.down_bytes_per_s,
            network_up_bytes_per_s=self.up_bytes_per_s,
            network_round_trip_microseconds=self.round_trip_microseconds,
        )


def _smoothed(before: int, length_bytes: int, seconds: float) -> int:
    if length_bytes < TRANSFER_BYTES_MIN:
        return before
    rate = min(RATE_BYTES_PER_S_MAX, int(length_bytes / max(seconds, 1e-6)))
    return max(1, (3 * before + rate) // 4 if before else rate)
