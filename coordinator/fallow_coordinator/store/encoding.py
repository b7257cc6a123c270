"""Events ↔ the bytes of the journal: deterministic protobuf, one message for each event, nothing lost either way."""

from __future__ import annotations

from typing import Any, get_args

from google.protobuf.message import DecodeError

from fallow.journal.v1 import journal_pb2 as pb
from fallow.journal_proof import SALT_BYTES, leaf_of
from fallow_coordinator.core.events import Event
from fallow_coordinator.store import (
    carbon_events,
    credit_events,
    device_events,
    door_events,
    duplicate_events,
    health_events,
    identity_events,
    tolerance_events,
    verification_events,
    work_events,
)
from fallow_coordinator.store.event_kind import AnyKind

__all__ = ["KINDS", "SALT_BYTES", "EventUnreadable", "decode_event", "encode_event", "leaf_of"]

KINDS: tuple[AnyKind, ...] = (
    *identity_events.KINDS,
    *work_events.KINDS,
    *health_events.KINDS,
    *credit_events.KINDS,
    *device_events.KINDS,
    *carbon_events.KINDS,
    *door_events.KINDS,
    *duplicate_events.KINDS,
    *verification_events.KINDS,
    *tolerance_events.KINDS,
)
"""Every kind of event; complete, or importing this module fails."""

_BY_EVENT: dict[type, AnyKind] = {kind.event: kind for kind in KINDS}
_BY_NAME: dict[str, AnyKind] = {kind.name: kind for kind in KINDS}
assert set(_BY_EVENT) == set(get_args(Event)), "each event of the core has one kind"
assert set(_BY_NAME) == set(pb.Event.DESCRIPTOR.fields_by_name), "each kind of the proto has one event"


class EventUnreadable(Exception):  # named like WriterFenced and StorageFailed, beside which it is raised
    """Bytes of the journal that are no event this software knows: damaged, or written by a newer version."""


def encode_event(event: Event) -> bytes:
    """The deterministic bytes of an event: equal events give equal bytes, on every machine and in every run."""
    kind = _BY_EVENT[type(event)]
    member: dict[str, Any] = {kind.name: kind.encode(event)}
    return pb.Event(**member).SerializeToString(deterministic=True)


def decode_event(data: bytes) -> Event:
    """The event that `data` holds. Raises EventUnreadable."""
    try:
        message = pb.Event.FromString(data)
        name = message.WhichOneof("kind")
        if name is None:
            raise EventUnreadable("a record holds an event of a kind that this software does not know")
        event: Event = _BY_NAME[name].decode(getattr(message, name))
    except (DecodeError, ValueError) as error:
        raise EventUnreadable(f"a record holds no readable event: {error}") from error
    return event
