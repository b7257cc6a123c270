"""A coordinator without a network: an engine on a store, with workers and a client that are a few lines each.

Time stands still unless a test moves it, and entropy is counted, so that the same calls give the same journal.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from fallow.bundle import InspectionReport
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, SessionId, digest_of
from fallow.job import DatasetBlock, JobOptions, Objective
from fallow.merkle import leaf_digests, root_of
from fallow.roles import DataClass, Role, Tier
from fallow.row_block import RowBlock, pack
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Device,
    DeviceKind,
    DeviceLevel,
    NodeRows,
    RowFailure,
    SandboxLevel,
    TaskKind,
    Usage,
)
from fallow_coordinator.config import EngineSettings
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.answers import (
    AccountMade,
    Answer,
    CertificateGranted,
    JobAccepted,
    SessionGranted,
    TokenMade,
)
from fallow_coordinator.core.effects import Effect
from fallow_coordinator.core.questions import lease_to_send
from fallow_coordinator.core.state import Lease
from fallow_coordinator.engine import Engine
from fallow_coordinator.ports import Packer, Snapshots, Store, Views
from fallow_coordinator.store.memory import MemoryStore

AnswerT = TypeVar("AnswerT", bound=Answer)
START_MS = 1_700_000_000_000
DAY_MS = 24 * 3_600_000
INPUT_SCHEMA = digest_of(b"input schema")
OUTPUT_SCHEMA = digest_of(b"output schema")
QUIET = EngineSettings(tick_ms=3_600_000, archive_ms=3_600_000, batch_ms_max=60_000.0)
"""Ticks come when a test says so, and what queues together is one batch however slow the machine."""


class Ended(BaseException):
    """The engine ended its process."""

    def __init__(self, words: str, exit_code: int) -> None:
        super().__init__(words)
        self.words = words
        self.exit_code = exit_code


def end(words: str, exit_code: int) -> NoReturn:
    raise Ended(words, exit_code)


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Waits until it is so; raises TimeoutError when it does not come to be."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of tests
            await asyncio.sleep(0.001)


class Clock:
    """Stands still."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


class CountedEntropy:
    """Fresh bytes that are the same in every run."""

    def __init__(self, seed: bytes = b"") -> None:
        self._seed = seed
        self._count = 0

    def __call__(self, length: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._seed + self._count.to_bytes(8, "big")).digest(length)


