"""Checks a certificate of results, offline, and names the first thing that is wrong.

Trust begins with the authority's fingerprint, which every join line pins. From there: the authority signed the
coordinator's key; that key signed checkpoint and statement; the proof puts every record under the checkpoint; whatever
people read follows from the records; and each worker's key signed its commitment to the root over its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.assurance import PPM
from fallow.certificate import Json, bytes_at, check_sections, evidence_from_json, leaf_of_record, told
from fallow.checking_story import wrong
from fallow.checkpoint import Checkpoint, CheckpointUnusable, read_checkpoint
from fallow.envelope import Domain, check_signature
from fallow.errors import FallowError
from fallow.identity import CONTROL_NAME, load_certificate, public_der_of_certificate
from fallow.ids import Digest, SessionId, digest_of
from fallow.job_records import Evidence, Statement
from fallow.job_story import Commitment, Story
from fallow.journal_proof import ProofWrong, root_shown
from fallow.row_block import RowBlock
from fallow.session_signature import check_worker_signature
from fallow.wire.evidence import commitment_payload, fact_of, statement_from

CLOCK_ALLOWANCE_MS: Final = 300_000


@dataclass(frozen=True, slots=True)
class Checked:
    """What held, of what there was to check."""

    job_id: str
    state: str
    rows: int
    rows_failed: int
    results: int
    records: int
    checkpoint: Checkpoint
    signatures: int
    """Workers' signatures that were checked, over the exact bytes."""
    signatures_unchecked: int
    """Those for which the certificate lacks the rows that were signed with them."""
    rows_checked: int
    """Of delivered rows: worked out by somebody else, and found right."""
    rows_by_referee: int
    """Those of them that a referee worked out."""
    rows_withdrawn: int
    wrong_ppm_max: int
    """Of any worker's rows, with 99 % confidence, if it cheats by itself; a million: nothing is known."""
    wrong_ppm_max_of_colluders: int
    roots: int
    """Results whose root was worked out again from the rows that the certificate carries."""


def check_certificate(certificate: Mapping[str, Json], authority_fingerprint: Digest) -> Checked:
    """Returns what held. Raises EVIDENCE_WRONG whose field is the first place that is wrong."""
    check_sections(certificate)
    evidence = evidence_from_json(certificate["evidence"])
    coordinator_key = _coordinator_key(evidence, authority_fingerprint)
    statement = _signed_statement(evidence, coordinator_key)
    checkpoint = _checkpoint(evidence, statement, coordinator_key)
    _compare(told(evidence), certificate)
    story = Story(sessions=statement.sessions)
    story.read((record, fact_of(record.event)) for record in evidence.records)
    submitted = story.finish()
    manifest = certificate["manifest"]
    if manifest is not None and digest_of(bytes_at("manifest", manifest)) != submitted.bundle_digest:
        raise wrong("manifest", "is not that of the job's bundle")
    outputs = _outputs(certificate["outputs"], story)
    story.checks.check_owners({worker.worker_id: worker.owner_tag for worker in statement.workers}, story.workers())
    signatures = _check_signatures(story, statement, outputs, coordinator_key)
    commitments = len(story.commitments)
    bounds = story.checks.bounds(story.standing(), story.workers())
    # Without bounds either nothing was checked, or everybody is trusted.
    nothing_ppm = 0 if story.checks.secret else PPM
    return Checked(
        job_id=submitted.job_id,
        state=story.state,
        rows=submitted.rows,
        rows_failed=story.rows_failed,
        results=len(story.results),
        records=len(evidence.records),
        checkpoint=checkpoint,
        signatures=signatures,
        signatures_unchecked=commitments - signatures,
        rows_checked=sum(bound.rows_checked for bound in bounds),
        rows_by_referee=sum(bound.rows_by_referee for bound in bounds),
        rows_withdrawn=sum(len(rows) for rows in story.withdrawn.values()),
        wrong_ppm_max=max((bound.wrong_ppm_max for bound in bounds), default=nothing_ppm),
        wrong_ppm_max_of_colluders=max((bound.wrong_ppm_max_of_colluders for bound in bounds), default=nothing_ppm),
        roots=sum(commitment.fact.output_digest in outputs for commitment in story.commitments.values()),
    )


