"""What worker and coordinator say to each other, as plain values; `fallow.wire.session` puts them into protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fallow.bundle import InspectionReport, Precision
from fallow.challenge import ChallengePlan, ChallengeVerdict
from fallow.comparison import RowFinding, ToleranceProfile
from fallow.ids import Digest, LeaseId, PoolId, SessionId


class TaskKind(StrEnum):
    """What is leased. Volunteers know map, train, evaluate and challenge; audits look like map."""

    MAP = "map"
    TRAIN = "train"
    EVALUATE = "evaluate"
    CHALLENGE = "challenge"
    INSPECT = "inspect"
    CALIBRATE = "calibrate"
    COMPARE = "compare"
    CHECK = "check"
    REFEREE = "referee"
    AGGREGATE = "aggregate"


class Cause(StrEnum):
    """Whose fault it is."""

    ROW = "row"
    PROGRAM = "program"
    WORKER = "worker"
    PLATFORM = "platform"
    OWNER_PREEMPT = "owner-preempt"


class DeviceKind(StrEnum):
    """Kinds of compute devices."""

    CPU = "cpu"
    GPU = "gpu"
    NPU = "npu"


class DeviceLevel(StrEnum):
    """How sure anyone can be of a device."""

    PRESENT = "present"
    USABLE = "usable"
    MEASURED = "measured"


class SandboxLevel(StrEnum):
    """How far a foreign program is locked in; each level holds what the one before holds."""

    NONE = "none"
    LIMITS = "limits"
    NO_FILES = "no-files"
    FULL = "full"
    """No network, no files, no new processes."""


class EnergySource(StrEnum):
    """How a worker knows what a task spent."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


SANDBOX_ORDER: tuple[SandboxLevel, ...] = tuple(SandboxLevel)


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a worker."""

    device_id: str
    kind: DeviceKind
    level: DeviceLevel
    vendor: str = ""
    model: str = ""
    memory_bytes: int = 0
    providers: tuple[str, ...] = ()
    driver_version: str = ""
    obstacle: str = ""
    """Why it is not usable and what to install; empty when usable."""
    cores: int = 0
    architecture: str = ""
    execution_class: str = ""
    slots: int = 1
    claimed_milliunits_per_s: int = 0
    """Speed it says it has in float32, in thousandths of a unit a second; 0: it says nothing."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What a worker says of itself; believed only as far as measured."""

    devices: tuple[Device, ...] = ()
    sandbox_level: SandboxLevel = SandboxLevel.NONE
    memory_bytes_free: int = 0
    executor: str = "process"
    nodes: int = 1
    operating_system: str = ""
    region: str = ""
    on_battery: bool = False
    network_down_bytes_per_s: int = 0
    network_up_bytes_per_s: int = 0
    task_kinds: frozenset[TaskKind] = frozenset({TaskKind.MAP})
    ask_microcredits_per_unit: int = 0
    network_round_trip_microseconds: int = 0
    """Shortest round trip to the coordinator that it has seen; 0: not known."""


@dataclass(frozen=True, slots=True)
class BlobReference:
    """A blob by content."""

    digest: Digest
    length_bytes: int


@dataclass(frozen=True, slots=True)
class SignedBytes:
    """Exact bytes and a signature over them: a grant or a receipt, opaque to whoever only carries it."""

    payload: bytes
    signature: bytes


# ---------------------------------------------------------------------------------------------- worker → coordinator


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that a worker holds when it opens a session."""

    lease_id: LeaseId
    fence: int
    committed: bool


@dataclass(frozen=True, slots=True)
class PoolCache:
    """Where a worker serves blobs to others of its pool, and the one certificate (DER) that it shows there."""

    endpoint: str
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a worker."""

    protocol_version: int
    protocol_min_supported: int
    software: str
    resume_token: bytes
    capability: Capability
    window: int
    held_leases: tuple[HeldLease, ...] = ()
    takes_several: bool = False
    """Whether several messages may come to it as one, under one signature."""
    machine_digest: bytes = b""
    """32 bytes that tell machines with copies of one key apart; empty: not told."""
    pool_cache: PoolCache | None = None


@dataclass(frozen=True, slots=True)
class LeaseProgress:
    """How far a lease is."""

    lease_id: LeaseId
    fence: int
    rows_done: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent every heartbeat interval."""

    progress: tuple[LeaseProgress, ...] = ()


@dataclass(frozen=True, slots=True)
class CapabilityChanged:
    """A change of what the worker can do or hold."""

    capability: Capability | None
    window: int


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row without a value: its position in the lease's block, whose fault, and why in at most 256 bytes."""

    row: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class NodeRows:
    """A run of a block's rows that one node of the owner's cluster did; at least one row."""

    node: int
    rows: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a task took."""

    wall_microseconds: int = 0
    cpu_microseconds: int = 0
    memory_bytes_peak: int = 0
    energy_joules: float = 0.0
    tokens: int = 0
    node: int = 0
    energy_source: EnergySource | None = None
    """None: nobody knows its energy."""
    nodes: tuple[NodeRows, ...] = ()
    """Runs of the block's rows in order, by the node that did them; empty: `node` did them all."""