class RecordingSink:
    """Keeps effects in order."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []

    def apply(self, effects: Sequence[Effect]) -> None:
        self.effects.extend(effects)


class BlobShelf:
    """Stands for the blob service: holds blocks by digest and packs them as it does."""

    def __init__(self) -> None:
        self.blocks: dict[Digest, bytes] = {}
        self.failures: list[Exception] = []
        """Raised by the next calls, one each."""

    def put(self, block: bytes) -> BlobReference:
        self.blocks[digest_of(block)] = block
        return BlobReference(digest_of(block), len(block))

    async def pack(
        self, *, sources: Sequence[tuple[Digest, int]], spans: Sequence[tuple[int, int, int]], nonce: bytes
    ) -> tuple[Digest, int]:
        if self.failures:
            raise self.failures.pop(0)
        from fallow.row_block import pack_selection

        blocks = [RowBlock.parse(self.blocks[digest]) for digest, _ in sources]
        made = self.put(pack_selection(blocks, [(source, first, first + rows) for source, first, rows in spans], nonce))
        return made.digest, made.length_bytes


def block_of(schema_digest: Digest, rows: Sequence[bytes]) -> bytes:
    """A block with one size feature: the bytes of each row."""
    return pack(schema_digest, rows, [(len(row),) for row in rows], bytes(16))


def stored_of(block: bytes) -> c.StoredBlob:
    """What the blob service or the service finds in a block."""
    parsed = RowBlock.parse(block)
    return c.StoredBlob(
        blob=BlobReference(digest_of(block), len(block)),
        rows=len(parsed),
        root=parsed.root(),
        schema_digest=parsed.schema_digest,
        size_feature_sums=parsed.size_feature_sums,
        rows_failed=sum(len(row) == 0 for row in parsed),
    )


@dataclass(slots=True)
class WorldWorker:
    """A worker as tests see it."""

    worker_id: PartyId
    session_id: SessionId
    account_id: AccountId
    capability: Capability
    sequence: int = 0
    token: bytes = b""


@dataclass
class World:
    """One engine and what is around it."""

    store: Store = field(default_factory=MemoryStore)
    packer: BlobShelf = field(default_factory=BlobShelf)
    clock: Clock = field(default_factory=Clock)
    entropy: CountedEntropy = field(default_factory=CountedEntropy)
    settings: EngineSettings = QUIET
    views: Views | None = None
    snapshots: Snapshots | None = None
    sink: RecordingSink = field(default_factory=RecordingSink)
    operator_account_id: AccountId = field(default=AccountId(""))
    client_id: PartyId = field(default=PartyId(""))
    bundle_digest: Digest = field(default=Digest(b""))
    keys: int = 0
    bundle_number: int = 0

    def __post_init__(self) -> None:
        packer: Packer = self.packer
        self.engine = Engine(
            store=self.store,
            sink=self.sink,
            packer=packer,
            views=self.views,
            snapshots=self.snapshots,
            clock=self.clock,
            entropy=self.entropy,
            settings=self.settings,
            end=end,
        )

    async def ask(
        self, kind: type[AnswerT], command: c.Command, payloads: Mapping[Digest, bytes] | None = None
    ) -> AnswerT:
        decision = await self.engine.submit(command, payloads or {})
        assert isinstance(decision.answer, kind)
        return decision.answer

    async def tell(self, command: c.Command, payloads: Mapping[Digest, bytes] | None = None) -> None:
        await self.engine.submit(command, payloads or {})

    def fingerprint(self) -> KeyFingerprint:
        self.keys += 1
        return KeyFingerprint(digest_of(f"key {self.keys}".encode()))

    # ----------------------------------------------------------------------------------------- who is there

    async def begin(self) -> None:
        """A new journal with the operator's account and a client of it."""
        await self.engine.start()
        made = await self.ask(AccountMade, c.StartJournal("operator", "default"))
        self.operator_account_id = made.account_id
        self.client_id = (await self._enroll_local("client", Role.OPERATOR, None)).party_id

    async def _enroll_local(self, name: str, role: Role, tier: Tier | None) -> CertificateGranted:
        return await self.ask(
            CertificateGranted,
            c.EnrollLocal(self.fingerprint(), b"a public key", name, role, tier, certificate_valid_for_ms=DAY_MS),
        )

    async def operator_worker(self, window: int = 4) -> WorldWorker:
        """The operator's own worker, which inspects and maps."""
        party = await self._enroll_local("operator worker", Role.WORKER, Tier.OPERATOR)
        return await self.connect(party, frozenset({TaskKind.MAP, TaskKind.INSPECT}), window)

    async def volunteer(self, name: str = "volunteer", window: int = 4) -> WorldWorker:
        """A worker that joins by a token, with an account of its own."""
        secret = digest_of(name.encode())
        token = await self.ask(
            TokenMade,
            c.IssueToken(
                secret, None, Role.WORKER, Tier.VOLUNTEER, None, uses_max=1, valid_for_ms=DAY_MS, tags=("lab",)
            ),
        )
        party = await self.ask(
            CertificateGranted, c.Enroll(token.token_id, self.fingerprint(), b"a public key", name, DAY_MS)
        )
        return await self.connect(party, frozenset({TaskKind.MAP}), window)

    async def connect(self, party: CertificateGranted, kinds: frozenset[TaskKind], window: int) -> WorldWorker:
        device = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, providers=("CPUExecutionProvider",), slots=2)
        capability = Capability(devices=(device,), sandbox_level=SandboxLevel.FULL, task_kinds=kinds)
        worker = WorldWorker(party.party_id, SessionId(""), party.account_id, capability)
        await self.reconnect(worker, window=window, first=True)
        return worker

    async def reconnect(self, worker: WorldWorker, *, window: int = 4, first: bool = False) -> None:
        """Opens a session; the worker has forgotten its leases."""
        presented = None if first else digest_of(worker.token)
        worker.token += b"+"
        granted = await self.ask(
            SessionGranted,
            c.OpenSession(
                worker.worker_id, presented, digest_of(worker.token), worker.capability, window, held_leases=()
            ),
        )
        worker.session_id = granted.session_id

    # ----------------------------------------------------------------------------------------- bundles and jobs

    async def inspected_bundle(self, inspector: WorldWorker, unit_micros_per_row: int = 500_000) -> Digest:
        """A bundle with one file, registered and accepted."""
        manifest = b"manifest %d" % self.bundle_number
        model = BlobReference(digest_of(b"a model"), 7)
        await self.tell(c.RecordBlobs(self.operator_account_id, (c.StoredBlob(model),)))
        self.bundle_digest = digest_of(manifest)
        await self.tell(
            c.RegisterBundle(
                account_id=self.operator_account_id,
                party_id=self.client_id,
                bundle_digest=self.bundle_digest,
                files=(model,),
                input_schema_digest=INPUT_SCHEMA,
                output_schema_digest=OUTPUT_SCHEMA,
                size_feature_count=1,
                bytes_feature_index=0,
            ),
            {self.bundle_digest: manifest},
        )
        await self.inspect_again(inspector, unit_micros_per_row=unit_micros_per_row)
        return self.bundle_digest

    async def inspect_again(self, inspector: WorldWorker, *, unit_micros_per_row: int = 10_000) -> None:
        """The inspection that an operator's worker holds ends well."""
        lease = self.leases_of(inspector)[0]
        await self.tell(
            c.ReportInspection(
                session_id=inspector.session_id,
                worker_id=inspector.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                report=InspectionReport(
                    bundle_digest=self.bundle_digest,
                    accepted=True,
                    refusals=(),
                    operators=(("MatMul", 2),),
                    canonical_batch_rows=4,
                    slot_dependent=False,
                    neighbour_dependent=False,
                    unit_micros_per_row=unit_micros_per_row,
                    unit_micros_per_kib=0,
                    memory_bytes_peak=1_000_000,
                    execution_class="cpu",
                    inspected_seconds=1.5,
                ),
                usage=Usage(),
                message_digest=digest_of(b"report"),
                signature=b"signature",
                sequence=1,
            )
        )

    async def submit_job(
        self,
        rows: Sequence[bytes],
        *,
        inline: bool = True,
        key: bytes = b"",
        title: str = "",
        failed_rows_max: int = 1_000,
        budget_microcredits: int = 0,
        objective: Objective = Objective.COST,
    ) -> JobId:
        """A job over one block of these rows."""
        block = block_of(INPUT_SCHEMA, rows)
        stored = stored_of(block)
        payloads: dict[Digest, bytes] = {}
        if inline:
            payloads[stored.blob.digest] = block
        else:
            self.packer.put(block)
            await self.tell(c.RecordBlobs(self.operator_account_id, (stored,)))
        accepted = await self.ask(
            JobAccepted,
            c.SubmitMapJob(
                account_id=self.operator_account_id,
                party_id=self.client_id,
                idempotency_key=key or self.entropy(16),
                request_digest=digest_of(block),
                bundle_digest=self.bundle_digest,
                blocks=(DatasetBlock(stored.blob, stored.rows, inline),),
                inline_blocks=(stored,) if inline else (),
                data_class=DataClass.PUBLIC,
                pool_id=None,
                title=title,
                options=JobOptions(
                    failed_rows_max=failed_rows_max, budget_microcredits=budget_microcredits, objective=objective
                ),
                kept=None,
            ),
            payloads,
        )
        return accepted.job_id

    def leases_of(self, worker: WorldWorker) -> list[Lease]:
        state = self.engine.state
        return [state.leases[lease_id] for lease_id in state.workers[worker.worker_id].leases]

    def input_of(self, lease_id: LeaseId) -> RowBlock:
        """The rows that a worker gets with a lease."""
        sent = lease_to_send(self.engine.state, lease_id)
        assert sent is not None and sent.input is not None
        data = self.engine.payload(sent.input.digest) if sent.input_inline else self.packer.blocks[sent.input.digest]
        assert data is not None
        return RowBlock.parse(data)

    def commit_command(
        self, worker: WorldWorker, lease: Lease, fail_rows: Sequence[int] = (), nodes: tuple[NodeRows, ...] = ()
    ) -> tuple[c.Commit, bytes]:
        """The worker's commitment to its rows reversed byte by byte, inline; and the output block."""
        rows = [bytes(row)[::-1] for row in self.input_of(lease.lease_id)]
        for row in fail_rows:
            rows[row] = b""
        block = block_of(OUTPUT_SCHEMA, rows)
        stored = stored_of(block)
        worker.sequence += 1
        command = c.Commit(
            session_id=worker.session_id,
            worker_id=worker.worker_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            output_root=root_of(leaf_digests(rows)),
            rows=len(rows),
            output=stored.blob,
            inline=True,
            failures=tuple(RowFailure(row, Cause.ROW, f"row {row} has no value") for row in fail_rows),
            usage=Usage(wall_microseconds=1_000, cpu_microseconds=900, node=1, nodes=nodes),
            execution_class="cpu",
            message_digest=digest_of(lease.lease_id.encode()),
            signature=b"signature",
            sequence=worker.sequence,
            stored=stored,
        )
        return command, block

    async def commit(
        self,
        worker: WorldWorker,
        lease: Lease,
        fail_rows: Sequence[int] = (),
        nodes: tuple[NodeRows, ...] = (),
    ) -> None:
        command, block = self.commit_command(worker, lease, fail_rows, nodes)
        await self.tell(command, {command.output.digest: block})

    async def work_until_idle(self, *workers: WorldWorker) -> int:
        """Every worker commits whatever it holds, until nobody holds anything; gives how many leases."""
        done = 0
        while held := [(worker, lease) for worker in workers for lease in self.leases_of(worker)]:
            for worker, lease in held:
                if lease.lease_id in self.engine.state.leases:
                    await self.commit(worker, lease)
                    done += 1
        return done
