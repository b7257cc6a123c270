"""Leases that another one outran: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import LeaseId, TaskId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store import values
from fallow_coordinator.store.event_kind import AnyKind, Kind

_AGREEMENTS = values.EnumTable(ev.Agreement, pb.Agreement.Value, "AGREEMENT")

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "late_lease_settled",
        ev.LateLeaseSettled,
        lambda event: pb.LateLeaseSettled(
            task_id=event.task_id,
            lease_id=event.lease_id,
            delivered_lease_id=event.delivered_lease_id,
            agreement=_AGREEMENTS.number(event.agreement),
            rows=event.rows,
            rows_failed=event.rows_failed,
            microcredits=event.microcredits,
            released=event.released,
            contribution_microcredits=event.contribution_microcredits,
            speed_milliunits_per_s=event.speed_milliunits_per_s,
            footprint=values.footprint_to_message(event.footprint),
        ),
        lambda message: ev.LateLeaseSettled(
            task_id=TaskId(message.task_id),
            lease_id=LeaseId(message.lease_id),
            delivered_lease_id=LeaseId(message.delivered_lease_id),
            agreement=_AGREEMENTS.member(message.agreement),
            rows=message.rows,
            rows_failed=message.rows_failed,
            microcredits=message.microcredits,
            released=message.released,
            contribution_microcredits=message.contribution_microcredits,
            speed_milliunits_per_s=message.speed_milliunits_per_s,
            footprint=values.footprint_from_message(message.footprint),
        ),
    ),
)
