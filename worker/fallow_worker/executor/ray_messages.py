"""What the daemon and its Ray driver say to each other: frames of a header in JSON and a body of plain bytes."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Any, Final

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengePlan, ChallengeVerdict
from fallow.ids import Digest, LeaseId
from fallow.limits import BLOCK_BYTES_MAX, MIB
from fallow.session import Cause, RowFailure, TaskKind, Usage
from fallow_worker.engine.frames import FrameError, from_json, to_json
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.capability import NodeFacts
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.ports import LoadedBundle, Outcome, Work

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
    )


def work_of(start: StartWork, input_block: bytes) -> Work:
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
        input_block=input_block,
        rows=start.rows,
        nonce=start.nonce,
        output_bytes_max=start.output_bytes_max,
        runtime_max_ms=start.runtime_max_ms,
        buckets=start.buckets,
        slots=start.slots,
        challenge=start.challenge,
    )


def end_of(call: int, end: Outcome | WorkFailed) -> tuple[WorkDone | WorkEnded, bytes]:
    """The message and body that tell how a lease ended."""
    if isinstance(end, WorkFailed):
        return WorkEnded(call, end.cause, end.reason), b""
    return WorkDone(call, end.failures, end.usage, end.execution_class, end.report, end.verdict), end.output_block
