"""Credits: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import AccountId, JobId, PoolId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store.event_kind import AnyKind, Kind

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "pool_mode_changed",
        ev.PoolModeChanged,
        lambda event: pb.PoolModeChanged(pool_id=event.pool_id, mode=event.mode),
        lambda message: ev.PoolModeChanged(PoolId(message.pool_id), message.mode),
    ),
    Kind(
        "credits_granted",
        ev.CreditsGranted,
        lambda event: pb.CreditsGranted(
            account_id=event.account_id,
            microcredits=event.microcredits,
            note=event.note,
            transfer_id=event.transfer_id,
        ),
        lambda message: ev.CreditsGranted(
            AccountId(message.account_id), message.microcredits, message.note, message.transfer_id
        ),
    ),
    Kind(
        "credits_released",
        ev.CreditsReleased,
        lambda event: pb.CreditsReleased(
            account_id=event.account_id,
            microcredits=event.microcredits,
            note=event.note,
            transfer_id=event.transfer_id,
        ),
        lambda message: ev.CreditsReleased(
            AccountId(message.account_id), message.microcredits, message.note, message.transfer_id
        ),
    ),
    Kind(
        "allotment_set",
        ev.AllotmentSet,
        lambda event: pb.AllotmentSet(
            pool_id=event.pool_id,
            account_id=event.account_id,
            microcredits=event.microcredits,
            period_ms=event.period_ms,
            renews_at_ms=event.renews_at_ms,
            granted_microcredits=event.granted_microcredits,
            lapsed_microcredits=event.lapsed_microcredits,
        ),
        lambda message: ev.AllotmentSet(
            pool_id=PoolId(message.pool_id),
            account_id=AccountId(message.account_id),
            microcredits=message.microcredits,
            period_ms=message.period_ms,
            renews_at_ms=message.renews_at_ms,
            granted_microcredits=message.granted_microcredits,
            lapsed_microcredits=message.lapsed_microcredits,
        ),
    ),
    Kind(
        "allotment_renewed",
        ev.AllotmentRenewed,
        lambda event: pb.AllotmentRenewed(
            pool_id=event.pool_id,
            account_id=event.account_id,
            renews_at_ms=event.renews_at_ms,
            granted_microcredits=event.granted_microcredits,
            lapsed_microcredits=event.lapsed_microcredits,
        ),
        lambda message: ev.AllotmentRenewed(
            pool_id=PoolId(message.pool_id),
            account_id=AccountId(message.account_id),
            renews_at_ms=message.renews_at_ms,
            granted_microcredits=message.granted_microcredits,
            lapsed_microcredits=message.lapsed_microcredits,
        ),
    ),
    Kind(
        "job_funded",
        ev.JobFunded,
        lambda event: pb.JobFunded(job_id=event.job_id, microcredits=event.microcredits, transfer_id=event.transfer_id),
        lambda message: ev.JobFunded(JobId(message.job_id), message.microcredits, message.transfer_id),
    ),
)
