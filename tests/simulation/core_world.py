"""A small world around the core: a state, its records, and short ways to say what happens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fallow.bundle import InspectionReport
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, PartyId, TaskId
from fallow.job import DatasetBlock, JobOptions, JobStatus
from fallow.roles import DataClass, Role, Tier
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Device,
    DeviceKind,
    DeviceLevel,
    HeldLease,
    RowFailure,
    TaskKind,
    Usage,
)
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import invariants, questions
from fallow_coordinator.core import turn as turns
from fallow_coordinator.core.answers import (
    AccountMade,
    Answer,
    CertificateGranted,
    JobAccepted,
    SessionGranted,
    TokenMade,
)
from fallow_coordinator.core.events import Event
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import Lease, State
from fallow_coordinator.core.turn import Turn

EffectT = TypeVar("EffectT")
START_MS = 1_000_000
INPUT_SCHEMA = Digest(hashlib.sha256(b"input schema").digest())
OUTPUT_SCHEMA = Digest(hashlib.sha256(b"output schema").digest())


def digest(*parts: object) -> Digest:
    """A digest that stands for anything."""
    return Digest(hashlib.sha256(repr(parts).encode()).digest())


def blob(*parts: object, length_bytes: int = 1_000) -> BlobReference:
    """A blob that stands for anything."""
    return BlobReference(digest(*parts), length_bytes)


def capability(*kinds: TaskKind, slots: int = 1) -> Capability:
    """One CPU with so many slots; map only unless kinds are named."""
    device = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, slots=slots)
    return Capability(devices=(device,), task_kinds=frozenset(kinds or (TaskKind.MAP,)))


def report(bundle_digest: Digest, *, accepted: bool = True, per_row: int = 10_000, batch: int = 4) -> InspectionReport:
    """What an inspector says."""
    return InspectionReport(
        bundle_digest=bundle_digest,
        accepted=accepted,
        refusals=() if accepted else ("node 3 (Loop): unbounded",),
        operators=(("ai.onnx.MatMul", 2),),
        canonical_batch_rows=batch,
        slot_dependent=False,
        neighbour_dependent=False,
        unit_micros_per_row=per_row,
        unit_micros_per_kib=0,
        memory_bytes_peak=1,
        execution_class="test",
        inspected_seconds=1.5,
    )


@dataclass
class World:
    """The state with every record that made it; `take` is the only way on."""

    state: State = field(default_factory=State)
    records: list[tuple[int, Event]] = field(default_factory=list[tuple[int, Event]])
    effects: list[f.Effect] = field(default_factory=list[f.Effect])
    now_ms: int = START_MS
    draws: int = 0
    account_id: AccountId = field(default=AccountId(""))
    client_id: PartyId = field(default=PartyId(""))
    bundle_digest: Digest = field(default_factory=lambda: digest("bundle"))
    checks: Callable[[State], None] = invariants.check

    def take(self, command: c.Command) -> Turn:
        """One turn at `now_ms`; the invariants hold after it."""
        self.draws += 1
        entropy = hashlib.sha256(self.draws.to_bytes(8, "big")).digest()
        turn = turns.take_turn(self.state, command, self.now_ms, entropy)
        self.records.extend((self.now_ms, event) for event in turn.events)
        self.effects.extend(turn.effects)
        self.checks(self.state)
        return turn

    def ask(self, command: c.Command) -> Answer:
        """The answer of one turn."""
        return self.take(command).answer

    def replayed(self) -> State:
        """A fresh fold of all records."""
        state = State()
        for at_ms, event in self.records:
            evolve(state, event, at_ms)
        return state

    def pass_time(self, ms: int) -> Turn:
        """Time goes by, and then a tick."""
        self.now_ms += ms
        return self.take(c.Tick())

    # ---------------------------------------------------------------------------------------------- people

    def start(self) -> World:
        """A journal with the operator's account and one client in it."""
        made = self.ask(c.StartJournal("operator", "default"))
        assert isinstance(made, AccountMade)
        self.account_id = made.account_id
        self.take(c.Restart(epoch=1, down_time_ms=0))
        self.client_id = self.enroll_local("client", Role.CLIENT)
        return self

    def enroll_local(self, name: str, role: Role, tier: Tier | None = None) -> PartyId:
        """One of the operator's own parties."""
        answer = self.ask(c.EnrollLocal(fingerprint(name), name.encode(), name, role, tier, 86_400_000))
        assert isinstance(answer, CertificateGranted)
        return answer.party_id

    def token(self, role: Role = Role.WORKER, tier: Tier | None = None, **changes: object) -> TokenMade:
        """A join token; with an account of its own for each joiner unless one is named."""
        fields: dict[str, object] = {
            "secret_digest": digest("secret", self.draws),
            "account_id": None,
            "role": role,
            "tier": tier,
            "pool_id": None,
            "uses_max": 100,
            "valid_for_ms": 3_600_000,
        }
        answer = self.ask(c.IssueToken(**(fields | changes)))  # type: ignore[arg-type]
        assert isinstance(answer, TokenMade)
        return answer

    def enroll(
        self, name: str, token: TokenMade | None = None, valid_for_ms: int = 30 * 86_400_000
    ) -> CertificateGranted:
        """A party by token, a volunteer worker unless the token says otherwise."""
        token = token or self.token()
        answer = self.ask(c.Enroll(token.token_id, fingerprint(name), name.encode(), name, valid_for_ms))
        assert isinstance(answer, CertificateGranted)
        return answer

    def connect(
        self,
        worker_id: PartyId,
        *,
        window: int = 2,
        token: str | None = None,
        next_token: str = "",
        held: tuple[HeldLease, ...] = (),
        able: Capability | None = None,
    ) -> SessionGranted:
        """Opens a session; the n-th one's resume token is `worker#n` unless named."""
        worker = self.state.workers[worker_id]
        answer = self.ask(
            c.OpenSession(
                worker_id=worker_id,
                resume_token_digest=None if token is None else digest("token", token),
                next_resume_token_digest=digest("token", next_token or f"{worker_id}#{worker.sessions + 1}"),
                capability=able or capability(),
                window=window,
                held_leases=held,
            )
        )
        assert isinstance(answer, SessionGranted)
        return answer

    def volunteer(self, name: str, *, window: int = 2, slots: int = 1) -> PartyId:
        """A connected volunteer with an account of its own."""
        worker_id = self.enroll(name).party_id
        self.connect(worker_id, window=window, able=capability(slots=slots))
        return worker_id

    def inspector(self, *kinds: TaskKind) -> PartyId:
        """A connected operator worker that inspects (and does nothing else unless kinds are named)."""
        worker_id = self.enroll_local("inspector", Role.WORKER, Tier.OPERATOR)
        self.connect(worker_id, able=capability(*(kinds or (TaskKind.INSPECT,))))
        return worker_id

    # ---------------------------------------------------------------------------------------------- bundles and jobs

    def record(self, stored: c.StoredBlob, account_id: AccountId | None = None) -> None:
        """The account uploaded a blob."""
        self.take(c.RecordBlobs(account_id or self.account_id, (stored,)))

    def register(self, account_id: AccountId | None = None, **changes: object) -> Turn:
        """Registers the world's bundle, after its one file."""
        account_id = account_id or self.account_id
        file = blob("model.onnx")
        self.record(c.StoredBlob(file), account_id)
        fields: dict[str, object] = {
            "account_id": account_id,
            "party_id": self.client_id,
            "bundle_digest": self.bundle_digest,
            "files": (file,),
            "input_schema_digest": INPUT_SCHEMA,
            "output_schema_digest": OUTPUT_SCHEMA,
            "size_feature_count": 0,
            "bytes_feature_index": -1,
        }
        return self.take(c.RegisterBundle(**(fields | changes)))  # type: ignore[arg-type]

    def inspect(self, *, accepted: bool = True, per_row: int = 10_000, batch: int = 4) -> Turn:
        """The leased inspection ends with a report."""
        lease = next(lease for lease in self.state.leases.values() if self.state.tasks[lease.task_id].job_id is None)
        return self.take(
            c.ReportInspection(
                session_id=lease.session_id,
                worker_id=lease.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                report=report(self.bundle_digest, accepted=accepted, per_row=per_row, batch=batch),
                usage=Usage(),
                message_digest=digest("message"),
                signature=b"signature",
                sequence=1,
            )
        )

    def ready_bundle(self, *, per_row: int = 10_000, batch: int = 4) -> World:
        """The world's bundle, registered and accepted by an inspector that then leaves."""
        inspector = self.inspector()
        self.register()
        self.inspect(per_row=per_row, batch=batch)
        session_id = self.state.workers[inspector].session_id
        assert session_id is not None
        self.take(c.CloseSession(session_id, "bye"))
        return self

    def submission(self, rows: int = 100, *, blocks: int = 1, key: str = "key", **changes: object) -> c.SubmitMapJob:
        """A submission of equal inline blocks, to be changed at will."""
        made = tuple(
            DatasetBlock(blob("rows", key, index), (rows * (index + 1)) // blocks - rows * index // blocks, inline=True)
            for index in range(blocks)
        )
        inline = tuple(
            c.StoredBlob(block.blob, rows=block.rows, root=digest("root", index), schema_digest=INPUT_SCHEMA)
            for index, block in enumerate(made)
        )
        fields: dict[str, object] = {
            "account_id": self.account_id,
            "party_id": self.client_id,
            "idempotency_key": digest(key)[:16],
            "request_digest": digest("request", key),
            "bundle_digest": self.bundle_digest,
            "blocks": made,
            "inline_blocks": inline,
            "data_class": DataClass.PUBLIC,
            "pool_id": None,
            "title": "",
            "options": JobOptions(),
            "kept": None,
        }
        return c.SubmitMapJob(**(fields | changes))  # type: ignore[arg-type]

    def submit(self, rows: int = 100, **changes: object) -> JobId:
        """A submitted job of inline blocks."""
        answer = self.ask(self.submission(rows, **changes))  # type: ignore[arg-type]
        assert isinstance(answer, JobAccepted)
        return answer.job_id

    # ---------------------------------------------------------------------------------------------- work

    def pack(self, task_id: TaskId, **changes: object) -> Turn:
        """The packer is done with the task."""
        task = self.state.tasks[task_id]
        fields: dict[str, object] = {
            "task_id": task_id,
            "pack_number": task.pack_number,
            "input": blob("input", task_id, task.pack_number),
            "inline": True,
        }
        return self.take(c.TaskPacked(**(fields | changes)))  # type: ignore[arg-type]

    def pack_all(self) -> None:
        """The packer does all there is, also what comes up meanwhile."""
        while True:
            packing = [task_id for lane in self.state.lanes.values() for task_id in lane.packing]
            if not packing:
                return
            for task_id in packing:
                self.pack(task_id)

    def leases_of(self, worker_id: PartyId) -> list[Lease]:
        """What the worker holds, oldest first."""
        return [self.state.leases[lease_id] for lease_id in self.state.workers[worker_id].leases]

    def commit_command(
        self, lease: Lease, *, inline: bool = True, failures: tuple[RowFailure, ...] = (), **changes: object
    ) -> c.Commit:
        """An honest commitment, to be changed at will."""
        task = self.state.tasks[lease.task_id]
        output = blob("output", task.spans)
        root = digest("output root", task.spans)
        stored = c.StoredBlob(output, rows=task.rows, root=root, schema_digest=OUTPUT_SCHEMA, rows_failed=len(failures))
        fields: dict[str, object] = {
            "session_id": lease.session_id,
            "worker_id": lease.worker_id,
            "lease_id": lease.lease_id,
            "fence": lease.fence,
            "output_root": root,
            "rows": task.rows,
            "output": output,
            "inline": inline,
            "failures": failures,
            "usage": Usage(),
            "execution_class": "test",
            "message_digest": digest("message"),
            "signature": b"signature",
            "sequence": 7,
            "stored": stored if inline else None,
        }
        return c.Commit(**(fields | changes))  # type: ignore[arg-type]

    def deliver_command(self, lease: Lease, **changes: object) -> c.Deliver:
        """An honest delivery of what was committed, to be changed at will."""
        assert lease.commitment is not None
        stored: dict[str, object] = {
            "blob": lease.commitment.output,
            "rows": lease.commitment.rows,
            "root": lease.commitment.output_root,
            "schema_digest": OUTPUT_SCHEMA,
            "rows_failed": len(lease.commitment.failures),
        }
        return c.Deliver(
            session_id=lease.session_id,
            worker_id=lease.worker_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            stored=c.StoredBlob(**(stored | changes)),  # type: ignore[arg-type]
        )

    def fail_command(self, lease: Lease, cause: Cause, reason: str = "it broke") -> c.FailTask:
        """The worker could not do it."""
        return c.FailTask(lease.session_id, lease.worker_id, lease.lease_id, lease.fence, cause, reason)

    def return_command(self, lease: Lease, cause: Cause, reason: str = "the owner is back") -> c.ReturnLease:
        """The worker gives it back."""
        return c.ReturnLease(lease.session_id, lease.worker_id, lease.lease_id, lease.fence, cause, reason)

    def work(self, worker_id: PartyId) -> Turn:
        """The worker does its oldest lease."""
        return self.take(self.commit_command(self.leases_of(worker_id)[0]))

    def work_off(self) -> None:
        """Everybody works until nothing is leased or packed."""
        while True:
            self.pack_all()
            if not self.state.leases:
                return
            self.take(self.commit_command(next(iter(self.state.leases.values()))))

    def status(self, job_id: JobId) -> JobStatus:
        """The job's status."""
        status = questions.job_status(self.state, job_id)
        assert status is not None
        return status

    def held(self, *leases: Lease) -> tuple[HeldLease, ...]:
        """How a worker lists leases."""
        return tuple(HeldLease(lease.lease_id, lease.fence, lease.commitment is not None) for lease in leases)


def fingerprint(name: str) -> KeyFingerprint:
    """The fingerprint of a named key."""
    return KeyFingerprint(digest("key", name))


def of_kind(effects: tuple[f.Effect, ...], kind: type[EffectT]) -> list[EffectT]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


__all__ = [
    "World",
    "blob",
    "capability",
    "digest",
    "fingerprint",
    "of_kind",
    "report",
]
