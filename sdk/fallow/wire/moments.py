"""Moments and durations: integer milliseconds inside, protobuf's own types on the wire."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def moment_to_message(at_ms: int) -> Timestamp:
    """Milliseconds since 1970 as a timestamp."""
    return Timestamp(seconds=at_ms // 1000, nanos=(at_ms % 1000) * 1_000_000)


def moment_from_message(message: Timestamp) -> int:
    """Milliseconds since 1970; an unset timestamp is 0."""
    return message.seconds * 1000 + message.nanos // 1_000_000


def duration_to_message(duration_ms: int) -> Duration:
    """Milliseconds as a duration."""
    return Duration(seconds=duration_ms // 1000, nanos=(duration_ms % 1000) * 1_000_000)


def duration_from_message(message: Duration) -> int:
    """Milliseconds; an unset duration is 0."""
    return message.seconds * 1000 + message.nanos // 1_000_000
