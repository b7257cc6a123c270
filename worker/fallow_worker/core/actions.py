"""What the daemon is told to do next."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import LeaseId
from fallow.session import (
    BundleOffer,
    CapabilityChanged,
    Checked,
    Commitment,
    Delivery,
    Draining,
    GrantsWanted,
    Inspection,
    Lease,
    LeaseReturned,
    Refereed,
    SignedBytes,
    TaskFailed,
)


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a session; the Hello lists what the world holds."""


@dataclass(frozen=True, slots=True)
class Say:
    """Send this message in the open session."""

    message: (
        Commitment
        | Delivery
        | Inspection
        | Checked
        | Refereed
        | TaskFailed
        | LeaseReturned
        | GrantsWanted
        | CapabilityChanged
        | Draining
    )


@dataclass(frozen=True, slots=True)
class SayHeartbeat:
    """Send a heartbeat with the progress of what runs."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring a lease's bundle and input to this machine."""

    lease: Lease
    offer: BundleOffer


@dataclass(frozen=True, slots=True)
class Run:
    """Begin a run."""

    lease: Lease
    offer: BundleOffer


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a run."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Upload:
    """Put the committed output into the blob service."""

    lease_id: LeaseId
    grant: SignedBytes


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a lease's input and output and stop its fetch or upload: it is settled, or nobody wants it.

    Nothing may be heard of the lease afterwards.
    """

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class ReleaseExecutor:
    """Stop runtimes to give memory back."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Close the session and end."""


Action = Connect | Say | SayHeartbeat | Fetch | Run | Cancel | Upload | Forget | ReleaseExecutor | Leave
