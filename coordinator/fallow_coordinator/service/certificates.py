"""Evidence for whoever asks later: signed checkpoints of the journal, and everything that it says about one job."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import grpc

from fallow.checkpoint import Checkpoint, sign_checkpoint
from fallow.envelope import Domain, sign_payload
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import AccountId, JobId, PartyId
from fallow.job import JOB_STATES_FINAL
from fallow.journal.v1 import journal_pb2
from fallow.limits import CONTROL_MESSAGE_BYTES_MAX, KIB
from fallow.roles import Role
from fallow.v1 import certificate_service_pb2 as pb
from fallow_coordinator.core.state import State
from fallow_coordinator.engine import Engine
from fallow_coordinator.ports import Prover, RawRecord
from fallow_coordinator.service.auth import Doorkeeper
from fallow_coordinator.service.calls import Call, method_name, server_stream, service_handlers, unary
from fallow_coordinator.service.job_reads import JobReads, check_not_deleted
from fallow_coordinator.service.rate_limit import RateLimit

CHECKPOINT_COST: Final = 10.0
"""Calls of another kind that a checkpoint takes as long as: a node or two of the tree, a signature."""
EVIDENCE_COST: Final = 100.0
RECORDS_OF_ONE_CALL: Final = 50
STREAMS_MAX: Final = 8
"""Evidence that is being read for all callers at once; one more is told to come back."""
VIEWS_PATIENCE_S: Final = 10.0
VIEWS_POLL_S: Final = 0.05
MESSAGE_BYTES: Final = 256 * KIB
"""About how long a part is."""
PROOF_DIGESTS_OF_ONE_MESSAGE: Final = 4_096
STATEMENT_BYTES_MAX: Final = CONTROL_MESSAGE_BYTES_MAX - 16 * KIB

_SERVICE = pb.DESCRIPTOR.services_by_name["CertificateService"]
_OWNER_TAG: Final = b"fallow/owner-of-a-worker\x00"

T = TypeVar("T")


class CertificateService:
    """All of CertificateService, for parties of role client or operator."""

    def __init__(
        self,
        *,
        engine: Engine,
        reads: JobReads,
        prover: Prover,
        doorkeeper: Doorkeeper,
        key: PrivateKey,
        coordinator_certificate: bytes,
        authority_certificate: bytes,
        now_ms: Callable[[], int],
    ) -> None:
        """`key` signs; the certificates (DER) say whose it is."""
        self._engine = engine
        self._reads = reads
        self._prover = prover
        self._doorkeeper = doorkeeper
        self._key = key
        self._coordinator_certificate = coordinator_certificate
        self._authority_certificate = authority_certificate
        self._now_ms = now_ms
        self._reading = asyncio.Lock()
        self._streams = 0

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """Both methods; `limit` counts by key."""
        checkpoint, evidence = (method_name(_SERVICE, name) for name in ("GetCheckpoint", "GetJobEvidence"))
        return service_handlers(
            _SERVICE,
            {
                "GetCheckpoint": unary(checkpoint, pb.GetCheckpointRequest, self.get_checkpoint, limit),
                "GetJobEvidence": server_stream(evidence, pb.GetJobEvidenceRequest, self.get_job_evidence, limit),
            },
        )

    async def get_checkpoint(self, call: Call[pb.GetCheckpointRequest]) -> pb.GetCheckpointResponse:
        """The journal as it is now, under the coordinator's signature, and that it goes on from an older one."""
        await self._doorkeeper.admit(call.peer, Role.CLIENT, Role.OPERATOR)
        call.charge(CHECKPOINT_COST)
        since_size, prover = call.request.since_size, self._prover
        size = await self._read(prover.size)
        if since_size > size:
            raise FallowError(
                Reason.OFFSET_MISMATCH,
                f"the journal has {size} records and never had {since_size}",
                field="since_size",
                limit=f"0 to {size}",
                hint="this coordinator once signed a longer journal: keep that checkpoint and ask its operator",
            )
        note = await self._signed_checkpoint(size)
        consistency = await self._read(lambda: prover.consistency(since_size, size))
        return pb.GetCheckpointResponse(checkpoint=note, consistency=consistency)

    async def get_job_evidence(
        self, call: Call[pb.GetJobEvidenceRequest]
    ) -> AsyncGenerator[pb.GetJobEvidenceResponse, None]:
        """Records, proof, and the signed statement, a part at a time."""
        caller = await self._doorkeeper.admit(call.peer, Role.CLIENT, Role.OPERATOR)
        call.charge(EVIDENCE_COST)
        job_id = JobId(call.request.job_id)
        await self._check_finished(caller.account_id, job_id)
        if self._streams >= STREAMS_MAX:
            raise FallowError(
                Reason.OVERLOADED, "too many certificates are being made", limit=str(STREAMS_MAX), hint="try again soon"
            )
        self._streams += 1
        try:
            size, found = await self._read(lambda: self._prover.job_records(job_id))
            call.charge(len(found) / RECORDS_OF_ONE_CALL)
            sequences = [sequence for sequence, _ in found]
            facts = _Facts(dict(found))
            parts = self._prover.records(sequences)
            while part := await self._read(lambda: _bytes_of_records(parts)):
                facts.take(part)
                yield pb.GetJobEvidenceResponse(records=pb.EvidenceRecords(records=part))
            proof = await self._read(lambda: self._prover.inclusion(sequences, size))
            for first in range(0, len(proof), PROOF_DIGESTS_OF_ONE_MESSAGE):
                digests = proof[first : first + PROOF_DIGESTS_OF_ONE_MESSAGE]
                yield pb.GetJobEvidenceResponse(proof=pb.EvidenceProof(digests=digests))
            note = await self._signed_checkpoint(size)
            yield pb.GetJobEvidenceResponse(signed=self._signed(job_id, note, sequences, facts))
        finally:
            self._streams -= 1

    async def _check_finished(self, account_id: AccountId, job_id: JobId) -> None:
        """Returns once everything about the job is in the views. Raises JOB_UNKNOWN, JOB_DELETED, JOB_UNFINISHED."""
        status = await self._reads.status(account_id, job_id)
        check_not_deleted(status)
        if status.state not in JOB_STATES_FINAL:
            raise FallowError(
                Reason.JOB_UNFINISHED,
                f"job {job_id} is {status.state.value}; it has a certificate once it has ended",
                field="job_id",
                hint=f"`fallow job wait {job_id}` returns then",
            )
        deadline = asyncio.get_running_loop().time() + VIEWS_PATIENCE_S
        # The follower is another process: nothing here is told when it has come so far.
        while not await self._read(lambda: self._prover.has_ended(job_id)):
            if asyncio.get_running_loop().time() > deadline:
                raise FallowError(
                    Reason.OVERLOADED,
                    "the views are behind the journal",
                    limit=f"{VIEWS_PATIENCE_S:g} s",
                    hint="try again in a minute",
                )
            await asyncio.sleep(VIEWS_POLL_S)

    async def _signed_checkpoint(self, size: int) -> str:
        root = await self._read(lambda: self._prover.root(size))
        return sign_checkpoint(Checkpoint(self._engine.state.journal_id, size, root, self._now_ms()), self._key)

    def _signed(self, job_id: JobId, note: str, sequences: Sequence[int], facts: _Facts) -> pb.SignedEvidence:
        digest = hashlib.sha256(b"".join(sequence.to_bytes(8, "big") for sequence in sequences)).digest()
        statement = pb.EvidenceStatement(
            job_id=job_id,
            checkpoint=note,
            records=len(sequences),
            sequences_digest=digest,
            workers=_workers(self._engine.state, job_id, facts.workers),
            sessions=[pb.EvidenceSession(sequence=at, session_id=name) for at, name in facts.sessions_moved.items()],
        ).SerializeToString(deterministic=True)
        if len(statement) > STATEMENT_BYTES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                "too many workers did this job",
                limit=f"a statement of {STATEMENT_BYTES_MAX} bytes",
            )
        return pb.SignedEvidence(
            statement=statement,
            signature=sign_payload(self._key, Domain.EVIDENCE, statement),
            coordinator_certificate=self._coordinator_certificate,
            authority_certificate=self._authority_certificate,
        )

    async def _read(self, work: Callable[[], T]) -> T:
        """What `work` finds in the files, in another thread, one at a time."""
        async with self._reading:
            return await asyncio.to_thread(work)