@dataclass(frozen=True, slots=True)
class Commitment:
    """Binds the worker to its output rows. Signed."""

    lease_id: LeaseId
    fence: int
    output_root: Digest
    rows: int
    output: BlobReference
    failures: tuple[RowFailure, ...] = ()
    usage: Usage = field(default_factory=Usage)
    execution_class: str = ""
    inline_output: bytes = b""
    """The output block when it is at most `INLINE_PAYLOAD_BYTES_MAX`; else empty and uploaded after the offer."""
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Delivery:
    """The output lies in the blob service."""

    lease_id: LeaseId
    fence: int
    receipt: SignedBytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """Answer to an inspect lease. Signed."""

    lease_id: LeaseId
    fence: int
    report: InspectionReport
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The task could not be done here. Signed."""

    lease_id: LeaseId
    fence: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """The worker gives a lease back undone."""

    lease_id: LeaseId
    fence: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class GrantsWanted:
    """Grants of a lease ran out or were lost."""

    lease_id: LeaseId
    fence: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker takes no further leases and leaves when it has finished."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """The lease of a challenge has arrived: said at once, so that the round trip is known."""

    lease_id: LeaseId
    fence: int


@dataclass(frozen=True, slots=True)
class Checked:
    """Answer to a check lease. Signed."""

    lease_id: LeaseId
    fence: int
    verdict: ChallengeVerdict


@dataclass(frozen=True, slots=True)
class Refereed:
    """Answer to a referee's lease. Signed."""

    lease_id: LeaseId
    fence: int
    own_root: Digest
    """Merkle root over the referee's own output rows, in the order of the lease's rows."""
    rows: tuple[RowFinding, ...]
    """One for each row of the lease, in order."""
    execution_class: str
    """In which the referee ran them."""
    usage: Usage = field(default_factory=Usage)


WorkerMessage = (
    Hello
    | Heartbeat
    | CapabilityChanged
    | Commitment
    | Delivery
    | Inspection
    | TaskFailed
    | LeaseReturned
    | GrantsWanted
    | Draining
    | LeaseSeen
    | Checked
    | Refereed
)

SIGNED_WORKER_MESSAGES: tuple[type, ...] = (Hello, Commitment, Inspection, TaskFailed, Checked, Refereed)
"""Kinds that carry evidence and must be signed."""


# ---------------------------------------------------------------------------------------------- coordinator → worker


@dataclass(frozen=True, slots=True)
class Welcome:
    """First message of the coordinator. Signed."""

    protocol_version: int
    protocol_min_supported: int
    session_id: SessionId
    resume_token: bytes
    heartbeat_interval_ms: int
    keep_lease_ids: tuple[LeaseId, ...]
    now_ms: int
    blob_endpoint: str


@dataclass(frozen=True, slots=True)
class BundleOffer:
    """A bundle as a worker needs it."""

    bundle_digest: Digest
    manifest: bytes
    file_grants: tuple[SignedBytes, ...]
    canonical_batch_rows: int
    slot_dependent: bool
    memory_bytes_peak: int
    pool_caches: tuple[PoolCache, ...] = ()
    """In the worker's network: worth a try before the blob service, with the same grants."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Output rows of workers beside which a referee puts its own."""

    block: BlobReference
    """A row block of the bundle's output schema; a row of no bytes is one that its worker had no value for."""
    grant: SignedBytes | None
    inline_block: bytes
    """The block itself when it is small; else empty and fetched with the grant."""
    class_numbers: tuple[int, ...]
    """The class of each row of the block: its place in the lease's `execution_classes`."""
    rows: tuple[int, ...] = ()
    """Rows of the lease that the block's rows answer, rising; empty: all of them."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission to work on one block of rows. Signed."""

    lease_id: LeaseId
    fence: int
    kind: TaskKind
    bundle_digest: Digest
    offer: BundleOffer | None
    """None when this session has it already."""
    rows: int
    input: BlobReference | None
    """None for inspections."""
    inline_input: bytes
    input_grant: SignedBytes | None
    deadline_ms: int
    runtime_max_ms: int
    precision: Precision
    output_bytes_max: int
    unit_micros: int
    pool_id: PoolId
    buckets: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    latency_ms_max: int = 0
    challenge: ChallengePlan | None = None
    """Of a challenge and of its check."""
    candidates: tuple[Candidate, ...] = ()
    """Of a referee's lease, as are the next two."""
    execution_classes: tuple[str, ...] = ()
    profiles: tuple[ToleranceProfile, ...] = ()
    """A pair of classes that is not here has no profile."""


@dataclass(frozen=True, slots=True)
class UploadOffer:
    """A commitment was recorded; upload the output with this grant."""

    lease_id: LeaseId
    fence: int
    grant: SignedBytes


@dataclass(frozen=True, slots=True)
class Settled:
    """A lease is over and its result recorded. Signed."""

    lease_id: LeaseId
    fence: int
    microcredits: int


@dataclass(frozen=True, slots=True)
class LeaseRevoked:
    """Stop working on a lease; nothing of it counts any more."""

    lease_id: LeaseId
    fence: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message of the worker was not accepted."""

    sequence: int
    lease_id: LeaseId | None
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class GrantsRenewed:
    """Fresh grants for a lease."""

    lease_id: LeaseId
    fence: int
    input_grant: SignedBytes | None
    offer: BundleOffer | None
    candidate_grants: tuple[SignedBytes, ...] = ()
    """Of a referee's lease: one for each candidate, in its order."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The coordinator ends the session."""

    reason: str
    message: str
    reconnect_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class DeviceStanding:
    """What challenges have shown of a device, or that it counts no more."""

    device_id: str
    units_milli_per_s: int = 0
    """0: the device has no certificate."""
    memory_bytes: int = 0
    expires_at_ms: int = 0
    reason: str = ""
    """Why it has none."""


CoordinatorMessage = (
    Welcome | Lease | UploadOffer | Settled | LeaseRevoked | Refused | GrantsRenewed | Goodbye | DeviceStanding
)

SIGNED_COORDINATOR_MESSAGES: tuple[type, ...] = (Welcome, Lease, Settled)
"""Kinds that grant or settle and must be signed."""
