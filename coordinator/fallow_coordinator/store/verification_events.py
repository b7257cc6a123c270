"""Draws, comparisons and verdicts: their events ↔ protobuf."""

from __future__ import annotations

from collections.abc import Iterable

from fallow.comparison import CandidateFinding, Finding, RowFinding
from fallow.ids import AccountId, Digest, JobId, LeaseId, PartyId, TaskId
from fallow.journal.v1 import journal_pb2 as pb
from fallow.v1 import session_pb2
from fallow_coordinator.core import verification_events as ev
from fallow_coordinator.core.events import PackedCandidate
from fallow_coordinator.store import values
from fallow_coordinator.store.event_kind import AnyKind, Kind

_FINDINGS = values.EnumTable(Finding, session_pb2.Finding.Value, "FINDING")
_TRUSTS = values.EnumTable(ev.Trust, pb.Trust.Value, "TRUST")
_VERDICTS = values.EnumTable(ev.Verdict, pb.Verdict.Value, "VERDICT")


def rows_to_message(rows: Iterable[ev.EvidenceRow]) -> list[pb.EvidenceRow]:
    """What a task checks."""
    return [pb.EvidenceRow(lease_id=row.lease_id, row=row.row) for row in rows]


def rows_from_message(messages: Iterable[pb.EvidenceRow]) -> tuple[ev.EvidenceRow, ...]:
    """What a task checks."""
    return tuple(ev.EvidenceRow(LeaseId(message.lease_id), message.row) for message in messages)


def candidates_to_message(candidates: Iterable[PackedCandidate]) -> list[pb.PackedCandidate]:
    """What a referee compares with."""
    return [
        pb.PackedCandidate(
            block=values.blob_to_message(candidate.block),
            inline=candidate.inline,
            rows=candidate.rows,
            class_numbers=candidate.class_numbers,
        )
        for candidate in candidates
    ]


def candidates_from_message(messages: Iterable[pb.PackedCandidate]) -> tuple[PackedCandidate, ...]:
    """What a referee compares with."""
    return tuple(
        PackedCandidate(
            values.blob_from_message(message.block), message.inline, tuple(message.rows), tuple(message.class_numbers)
        )
        for message in messages
    )


def _finding_to_message(found: RowFinding) -> session_pb2.RowFinding:
    return session_pb2.RowFinding(
        row=found.row,
        candidates=[
            session_pb2.CandidateFinding(
                finding=_FINDINGS.number(one.finding),
                error_ppm_of_tolerance=one.error_ppm_of_tolerance,
                deviation_ppm=one.deviation_ppm,
            )
            for one in found.candidates
        ],
    )


def _finding_from_message(message: session_pb2.RowFinding) -> RowFinding:
    return RowFinding(
        message.row,
        tuple(
            CandidateFinding(_FINDINGS.member_or_none(one.finding), one.error_ppm_of_tolerance, one.deviation_ppm)
            for one in message.candidates
        ),
    )


def _drawn_to(event: ev.AuditsDrawn) -> pb.AuditsDrawn:
    return pb.AuditsDrawn(
        lease_id=event.lease_id,
        job_id=event.job_id,
        worker_id=event.worker_id,
        cursor=event.cursor,
        rows=event.rows,
        execution_class=event.execution_class,
        rate_ppm=event.rate_ppm,
        drawn=event.drawn,
        refereed=event.refereed,
        trust=_TRUSTS.number(event.trust),
        microcredits=event.microcredits,
        further_rows=event.further_rows,
    )


def _drawn_from(message: pb.AuditsDrawn) -> ev.AuditsDrawn:
    return ev.AuditsDrawn(
        lease_id=LeaseId(message.lease_id),
        job_id=JobId(message.job_id),
        worker_id=PartyId(message.worker_id),
        cursor=message.cursor,
        rows=message.rows,
        execution_class=message.execution_class,
        rate_ppm=message.rate_ppm,
        drawn=tuple(message.drawn),
        refereed=tuple(message.refereed),
        trust=_TRUSTS.member(message.trust),
        microcredits=message.microcredits,
        further_rows=message.further_rows,
    )


def _compared_to(event: ev.AuditCompared) -> pb.AuditCompared:
    return pb.AuditCompared(
        task_id=event.task_id,
        lease_id=event.lease_id,
        job_id=event.job_id,
        worker_id=event.worker_id,
        equal=event.equal,
    )


def _compared_from(message: pb.AuditCompared) -> ev.AuditCompared:
    return ev.AuditCompared(
        task_id=TaskId(message.task_id),
        lease_id=LeaseId(message.lease_id),
        job_id=JobId(message.job_id),
        worker_id=PartyId(message.worker_id),
        equal=tuple(message.equal),
    )


def _reported_to(event: ev.RefereeReported) -> pb.RefereeReported:
    return pb.RefereeReported(
        task_id=event.task_id,
        lease_id=event.lease_id,
        job_id=event.job_id,
        worker_id=event.worker_id,
        own_root=event.own_root,
        execution_class=event.execution_class,
        findings=[_finding_to_message(found) for found in event.findings],
        message_digest=event.message_digest,
        signature=event.signature,
        sequence=event.sequence,
    )


