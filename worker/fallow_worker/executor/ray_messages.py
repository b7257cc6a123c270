"""What the daemon and its Ray driver say to each other: frames of a header in JSON and a body of plain bytes."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Any, Final

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengePlan, ChallengeVerdict
from fallow.comparison import RowFinding, Spread, ToleranceProfile
from fallow.ids import Digest, LeaseId
from fallow.limits import BLOCK_BYTES_MAX, MIB
from fallow.session import Cause, RowFailure, TaskKind, Usage
from fallow_worker.engine.frames import FrameError, from_json, to_json
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.capability import NodeFacts
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.ports import CandidateRows, LoadedBundle, Outcome, RefereeWork, Work

HEADER_BYTES_MAX: Final = 16 * MIB
"""Slots of a million rows are the longest thing in a header."""
STREAM_BYTES: Final = 4 * MIB
_LENGTHS: Final = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class DriverArguments:
    """What a driver is told at its start."""

    settings: RaySettings
    control_fd: int
    folder: str
    """Private, short, removed by the driver at its end."""


@dataclass(frozen=True, slots=True)
class FilePath:
    """Where a file of a bundle is on the machine of the daemon."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class CandidateHead:
    """Rows to compare with, whose block stands in the body."""

    block_bytes: int
    rows: tuple[int, ...]
    class_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefereeHead:
    """What a referee compares; in the body its own rows and the candidates' follow the input block."""

    input_bytes: int
    own_bytes: int
    own_class: str
    candidates: tuple[CandidateHead, ...]
    execution_classes: tuple[str, ...]
    profiles: tuple[ToleranceProfile, ...]
    spread: Spread | None
    runs_program: bool


@dataclass(frozen=True, slots=True)
class StartWork:
    """A lease to run; the body is its input block."""

    call: int
    lease_id: LeaseId
    kind: TaskKind
    bundle_digest: Digest
    manifest: bytes
    files: tuple[FilePath, ...]
    canonical_batch_rows: int
    slot_dependent: bool
    memory_bytes_peak: int
    rows: int
    nonce: bytes
    output_bytes_max: int
    runtime_max_ms: int
    buckets: tuple[int, ...]
    slots: tuple[int, ...]
    challenge: ChallengePlan | None
    referee: RefereeHead | None = None


@dataclass(frozen=True, slots=True)
class CancelWork:
    """Stop that lease; no answer follows."""

    call: int


@dataclass(frozen=True, slots=True)
class Up:
    """Ray runs and these nodes have supervisors."""

    nodes: tuple[NodeFacts, ...]


@dataclass(frozen=True, slots=True)
class Down:
    """The driver cannot go on and ends; work not yet answered is lost."""

    reason: str


@dataclass(frozen=True, slots=True)
class RowsDone:
    """How far a lease is."""

    call: int
    rows_done: int


@dataclass(frozen=True, slots=True)
class WorkDone:
    """A lease went well; the body is its output block."""

    call: int
    failures: tuple[RowFailure, ...]
    usage: Usage
    execution_class: str
    report: InspectionReport | None
    verdict: ChallengeVerdict | None
    findings: tuple[RowFinding, ...]
    spread: Spread | None


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """A lease failed."""

    call: int
    cause: Cause
    reason: str


ToDriver = StartWork | CancelWork
FromDriver = Up | Down | RowsDone | WorkDone | WorkEnded


def encode(message: ToDriver | FromDriver, body: bytes = b"") -> tuple[bytes, bytes]:
    """The bytes of one frame in two parts, so that a body is not copied."""
    header = to_json(message)
    assert len(header) <= HEADER_BYTES_MAX and len(body) <= BLOCK_BYTES_MAX
    return _LENGTHS.pack(len(header), len(body)) + header, body


