"""Verifying jobs on the real core, with workers that compute by a table and may cheat: no bytes, no clock, one seed.

An output is a list of values; a value says which row it is of, by which execution class, and whether it is wrong. What
the blob service and referees would do is done on those lists.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fallow.bundle import InspectionReport
from fallow.challenge import OUTPUT_SCHEMA_DIGEST, ChallengeVerdict
from fallow.comparison import CandidateFinding, Finding, RowFinding
from fallow.credits import PoolMode
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, SessionId, TaskId, digest_of
from fallow.job import JOB_STATES_FINAL, DatasetBlock, JobOptions, JobState
from fallow.limits import GIB
from fallow.roles import DataClass, Role, Tier
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Device,
    DeviceKind,
    DeviceLevel,
    RowFailure,
    SandboxLevel,
    TaskKind,
    Usage,
)
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import invariants
from fallow_coordinator.core.answers import (
    AccountMade,
    Answer,
    CertificateGranted,
    JobAccepted,
    SessionGranted,
    TokenMade,
)
from fallow_coordinator.core.devices import measured
from fallow_coordinator.core.limits import AUDIT_PATIENCE_MS
from fallow_coordinator.core.row_plans import compare_plan, pack_plan
from fallow_coordinator.core.state import Lease, State
from fallow_coordinator.core.turn import take_turn

AnswerT = TypeVar("AnswerT", bound=Answer)
EventT = TypeVar("EventT")
DAY_MS = 24 * 3_600_000
INPUT_SCHEMA = digest_of(b"input schema")
OUTPUT_SCHEMA = digest_of(b"output schema")
CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, vendor="Acme", model="Core 9", memory_bytes=8 * GIB, cores=2)
RULES = c.MeasuringRules(idle_ms=60_000, fill_bytes_max=64 * 1024 * 1024)
VOLUNTEERED = frozenset({TaskKind.MAP, TaskKind.CHALLENGE})


@dataclass(frozen=True, slots=True)
class Value:
    """An output row."""

    position: int
    execution_class: str = "cpu"
    wrong: int = 0
    """0: as an honest worker gives it; else which lie."""


Row = Value | None
"""None: a row without a value."""
Behaviour = Callable[["Actor", int], Row]
"""What a worker gives for the row at a job position; it does not know the position, honest or not."""


@dataclass(slots=True)
class Actor:
    """A worker."""

    worker_id: PartyId
    session_id: SessionId
    account_id: AccountId
    behaviour: Behaviour
    execution_class: str = "cpu"
    sequence: int = 0
    rows_done: int = 0
    machine_digest: bytes = b""
    ask: int = 0
    """Micro-credits for a unit."""


def honest(actor: Actor, position: int) -> Row:
    return Value(position, actor.execution_class)


def junk(actor: Actor, position: int) -> Row:
    return Value(position, actor.execution_class, wrong=1 + hash((actor.worker_id, position)) % 1_000_003)


def colluding(actor: Actor, position: int) -> Row:
    """The same lie as that of all who agreed on it."""
    return Value(position, actor.execution_class, wrong=7)


def withholding(actor: Actor, position: int) -> Row:
    return None


def at_times(lie: Behaviour, share: float, rng: random.Random) -> Behaviour:
    """Lies about a share of the rows."""

    def behave(actor: Actor, position: int) -> Row:
        return lie(actor, position) if rng.random() < share else honest(actor, position)

    return behave


def after(rows: int, lie: Behaviour) -> Behaviour:
    """A sleeper."""
    return lambda actor, position: (lie if actor.rows_done >= rows else honest)(actor, position)


@dataclass
class Zoo:
    """One coordinator's core and who works for it."""

    seed: int = 0
    checks: bool = True
    """Whether all invariants are checked after each turn."""
    state: State = field(default_factory=State)
    now_ms: int = 1_700_000_000_000
    events: list[tuple[int, e.Event]] = field(default_factory=list[tuple[int, e.Event]])
    outputs: dict[Digest, list[Row]] = field(default_factory=dict[Digest, list[Row]])
    pending: deque[f.Effect] = field(default_factory=deque[f.Effect])
    actors: dict[PartyId, Actor] = field(default_factory=dict[PartyId, Actor])
    operator_id: AccountId = field(default=AccountId(""))
    client_id: PartyId = field(default=PartyId(""))
    keys: int = 0
    referee: Actor | None = None
    bundle_digest: Digest = field(default=digest_of(b"manifest"))

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.operator_id = self.ask(AccountMade, c.StartJournal("operator", "default")).account_id
        self.client_id = self._local("client", Role.OPERATOR, None).party_id

    # ----------------------------------------------------------------------------------------- the core

    def tell(self, command: c.Command) -> Answer | None:
        turn = take_turn(self.state, command, self.now_ms, self.rng.randbytes(32))
        self.events += [(self.now_ms, event) for event in turn.events]
        self.pending.extend(effect for effect in turn.effects if isinstance(effect, f.PackTask | f.CompareRows))
        if self.checks:
            invariants.check(self.state)
        return turn.answer

    def ask(self, kind: type[AnswerT], command: c.Command) -> AnswerT:
        answer = self.tell(command)
        assert isinstance(answer, kind)
        return answer

    def of_kind(self, kind: type[EventT]) -> list[EventT]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def pass_ms(self, ms: int) -> None:
        self.now_ms += ms
        self.tell(c.Tick())

    def do_pending(self) -> bool:
        """Does one thing that the engine would do."""
        if not self.pending:
            return False
        effect = self.pending.popleft()
        if isinstance(effect, f.PackTask):
            self._pack(effect)
        elif isinstance(effect, f.CompareRows):
            plan = compare_plan(self.state, effect.job_id, effect.task_id)
            if plan is not None:
                rows = [self.outputs[source.digest] for source in plan.sources]
                equal = tuple(rows[a][i] == rows[b][j] for (a, i), (b, j) in plan.pairs)
                self.tell(c.RecordComparison(effect.job_id, effect.task_id, equal))
        return True

    def _pack(self, effect: f.PackTask) -> None:
        plan = pack_plan(self.state, effect.task_id)
        if plan is None or plan.pack_number != effect.pack_number:
            return
        candidates: list[e.PackedCandidate] = []
        for number, one in enumerate(plan.candidates):
            blob = BlobReference(digest_of(f"{effect.task_id} {effect.pack_number} {number}".encode()), 100)
            self.outputs[blob.digest] = [self.outputs[one.sources[source].digest][row] for source, row in one.places]
            candidates.append(e.PackedCandidate(blob, False, one.rows, one.class_numbers))
        blob = BlobReference(digest_of(f"{effect.task_id} {effect.pack_number}".encode()), 100)
        self.tell(
            c.TaskPacked(effect.task_id, effect.pack_number, blob, False, tuple(candidates), plan.execution_classes)
        )

    # ----------------------------------------------------------------------------------------- who is there

    def _key(self) -> KeyFingerprint:
        self.keys += 1
        return KeyFingerprint(digest_of(f"key {self.keys}".encode()))

    def _local(self, name: str, role: Role, tier: Tier | None) -> CertificateGranted:
        command = c.EnrollLocal(self._key(), b"a public key", name, role, tier, certificate_valid_for_ms=20 * DAY_MS)
        return self.ask(CertificateGranted, command)

    def operator_worker(self, *kinds: TaskKind, behaviour: Behaviour = honest, window: int = 4) -> Actor:
        party = self._local(f"operator {self.keys}", Role.WORKER, Tier.OPERATOR)
        return self._connect(party, frozenset(kinds), behaviour, window, "cpu", b"")

    def volunteer(
        self,
        behaviour: Behaviour = honest,
        *,
        execution_class: str = "cpu",
        window: int = 2,
        ask: int = 0,
        tier: Tier = Tier.VOLUNTEER,
        account_id: AccountId | None = None,
        machine_digest: bytes = b"",
    ) -> Actor:
        token = self.ask(
            TokenMade,
            c.IssueToken(
                Digest(self._key()), account_id, Role.WORKER, tier, None, uses_max=1, valid_for_ms=DAY_MS, tags=()
            ),
        )
        name = f"worker {self.keys}"
        command = c.Enroll(token.token_id, self._key(), b"a public key", name, 20 * DAY_MS)
        party = self.ask(CertificateGranted, command)
        return self._connect(party, VOLUNTEERED, behaviour, window, execution_class, machine_digest, ask)

    def _connect(
        self,
        party: CertificateGranted,
        kinds: frozenset[TaskKind],
        behaviour: Behaviour,
        window: int,
        execution_class: str,
        machine_digest: bytes,
        ask: int = 0,
    ) -> Actor:
        actor = Actor(
            party.party_id, SessionId(""), party.account_id, behaviour, execution_class, 0, 0, machine_digest, ask
        )
        self.actors[actor.worker_id] = actor
        self.reconnect(actor, kinds, window)
        return actor

    def reconnect(self, actor: Actor, kinds: frozenset[TaskKind] = VOLUNTEERED, window: int = 2) -> None:
        capability = Capability(
            devices=(CPU,),
            sandbox_level=SandboxLevel.FULL,
            memory_bytes_free=4 * GIB,
            task_kinds=kinds,
            ask_microcredits_per_unit=actor.ask,
        )
        token = digest_of(f"token {actor.worker_id}".encode())
        command = c.OpenSession(actor.worker_id, token, token, capability, window, (), actor.machine_digest)
        actor.session_id = self.ask(SessionGranted, command).session_id

    def measure_all(self) -> None:
        """Every volunteer's device gets its certificate, for which an operator's worker that checks is there."""
        checker = self.operator_worker(TaskKind.CHECK)
        for _ in range(40):
            self.now_ms += 60_000
            self.tell(c.Tick(RULES))
            for actor in list(self.actors.values()):
                for lease in self.leases_of(actor):
                    self.work(actor, lease)
        self.disconnect(checker)
        for actor in self.actors.values():
            worker = self.state.workers[actor.worker_id]
            there = worker.session_id is not None and worker.tier is not Tier.OPERATOR
            assert not there or measured(worker), "everybody is measured"

    def disconnect(self, actor: Actor) -> None:
        self.tell(c.CloseSession(actor.session_id, "gone"))

    # ----------------------------------------------------------------------------------------- jobs

    def begin(self, *, slot_dependent: bool = False, mode: PoolMode = PoolMode.DONATION) -> None:
        """A bundle that an operator's worker has inspected."""
        if mode is not PoolMode.DONATION:
            self.tell(c.SetPoolMode(self.state.default_pool_id, mode))
        inspector = self.operator_worker(TaskKind.INSPECT)
        model = BlobReference(digest_of(b"a model"), 7)
        self.tell(c.RecordBlobs(self.operator_id, (c.StoredBlob(model),)))
        self.register(self.operator_id)
        lease = next(iter(self.leases_of(inspector)))
        report = InspectionReport(
            bundle_digest=self.bundle_digest,
            accepted=True,
            refusals=(),
            operators=(("MatMul", 2),),
            canonical_batch_rows=4,
            slot_dependent=slot_dependent,
            neighbour_dependent=False,
            unit_micros_per_row=40_000,
            unit_micros_per_kib=0,
            memory_bytes_peak=1_000_000,
            execution_class="cpu",
            inspected_seconds=1.5,
        )
        self.tell(
            c.ReportInspection(
                inspector.session_id, inspector.worker_id, lease.lease_id, lease.fence, report, Usage(),
                digest_of(b"report"), b"signature", 1,
            )
        )  # fmt: skip

    def register(self, account_id: AccountId) -> None:
        model = BlobReference(digest_of(b"a model"), 7)
        self.tell(c.RecordBlobs(account_id, (c.StoredBlob(model),)))
        self.tell(
            c.RegisterBundle(
                account_id, self.client_id, self.bundle_digest, (model,), INPUT_SCHEMA, OUTPUT_SCHEMA, 1, 0
            )
        )

    def submit(
        self,
        rows: int,
        assurance: str = "standard",
        *,
        account_id: AccountId | None = None,
        blocks: int = 1,
        failed_rows_max: int = 1_000,
        budget_microcredits: int = 0,
    ) -> JobId:
        account_id = account_id or self.operator_id
        made: list[DatasetBlock] = []
        for number in range(blocks):
            count = rows // blocks + (number < rows % blocks)
            blob = BlobReference(digest_of(f"block {self.keys} {number}".encode()), 100 * count)
            stored = c.StoredBlob(blob, count, digest_of(b"root"), INPUT_SCHEMA, (10 * count,))
            self.tell(c.RecordBlobs(account_id, (stored,)))
            made.append(DatasetBlock(blob, count, inline=False))
        self.keys += 1
        command = c.SubmitMapJob(
            account_id=account_id,
            party_id=self.client_id,
            idempotency_key=digest_of(f"job {self.keys}".encode()),
            request_digest=digest_of(b"request"),
            bundle_digest=self.bundle_digest,
            blocks=tuple(made),
            inline_blocks=(),
            data_class=DataClass.PUBLIC,
            pool_id=self.state.default_pool_id,
            title="",
            options=JobOptions(
                failed_rows_max=failed_rows_max, assurance=assurance, budget_microcredits=budget_microcredits
            ),
            kept=None,
        )
        return self.ask(JobAccepted, command).job_id

    # ----------------------------------------------------------------------------------------- work

    def leases_of(self, actor: Actor) -> list[Lease]:
        return [self.state.leases[lease_id] for lease_id in self.state.workers[actor.worker_id].leases]

    def positions_of(self, task_id: TaskId) -> list[int]:
        return [position for span in self.state.tasks[task_id].spans for position in range(*span)]

    def work(self, actor: Actor, lease: Lease) -> None:
        """The worker does what it holds."""
        task = self.state.tasks[lease.task_id]
        if task.kind is TaskKind.REFEREE:
            self._referee(actor, lease)
            return
        if task.kind is TaskKind.CHECK:
            verdict = ChallengeVerdict(holds=True, reason="")
            self.tell(c.ReportCheck(actor.session_id, actor.worker_id, lease.lease_id, lease.fence, verdict))
            return
        rows: list[Row] = []
        for position in self.positions_of(task.task_id) if task.kind is TaskKind.MAP else [0]:
            rows.append(actor.behaviour(actor, position))
            actor.rows_done += 1
        output = BlobReference(digest_of(f"output {lease.lease_id}".encode()), 100)
        self.outputs[output.digest] = rows
        actor.sequence += 1
        failures = tuple(RowFailure(row, Cause.ROW, "no value") for row, value in enumerate(rows) if value is None)
        root = digest_of(f"root {lease.lease_id}".encode())
        self.tell(
            c.Commit(
                session_id=actor.session_id,
                worker_id=actor.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                output_root=root,
                rows=len(rows),
                output=output,
                inline=True,
                failures=failures[:256],
                usage=Usage(wall_microseconds=1_000),
                execution_class=actor.execution_class,
                message_digest=digest_of(f"message {lease.lease_id}".encode()),
                signature=b"signature",
                sequence=actor.sequence,
                stored=c.StoredBlob(
                    output,
                    len(rows),
                    root,
                    OUTPUT_SCHEMA if task.kind is TaskKind.MAP else OUTPUT_SCHEMA_DIGEST,
                    (0,),
                    len(failures),
                ),
                elapsed_ms=1_000,
            )
        )

    def _referee(self, actor: Actor, lease: Lease) -> None:
        task = self.state.tasks[lease.task_id]
        found: list[list[CandidateFinding]] = [[CandidateFinding(None) for _ in task.candidates] for _ in task.spans]
        positions = self.positions_of(task.task_id)
        for number, candidate in enumerate(task.candidates):
            for row, value in zip(candidate.rows, self.outputs[candidate.block.digest], strict=True):
                found[row][number] = CandidateFinding(self.finding(actor, positions[row], value))
        actor.sequence += 1
        self.tell(
            c.ReportReferee(
                session_id=actor.session_id,
                worker_id=actor.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                own_root=digest_of(b"own root"),
                findings=tuple(RowFinding(row, tuple(one)) for row, one in enumerate(found)),
                execution_class=actor.execution_class,
                usage=Usage(),
                message_digest=digest_of(b"report"),
                signature=b"signature",
                sequence=actor.sequence,
            )
        )

    def finding(self, actor: Actor, position: int, value: Row) -> Finding:
        own = actor.behaviour(actor, position)
        if own is None:
            return Finding.EQUAL if value is None else Finding.TIE
        if value is None:
            return Finding.WITHHELD
        if value == own:
            return Finding.EQUAL
        if replace(value, execution_class=own.execution_class) == own:
            return Finding.WITHIN_TOLERANCE
        return Finding.WRONG

    def step(self) -> bool:
        """One thing happens, drawn at random; False when nothing can."""
        held = [(actor, lease) for actor in self.actors.values() for lease in self.leases_of(actor)]
        live = [(actor, lease) for actor, lease in held if self.state.workers[actor.worker_id].session_id is not None]
        if self.pending and (not live or self.rng.random() < 0.7):
            return self.do_pending()
        if not live:
            return False
        self.work(*self.rng.choice(live))
        return True

    def go_on(self) -> None:
        """One step, or a second."""
        if not self.step():
            self.pass_ms(1_000)

    def run(self, steps_max: int = 100_000) -> None:
        """Until nothing happens any more, ticks included."""
        for _ in range(steps_max):
            if self.step():
                continue
            before = len(self.events)
            for wait_ms in (1_000, AUDIT_PATIENCE_MS):
                self.pass_ms(wait_ms)
                if len(self.events) > before or self.pending:
                    break
            else:
                return
        raise AssertionError("it never ends")

    # ----------------------------------------------------------------------------------------- what came of it

    def delivered(self, job_id: JobId) -> dict[int, Row]:
        """What the job's owner has, by position."""
        rows: dict[int, Row] = {}
        for result in self.state.jobs[job_id].results:
            for span in result.spans:
                for offset in range(span.rows):
                    values = self.outputs[result.output.digest] if result.output is not None else None
                    rows[span.job_position + offset] = values[span.block_row + offset] if values is not None else None
        return rows

    def wrong_rows(self, job_id: JobId) -> int:
        return sum(value is not None and value.wrong != 0 for value in self.delivered(job_id).values())

    def is_over(self, job_id: JobId) -> bool:
        return self.state.jobs[job_id].state in JOB_STATES_FINAL

    def succeeded(self, job_id: JobId) -> bool:
        return self.state.jobs[job_id].state is JobState.SUCCEEDED

    def distrusted(self) -> set[PartyId]:
        return {worker_id for worker_id, worker in self.state.workers.items() if worker.distrusted_reason}

    def lease_ids(self, actor: Actor) -> list[LeaseId]:
        return list(self.state.workers[actor.worker_id].leases)