def authority_fingerprint(authority: x509.Certificate) -> Digest:
    """What join lines pin: SHA-256 of the authority's certificate, DER."""
    return digest_of(authority.public_bytes(Encoding.DER))


def story_of_certificate(certificate: Mapping[str, Json]) -> Story:
    """The job as a checked certificate's evidence tells it. Raises EVIDENCE_WRONG."""
    evidence = evidence_from_json(certificate["evidence"])
    return story_of(evidence, statement_from(evidence.statement))


def story_of(evidence: Evidence, statement: Statement) -> Story:
    """The job as the evidence tells it. Raises EVIDENCE_WRONG."""
    story = Story(sessions=statement.sessions)
    story.read((record, fact_of(record.event)) for record in evidence.records)
    story.finish()
    return story


def outputs_of(certificate: Mapping[str, Json]) -> dict[Digest, RowBlock]:
    """Output blocks that a checked certificate carries, by digest."""
    carried = certificate["outputs"]
    assert isinstance(carried, dict), "it has been checked"
    return {
        Digest(bytes.fromhex(name)): RowBlock.parse(bytes_at(f"outputs.{name}", data)) for name, data in carried.items()
    }


# ------------------------------------------------------------------------------------------------ who says so


def _coordinator_key(evidence: Evidence, authority_fingerprint: Digest) -> bytes:
    """The key that the authority gave the coordinator, DER."""
    if digest_of(evidence.authority_certificate) != authority_fingerprint:
        raise wrong(
            "evidence.authority_certificate",
            f"is {digest_of(evidence.authority_certificate).hex()[:16]}…, and the one to be trusted is "
            f"{authority_fingerprint.hex()[:16]}…",
        )
    try:
        authority = load_certificate(evidence.authority_certificate)
        coordinator = load_certificate(evidence.coordinator_certificate)
        coordinator.verify_directly_issued_by(authority)
        names = coordinator.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = public_der_of_certificate(coordinator)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        raise wrong("evidence.coordinator_certificate", "was not issued by the authority") from None
    except FallowError as error:
        raise wrong("evidence.coordinator_certificate", error.message) from None
    if CONTROL_NAME not in names.get_values_for_type(x509.DNSName):
        raise wrong("evidence.coordinator_certificate", "is of another service of this authority")
    return key


def _signed_statement(evidence: Evidence, coordinator_key: bytes) -> Statement:
    try:
        check_signature(coordinator_key, evidence.signature, Domain.EVIDENCE, evidence.statement)
        statement = statement_from(evidence.statement)
    except FallowError as error:
        raise wrong("evidence.statement", f"is not what the coordinator signed: {error.message}") from None
    sequences = [record.sequence for record in evidence.records]
    digest = hashlib.sha256(b"".join(sequence.to_bytes(8, "big") for sequence in sequences)).digest()
    if len(sequences) != statement.records or digest != statement.sequences_digest:
        raise wrong("evidence.records", f"are not the {statement.records} that the coordinator signed for")
    return statement


def _checkpoint(evidence: Evidence, statement: Statement, coordinator_key: bytes) -> Checkpoint:
    try:
        checkpoint = read_checkpoint(statement.checkpoint, coordinator_key)
    except CheckpointUnusable as error:
        raise wrong("evidence.statement", str(error)) from None
    certificate = load_certificate(evidence.coordinator_certificate)
    begin_ms = certificate.not_valid_before_utc.timestamp() * 1_000 - CLOCK_ALLOWANCE_MS
    if not begin_ms <= checkpoint.at_ms <= certificate.not_valid_after_utc.timestamp() * 1_000:
        raise wrong("evidence.coordinator_certificate", "was not good when the checkpoint was signed")
    leaves = {record.sequence - 1: leaf_of_record(record) for record in evidence.records}
    try:
        root = root_shown(leaves, checkpoint.size, evidence.proof)
    except ProofWrong as error:
        raise wrong("evidence.proof", str(error)) from None
    if root != checkpoint.root:
        raise wrong("evidence.proof", "does not lead from the records to the checkpoint's root")
    return checkpoint


