"""A certificate of results: one JSON file that tells what became of a job, and carries what it takes to check it.

Everything that people read in it follows from the evidence it carries, by the code in this file; so a check makes it
again and compares. `fallow.certificate_check` has the rest: signatures, the proof, rows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

from fallow.checking_story import CONFIDENCE_PPM, wrong
from fallow.checkpoint import Checkpoint, CheckpointUnusable, read_checkpoint
from fallow.errors import FallowError, Reason
from fallow.identity import write_private
from fallow.ids import DIGEST_BYTES, Digest
from fallow.job_records import Compared, Drawn, Evidence, RawRecord, Reported, Statement, Submitted, TaskMade
from fallow.job_story import Commitment, Result, Story
from fallow.journal_proof import SALT_BYTES, leaf_of
from fallow.wire.evidence import fact_of, statement_from

FORMAT: Final = "fallow-certificate-1"
CERTIFICATE_BYTES_MAX: Final = 2 * 1024**3
OUTPUTS_BYTES_MAX: Final = 64 * 1024**2
"""Inline outputs that a certificate carries, so that its signatures can be checked without the results."""

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"
"""What stands in a certificate; it has no other numbers than whole ones."""

_SECTIONS: Final = (
    "format",
    "job",
    "checkpoint",
    "workers",
    "results",
    "verification",
    "evidence",
    "manifest",
    "outputs",
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate as it stands in its file; docs/protocol.md names its parts."""

    facts: Mapping[str, Json]

    @property
    def job(self) -> Mapping[str, Json]:
        """The job's part."""
        job = self.facts["job"]
        assert isinstance(job, dict), "a certificate tells of a job"
        return job

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all, for its owner alone. Raises STORAGE_FULL."""
        write_certificate(self.facts, Path(path))
        return Path(path)


def bundle_of(evidence: Evidence) -> Digest:
    """The bundle that the job was submitted with. Raises EVIDENCE_WRONG."""
    for record in evidence.records:
        fact = fact_of(record.event)
        if isinstance(fact, Submitted):
            return fact.bundle_digest
    raise wrong("records", "none of them submits the job")


def compose(evidence: Evidence, *, manifest: bytes, outputs: Mapping[Digest, bytes]) -> Certificate:
    """The certificate. `manifest` is the bundle's; `outputs` are blocks that travelled inline, by digest.

    Raises EVIDENCE_WRONG when the records do not tell one whole story.
    """
    return Certificate(
        {
            "format": FORMAT,
            **told(evidence),
            "evidence": _evidence_to_json(evidence),
            "manifest": _text(manifest) if manifest else None,
            "outputs": {digest.hex(): _text(data) for digest, data in outputs.items()},
        }
    )


def write_certificate(certificate: Mapping[str, Json], path: Path) -> None:
    """Writes the file, whole or not at all, for its owner alone. Raises STORAGE_FULL."""
    data = json.dumps(certificate, indent=1, ensure_ascii=False).encode() + b"\n"
    try:
        write_private(path, data)
    except OSError as error:
        raise FallowError(
            Reason.STORAGE_FULL, f"cannot write {path}: {error.strerror or error}", field="path"
        ) from None


def read_certificate(path: Path) -> dict[str, Json]:
    """What stands in a file; nothing in it is checked. Raises EVIDENCE_WRONG when it is no JSON object."""
    try:
        if path.stat().st_size > CERTIFICATE_BYTES_MAX:
            raise wrong(str(path), f"is longer than {CERTIFICATE_BYTES_MAX} bytes")
        made = json.loads(path.read_bytes(), object_pairs_hook=_no_twins)
    except OSError as error:
        raise FallowError(Reason.FIELD_INVALID, f"cannot read {path}: {error.strerror}", field="path") from None
    except (ValueError, RecursionError) as error:
        raise wrong(str(path), f"is no JSON: {error}") from None
    certificate: Json = made
    if not isinstance(certificate, dict):
        raise wrong(str(path), "is no certificate")
    return certificate


def check_sections(certificate: Mapping[str, Json]) -> None:
    """Returns when it is of this version's form and has its sections, and no other. Raises EVIDENCE_WRONG."""
    if certificate.get("format") != FORMAT:
        raise wrong("format", f"is {certificate.get('format')!r}, and this version reads {FORMAT}")
    check_keys("certificate", dict(certificate), _SECTIONS)


