"""What a command's asker is told, beside the events."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import AccountId, JobId, LeaseId, PartyId, PoolId, SessionId, TokenId
from fallow.roles import Role, Tier
from fallow_coordinator.core.events import Event


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing more to say."""


@dataclass(frozen=True, slots=True)
class AccountMade:
    account_id: AccountId


@dataclass(frozen=True, slots=True)
class PoolMade:
    pool_id: PoolId


@dataclass(frozen=True, slots=True)
class TokenMade:
    token_id: TokenId
    role: Role
    tier: Tier | None
    pool_id: PoolId
    account_id: AccountId | None
    """None: joining makes an account of its own."""
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class CertificateGranted:
    """The facts that go into the certificate, which the service then signs."""

    party_id: PartyId
    account_id: AccountId
    role: Role
    tier: Tier | None
    pool_id: PoolId
    serial: bytes
    not_after_ms: int


@dataclass(frozen=True, slots=True)
class SessionGranted:
    session_id: SessionId
    kept: tuple[LeaseId, ...]


@dataclass(frozen=True, slots=True)
class JobAccepted:
    job_id: JobId
    repeated: bool
    """True when the idempotency key named a job that was there already."""


@dataclass(frozen=True, slots=True)
class Moved:
    """So many micro-credits, now or when the same transfer was asked for before."""

    microcredits: int
    repeated: bool


Answer = Done | AccountMade | PoolMade | TokenMade | CertificateGranted | SessionGranted | JobAccepted | Moved


@dataclass(frozen=True, slots=True)
class Decision:
    """What `decide` returns: events to make durable, and the answer to give once they are."""

    events: tuple[Event, ...] = ()
    answer: Answer = Done()
