"""How far classes lie apart: its events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import AccountId, Digest
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import tolerance_events as ev
from fallow_coordinator.store.event_kind import AnyKind, Kind

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "deviations_learned",
        ev.DeviationsLearned,
        lambda event: pb.DeviationsLearned(
            bundle_digest=event.bundle_digest,
            referee_class=event.referee_class,
            candidate_class=event.candidate_class,
            account_id=event.account_id,
            deviations_ppm=event.deviations_ppm,
        ),
        lambda message: ev.DeviationsLearned(
            Digest(message.bundle_digest),
            message.referee_class,
            message.candidate_class,
            AccountId(message.account_id),
            tuple(message.deviations_ppm),
        ),
    ),
)
