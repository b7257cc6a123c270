"""What a worker holds: its session, its leases with their phases, its executor. Plain values that never change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fallow.bundle import Precision
from fallow.ids import Digest, LeaseId, SessionId
from fallow.session import (
    BundleOffer,
    Capability,
    Checked,
    Commitment,
    Delivery,
    HeldLease,
    Inspection,
    Lease,
    LeaseReturned,
    Refereed,
    SignedBytes,
    TaskFailed,
    TaskKind,
)

# ------------------------------------------------------------------------------------------------- the session


@dataclass(frozen=True, slots=True)
class Offline:
    """No session; the next try is due at `retry_at_ms`. `attempts` counts tries since the last one that held."""

    retry_at_ms: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Connecting:
    """A session is being opened; its Hello says `window_said` and `capability_said`."""

    attempts: int
    window_said: int
    capability_said: Capability = field(default_factory=Capability)


@dataclass(frozen=True, slots=True)
class Online:
    """A session is open."""

    session_id: SessionId
    opened_at_ms: int
    heartbeat_interval_ms: int
    heartbeat_due_ms: int
    attempts: int
    """Tries before this one; forgotten once the session has lasted `SESSION_HOLDS_MS`."""
    window_said: int
    window_due_ms: int
    """The window may be said anew from this moment on."""
    draining_said: bool = False
    capability_said: Capability = field(default_factory=Capability)
    capability_said_at_ms: int = 0


SessionState = Offline | Connecting | Online


# ------------------------------------------------------------------------------------------------- phases of a lease


@dataclass(frozen=True, slots=True)
class Granted:
    """Its bundle and input are not here yet. `attempts` fetches failed; the next may start at `retry_at_ms`."""

    attempts: int = 0
    retry_at_ms: int = 0


@dataclass(frozen=True, slots=True)
class AwaitingGrants:
    """Its grants ran out. `said_in` is the session that was asked for new ones, None when none was yet."""

    attempts: int
    said_in: SessionId | None = None
    said_at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Fetching:
    """Its bundle and input are being fetched."""

    attempts: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything it needs is on this machine."""


@dataclass(frozen=True, slots=True)
class Running:
    """An executor slot works on it."""

    started_at_ms: int


