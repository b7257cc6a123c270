"""The journal itself, accounts, tokens, parties and sessions: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import AccountId, Digest, KeyFingerprint, LeaseId, PartyId, PoolId, SessionId, TokenId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store import values
from fallow_coordinator.store.event_kind import AnyKind, Kind


def _token_issued_to(event: ev.TokenIssued) -> pb.TokenIssued:
    return pb.TokenIssued(
        token_id=event.token_id,
        secret_digest=event.secret_digest,
        account_id=event.account_id,
        role=values.ROLES.number(event.role),
        tier=values.TIERS.number(event.tier),
        pool_id=event.pool_id,
        uses_max=event.uses_max,
        expires_at_ms=event.expires_at_ms,
        tags=event.tags,
    )


def _token_issued_from(message: pb.TokenIssued) -> ev.TokenIssued:
    return ev.TokenIssued(
        token_id=TokenId(message.token_id),
        secret_digest=Digest(message.secret_digest),
        account_id=AccountId(message.account_id) if message.HasField("account_id") else None,
        role=values.ROLES.member(message.role),
        tier=values.TIERS.member_or_none(message.tier),
        pool_id=PoolId(message.pool_id),
        uses_max=message.uses_max,
        expires_at_ms=message.expires_at_ms,
        tags=tuple(message.tags),
    )


def _party_enrolled_to(event: ev.PartyEnrolled) -> pb.PartyEnrolled:
    return pb.PartyEnrolled(
        party_id=event.party_id,
        key_fingerprint=event.key_fingerprint,
        public_key=event.public_key,
        account_id=event.account_id,
        role=values.ROLES.number(event.role),
        tier=values.TIERS.number(event.tier),
        pool_id=event.pool_id,
        token_id=event.token_id,
        name=event.name,
        machine_digest=event.machine_digest,
    )


def _party_enrolled_from(message: pb.PartyEnrolled) -> ev.PartyEnrolled:
    return ev.PartyEnrolled(
        party_id=PartyId(message.party_id),
        key_fingerprint=KeyFingerprint(message.key_fingerprint),
        public_key=message.public_key,
        account_id=AccountId(message.account_id),
        role=values.ROLES.member(message.role),
        tier=values.TIERS.member_or_none(message.tier),
        pool_id=PoolId(message.pool_id),
        token_id=TokenId(message.token_id) if message.HasField("token_id") else None,
        name=message.name,
        machine_digest=message.machine_digest,
    )


def _session_opened_to(event: ev.SessionOpened) -> pb.SessionOpened:
    return pb.SessionOpened(
        session_id=event.session_id,
        worker_id=event.worker_id,
        resume_token_digest=event.resume_token_digest,
        capability=values.capability_to_message(event.capability),
        window=event.window,
        kept_lease_ids=event.kept,
        presented_token_digest=event.presented_token_digest,
        machine_digest=event.machine_digest,
    )


def _session_opened_from(message: pb.SessionOpened) -> ev.SessionOpened:
    return ev.SessionOpened(
        session_id=SessionId(message.session_id),
        worker_id=PartyId(message.worker_id),
        resume_token_digest=Digest(message.resume_token_digest),
        capability=values.capability_from_message(message.capability),
        window=message.window,
        kept=tuple([LeaseId(lease) for lease in message.kept_lease_ids]),
        presented_token_digest=(
            Digest(message.presented_token_digest) if message.HasField("presented_token_digest") else None
        ),
        machine_digest=message.machine_digest,
    )


def _capability_reported_to(event: ev.CapabilityReported) -> pb.CapabilityReported:
    return pb.CapabilityReported(
        session_id=event.session_id,
        capability=None if event.capability is None else values.capability_to_message(event.capability),
        window=event.window,
    )


def _capability_reported_from(message: pb.CapabilityReported) -> ev.CapabilityReported:
    return ev.CapabilityReported(
        session_id=SessionId(message.session_id),
        capability=values.capability_from_message(message.capability) if message.HasField("capability") else None,
        window=message.window,
    )


KINDS: tuple[AnyKind, ...] = (
    Kind(
        "journal_started",
        ev.JournalStarted,
        lambda event: pb.JournalStarted(journal_id=event.journal_id),
        lambda message: ev.JournalStarted(message.journal_id),
    ),
    Kind(
        "restarted",
        ev.Restarted,
        lambda event: pb.Restarted(epoch=event.epoch, down_time_ms=event.down_time_ms),
        lambda message: ev.Restarted(epoch=message.epoch, down_time_ms=message.down_time_ms),
    ),
    Kind(
        "account_created",
        ev.AccountCreated,
        lambda event: pb.AccountCreated(account_id=event.account_id, name=event.name),
        lambda message: ev.AccountCreated(AccountId(message.account_id), message.name),
    ),
    Kind(
        "pool_created",
        ev.PoolCreated,
        lambda event: pb.PoolCreated(
            pool_id=event.pool_id,
            account_id=event.account_id,
            name=event.name,
            mode=event.mode,
            policy=event.policy,
            closed=event.closed,
        ),
        lambda message: ev.PoolCreated(
            pool_id=PoolId(message.pool_id),
            account_id=AccountId(message.account_id),
            name=message.name,
            mode=message.mode,
            policy=message.policy,
            closed=message.closed,
        ),
    ),
    Kind("token_issued", ev.TokenIssued, _token_issued_to, _token_issued_from),
    Kind(
        "token_revoked",
        ev.TokenRevoked,
        lambda event: pb.TokenRevoked(token_id=event.token_id),
        lambda message: ev.TokenRevoked(TokenId(message.token_id)),
    ),
    Kind("party_enrolled", ev.PartyEnrolled, _party_enrolled_to, _party_enrolled_from),
    Kind(
        "certificate_issued",
        ev.CertificateIssued,
        lambda event: pb.CertificateIssued(
            party_id=event.party_id, serial=event.serial, not_after_ms=event.not_after_ms
        ),
        lambda message: ev.CertificateIssued(PartyId(message.party_id), message.serial, message.not_after_ms),
    ),
    Kind(
        "party_revoked",
        ev.PartyRevoked,
        lambda event: pb.PartyRevoked(party_id=event.party_id, reason=event.reason),
        lambda message: ev.PartyRevoked(PartyId(message.party_id), message.reason),
    ),
    Kind(
        "worker_quarantined",
        ev.WorkerQuarantined,
        lambda event: pb.WorkerQuarantined(worker_id=event.worker_id, reason=event.reason),
        lambda message: ev.WorkerQuarantined(PartyId(message.worker_id), message.reason),
    ),
    Kind(
        "worker_released",
        ev.WorkerReleased,
        lambda event: pb.WorkerReleased(worker_id=event.worker_id),
        lambda message: ev.WorkerReleased(PartyId(message.worker_id)),
    ),
    Kind("session_opened", ev.SessionOpened, _session_opened_to, _session_opened_from),
    Kind(
        "session_closed",
        ev.SessionClosed,
        lambda event: pb.SessionClosed(session_id=event.session_id, reason=event.reason),
        lambda message: ev.SessionClosed(SessionId(message.session_id), message.reason),
    ),
    Kind("capability_reported", ev.CapabilityReported, _capability_reported_to, _capability_reported_from),
)
