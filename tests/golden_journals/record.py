"""Records a golden journal: `python record.py NAME [STORY]` writes NAME.journal and NAME.json beside itself.

Run it for a NEW name when events were added that no golden journal has. A recorded journal is never recorded again: it
stands for journals that people have on their disks.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow.credits import PoolMode  # noqa: E402
from fallow.errors import FallowError, Reason  # noqa: E402
from fallow.roles import Role  # noqa: E402
from fallow.session import Cause, NodeRows  # noqa: E402
from fallow_coordinator.core import commands as c  # noqa: E402
from fallow_coordinator.core.answers import AccountMade, PoolMade, TokenMade  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord, decode_records  # noqa: E402
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore  # noqa: E402
from fallow_coordinator.store.segment import encode_segment  # noqa: E402
from golden_journals.facts import facts_of  # noqa: E402
from journal_world import DAY_MS, World, WorldWorker  # noqa: E402

ROWS = [f"row {number}".encode() for number in range(60)]


async def fail_first_lease(world: World, worker: WorldWorker, cause: Cause) -> None:
    lease = world.leases_of(worker)[0]
    await world.tell(
        c.FailTask(worker.session_id, worker.worker_id, lease.lease_id, lease.fence, cause, f"the {cause.value} failed")
    )


async def packers_done() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def record() -> list[StoredRecord]:
    """A life in which every kind of event happens."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    first, second = await world.volunteer("first"), await world.volunteer("second")
    await world.ask(AccountMade, c.CreateAccount("lab"))
    await world.tell(c.CreatePool("lab pool", world.operator_account_id))
    token = await world.ask(
        TokenMade,
        c.IssueToken(
            world.bundle_digest, world.operator_account_id, Role.CLIENT, None, None, 3, DAY_MS, tags=("a", "b")
        ),
    )
    await world.tell(c.RevokeToken(token.token_id))
    key = world.engine.state.parties[first.worker_id].key_fingerprint
    await world.tell(c.RenewCertificate(key, DAY_MS))
    await world.tell(c.ChangeCapability(second.session_id, second.capability, 2))

    # A job with a failed row, a failed task, a returned and an expired lease; then it leaves the state.
    await world.submit_job(ROWS, title="mixed", failed_rows_max=3)
    await world.commit(first, world.leases_of(first)[0], fail_rows=[0])
    await fail_first_lease(world, second, Cause.PLATFORM)
    lease = world.leases_of(first)[0]
    await world.tell(
        c.ReturnLease(
            first.session_id, first.worker_id, lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "the owner is back"
        )
    )
    world.clock.now_ms += 10 * 60_000
    await world.tell(c.Tick())
    await world.work_until_idle(inspector, first, second)
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))

    # Rows in the blob service, and one packing that has to be asked for twice.
    world.packer.failures = [FallowError(Reason.COORDINATOR_UNREACHABLE, "the blob service is away")]
    await world.submit_job([b"one row"], inline=False, title="uploaded")
    await packers_done()
    world.clock.now_ms += 60_000
    await world.tell(c.Tick())
    await packers_done()
    await world.work_until_idle(inspector, first, second)

    # A job that its owner cancels, and one whose row nobody can compute.
    cancelled = await world.submit_job(ROWS, title="cancelled")
    await world.tell(c.CancelJob(world.operator_account_id, cancelled))
    await world.submit_job([b"a hopeless row"], title="abandoned", failed_rows_max=3)
    for _ in range(20):
        for worker in (inspector, first, second):
            if world.leases_of(worker):
                await fail_first_lease(world, worker, Cause.PLATFORM)
        world.clock.now_ms += 60_000
        await world.tell(c.Tick())

    # Quarantine, release, a crashing program on two accounts, a worker that leaves for good.
    await world.tell(c.QuarantineWorker(second.worker_id, "odd results"))
    await world.tell(c.ReleaseWorker(second.worker_id))
    await world.reconnect(second)
    await world.tell(c.DrainSession(inspector.session_id))
    await world.submit_job(ROWS, title="crashes")
    await fail_first_lease(world, first, Cause.PROGRAM)
    await fail_first_lease(world, second, Cause.PROGRAM)
    await world.tell(c.RevokeParty(second.worker_id, "left the lab"))

    # A job is deleted while it is here and one after it has left; what they used is forgotten; an account gets a quota.
    state = world.engine.state
    await world.tell(c.DeleteJob(world.operator_account_id, cancelled, archived=False))
    await world.tell(c.ArchiveJobs(state.sequence))
    await world.tell(c.ExpireJobs(((world.operator_account_id, cancelled),)))
    uploads = tuple(state.accounts[world.operator_account_id].blobs)
    await world.tell(c.ForgetBlobs(uploads, state.sequence, grace_ms=0))
    await world.tell(c.SetBlobQuota(world.operator_account_id, 1_000_000))

    # Another writer, and work that is under way at the end.
    await world.engine.stop()
    later = World(
        store=MemoryStore(disk), packer=world.packer, clock=world.clock, entropy=world.entropy, keys=world.keys
    )
    later.operator_account_id, later.client_id = world.operator_account_id, world.client_id
    world.clock.now_ms += 5_000
    await later.engine.start()
    await later.reconnect(inspector)
    await later.reconnect(first)
    await another_bundle(later, inspector)
    await later.submit_job(ROWS, title="running")
    await later.reconnect(first)
    await later.commit(first, later.leases_of(first)[0])
    await bad_host(later)
    await later.engine.stop()
    return disk.records