async def read_frame(reader: asyncio.StreamReader, hint: Any) -> tuple[Any, bytes] | None:
    """The next message of a class in the union `hint`, with its body; None at the end. Raises FrameError."""
    try:
        header_length, body_length = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
        if header_length > HEADER_BYTES_MAX or body_length > BLOCK_BYTES_MAX:
            raise FrameError(f"a frame of {header_length} and {body_length} bytes")
        header = await reader.readexactly(header_length)
        body = await reader.readexactly(body_length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return from_json(header, hint), body


def start_of(call: int, work: Work) -> StartWork:
    """The header of a lease."""
    bundle = work.bundle
    return StartWork(
        call=call,
        lease_id=work.lease_id,
        kind=work.kind,
        bundle_digest=bundle.bundle_digest,
        manifest=bundle.manifest,
        files=tuple(FilePath(name, path) for name, path in bundle.files.items()),
        canonical_batch_rows=bundle.canonical_batch_rows,
        slot_dependent=bundle.slot_dependent,
        memory_bytes_peak=bundle.memory_bytes_peak,
        rows=work.rows,
        nonce=work.nonce,
        output_bytes_max=work.output_bytes_max,
        runtime_max_ms=work.runtime_max_ms,
        buckets=work.buckets,
        slots=work.slots,
        challenge=work.challenge,
        referee=_referee_head(work),
    )


def body_of(work: Work) -> bytes:
    """What goes with the header of a lease. Raises WorkFailed when it is too much for one frame."""
    if work.referee is None:
        return work.input_block
    body = b"".join(
        (work.input_block, work.referee.own_block, *(candidate.block for candidate in work.referee.candidates))
    )
    if len(body) > BLOCK_BYTES_MAX:
        raise WorkFailed(Cause.PLATFORM, f"{len(body)} bytes to compare; allowed on Ray: {BLOCK_BYTES_MAX}")
    return body


def _referee_head(work: Work) -> RefereeHead | None:
    task = work.referee
    if task is None:
        return None
    return RefereeHead(
        input_bytes=len(work.input_block),
        own_bytes=len(task.own_block),
        own_class=task.own_class,
        candidates=tuple(CandidateHead(len(one.block), one.rows, one.class_numbers) for one in task.candidates),
        execution_classes=task.execution_classes,
        profiles=task.profiles,
        spread=task.spread,
        runs_program=task.runs_program,
    )


def _referee_of(head: RefereeHead, body: bytes) -> RefereeWork:
    at = head.input_bytes + head.own_bytes
    candidates: list[CandidateRows] = []
    for one in head.candidates:
        candidates.append(CandidateRows(body[at : at + one.block_bytes], one.rows, one.class_numbers))
        at += one.block_bytes
    return RefereeWork(
        own_block=body[head.input_bytes : head.input_bytes + head.own_bytes],
        own_class=head.own_class,
        candidates=tuple(candidates),
        execution_classes=head.execution_classes,
        profiles=head.profiles,
        spread=head.spread,
        runs_program=head.runs_program,
    )


def work_of(start: StartWork, body: bytes) -> Work:
    """The lease of a header and its body."""
    return Work(
        lease_id=start.lease_id,
        kind=start.kind,
        bundle=LoadedBundle(
            bundle_digest=start.bundle_digest,
            manifest=start.manifest,
            files={file.name: file.path for file in start.files},
            canonical_batch_rows=start.canonical_batch_rows,
            slot_dependent=start.slot_dependent,
            memory_bytes_peak=start.memory_bytes_peak,
        ),
        input_block=body if start.referee is None else body[: start.referee.input_bytes],
        rows=start.rows,
        nonce=start.nonce,
        output_bytes_max=start.output_bytes_max,
        runtime_max_ms=start.runtime_max_ms,
        buckets=start.buckets,
        slots=start.slots,
        challenge=start.challenge,
        referee=None if start.referee is None else _referee_of(start.referee, body),
    )


def end_of(call: int, end: Outcome | WorkFailed) -> tuple[WorkDone | WorkEnded, bytes]:
    """The message and body that tell how a lease ended."""
    if isinstance(end, WorkFailed):
        return WorkEnded(call, end.cause, end.reason), b""
    done = WorkDone(
        call,
        end.failures,
        end.usage,
        end.execution_class,
        end.report,
        end.verdict,
        end.findings,
        end.spread,
    )
    return done, end.output_block