def _compare(expected: Mapping[str, Json], certificate: Mapping[str, Json]) -> None:
    """Raises EVIDENCE_WRONG at the first place where the certificate says another thing than its evidence."""
    for name, value in expected.items():
        _compare_value(name, value, certificate[name])


def _compare_value(where: str, expected: Json, found: Json) -> None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            if name not in found:
                raise wrong(f"{where}.{name}", "is missing")
            _compare_value(f"{where}.{name}", value, found[name])
        for name in found:
            if name not in expected:
                raise wrong(f"{where}.{name}", "does not belong there")
    elif isinstance(expected, list) and isinstance(found, list):
        for at, (value, other) in enumerate(zip(expected, found, strict=False)):
            _compare_value(f"{where}[{at}]", value, other)
        if len(expected) != len(found):
            raise wrong(where, f"has {len(found)} entries; the journal has {len(expected)}")
    elif type(expected) is not type(found) or expected != found:
        raise wrong(where, f"says {found!r}; the journal says {expected!r}")


# ------------------------------------------------------------------------------------------------ rows, signatures


def _outputs(value: Json, story: Story) -> dict[Digest, bytes]:
    """The blocks that the certificate carries, each what its commitment says. Raises EVIDENCE_WRONG."""
    if not isinstance(value, dict):
        raise wrong("outputs", "is no object")
    committed: dict[str, Commitment] = {c.fact.output_digest.hex(): c for c in story.commitments.values()}
    blocks: dict[Digest, bytes] = {}
    for name, text in value.items():
        where = f"outputs.{name}"
        commitment = committed.get(name)
        if commitment is None:
            raise wrong(where, "is the output of none of the commitments")
        data = bytes_at(where, text)
        if digest_of(data) != commitment.fact.output_digest:
            raise wrong(where, "does not match its digest")
        try:
            block = RowBlock.parse(data)
        except FallowError as error:
            raise wrong(where, error.message) from None
        if len(block) != commitment.fact.rows or block.root() != commitment.fact.output_root:
            raise wrong(where, "has other rows than were committed to")
        blocks[commitment.fact.output_digest] = data
    return blocks


def _check_signatures(
    story: Story, statement: Statement, outputs: Mapping[Digest, bytes], coordinator_key: bytes
) -> int:
    """How many workers' signatures hold. Raises EVIDENCE_WRONG for one that does not."""
    keys = {worker.worker_id: worker.public_key for worker in statement.workers}
    checked = 0
    for commitment in story.commitments.values():
        fact, lease = commitment.fact, commitment.lease
        where = _place(story, commitment)
        if fact.inline and fact.output_digest not in outputs:
            continue
        inline = outputs[fact.output_digest] if fact.inline else b""
        payload = commitment_payload(commitment.at.event, fence=lease.fence, inline_output=inline)
        if digest_of(payload) != fact.message_digest:
            # Written by software that puts the same facts into other bytes: nothing that can be checked here.
            continue
        if lease.worker_id not in keys:
            raise wrong("workers", f"lack {lease.worker_id}, which committed to rows")
        try:
            check_worker_signature(
                keys[lease.worker_id],
                fact.signature,
                payload,
                session=SessionId(commitment.session_id),
                sequence=fact.message_sequence,
                coordinator_key=coordinator_key,
            )
        except FallowError:
            raise wrong(f"{where}.signature", f"is not {lease.worker_id}'s over its commitment") from None
        checked += 1
    return checked


def _place(story: Story, commitment: Commitment) -> str:
    for result in story.results:
        if result.commitment is commitment:
            return f"{result.path}.commitment"
    for at, (_, audit) in enumerate(story.checks.audits):
        if audit.lease_id == commitment.fact.lease_id:
            return f"verification.audits[{at}].commitment"
    return f"record {commitment.at.sequence}"