def _no_twins(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


# ------------------------------------------------------------------------------------------------ what people read


def told(evidence: Evidence) -> dict[str, Json]:
    """Every section that follows from the evidence. Raises EVIDENCE_WRONG."""
    statement = _statement(evidence)
    story = Story(sessions=statement.sessions)
    story.read((record, fact_of(record.event)) for record in evidence.records)
    submitted = story.finish()
    if statement.job_id != submitted.job_id:
        raise wrong("evidence.statement", f"is of job {statement.job_id}, the records of {submitted.job_id}")
    checkpoint = checkpoint_of(statement)
    return {
        "job": _job(story, submitted),
        "checkpoint": {
            "journal_id": checkpoint.journal_id.hex(),
            "records": checkpoint.size,
            "root": checkpoint.root.hex(),
            "at_ms": checkpoint.at_ms,
        },
        "workers": [
            {
                "worker_id": worker.worker_id,
                "tier": worker.tier,
                "public_key": worker.public_key.hex(),
                "owner_tag": worker.owner_tag.hex(),
            }
            for worker in statement.workers
        ],
        "results": [_result(result) for result in story.results],
        "verification": _verification(story, submitted),
    }


def checkpoint_of(statement: Statement) -> Checkpoint:
    """The checkpoint under which the records stand; its signature is not checked. Raises EVIDENCE_WRONG."""
    try:
        return read_checkpoint(statement.checkpoint, None)
    except CheckpointUnusable as error:
        raise wrong("evidence.statement", str(error)) from None


def dataset_digest(submitted: Submitted) -> Digest:
    """Names the rows and their order: SHA-256 over digest ‖ rows (u32 big-endian) of each block."""
    blocks = b"".join(block.digest + block.rows.to_bytes(4, "big") for block in submitted.blocks)
    return Digest(hashlib.sha256(blocks).digest())


def _job(story: Story, submitted: Submitted) -> dict[str, Json]:
    return {
        "job_id": submitted.job_id,
        "title": submitted.title,
        "state": story.state,
        "reason": story.reason,
        "pool_id": submitted.pool_id,
        "data_class": submitted.data_class,
        "bundle_digest": submitted.bundle_digest.hex(),
        "dataset_digest": dataset_digest(submitted).hex(),
        "rows": submitted.rows,
        "rows_delivered": len(story.rows),
        "rows_failed": story.rows_failed,
        "submitted_at_ms": story.submitted_at_ms,
        "ended_at_ms": story.ended_at_ms,
        "budget_microcredits": submitted.budget_microcredits + story.funded_microcredits,
        "paid_microcredits": story.paid_microcredits,
    }


def _result(result: Result) -> dict[str, Json]:
    facts: dict[str, Json] = {
        "result": result.cursor,
        "task_id": result.task.task_id,
        "record": result.at.sequence,
        "at_ms": result.at.at_ms,
        "positions": [list(span) for span in result.task.spans],
        "corrects": result.task.corrects,
    }
    if result.abandoned is not None:
        gone = result.abandoned
        return {**facts, "rows": gone.rows, "rows_failed": gone.rows, "cause": gone.cause, "reason": gone.reason}
    assert result.settled is not None and result.commitment is not None, "whatever is not abandoned was settled"
    settled = result.settled
    return {
        **facts,
        "rows": settled.rows,
        "rows_failed": settled.rows_failed,
        "microcredits": settled.microcredits,
        "released": settled.released,
        "contribution_microcredits": settled.contribution_microcredits,
        "commitment": _commitment(result.commitment),
    }


def _verification(story: Story, submitted: Submitted) -> dict[str, Json]:
    """What was checked, and what that says about rows that were not."""
    checks = story.checks
    if not checks.secret:
        return {"policy": submitted.policy, "assurance": submitted.assurance}
    return {
        "policy": submitted.policy,
        "assurance": submitted.assurance,
        "accepted": checks.accepted,
        "secret": checks.secret.hex(),
        "secret_record": checks.secret_record,
        "draws": [_draw(record, draw) for record, draw in checks.draws],
        "audits": [_audit(record, audit, story) for record, audit in checks.audits],
        "given_up": [{"record": record, "reason": fact.reason} for record, fact in checks.given_up],
        "referee_reports": [_report(record, report, story) for record, report in checks.reports],
        "verdicts": [
            {
                "record": record,
                "lease_id": fact.lease_id,
                "row": fact.row,
                "worker_id": fact.worker_id,
                "verdict": fact.verdict,
                "referee_lease_id": fact.referee_lease_id,
            }
            for record, fact in checks.verdicts
        ],
        "corrections": [
            {
                "record": record,
                "result": fact.cursor,
                "lease_id": fact.lease_id,
                "positions": [list(span) for span in fact.spans],
                "verdict": fact.verdict,
                "reason": fact.reason,
            }
            for record, fact in checks.corrections
        ],
        "distrusted": [
            {"record": record, "worker_id": fact.worker_id, "lease_id": fact.lease_id, "row": fact.row,
             "reason": fact.reason}
            for record, fact in checks.distrusted
        ],
        "released": [
            {"record": record, "lease_id": fact.lease_id, "worker_id": fact.worker_id,
             "microcredits": fact.microcredits, "accepted": fact.accepted}
            for record, fact in checks.released
        ],
        "voided": [
            {"record": record, "worker_id": fact.worker_id, "microcredits": fact.microcredits}
            for record, fact in checks.voided
        ],
        "bounds": {
            "confidence_ppm": CONFIDENCE_PPM,
            "workers": [
                {
                    "worker_id": bound.worker_id,
                    "rows": bound.rows,
                    "rows_checked": bound.rows_checked,
                    "rows_by_referee": bound.rows_by_referee,
                    "wrong_ppm_max": bound.wrong_ppm_max,
                    "wrong_ppm_max_of_colluders": bound.wrong_ppm_max_of_colluders,
                }
                for bound in checks.bounds(story.standing(), story.workers())
            ],
        },
    }  # fmt: skip


def _draw(record: int, draw: Drawn) -> dict[str, Json]:
    return {
        "record": record,
        "result": draw.cursor,
        "lease_id": draw.lease_id,
        "worker_id": draw.worker_id,
        "rows_of_lease": draw.rows,
        "rate_ppm": draw.rate_ppm,
        "rows": list(draw.drawn),
        "rows_to_referee": list(draw.refereed),
        "trust": draw.trust,
    }


def _checked_rows(task: TaskMade) -> list[Json]:
    return [[row.lease_id, row.row] for row in task.checks]


def _audit(record: int, audit: Compared, story: Story) -> dict[str, Json]:
    commitment = story.commitments.get(audit.lease_id)
    return {
        "record": record,
        "task_id": audit.task_id,
        "worker_id": audit.worker_id,
        "rows": _checked_rows(story.tasks[audit.task_id]),
        "equal": list(audit.equal),
        "commitment": _commitment(commitment) if commitment is not None else None,
    }


def _report(record: int, report: Reported, story: Story) -> dict[str, Json]:
    return {
        "record": record,
        "task_id": report.task_id,
        "lease_id": report.lease_id,
        "worker_id": report.worker_id,
        "rows": _checked_rows(story.tasks[report.task_id]),
        "findings": [list(found) for found in report.findings],
        "own_root": report.own_root.hex(),
        "execution_class": report.execution_class,
        "message_digest": report.message_digest.hex(),
        "signature": report.signature.hex(),
        "message_sequence": report.message_sequence,
    }


def _commitment(commitment: Commitment) -> dict[str, Json]:
    fact, lease = commitment.fact, commitment.lease
    return {
        "record": commitment.at.sequence,
        "at_ms": commitment.at.at_ms,
        "worker_id": lease.worker_id,
        "lease_id": lease.lease_id,
        "fence": lease.fence,
        "session_id": commitment.session_id,
        "message_sequence": fact.message_sequence,
        "message_digest": fact.message_digest.hex(),
        "signature": fact.signature.hex(),
        "execution_class": fact.execution_class,
        "output_root": fact.output_root.hex(),
        "output_digest": fact.output_digest.hex(),
        "output_length_bytes": fact.output_length_bytes,
        "output_inline": fact.inline,
    }


# ------------------------------------------------------------------------------------------------ evidence ↔ JSON


def _evidence_to_json(evidence: Evidence) -> dict[str, Json]:
    return {
        "statement": _text(evidence.statement),
        "signature": _text(evidence.signature),
        "coordinator_certificate": _text(evidence.coordinator_certificate),
        "authority_certificate": _text(evidence.authority_certificate),
        "records": [
            {
                "sequence": record.sequence,
                "at_ms": record.at_ms,
                "epoch": record.epoch,
                "salt": _text(record.salt),
                "event": _text(record.event),
                "leaf": _text(leaf_of_record(record)),
            }
            for record in evidence.records
        ],
        "proof": [_text(digest) for digest in evidence.proof],
    }


def evidence_from_json(value: Json) -> Evidence:
    """The evidence of a certificate, every leaf compared with its record. Raises EVIDENCE_WRONG, naming the place."""
    names = ("statement", "signature", "coordinator_certificate", "authority_certificate")
    facts = check_keys("evidence", value, (*names, "records", "proof"))
    told = {name: bytes_at(f"evidence.{name}", facts[name]) for name in names}
    records = [_record(f"evidence.records[{at}]", record) for at, record in enumerate(_list("evidence.records", facts))]
    for at, (before, after) in enumerate(pairwise(records)):
        if before.sequence >= after.sequence:
            raise wrong(f"evidence.records[{at + 1}].sequence", "does not come after the record before it")
    proof = [
        bytes_at(f"evidence.proof[{at}]", digest, length=DIGEST_BYTES)
        for at, digest in enumerate(_list("evidence.proof", facts))
    ]
    return Evidence(records=tuple(records), proof=tuple(proof), **told)


def _record(where: str, value: Json) -> RawRecord:
    facts = check_keys(where, value, ("sequence", "at_ms", "epoch", "salt", "event", "leaf"))
    record = RawRecord(
        sequence=_number(f"{where}.sequence", facts["sequence"]),
        at_ms=_number(f"{where}.at_ms", facts["at_ms"]),
        epoch=_number(f"{where}.epoch", facts["epoch"]),
        salt=bytes_at(f"{where}.salt", facts["salt"], length=SALT_BYTES),
        event=bytes_at(f"{where}.event", facts["event"]),
    )
    if leaf_of_record(record) != bytes_at(f"{where}.leaf", facts["leaf"], length=DIGEST_BYTES):
        raise wrong(where, f"is not record {record.sequence} of the journal: its leaf is another")
    return record


def leaf_of_record(record: RawRecord) -> Digest:
    """The leaf of a record."""
    return leaf_of(
        salt=record.salt, sequence=record.sequence, at_ms=record.at_ms, epoch=record.epoch, event=record.event
    )


def _statement(evidence: Evidence) -> Statement:
    try:
        return statement_from(evidence.statement)
    except FallowError as error:
        raise wrong("evidence.statement", error.message) from None


def check_keys(where: str, value: Json, names: Sequence[str]) -> dict[str, Json]:
    """`value` as an object with exactly these names. Raises EVIDENCE_WRONG."""
    if not isinstance(value, dict):
        raise wrong(where, "is no object")
    for name in names:
        if name not in value:
            raise wrong(f"{where}.{name}", "is missing")
    for name in value:
        if name not in names:
            raise wrong(f"{where}.{name}", "does not belong there")
    return value


def bytes_at(where: str, value: Json, *, length: int = 0) -> bytes:
    """The bytes that base64 text holds, written as base64 writes them. Raises EVIDENCE_WRONG."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (ValueError, binascii.Error):
        data = None
    if data is None or _text(data) != value:
        raise wrong(where, "is no base64")
    if length and len(data) != length:
        raise wrong(where, f"has {len(data)} bytes, not {length}")
    return data


def _list(where: str, facts: Mapping[str, Json]) -> list[Json]:
    value = facts[where.rpartition(".")[2]]
    if not isinstance(value, list):
        raise wrong(where, "is no list")
    return value


def _number(where: str, value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise wrong(where, "is no number that a journal has")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