def _reported_from(message: pb.RefereeReported) -> ev.RefereeReported:
    return ev.RefereeReported(
        task_id=TaskId(message.task_id),
        lease_id=LeaseId(message.lease_id),
        job_id=JobId(message.job_id),
        worker_id=PartyId(message.worker_id),
        own_root=Digest(message.own_root),
        execution_class=message.execution_class,
        findings=tuple(_finding_from_message(found) for found in message.findings),
        message_digest=Digest(message.message_digest),
        signature=message.signature,
        sequence=message.sequence,
    )


def _verdict_to(event: ev.VerdictReached) -> pb.VerdictReached:
    return pb.VerdictReached(
        job_id=event.job_id,
        lease_id=event.lease_id,
        row=event.row,
        worker_id=event.worker_id,
        verdict=_VERDICTS.number(event.verdict),
        referee_lease_id=event.referee_lease_id,
    )


def _verdict_from(message: pb.VerdictReached) -> ev.VerdictReached:
    return ev.VerdictReached(
        job_id=JobId(message.job_id),
        lease_id=LeaseId(message.lease_id),
        row=message.row,
        worker_id=PartyId(message.worker_id),
        verdict=_VERDICTS.member(message.verdict),
        referee_lease_id=LeaseId(message.referee_lease_id),
    )


def _corrected_to(event: ev.RowsCorrected) -> pb.RowsCorrected:
    return pb.RowsCorrected(
        job_id=event.job_id,
        lease_id=event.lease_id,
        cursor=event.cursor,
        spans=[position for span in event.spans for position in span],
        rows_failed=event.rows_failed,
        verdict=_VERDICTS.number(event.verdict),
        reason=event.reason,
    )


def _corrected_from(message: pb.RowsCorrected) -> ev.RowsCorrected:
    flat = list(message.spans)
    return ev.RowsCorrected(
        job_id=JobId(message.job_id),
        lease_id=LeaseId(message.lease_id),
        cursor=message.cursor,
        spans=tuple(zip(flat[::2], flat[1::2], strict=True)),
        rows_failed=message.rows_failed,
        verdict=_VERDICTS.member(message.verdict),
        reason=message.reason,
    )


def _released_to(event: ev.EvidenceReleased) -> pb.EvidenceReleased:
    return pb.EvidenceReleased(
        lease_id=event.lease_id,
        job_id=event.job_id,
        worker_id=event.worker_id,
        account_id=event.account_id,
        microcredits=event.microcredits,
        accepted=event.accepted,
    )


def _released_from(message: pb.EvidenceReleased) -> ev.EvidenceReleased:
    return ev.EvidenceReleased(
        lease_id=LeaseId(message.lease_id),
        job_id=JobId(message.job_id),
        worker_id=PartyId(message.worker_id),
        account_id=AccountId(message.account_id),
        microcredits=message.microcredits,
        accepted=message.accepted,
    )


KINDS: tuple[AnyKind, ...] = (
    Kind(
        "draw_secret_set",
        ev.DrawSecretSet,
        lambda event: pb.DrawSecretSet(job_id=event.job_id, secret=event.secret),
        lambda message: ev.DrawSecretSet(JobId(message.job_id), message.secret),
    ),
    Kind("audits_drawn", ev.AuditsDrawn, _drawn_to, _drawn_from),
    Kind("audit_compared", ev.AuditCompared, _compared_to, _compared_from),
    Kind(
        "audit_given_up",
        ev.AuditGivenUp,
        lambda event: pb.AuditGivenUp(job_id=event.job_id, rows=rows_to_message(event.rows), reason=event.reason),
        lambda message: ev.AuditGivenUp(JobId(message.job_id), rows_from_message(message.rows), message.reason),
    ),
    Kind("referee_reported", ev.RefereeReported, _reported_to, _reported_from),
    Kind("verdict_reached", ev.VerdictReached, _verdict_to, _verdict_from),
    Kind("rows_corrected", ev.RowsCorrected, _corrected_to, _corrected_from),
    Kind("evidence_released", ev.EvidenceReleased, _released_to, _released_from),
    Kind(
        "pay_voided",
        ev.PayVoided,
        lambda event: pb.PayVoided(
            job_id=event.job_id,
            worker_id=event.worker_id,
            account_id=event.account_id,
            microcredits=event.microcredits,
        ),
        lambda message: ev.PayVoided(
            JobId(message.job_id), PartyId(message.worker_id), AccountId(message.account_id), message.microcredits
        ),
    ),
    Kind(
        "worker_distrusted",
        ev.WorkerDistrusted,
        lambda event: pb.WorkerDistrusted(
            worker_id=event.worker_id,
            job_id=event.job_id,
            lease_id=event.lease_id,
            row=event.row,
            reason=event.reason,
        ),
        lambda message: ev.WorkerDistrusted(
            PartyId(message.worker_id), JobId(message.job_id), LeaseId(message.lease_id), message.row, message.reason
        ),
    ),
    Kind(
        "worker_trusted",
        ev.WorkerTrusted,
        lambda event: pb.WorkerTrusted(worker_id=event.worker_id),
        lambda message: ev.WorkerTrusted(PartyId(message.worker_id)),
    ),
    Kind(
        "assurance_accepted",
        ev.AssuranceAccepted,
        lambda event: pb.AssuranceAccepted(job_id=event.job_id),
        lambda message: ev.AssuranceAccepted(JobId(message.job_id)),
    ),
)
