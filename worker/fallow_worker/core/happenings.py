"""What can happen to a worker: facts from its link, its fetches, its executor and its owner."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fallow.ids import LeaseId, SessionId
from fallow.session import (
    Capability,
    Cause,
    Checked,
    Commitment,
    GrantsRenewed,
    Inspection,
    Lease,
    LeaseRevoked,
    Refereed,
    Refused,
    Settled,
    SignedBytes,
    UploadOffer,
)


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The coordinator welcomed this worker."""

    session_id: SessionId
    heartbeat_interval_ms: int
    keep_lease_ids: frozenset[LeaseId]


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The session, or the try to open one, ended."""

    jitter: float
    """At least 0, less than 1; fresh chance."""
    not_before_ms: int = 0
    """Milliseconds from now that the coordinator asked to wait, beside the usual back-off."""


@dataclass(frozen=True, slots=True)
class Received:
    """The coordinator said something (a Welcome is SessionOpened, a Goodbye SessionEnded)."""

    message: Lease | UploadOffer | Settled | LeaseRevoked | Refused | GrantsRenewed


class FetchTrouble(StrEnum):
    """What to do about a fetch or upload that failed."""

    GRANT_EXPIRED = "grant-expired"
    TRY_AGAIN = "try-again"
    GIVE_UP = "give-up"


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bundle and input of a lease are here."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class FetchFailed:
    lease_id: LeaseId
    trouble: FetchTrouble
    reason: str
    jitter: float


@dataclass(frozen=True, slots=True)
class SlotFreed:
    """A run's rows are done; `Ran` or `RunFailed` follows."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Ran:
    """A run ended with rows or a report; the output's bytes lie with the daemon."""

    lease_id: LeaseId
    message: Commitment | Inspection | Checked | Refereed


@dataclass(frozen=True, slots=True)
class RunFailed:
    """A run ended without; also the answer to a cancelled one, whose cause does not matter then."""

    lease_id: LeaseId
    cause: Cause
    reason: str
    jitter: float


@dataclass(frozen=True, slots=True)
class Uploaded:
    lease_id: LeaseId
    receipt: SignedBytes


@dataclass(frozen=True, slots=True)
class UploadFailed:
    lease_id: LeaseId
    trouble: FetchTrouble
    reason: str
    jitter: float


@dataclass(frozen=True, slots=True)
class CapabilitySeen:
    """A look at this machine: what the worker can do now."""

    capability: Capability


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The owner wants the machine back: runs may go on for `run_grace_ms`, words with others a little longer."""

    reason: str
    run_grace_ms: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened, but something may be due."""


Happening = (
    SessionOpened
    | SessionEnded
    | Received
    | Fetched
    | FetchFailed
    | SlotFreed
    | Ran
    | RunFailed
    | Uploaded
    | UploadFailed
    | CapabilitySeen
    | DrainAsked
    | TimePassed
)
