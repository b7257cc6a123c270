"""What placing a task costs in the core as the fleet grows: turns of the real core, without journal and network.

A pool with prices holds workers of many kinds (regions, devices, memory, tiers, asks), and accounts whose jobs ask for
many different things (regions, devices, memory, limits, objectives, deadlines), 100,000 tasks in all that wait to be
cut. Then workers commit one task after the other, and each time the core settles it, cuts and packs another, and gives
one out. Counted is the processor time of all these turns for each lease granted.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from scripts.benches.report import Report, median, say

from fallow.bundle import InspectionReport
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, PoolId
from fallow.job import DatasetBlock, JobOptions, Objective
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, Capability, Device, DeviceKind, DeviceLevel, TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import AccountMade, CertificateGranted, JobAccepted, TokenMade
from fallow_coordinator.core.devices import identity_of
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import DeviceCertificate, State
from fallow_coordinator.core.turn import Turn, take_turn

WORST_OVER_BEST = 2.0
ACCOUNTS = 200
BUNDLES = 20
JOBS = 1_000
REGIONS = ("de", "fr", "us-east", "us-west", "in", "")
SCHEMA = Digest(hashlib.sha256(b"schema").digest())
POOL = PoolId("pool-market")
DAY_MS = 86_400_000


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--workers", type=int, nargs="+", default=[100, 1_000, 10_000], help="sizes of the fleet")
    parser.add_argument("--tasks", type=int, default=100_000, help="queued tasks")
    parser.add_argument("--placed", type=int, default=2_000, help="tasks placed in each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds for each size, interleaved")


async def measure(chosen: argparse.Namespace) -> Report:
    """Interleaves rounds over the sizes, so that what else the machine does falls on all alike."""
    fleets: list[Fleet] = []
    fill_us: dict[str, float] = {}
    for size in chosen.workers:
        say(f"{size} workers, {chosen.tasks} tasks …")
        fleet = Fleet(size, chosen.tasks)
        fill_us[str(size)] = round(fleet.fill(), 1)
        fleets.append(fleet)
    gc.collect()
    gc.freeze()
    found: dict[str, list[float]] = {str(fleet.size): [] for fleet in fleets}
    for number in range(chosen.rounds + 1):
        for fleet in fleets:
            spent_us = fleet.place(chosen.placed)
            if number:
                found[str(fleet.size)].append(spent_us)
    us_per_task = {size: round(median(values), 1) for size, values in found.items()}
    ratio = max(us_per_task.values()) / min(us_per_task.values())
    facts: dict[str, Any] = {
        "us_per_placed_task": us_per_task,
        "worst_over_best": round(ratio, 2),
        "us_per_first_task": fill_us,
        "groups": {str(fleet.size): len(fleet.state.groups) for fleet in fleets},
        "lanes": {str(fleet.size): len(fleet.state.lanes) for fleet in fleets},
        "queued_tasks": {str(fleet.size): fleet.queued() for fleet in fleets},
        "rounds": chosen.rounds,
        "budget_worst_over_best": WORST_OVER_BEST,
        "holds": ratio <= WORST_OVER_BEST,
    }
    void = [f"{fleet.size} workers: too few tasks were queued" for fleet in fleets if fleet.queued() < chosen.tasks / 2]
    return Report(facts, void)


def _digest(*parts: object) -> Digest:
    return Digest(hashlib.sha256(repr(parts).encode()).digest())


@dataclass
class Fleet:
    """A state with so many connected workers, and the commands that keep it going."""

    size: int
    tasks: int
    state: State = field(default_factory=State)
    now_ms: int = 1_700_000_000_000
    draws: int = 0
    spent_s: float = 0.0
    granted: int = 0
    live: deque[LeaseId] = field(default_factory=deque[LeaseId])
    bundles: list[Digest] = field(default_factory=list[Digest])

    def __post_init__(self) -> None:
        self.dice = random.Random(self.size)
        made = self._take(c.StartJournal("operator", "default")).answer
        assert isinstance(made, AccountMade)
        self.operator_id = made.account_id
        self._take(c.Restart(epoch=1, down_time_ms=0))
        pool = e.PoolCreated(pool_id=POOL, account_id=made.account_id, name="m", mode="market", policy="unverified")
        evolve(self.state, pool, self.now_ms)
        self.accounts = [self._account(number) for number in range(ACCOUNTS)]
        self._make_bundles()

    # ---------------------------------------------------------------------------------------------- setting up

    def _account(self, number: int) -> AccountId:
        made = self._take(c.CreateAccount(f"account {number}")).answer
        assert isinstance(made, AccountMade)
        self._take(c.GrantCredits(made.account_id, 10**12, "to spend", number.to_bytes(16, "big")))
        return made.account_id

    def _make_bundles(self) -> None:
        inspector = self._enroll_local("inspector")
        able = Capability(devices=(_cpu(8),), task_kinds=frozenset({TaskKind.INSPECT}))
        session = c.OpenSession(inspector, None, _digest("token"), able, 1, ())
        self._take(session)
        file = BlobReference(_digest("file"), 10)
        for account_id in self.accounts:
            self._take(c.RecordBlobs(account_id, (c.StoredBlob(file),)))
        for number in range(BUNDLES):
            digest = _digest("bundle", number)
            for account_id in self.accounts[number::BUNDLES]:
                party_id = PartyId("")
                self._take(c.RegisterBundle(account_id, party_id, digest, (file,), SCHEMA, SCHEMA, 0, -1))
            self._inspect(digest)
            self.bundles.append(digest)
        session_id = self.state.workers[inspector].session_id
        assert session_id is not None
        self._take(c.CloseSession(session_id, "bye"))

    def _enroll_local(self, name: str) -> PartyId:
        key = KeyFingerprint(_digest(name))
        made = self._take(c.EnrollLocal(key, name.encode(), name, Role.WORKER, Tier.OPERATOR, DAY_MS)).answer
        assert isinstance(made, CertificateGranted)
        return made.party_id

    def _inspect(self, digest: Digest) -> None:
        (lease,) = self.state.leases.values()
        found = InspectionReport(
            bundle_digest=digest,
            accepted=True,
            refusals=(),
            operators=(),
            canonical_batch_rows=1,
            slot_dependent=False,
            neighbour_dependent=False,
            unit_micros_per_row=30_000_000,
            unit_micros_per_kib=0,
            memory_bytes_peak=1,
            execution_class="test",
            inspected_seconds=1.0,
        )
        self._take(
            c.ReportInspection(
                lease.session_id, lease.worker_id, lease.lease_id, lease.fence, found, Usage(), digest, b"", 1
            )
        )

    def fill(self) -> float:
        """Connects everybody, submits everything; µs for each first task."""
        for number in range(self.size):
            self._connect(number)
        self.spent_s, self.granted = 0.0, 0
        for number in range(JOBS):
            self._submit(number)
        return self.spent_s * 1e6 / max(1, self.granted)

    def _connect(self, number: int) -> None:
        dice = self.dice
        tier = Tier.MANAGED if dice.random() < 0.1 else None
        token = self._take(c.IssueToken(_digest("secret", number), None, Role.WORKER, tier, POOL, 1, 3_600_000)).answer
        assert isinstance(token, TokenMade)
        key = KeyFingerprint(_digest("worker", number))
        made = self._take(c.Enroll(token.token_id, key, b"key", f"worker {number}", DAY_MS)).answer
        assert isinstance(made, CertificateGranted)
        devices = [_cpu(dice.choice((8, 16, 32)))]
        if dice.random() < 0.4:
            memory_bytes = dice.choice((8, 16, 24)) << 30
            devices.append(Device("gpu-0", DeviceKind.GPU, DeviceLevel.USABLE, memory_bytes=memory_bytes))
        able = Capability(
            devices=tuple(devices),
            region=dice.choice(REGIONS),
            ask_microcredits_per_unit=dice.randint(100, 1_600),
        )
        # Paid work goes to measured devices alone; measuring ten thousand takes longer than this bench.
        certificate = DeviceCertificate(
            "cpu-0",
            identity_of(devices[0]),
            units_milli_per_s=1_000,
            speed_expires_at_ms=1 << 60,
            memory_bytes=8 << 30,
            memory_expires_at_ms=1 << 60,
        )
        self.state.workers[made.party_id].certificates["cpu-0"] = certificate
        self._take(c.OpenSession(made.party_id, None, _digest("token", number), able, 2, ()))

    def _submit(self, number: int) -> JobId:
        dice = self.dice
        account_id = self.accounts[number % ACCOUNTS]
        bundle = self.bundles[number % ACCOUNTS % BUNDLES]
        rows = self.tasks // JOBS
        blob = BlobReference(_digest("rows", number), 1_000)
        wishes = JobOptions(
            priority=dice.randint(0, 9),
            deadline_ms=self.now_ms + dice.randint(1, 100) * 3_600_000 if dice.random() < 0.3 else 0,
            limit_microcredits_per_unit=dice.choice((1_000, 2_000, 4_000)),
            budget_microcredits=10**9,
            objective=dice.choice((Objective.COST, Objective.COST, Objective.SPEED)),
            region=dice.choice((*REGIONS, "", "", "us")),
            device_kind=dice.choice(("", "", "", "cpu", "gpu")),
            memory_bytes_min=dice.choice((0, 0, 8 << 30)),
        )
        made = self._take(
            c.SubmitMapJob(
                account_id=account_id,
                party_id=PartyId(""),
                idempotency_key=_digest("key", number)[:16],
                request_digest=_digest("request", number),
                bundle_digest=bundle,
                blocks=(DatasetBlock(blob, rows, inline=True),),
                inline_blocks=(c.StoredBlob(blob, rows=rows, root=SCHEMA, schema_digest=SCHEMA),),
                data_class=DataClass.PUBLIC if dice.random() < 0.9 else DataClass.INTERNAL,
                pool_id=POOL,
                title="",
                options=wishes,
                kept=None,
            )
        ).answer
        assert isinstance(made, JobAccepted)
        return made.job_id

    # ---------------------------------------------------------------------------------------------- going on

    def place(self, count: int) -> float:
        """Commits tasks until so many more were given out; µs of processor time for each of them."""
        self.spent_s, self.granted = 0.0, 0
        while self.granted < count:
            self.now_ms += 3
            self.live.rotate(-self.dice.randrange(len(self.live)))
            self._commit(self.live.popleft())
        return self.spent_s * 1e6 / self.granted

    def queued(self) -> int:
        """Tasks that are still to be cut."""
        return sum(job.rows - job.next_row for job in self.state.jobs.values())

    def _commit(self, lease_id: LeaseId) -> None:
        lease = self.state.leases.get(lease_id)
        if lease is None:
            return
        rows = self.state.tasks[lease.task_id].rows
        output = BlobReference(Digest(hashlib.sha256(lease_id.encode()).digest()), 100)
        self._take(
            c.Commit(
                session_id=lease.session_id,
                worker_id=lease.worker_id,
                lease_id=lease_id,
                fence=lease.fence,
                output_root=SCHEMA,
                rows=rows,
                output=output,
                inline=True,
                failures=(),
                usage=Usage(wall_microseconds=self.dice.randint(1, 90) * 1_000_000),
                execution_class="test",
                message_digest=SCHEMA,
                signature=b"",
                sequence=1,
                stored=c.StoredBlob(output, rows=rows, root=SCHEMA, schema_digest=SCHEMA),
            )
        )

    def _take(self, command: c.Command) -> Turn:
        """The command's turn, and those of the packings that it asks for."""
        self.draws += 1
        entropy = hashlib.sha256(self.draws.to_bytes(8, "big")).digest()
        began = time.process_time()
        turn = take_turn(self.state, command, self.now_ms, entropy)
        self.spent_s += time.process_time() - began
        for effect in turn.effects:
            if isinstance(effect, f.SendLease):
                self.granted += 1
                self.live.append(effect.lease_id)
            elif isinstance(effect, f.PackTask):
                packed = BlobReference(Digest(hashlib.sha256(effect.task_id.encode()).digest()), 1_000)
                self._take(c.TaskPacked(effect.task_id, effect.pack_number, packed, inline=True))
        return turn


def _cpu(gibibytes: int) -> Device:
    return Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, memory_bytes=gibibytes << 30)