async def bad_host(world: World) -> None:
    """A host that fails by its own fault until it rests, comes back and recovers."""
    world.clock.now_ms += 120_000
    bad = await world.volunteer("bad host")
    await world.submit_job(ROWS, title="on a bad host", failed_rows_max=len(ROWS))
    for _ in range(3):
        await fail_first_lease(world, bad, Cause.WORKER)
        world.clock.now_ms += 60_000
        await world.tell(c.Tick())
        await packers_done()
    await world.commit(bad, world.leases_of(bad)[0])


async def record_door() -> list[StoredRecord]:
    """A closed pool whose members come and go, and a program that is suspected, cleared, held and released."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    first, second = await world.volunteer("first"), await world.volunteer("second")
    lab = await world.ask(AccountMade, c.CreateAccount("lab"))
    pool = await world.ask(PoolMade, c.CreatePool("lab pool", lab.account_id, closed=True))
    await world.tell(c.AdmitAccount(pool.pool_id, first.account_id))
    await world.tell(c.AdmitAccount(pool.pool_id, second.account_id))
    await world.tell(c.ExpelAccount(pool.pool_id, first.account_id))

    for accepted in (True, False):
        await world.submit_job(ROWS, title="suspected")
        await fail_first_lease(world, first, Cause.PROGRAM)
        await fail_first_lease(world, second, Cause.PROGRAM)
        # The operator's worker takes rows too.
        while world.engine.state.tasks[world.leases_of(inspector)[0].task_id].job_id is not None:
            await world.commit(inspector, world.leases_of(inspector)[0])
        if accepted:
            await world.inspect_again(inspector)
            await world.work_until_idle(inspector, first, second)
            world.clock.now_ms += 60_000
            await world.tell(c.Tick())
            await world.work_until_idle(inspector, first, second)
        else:
            await fail_first_lease(world, inspector, Cause.PROGRAM)
    await world.tell(c.ReleaseBundle(world.bundle_digest))
    await world.submit_job(ROWS, title="after the release")
    await world.engine.stop()
    return disk.records


async def record_claims() -> list[StoredRecord]:
    """Two accounts say that a program crashed on their rows: an operator's worker runs those of the second, twice."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    first, second = await world.volunteer("first"), await world.volunteer("second")
    for crashes in (False, True):
        await world.submit_job(ROWS, title="suspected")
        await fail_first_lease(world, first, Cause.PROGRAM)
        await fail_first_lease(world, second, Cause.PROGRAM)
        while world.engine.state.tasks[world.leases_of(inspector)[0].task_id].job_id is not None:
            await world.commit(inspector, world.leases_of(inspector)[0])
        if not crashes:
            # Once more with the same rows: a try that says nothing of the program.
            await fail_first_lease(world, inspector, Cause.PLATFORM)
            world.clock.now_ms += 60_000
            await world.tell(c.Tick())
            while world.engine.state.tasks[world.leases_of(inspector)[0].task_id].job_id is not None:
                await world.commit(inspector, world.leases_of(inspector)[0])
            await world.inspect_again(inspector)
            await world.work_until_idle(inspector, first, second)
        else:
            await fail_first_lease(world, inspector, Cause.PROGRAM)
    await world.engine.stop()
    return disk.records