class _Facts:
    """What the statement must say about the records, noted while they go by."""

    def __init__(self, sessions: Mapping[int, str]) -> None:
        self._sessions = sessions
        self._granted: dict[str, str] = {}
        self.workers: dict[PartyId, None] = {}
        self.sessions_moved: dict[int, str] = {}

    def take(self, records: Sequence[pb.EvidenceRecord]) -> None:
        """Notes who holds leases, and which commitments were signed in a later session than their lease's."""
        for record in records:
            event = journal_pb2.Event.FromString(record.event)
            match event.WhichOneof("kind"):
                case "lease_granted":
                    self.workers[PartyId(event.lease_granted.worker_id)] = None
                    self._granted[event.lease_granted.lease_id] = event.lease_granted.session_id
                case "commitment_recorded":
                    session = self._sessions.get(record.sequence, "")
                    if session != self._granted.get(event.commitment_recorded.lease_id):
                        self.sessions_moved[record.sequence] = session
                case _:
                    pass


def _bytes_of_records(parts: Iterator[Sequence[RawRecord]]) -> list[pb.EvidenceRecord]:
    """The next records, about a message full; empty when there are no more."""
    made: list[pb.EvidenceRecord] = []
    length_bytes = 0
    for part in parts:
        made += [
            pb.EvidenceRecord(
                sequence=record.sequence, at_ms=record.at_ms, epoch=record.epoch, salt=record.salt, event=record.event
            )
            for record in part
        ]
        length_bytes += sum(len(record.event) for record in part)
        if length_bytes >= MESSAGE_BYTES:
            break
    return made


def _workers(state: State, job_id: JobId, worker_ids: Mapping[PartyId, None]) -> Iterator[pb.EvidenceWorker]:
    for worker_id in sorted(worker_ids):
        party = state.parties[worker_id]
        yield pb.EvidenceWorker(
            worker_id=worker_id,
            public_key=party.public_key,
            tier=party.tier.value if party.tier is not None else "",
            owner_tag=owner_tag(job_id, party.account_id),
        )


def owner_tag(job_id: JobId, account_id: AccountId) -> bytes:
    """Tells which workers of a job have one owner, and nothing beyond that job."""
    return hashlib.sha256(_OWNER_TAG + job_id.encode() + b"\x00" + account_id.encode()).digest()
