"""Evidence from the coordinator: checkpoints that go on from those seen before, and what certificates are made of."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from fallow.certificate import OUTPUTS_BYTES_MAX
from fallow.checking_story import wrong
from fallow.checkpoint import Checkpoint, CheckpointUnusable, read_checkpoint
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.client.stream import watch
from fallow.errors import FallowError, Reason
from fallow.identity import write_private
from fallow.ids import Digest, JobId
from fallow.job import JobStatus
from fallow.job_records import Evidence, RawRecord
from fallow.journal_proof import ProofWrong, check_consistency
from fallow.v1 import certificate_service_pb2, job_service_pb2
from fallow.wire.evidence import record_from_message

SEEN_FILE: Final = "checkpoint.note"
"""In the credentials' folder: the newest checkpoint that this client has seen."""
EVIDENCE_TIMEOUT_S: Final = 600.0


async def follow_checkpoint(connection: Connection, since: Checkpoint | None = None) -> Checkpoint:
    """The coordinator's newest checkpoint, which goes on from the one seen last, and from `since`.

    Raises EVIDENCE_WRONG when the coordinator shows a journal that is not the one it showed before.
    """
    credentials = connection.credentials
    path = credentials.folder / SEEN_FILE
    seen = await asyncio.to_thread(_seen, path, credentials.coordinator_public_key)
    newest: Checkpoint | None = None
    for older in (since, seen):
        note, newer = await _checkpoint_after(connection, older)
        if newest is not None and (newer.size < newest.size):
            raise wrong("checkpoint", "a later one has fewer records")
        newest = newer
        if older is seen:
            await asyncio.to_thread(write_private, path, note.encode())
    assert newest is not None, "there was one to follow"
    return newest


async def _checkpoint_after(connection: Connection, older: Checkpoint | None) -> tuple[str, Checkpoint]:
    request = certificate_service_pb2.GetCheckpointRequest(since_size=older.size if older is not None else 0)
    answer = await connection.call_certificates(lambda stub: stub.GetCheckpoint(request, timeout=CALL_TIMEOUT_S))
    newer = _read(answer.checkpoint, connection.credentials.coordinator_public_key)
    if older is None:
        return answer.checkpoint, newer
    if older.journal_id != newer.journal_id:
        raise wrong("checkpoint", "is of another journal than the one seen before")
    try:
        check_consistency(
            old_size=older.size,
            old_root=older.root,
            size=newer.size,
            root=newer.root,
            proof=list(answer.consistency),
        )
    except ProofWrong as error:
        raise wrong(
            "checkpoint", f"the coordinator's journal is not the one it signed before ({error}); keep both and ask why"
        ) from None
    return answer.checkpoint, newer


async def fetch_evidence(connection: Connection, job_id: JobId) -> Evidence:
    """Everything that the coordinator tells about a finished job; nothing in it is checked.

    Raises JOB_UNKNOWN, JOB_UNFINISHED, JOB_DELETED.
    """
    request = certificate_service_pb2.GetJobEvidenceRequest(job_id=job_id)

    async def read() -> Evidence:
        records: list[RawRecord] = []
        proof: list[bytes] = []
        async for message in connection.certificates.GetJobEvidence(request, timeout=EVIDENCE_TIMEOUT_S):
            match message.WhichOneof("kind"):
                case "records":
                    records += [record_from_message(record) for record in message.records.records]
                case "proof":
                    proof += message.proof.digests
                case "signed":
                    signed = message.signed
                    return Evidence(
                        records=tuple(records),
                        proof=tuple(proof),
                        statement=signed.statement,
                        signature=signed.signature,
                        coordinator_certificate=signed.coordinator_certificate,
                        authority_certificate=signed.authority_certificate,
                    )
                case _:
                    pass
        raise FallowError(Reason.MALFORMED_MESSAGE, "the evidence ends without a signature", field="evidence")

    return await connection.repeated(read)


async def inline_outputs(connection: Connection, job_id: JobId) -> dict[Digest, bytes]:
    """Output blocks of the job that travelled inline; none at all when they are more than a certificate carries."""
    outputs: dict[Digest, bytes] = {}
    total = 0
    async for event in watch(connection, job_id):
        if isinstance(event, JobStatus) or event.result.output is None or not event.inline_output:
            continue
        outputs[event.result.output.digest] = event.inline_output
        total += len(event.inline_output)
        if total > OUTPUTS_BYTES_MAX:
            return {}
    return outputs


async def manifest_of(connection: Connection, bundle_digest: Digest) -> bytes:
    """The bundle's manifest as it was registered; empty when the coordinator does not have it any more."""
    request = job_service_pb2.GetBundleRequest(bundle_digest=bundle_digest)
    try:
        answer = await connection.call(lambda jobs: jobs.GetBundle(request, timeout=CALL_TIMEOUT_S))
    except FallowError as error:
        if error.reason is Reason.BUNDLE_UNKNOWN:
            return b""
        raise
    return answer.status.manifest


def _seen(path: Path, coordinator_key: bytes) -> Checkpoint | None:
    try:
        return _read(path.read_text(), coordinator_key)
    except FileNotFoundError:
        return None


def _read(note: str, coordinator_key: bytes) -> Checkpoint:
    try:
        return read_checkpoint(note, coordinator_key)
    except CheckpointUnusable as error:
        raise wrong("checkpoint", str(error)) from None