async def record_credits() -> list[StoredRecord]:
    """A market: grants, a budget that runs out, a top-up, a release; then a quota pool and its periods."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    account_id, pool_id = world.operator_account_id, world.engine.state.default_pool_id
    await world.tell(c.SetPoolMode(pool_id, PoolMode.MARKET))
    await world.tell(c.GrantCredits(account_id, 50_000_000, "for the golden journal", world.entropy(16)))
    await world.tell(c.DrainSession(inspector.session_id))
    cheap, dear = await world.volunteer("cheap", window=1), await world.volunteer("dear", window=1)
    for worker, ask in ((cheap, 300_000), (dear, 700_000)):
        worker.capability = replace(worker.capability, ask_microcredits_per_unit=ask)
        await world.tell(c.ChangeCapability(worker.session_id, worker.capability, 1))
    job_id = await world.submit_job(ROWS, title="paid", budget_microcredits=12_000_000)
    await world.commit(cheap, world.leases_of(cheap)[0], fail_rows=[0])
    await fail_first_lease(world, dear, Cause.PLATFORM)
    await world.work_until_idle(cheap, dear)
    world.clock.now_ms += 60_000
    await world.tell(c.Tick())
    await world.work_until_idle(cheap, dear)
    await world.tell(c.TopUpJob(account_id, job_id, 30_000_000, world.entropy(16)))
    await world.work_until_idle(cheap, dear)
    await world.tell(c.ReleaseCredits(cheap.account_id, 0, "looked right", world.entropy(16)))
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))

    await world.tell(c.SetPoolMode(pool_id, PoolMode.QUOTA))
    await world.tell(c.SetAllotment(pool_id, account_id, 10_000_000, DAY_MS))
    await world.submit_job(ROWS, title="on allotment")
    await world.work_until_idle(cheap, dear)
    world.clock.now_ms += DAY_MS
    await world.tell(c.Tick())
    await world.work_until_idle(cheap, dear)
    await world.engine.stop()
    return disk.records


async def record_nodes() -> list[StoredRecord]:
    """A worker that is a cluster: a lease on one of its nodes, and leases spread over several."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    cluster = await world.volunteer("cluster")
    await world.submit_job(ROWS, title="spread", failed_rows_max=3)
    await world.commit(cluster, world.leases_of(cluster)[0])
    while world.leases_of(cluster):
        lease = world.leases_of(cluster)[0]
        rows = world.engine.state.tasks[lease.task_id].rows
        nodes = (NodeRows(1, rows - 3), NodeRows(0, 2), NodeRows(1, 1))
        await world.commit(cluster, lease, fail_rows=[0], nodes=nodes)
    await world.engine.stop()
    return disk.records


STORIES = {
    "all": record,
    "credits": record_credits,
    "door": record_door,
    "claims": record_claims,
    "nodes": record_nodes,
}


async def another_bundle(world: World, inspector: WorldWorker) -> None:
    world.bundle_number += 1
    await world.inspected_bundle(inspector)


def main() -> None:
    write(sys.argv[1], STORIES[sys.argv[2] if len(sys.argv) > 2 else "all"]())


def write(name: str, life: Coroutine[None, None, list[StoredRecord]]) -> None:
    """Records a life under a new name."""
    target = HERE / f"{name}.journal"
    assert not target.exists(), f"{target} is recorded; choose a new name"
    stored = asyncio.run(life)
    target.write_bytes(encode_segment(stored))
    facts = facts_of(decode_records(stored, 0, target))
    (HERE / f"{name}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
