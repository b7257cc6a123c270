"""Hosts that fail and recover: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import PartyId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store.event_kind import AnyKind, Kind

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "worker_struck",
        ev.WorkerStruck,
        lambda event: pb.WorkerStruck(worker_id=event.worker_id, strikes=event.strikes, cool_ms=event.cool_ms),
        lambda message: ev.WorkerStruck(PartyId(message.worker_id), message.strikes, message.cool_ms),
    ),
    Kind(
        "worker_warmed",
        ev.WorkerWarmed,
        lambda event: pb.WorkerWarmed(worker_id=event.worker_id),
        lambda message: ev.WorkerWarmed(PartyId(message.worker_id)),
    ),
)
