"""Evidence of a job out of events in memory, under keys of the test's own: certificates without processes."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fallow.checkpoint import Checkpoint, sign_checkpoint
from fallow.envelope import Domain, sign_payload
from fallow.identity import CONTROL_NAME, PrivateKey, load_certificate
from fallow.ids import Digest, JobId, digest_of
from fallow.job_records import Evidence, RawRecord
from fallow.journal_proof import SALT_BYTES, inclusion_of, leaf_of
from fallow.merkle import root_of
from fallow.v1 import certificate_service_pb2 as pb
from fallow_coordinator.core.events import Event
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import State
from fallow_coordinator.service.authority import Authority
from fallow_coordinator.service.certificates import owner_tag
from fallow_coordinator.store.encoding import encode_event
from fallow_coordinator.store.job_index import job_of


class CertificateWorld:
    """An authority, a coordinator's key, and what they say about a journal."""

    def __init__(self, folder: Path) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.authority = Authority.open(folder, now)
        self.key = PrivateKey.generate()
        pem = self.authority.server_certificate(self.key.raw.public_key(), (CONTROL_NAME,), now)
        self.certificate = load_certificate(pem).public_bytes(Encoding.DER)
        self.now_ms = int(now.timestamp() * 1_000)

    @property
    def fingerprint(self) -> Digest:
        """Of the authority: whom to trust."""
        return self.authority.fingerprint

    def evidence(self, job_id: JobId, events: Sequence[tuple[int, Event]]) -> Evidence:
        """What a coordinator with this journal would tell about a job."""
        state, of_job = State(), list[int]()
        records: list[RawRecord] = []
        for sequence, (at_ms, event) in enumerate(events, 1):
            found = job_of(state, event)
            if found is not None and found.job_id == job_id:
                of_job.append(sequence)
            salt = digest_of(sequence.to_bytes(8, "big"))[:SALT_BYTES]
            records.append(RawRecord(sequence, at_ms, 1, salt, encode_event(event)))
            evolve(state, event, at_ms)
        return self.signed(job_id, records, of_job, state)

    def signed(self, job_id: JobId, records: Sequence[RawRecord], of_job: Sequence[int], state: State) -> Evidence:
        """Evidence of those records under a fresh checkpoint over all of them."""
        leaves = [leaf_of(salt=r.salt, sequence=r.sequence, at_ms=r.at_ms, epoch=r.epoch, event=r.event)
                  for r in records]  # fmt: skip
        checkpoint = Checkpoint(state.journal_id, len(leaves), root_of(leaves), self.now_ms)
        workers = [
            pb.EvidenceWorker(
                worker_id=worker_id,
                public_key=state.parties[worker_id].public_key,
                tier=worker.tier.value,
                owner_tag=owner_tag(job_id, worker.account_id),
            )
            for worker_id, worker in sorted(state.workers.items())
        ]
        digest = hashlib.sha256(b"".join(sequence.to_bytes(8, "big") for sequence in of_job)).digest()
        statement = pb.EvidenceStatement(
            job_id=job_id,
            checkpoint=sign_checkpoint(checkpoint, self.key),
            records=len(of_job),
            sequences_digest=digest,
            workers=workers,
        ).SerializeToString(deterministic=True)
        return Evidence(
            records=tuple(records[sequence - 1] for sequence in of_job),
            proof=tuple(
                inclusion_of([s - 1 for s in of_job], len(leaves), lambda low, high: root_of(leaves[low:high]))
            ),
            statement=statement,
            signature=sign_payload(self.key, Domain.EVIDENCE, statement),
            coordinator_certificate=self.certificate,
            authority_certificate=self.authority.certificate_der,
        )

    def encoded(self, events: Sequence[tuple[int, Event]], records: Sequence[RawRecord]) -> list[bytes]:
        """Bytes of the events that stand at the records' sequences."""
        return [encode_event(events[record.sequence - 1][1]) for record in records]

    def resigned(self, job_id: JobId, records: Sequence[RawRecord], state: State) -> Evidence:
        """Evidence of a coordinator that lies: a journal that holds these records and fits them otherwise."""
        by_sequence = {record.sequence: record for record in records}
        size = max(by_sequence)
        nothing = RawRecord(0, 0, 1, bytes(SALT_BYTES), b"")
        journal = [by_sequence.get(sequence, replace(nothing, sequence=sequence)) for sequence in range(1, size + 1)]
        return self.signed(job_id, journal, sorted(by_sequence), state)
