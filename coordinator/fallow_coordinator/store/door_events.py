"""Who is let in where, and programs under suspicion: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import AccountId, Digest, PartyId, PoolId, TaskId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store import values
from fallow_coordinator.store.event_kind import AnyKind, Kind

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "account_admitted",
        ev.AccountAdmitted,
        lambda event: pb.AccountAdmitted(pool_id=event.pool_id, account_id=event.account_id),
        lambda message: ev.AccountAdmitted(PoolId(message.pool_id), AccountId(message.account_id)),
    ),
    Kind(
        "account_expelled",
        ev.AccountExpelled,
        lambda event: pb.AccountExpelled(pool_id=event.pool_id, account_id=event.account_id),
        lambda message: ev.AccountExpelled(PoolId(message.pool_id), AccountId(message.account_id)),
    ),
    Kind(
        "bundle_cleared",
        ev.BundleCleared,
        lambda event: pb.BundleCleared(
            bundle_digest=event.bundle_digest, task_id=event.task_id, worker_id=event.worker_id
        ),
        lambda message: ev.BundleCleared(
            Digest(message.bundle_digest), TaskId(message.task_id), PartyId(message.worker_id)
        ),
    ),
    Kind(
        "inspection_rows_given",
        ev.InspectionRowsGiven,
        lambda event: pb.InspectionRowsGiven(
            task_id=event.task_id, input=values.blob_to_message(event.input), inline=event.inline, rows=event.rows
        ),
        lambda message: ev.InspectionRowsGiven(
            TaskId(message.task_id), values.blob_from_message(message.input), message.inline, message.rows
        ),
    ),
    Kind(
        "bundle_released",
        ev.BundleReleased,
        lambda event: pb.BundleReleased(bundle_digest=event.bundle_digest),
        lambda message: ev.BundleReleased(Digest(message.bundle_digest)),
    ),
)
