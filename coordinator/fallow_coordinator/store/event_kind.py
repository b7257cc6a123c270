"""How one class of events becomes a protobuf message and comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from fallow_coordinator.core.events import Event

EventT = TypeVar("EventT", bound=Event)
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Kind(Generic[EventT, MessageT]):
    """One member of `Event.kind`."""

    name: str
    """The member's name in the proto."""
    event: type[EventT]
    encode: Callable[[EventT], MessageT]
    decode: Callable[[MessageT], EventT]


AnyKind = Kind[Any, Any]
"""A table of kinds has another type in each row, which no type can say."""
