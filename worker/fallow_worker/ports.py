"""What the daemon needs from outside; one contract suite each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengePlan, ChallengeVerdict
from fallow.comparison import RowFinding, Spread, ToleranceProfile
from fallow.ids import Digest, LeaseId
from fallow.session import Capability, RowFailure, TaskKind, Usage


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle on this machine's disk, verified by digest."""

    bundle_digest: Digest
    manifest: bytes
    files: Mapping[str, str]
    """Path of each file by its name in the manifest."""
    canonical_batch_rows: int
    slot_dependent: bool
    memory_bytes_peak: int
    """From the inspection; the child's memory limit follows from it."""


@dataclass(frozen=True, slots=True)
class CandidateRows:
    """Output rows of workers, to be put beside a referee's."""

    block: bytes
    rows: tuple[int, ...]
    """Rows of the lease that the block's rows answer."""
    class_numbers: tuple[int, ...]
    """The class of each: its place in `RefereeWork.execution_classes`."""


@dataclass(frozen=True, slots=True)
class RefereeWork:
    """What a referee compares, once it has run the rows itself."""

    own_block: bytes
    """The referee's output rows."""
    own_class: str
    candidates: tuple[CandidateRows, ...]
    execution_classes: tuple[str, ...]
    profiles: tuple[ToleranceProfile, ...] = ()
    spread: Spread | None = None
    """The bundle's, when an earlier lease has measured it."""
    runs_program: bool = True
    """False: compare without running the program in other forms, because it did not survive that."""


@dataclass(frozen=True, slots=True)
class Work:
    """One lease, ready to run."""

    lease_id: LeaseId
    kind: TaskKind
    bundle: LoadedBundle
    input_block: bytes
    """Empty for inspections, unless their rows are still to be run."""
    rows: int
    nonce: bytes
    """16 fresh bytes for the output block's header."""
    output_bytes_max: int
    runtime_max_ms: int
    buckets: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    challenge: ChallengePlan | None = None
    """Of a challenge, and of the check of an answer, which then is `input_block`."""
    referee: RefereeWork | None = None
    """Of the second half of a referee's lease; the first is a map."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Output rows and what they took. Only one of `output_block`, `report` and `verdict` is set,
    but a referee's rows come with its findings."""

    output_block: bytes
    failures: tuple[RowFailure, ...]
    usage: Usage
    execution_class: str
    report: InspectionReport | None = None
    verdict: ChallengeVerdict | None = None
    findings: tuple[RowFinding, ...] = ()
    spread: Spread | None = None
    """The bundle's, when the referee has measured it."""


class Executor(Protocol):
    """Runs work in sandboxed engine children. Both implementations (on Ray, on processes) pass one contract suite.

    A task that cannot be done raises `fallow_worker.executor.WorkFailed` with cause and reason; nothing else escapes.
    """

    async def start(self) -> None:
        """Gets ready lazily: runtimes start on the first work. Raises FallowError(EXECUTOR_UNAVAILABLE)."""
        ...

    async def capability(self) -> Capability:
        """Devices, slots and the sandbox level that was really reached, probed once."""
        ...

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Runs one lease; `progress` hears rows done. Cancelling the call stops the work. Up to `slots` at once."""
        ...

    async def release(self) -> None:
        """Stops runtimes and children to give memory back; the next run starts them again."""
        ...

    async def stop(self) -> None:
        """Ends everything, leaving no process behind."""
        ...
