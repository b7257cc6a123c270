"""A referee's candidates, profiles and findings, to protobuf and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from fallow.comparison import PPM_MAX, CandidateFinding, RowFinding, ToleranceProfile
from fallow.errors import FallowError, Reason
from fallow.limits import (
    INLINE_PAYLOAD_BYTES_MAX,
    REFEREE_CANDIDATES_MAX,
    REFEREE_CLASSES_MAX,
    REFEREE_ROWS_MAX,
)
from fallow.session import Candidate
from fallow.v1 import session_pb2
from fallow.wire.blob import grant_from_message, grant_to_message, reference_from_message, reference_to_message
from fallow.wire.enums import FINDINGS


def candidates_to_message(candidates: Iterable[Candidate]) -> list[session_pb2.Candidate]:
    """The protobuf form of a lease's candidates."""
    return [
        session_pb2.Candidate(
            block=reference_to_message(candidate.block),
            grant=grant_to_message(candidate.grant) if candidate.grant else None,
            inline_block=candidate.inline_block,
            rows=candidate.rows,
            class_numbers=candidate.class_numbers,
        )
        for candidate in candidates
    ]


def candidates_from_message(lease: session_pb2.Lease) -> tuple[Candidate, ...]:
    """The candidates of a lease. Raises FIELD_INVALID or LIMIT_EXCEEDED, naming the candidate."""
    _counted(len(lease.candidates), REFEREE_CANDIDATES_MAX, "lease.candidates")
    _counted(len(lease.execution_classes), REFEREE_CLASSES_MAX, "lease.execution_classes")
    if lease.candidates:
        _counted(lease.rows, REFEREE_ROWS_MAX, "lease.rows")
    return tuple(
        _candidate(message, lease.rows, len(lease.execution_classes), f"lease.candidates[{index}]")
        for index, message in enumerate(lease.candidates)
    )


def profiles_to_message(profiles: Iterable[ToleranceProfile]) -> list[session_pb2.ToleranceProfile]:
    """The protobuf form of profiles."""
    return [
        session_pb2.ToleranceProfile(
            referee_class=profile.referee_class,
            candidate_class=profile.candidate_class,
            samples=profile.samples,
            median_ppm=profile.median_ppm,
            p95_ppm=profile.p95_ppm,
            max_ppm=profile.max_ppm,
        )
        for profile in profiles
    ]


def profiles_from_message(messages: Sequence[session_pb2.ToleranceProfile]) -> tuple[ToleranceProfile, ...]:
    """The profiles of a lease. Raises LIMIT_EXCEEDED, or FIELD_INVALID for quantiles that fall."""
    _counted(len(messages), REFEREE_CLASSES_MAX, "lease.profiles")
    profiles: list[ToleranceProfile] = []
    for index, message in enumerate(messages):
        if not message.median_ppm <= message.p95_ppm <= message.max_ppm <= PPM_MAX:
            raise FallowError(
                Reason.FIELD_INVALID,
                "quantiles of a profile that fall",
                field=f"lease.profiles[{index}]",
                limit=f"median, p95, largest, up to {PPM_MAX}",
            )
        profiles.append(
            ToleranceProfile(
                message.referee_class,
                message.candidate_class,
                message.samples,
                message.median_ppm,
                message.p95_ppm,
                message.max_ppm,
            )
        )
    return tuple(profiles)


def row_findings_to_message(rows: Iterable[RowFinding]) -> list[session_pb2.RowFinding]:
    """The protobuf form of what was found of each row."""
    return [
        session_pb2.RowFinding(
            row=row.row,
            candidates=[
                session_pb2.CandidateFinding(
                    finding=FINDINGS.number(found.finding),
                    error_ppm_of_tolerance=found.error_ppm_of_tolerance,
                    deviation_ppm=found.deviation_ppm,
                )
                for found in row.candidates
            ],
        )
        for row in rows
    ]


def row_findings_from_message(messages: Sequence[session_pb2.RowFinding]) -> tuple[RowFinding, ...]:
    """What was found of each row, in order. Raises FIELD_INVALID or LIMIT_EXCEEDED, naming the row."""
    _counted(len(messages), REFEREE_ROWS_MAX, "refereed.rows")
    return tuple(_row_finding(message, index) for index, message in enumerate(messages))


def _row_finding(message: session_pb2.RowFinding, index: int) -> RowFinding:
    field = f"refereed.rows[{index}]"
    if message.row != index:
        raise FallowError(Reason.FIELD_INVALID, f"row {message.row}", field=f"{field}.row", limit=f"row {index}")
    _counted(len(message.candidates), REFEREE_CANDIDATES_MAX, f"{field}.candidates")
    found: list[CandidateFinding] = []
    for candidate in message.candidates:
        if max(candidate.error_ppm_of_tolerance, candidate.deviation_ppm) > PPM_MAX:
            raise FallowError(Reason.FIELD_INVALID, "an error without end", field=field, limit=f"{PPM_MAX} millionths")
        finding = FINDINGS.optional(candidate.finding, f"{field}.candidates.finding")
        found.append(CandidateFinding(finding, candidate.error_ppm_of_tolerance, candidate.deviation_ppm))
    return RowFinding(index, tuple(found))


def _candidate(message: session_pb2.Candidate, lease_rows: int, classes: int, field: str) -> Candidate:
    rows = tuple(message.rows)
    if any(low >= high for low, high in pairwise((*rows, lease_rows))):
        raise FallowError(
            Reason.FIELD_INVALID, "rows that do not rise", field=f"{field}.rows", limit=f"rising, below {lease_rows}"
        )
    class_numbers = tuple(message.class_numbers)
    count = len(rows) or lease_rows
    if len(class_numbers) != count or any(number >= classes for number in class_numbers):
        raise FallowError(
            Reason.FIELD_INVALID,
            "classes are not one for each row",
            field=f"{field}.class_numbers",
            limit=f"{count} numbers below {classes}",
        )
    _counted(len(message.inline_block), INLINE_PAYLOAD_BYTES_MAX, f"{field}.inline_block")
    return Candidate(
        block=reference_from_message(message.block, f"{field}.block"),
        grant=grant_from_message(message.grant) if message.HasField("grant") else None,
        inline_block=message.inline_block,
        class_numbers=class_numbers,
        rows=rows,
    )


def _counted(count: int, most: int, field: str) -> None:
    if count > most:
        raise FallowError(Reason.LIMIT_EXCEEDED, f"{count} in {field}", field=field, limit=f"{most}")
