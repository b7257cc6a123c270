"""Moments and durations: integer milliseconds inside, protobuf's own types on the wire."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def moment_to_message(at_ms: int) -> Timestamp:
    """Milliseconds since 1970 as a timestamp."""
    return Timestamp(seconds=at_ms // 1000, nanos=(at_ms % 1000) * 1_000_000)


def moment_from_message(message: Timestamp) -> int:
    """Milliseconds since 1970; an unset timestamp is 0, one beyond the year 9999 its end."""
    return _within(message.seconds) * 1000 + message.nanos // 1_000_000


def duration_to_message(duration_ms: int) -> Duration:
    """Milliseconds as a duration."""
    return Duration(seconds=duration_ms // 1000, nanos=(duration_ms % 1000) * 1_000_000)


def duration_from_message(message: Duration) -> int:
    """Milliseconds; an unset duration is 0, one beyond 8,000 years as long as that."""
    return _within(message.seconds) * 1000 + message.nanos // 1_000_000


_SECONDS_MAX = 253_402_300_799
"""9999-12-31T23:59:59Z, the end of protobuf's timestamps; later milliseconds fit no database's integers."""


def _within(seconds: int) -> int:
    return max(-_SECONDS_MAX, min(_SECONDS_MAX, seconds))