@dataclass(frozen=True, slots=True)
class Finishing:
    """Its rows are done and its slot is free; its root is being computed."""


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Its run is to stop, but its slot is not free yet. `told`: the executor knows."""

    told: bool
    then: LeaseReturned | None
    """What to say afterwards; None when nobody wants to hear of it."""


Message = Commitment | Delivery | Inspection | Checked | Refereed
"""What must be said again, word for word, until it is answered."""


@dataclass(frozen=True, slots=True)
class Telling:
    """`message` waits for its answer. Said in session `said_in` (None: not yet in any), `times` times there."""

    message: Message
    commitment: Commitment | None
    """What the worker is bound to; None for inspections."""
    said_in: SessionId | None = None
    said_at_ms: int = 0
    times: int = 0


@dataclass(frozen=True, slots=True)
class Uploading:
    """Its committed output is being uploaded under `grant`."""

    commitment: Commitment
    grant: SignedBytes
    attempts: int


@dataclass(frozen=True, slots=True)
class UploadWaiting:
    """Its output will be uploaded from `retry_at_ms` on."""

    commitment: Commitment
    grant: SignedBytes
    attempts: int
    retry_at_ms: int


@dataclass(frozen=True, slots=True)
class GivenUp:
    """It could not be done here; `message` is said until it is answered, in one session after the other.

    Said in session `said_in` (None: not yet in any), `times` times there. The answer is that the lease is over.
    """

    message: TaskFailed | LeaseReturned
    said_in: SessionId | None = None
    said_at_ms: int = 0
    times: int = 0


Phase = (
    Granted
    | AwaitingGrants
    | Fetching
    | Ready
    | Running
    | Finishing
    | Cancelling
    | Telling
    | Uploading
    | UploadWaiting
    | GivenUp
)


@dataclass(frozen=True, slots=True)
class Held:
    """A lease and how far it is."""

    lease: Lease
    phase: Phase
    order: int
    """Leases that came earlier have lower numbers."""

    @property
    def lease_id(self) -> LeaseId:
        return self.lease.lease_id

    @property
    def fence(self) -> int:
        return self.lease.fence

    @property
    def input_bytes(self) -> int:
        """What its input block, and what it is compared with, takes here."""
        own = self.lease.input.length_bytes if self.lease.input else 0
        return own + sum(candidate.block.length_bytes for candidate in self.lease.candidates)

    @property
    def committed(self) -> bool:
        """Whether a commitment or inspection for it was said in any session."""
        match self.phase:
            case Telling(message=Delivery()) | Uploading() | UploadWaiting():
                return True
            case Telling(said_in=said_in):
                return said_in is not None
            case _:
                return False


# ------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True, slots=True)
class Terms:
    """What this worker takes on: fixed while it runs."""

    slots: int
    """Leases that run at once."""
    task_kinds: frozenset[TaskKind]
    precisions: frozenset[Precision] = frozenset(Precision)
    refusal: str = ""
    """Why this worker takes no foreign programs at all; empty when it does."""
    idle_release_ms: int = 300_000
    """Without work for so long, the executor gives its memory back."""
    runs_queued: int = 0
    """Leases given to the executor beyond its slots: it begins the next while its children finish the last."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The platform failed `failures` times in a row; nothing new is begun before `until_ms`."""

    failures: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class Drain:
    """The worker takes nothing more. What runs at `runs_until_ms` is returned; at `leave_at_ms` it leaves anyway."""

    reason: str
    runs_until_ms: int
    leave_at_ms: int


def _no_leases() -> Mapping[LeaseId, Held]:
    return MappingProxyType({})


def _no_offers() -> Mapping[Digest, BundleOffer]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class World:
    """Everything that decides what a worker does next."""

    terms: Terms
    session: SessionState
    capability: Capability = field(default_factory=Capability)
    """What the worker can do, as it is advertised: free memory in coarse steps."""
    leases: Mapping[LeaseId, Held] = field(default_factory=_no_leases)
    """Every lease that is neither settled, nor dropped, nor given back; in order of arrival."""
    offers: Mapping[Digest, BundleOffer] = field(default_factory=_no_offers)
    """Bundles known from this and earlier sessions, at most `OFFERS_KEPT_MAX`, the latest named one last."""
    forgotten: tuple[LeaseId, ...] = ()
    """Leases whose bytes still lie here and are to be dropped."""
    leases_seen: int = 0
    run_ms_typical: int = 0
    """Moving mean of how long runs took; 0 before the first."""
    executor_warm: bool = False
    """Whether runtimes may be up."""
    busy_at_ms: int = 0
    """The last moment at which a lease was held."""
    trouble: Trouble | None = None
    drain: Drain | None = None
    left: bool = False
    """Nothing more is to be done."""

    @property
    def runs(self) -> int:
        """Executor slots in use."""
        return sum(isinstance(held.phase, Running | Cancelling) for held in self.leases.values())

    @property
    def fetches(self) -> int:
        """Fetches under way."""
        return sum(isinstance(held.phase, Fetching) for held in self.leases.values())

    @property
    def uploads(self) -> int:
        """Uploads under way."""
        return sum(isinstance(held.phase, Uploading) for held in self.leases.values())

    def held_leases(self) -> tuple[HeldLease, ...]:
        """What a Hello lists: every lease that this worker wants to go on with or give back by name."""
        return tuple(
            HeldLease(held.lease_id, held.fence, held.committed)
            for held in self.leases.values()
            if not (isinstance(held.phase, Cancelling) and held.phase.then is None)
        )
