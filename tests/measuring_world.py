"""A world in which devices are measured, told step by step."""

from __future__ import annotations

from fallow.challenge import OUTPUT_SCHEMA_DIGEST, ChallengeVerdict
from fallow.ids import digest_of
from fallow.limits import GIB
from fallow.row_block import pack
from fallow.session import Capability, Device, DeviceKind, DeviceLevel, SandboxLevel, TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import invariants
from fallow_coordinator.core.state import Lease, Worker
from journal_world import World, WorldWorker, stored_of

RULES = c.MeasuringRules(idle_ms=60_000, fill_bytes_max=64 * 1024 * 1024)
CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, vendor="Acme", model="Core 9", memory_bytes=8 * GIB, cores=2)
KINDS = frozenset({TaskKind.MAP, TaskKind.CHALLENGE})


class Measuring:
    """A world with an operator worker that checks and a volunteer that can be challenged."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.checker: WorldWorker
        self.worker: WorldWorker

    async def begin(self, device: Device = CPU, *, kinds: frozenset[TaskKind] = KINDS, battery: bool = False) -> None:
        await self.world.begin()
        self.checker = await self.world.operator_worker()
        await self.capability(self.checker, (), frozenset({TaskKind.MAP, TaskKind.INSPECT, TaskKind.CHECK}))
        self.worker = await self.world.volunteer()
        await self.capability(self.worker, (device,), kinds, battery=battery)

    async def capability(
        self, worker: WorldWorker, devices: tuple[Device, ...], kinds: frozenset[TaskKind], *, battery: bool = False
    ) -> None:
        worker.capability = Capability(
            devices=devices,
            sandbox_level=SandboxLevel.FULL,
            memory_bytes_free=4 * GIB,
            on_battery=battery,
            task_kinds=kinds,
        )
        await self.world.tell(c.ChangeCapability(worker.session_id, worker.capability, 4))

    @property
    def state_of_worker(self) -> Worker:
        return self.world.engine.state.workers[self.worker.worker_id]

    async def pass_ms(self, duration_ms: int) -> None:
        self.world.clock.now_ms += duration_ms
        await self.world.tell(c.Tick(RULES))
        invariants.check(self.world.engine.state)

    def lease(self, kind: TaskKind = TaskKind.CHALLENGE) -> Lease:
        holder = self.checker if kind is TaskKind.CHECK else self.worker
        (lease,) = self.world.leases_of(holder)
        assert self.world.engine.state.tasks[lease.task_id].kind is kind
        return lease

    async def answer(self, took_ms: int = 1_000, *, answer: bytes = b"an answer", round_trip_ms: int = 0) -> None:
        lease = self.lease()
        block = block_without_features(answer)
        stored = stored_of(block)
        assert stored.root is not None
        await self.world.tell(
            c.Commit(
                session_id=self.worker.session_id,
                worker_id=self.worker.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                output_root=stored.root,
                rows=1,
                output=stored.blob,
                inline=True,
                failures=(),
                usage=Usage(),
                execution_class="cpu",
                message_digest=digest_of(b"message"),
                signature=b"signature",
                sequence=1,
                stored=stored,
                elapsed_ms=took_ms,
                round_trip_ms=round_trip_ms,
            ),
            {stored.blob.digest: block},
        )
        invariants.check(self.world.engine.state)

    async def verdict(self, reason: str = "") -> None:
        lease = self.lease(TaskKind.CHECK)
        await self.world.tell(
            c.ReportCheck(
                self.checker.session_id,
                self.checker.worker_id,
                lease.lease_id,
                lease.fence,
                ChallengeVerdict(not reason, reason),
            )
        )
        invariants.check(self.world.engine.state)

    async def measure(self, took_ms: int = 1_000) -> None:
        """Speed, then memory, both honestly."""
        await self.pass_ms(60_000)
        await self.answer(took_ms)
        await self.pass_ms(1_000)
        await self.verdict()
        await self.pass_ms(60_000)
        await self.answer(took_ms)
        await self.pass_ms(1_000)
        await self.verdict()


def block_without_features(row: bytes) -> bytes:
    return pack(OUTPUT_SCHEMA_DIGEST, [row], [()], bytes(16))
