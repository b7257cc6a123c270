"""How long something took, many times: counts in buckets that grow by a twelfth of their size, cheap to add to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

LOWEST_MS: Final = 0.1
BUCKETS_PER_OCTAVE: Final = 8
OCTAVES: Final = 18
BUCKETS: Final = OCTAVES * BUCKETS_PER_OCTAVE + 1
"""From 0.1 ms up to 26 s; what is longer counts as that."""


class Latencies:
    """A histogram of durations."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        """Nothing was measured yet."""
        self.counts = [0] * BUCKETS
        """Bucket i holds what took up to `upper_bound_ms(i)`, and more than the one before."""

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bucket_of(seconds * 1e3)] += 1


def bucket_of(duration_ms: float) -> int:
    """The bucket in which a duration counts."""
    if duration_ms <= LOWEST_MS:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log2(duration_ms / LOWEST_MS) * BUCKETS_PER_OCTAVE))


def upper_bound_ms(bucket: int) -> float:
    """The longest duration of a bucket."""
    return LOWEST_MS * math.pow(2.0, bucket / BUCKETS_PER_OCTAVE)


def quantile_ms(counts: Sequence[int], share: float) -> float:
    """The duration that `share` of all did not exceed, as the upper bound of its bucket; 0 when there are none."""
    total = sum(counts)
    wanted = share * total
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return upper_bound_ms(bucket)
    return 0.0
