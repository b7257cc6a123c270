"""Who gets which task, against a slow model that looks at every task and every worker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fallow.ids import PartyId, PoolId, TaskId
from fallow.job import JobOptions, JobState, Objective
from fallow.roles import Role, Tier
from fallow.session import Capability, Cause, Device, DeviceKind, DeviceLevel
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import invariants, matching
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.devices import identity_of
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.explaining import unfit
from fallow_coordinator.core.state import DeviceCertificate, State, Task, TaskPhase, Worker
from simulation.core_world import World

POOL = PoolId("pool-market")
CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, memory_bytes=8 << 30)
GPU = Device("gpu-0", DeviceKind.GPU, DeviceLevel.USABLE, memory_bytes=16 << 30)
RANKS = {Tier.VOLUNTEER: 0, Tier.MANAGED: 1, Tier.OPERATOR: 2}


def market_world() -> World:
    """A pool with prices and the world's bundle, of the operator and of another account."""
    world = World(checks=lambda state: None).start().ready_bundle(per_row=1_000_000)
    pool = e.PoolCreated(pool_id=POOL, account_id=world.account_id, name="m", mode="market", policy="unverified")
    evolve(world.state, pool, world.now_ms)
    world.records.append((world.now_ms, pool))
    world.take(c.GrantCredits(world.account_id, 10**12, "to spend", b"k" * 16))
    return world


def join(world: World, name: str, capability: Capability, *, window: int = 2, tier: Tier | None = None) -> PartyId:
    """A connected, measured worker of the market."""
    worker_id = world.enroll(name, world.token(Role.WORKER, tier, pool_id=POOL)).party_id
    device = capability.devices[0]
    certificate = DeviceCertificate(
        device.device_id,
        identity_of(device),
        units_milli_per_s=1_000,
        speed_challenge=TaskId("task-speed"),
        speed_expires_at_ms=1 << 60,
        memory_bytes=1,
        memory_challenge=TaskId("task-memory"),
        memory_expires_at_ms=1 << 60,
    )
    world.state.workers[worker_id].certificates[device.device_id] = certificate
    world.connect(worker_id, window=window, able=capability)
    return worker_id


def takes(state: State, task: Task, worker: Worker) -> bool:
    """Whether a free worker may take a task, by the rules one by one."""
    assert task.job_id is not None
    if unfit(state, task.lane, worker) is not None or worker.worker_id in task.avoid:
        return False
    options = state.jobs[task.job_id].options
    ask = worker.capability.ask_microcredits_per_unit
    return ask <= options.limit_microcredits_per_unit


def best_workers(state: State, task: Task) -> set[PartyId]:
    """The cheapest, then least loaded, then least trusted; who has the bundle is as good while a slot is idle."""
    fitting = [worker for worker in state.workers.values() if takes(state, task, worker)]
    ranks = {w.worker_id: (w.ask_microcredits_per_unit, w.load, RANKS[w.tier]) for w in fitting}
    best = min(ranks.values())
    first = {worker_id for worker_id, rank in ranks.items() if rank == best}
    holders = {
        w.worker_id
        for w in fitting
        if task.bundle_digest in w.bundles
        and w.ask_microcredits_per_unit == best[0]
        and RANKS[w.tier] <= best[2]
        and (w.load <= best[1] or w.load < 1_000)
    }
    return holders or first


asks = st.sampled_from([100, 150, 199, 260, 700])
workers = st.tuples(asks, st.sampled_from(["", "de", "us-east"]), st.booleans(), st.integers(1, 3), st.booleans())
wishes = st.tuples(
    st.sampled_from([0, 120, 160, 300, 1_000]),
    st.sampled_from(["", "", "de", "us"]),
    st.sampled_from(["", "", "gpu"]),
    st.integers(0, 9),
    st.booleans(),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fleet=st.lists(workers, min_size=1, max_size=6), jobs=st.lists(wishes, min_size=1, max_size=5), data=st.data())
def test_each_lease_goes_where_the_slow_model_would_send_it(
    fleet: list[tuple[int, str, bool, int, bool]], jobs: list[tuple[int, str, str, int, bool]], data: st.DataObject
) -> None:
    world = market_world()
    made = world.ask(c.CreateAccount("other"))
    assert isinstance(made, AccountMade)
    world.register(made.account_id)
    world.take(c.GrantCredits(made.account_id, 10**12, "to spend", b"o" * 16))
    for number, (limit, region, device_kind, priority, other) in enumerate(jobs):
        options = JobOptions(
            priority=priority,
            limit_microcredits_per_unit=limit,
            budget_microcredits=10**9 if limit else 0,
            region=region,
            device_kind=device_kind,
            failed_rows_max=1_000,
        )
        account_id = made.account_id if other else world.account_id
        world.submit(20, key=f"job {number}", options=options, pool_id=POOL, account_id=account_id)
    members: list[PartyId] = []
    for number, (ask, region, has_gpu, window, managed) in enumerate(fleet):
        devices = (CPU, GPU) if has_gpu else (CPU,)
        able = Capability(devices=devices, region=region, ask_microcredits_per_unit=ask)
        members.append(join(world, f"w{number}", able, window=window, tier=Tier.MANAGED if managed else None))
    for _ in range(12):
        step(world, members, data)
    invariants.check(world.state)


def step(world: World, members: list[PartyId], data: st.DataObject) -> None:
    """Something happens; each lease that comes of it is judged in the state that it was decided in."""
    packing = [task_id for lane in world.state.lanes.values() for task_id in lane.packing]
    busy = [worker_id for worker_id in members if world.leases_of(worker_id)]
    if packing and (not busy or data.draw(st.booleans())):
        task = world.state.tasks[packing[0]]
        expected = {w.worker_id for w in world.state.workers.values() if takes(world.state, task, w)}
        best = best_workers(world.state, task) if expected else set[PartyId]()
        turn = world.pack(packing[0])
        granted = [event for event in turn.events if isinstance(event, e.LeaseGranted)]
        assert len(granted) <= 1, "one task more, one lease more"
        assert bool(granted) == bool(expected), "a task that fits a free worker is given out at once"
        if granted:
            assert granted[0].worker_id in best
    elif busy:
        worker_id = data.draw(st.sampled_from(busy))
        ready = [task for task in world.state.tasks.values() if task.phase is TaskPhase.READY]
        turn = world.work(worker_id)
        for event in turn.events:
            if isinstance(event, e.LeaseGranted):
                task = next(task for task in ready if task.task_id == event.task_id)
                worker = world.state.workers[event.worker_id]
                assert event.worker_id == worker_id, "only the worker that became free had room"
                rivals = [r for r in ready if fits_later(world.state, r, worker)]
                assert min((r.stamp, r.number) for r in rivals) == (task.stamp, task.number), "by turns"
    for task in world.state.tasks.values():
        if task.phase is TaskPhase.READY:
            assert not any(takes(world.state, task, w) for w in world.state.workers.values()), (
                "nobody idles beside work"
            )


def fits_later(state: State, task: Task, worker: Worker) -> bool:
    """Whether the worker could have taken the task when it became free."""
    job = state.jobs.get(task.job_id) if task.job_id is not None else None
    reason = unfit(state, task.lane, worker)
    ask = worker.capability.ask_microcredits_per_unit
    return (
        job is not None
        and job.state in (JobState.QUEUED, JobState.RUNNING)
        and (reason is None or reason.value == "busy")
        and worker.worker_id not in task.avoid
        and ask <= job.options.limit_microcredits_per_unit
    )


# ------------------------------------------------------------------------------------------------- single rules


def asking(ask: int, **changes: object) -> Capability:
    return replace(Capability(devices=(CPU,), ask_microcredits_per_unit=ask), **changes)  # type: ignore[arg-type]


@pytest.fixture
def runner_up(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What each lease's maker was told of the runner-up."""
    told: list[int | None] = []
    right = matching._grant

    def seen(*arguments: object, runner_up_ask: int | None, **rest: object) -> tuple[e.Event, ...]:
        told.append(runner_up_ask)
        return right(*arguments, runner_up_ask=runner_up_ask, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "_grant", seen)
    return told


def test_the_cheapest_wins_and_the_next_ask_is_told(runner_up: list[int | None]) -> None:
    world = market_world()
    dear, cheap = join(world, "dear", asking(300), window=1), join(world, "cheap", asking(120), window=1)
    world.submit(8, pool_id=POOL, options=JobOptions(budget_microcredits=10**9, limit_microcredits_per_unit=500))
    world.pack_all()
    order = [event.worker_id for _, event in world.records if isinstance(event, e.LeaseGranted)][-2:]
    assert order == [cheap, dear]
    assert runner_up[-2:] == [300, None]


def test_a_limit_below_every_ask_waits_and_shuts_nobody_else_out() -> None:
    world = market_world()
    worker = join(world, "w", asking(190), window=1)
    low = world.submit(
        8, key="low", pool_id=POOL, options=JobOptions(budget_microcredits=10**9, limit_microcredits_per_unit=130)
    )
    high = world.submit(
        8,
        key="high",
        pool_id=POOL,
        options=JobOptions(budget_microcredits=10**9, limit_microcredits_per_unit=250, priority=0),
    )
    world.pack_all()
    assert [world.state.tasks[lease.task_id].job_id for lease in world.leases_of(worker)] == [high]
    assert not world.state.jobs[low].rows_leased


def test_speed_goes_to_whoever_is_done_first() -> None:
    world = market_world()
    workers_ = [join(world, name, asking(100), window=1) for name in ("a", "b")]
    options = JobOptions(budget_microcredits=10**9, limit_microcredits_per_unit=500, objective=Objective.SPEED)
    job_id = world.submit(40, pool_id=POOL, options=options)
    world.pack_all()
    slow, fast = (world.leases_of(worker_id)[0] for worker_id in workers_)
    world.now_ms += 500
    world.take(world.commit_command(fast))
    world.now_ms += 60_000
    world.take(world.commit_command(slow))
    speeds = [world.state.workers[worker_id].speed_milliunits_per_s for worker_id in workers_]
    assert speeds[0] < speeds[1]
    world.take(c.CancelJob(world.account_id, job_id))
    world.submit(2, key="urgent", pool_id=POOL, options=options)
    world.pack_all()
    assert (len(world.leases_of(workers_[0])), len(world.leases_of(workers_[1]))) == (0, 1)


def test_among_equals_the_one_that_has_the_bundle_is_taken_and_forgotten_after_a_failure() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    names = [world.volunteer(f"w{number}", window=2) for number in range(6)]
    world.submit(1, key="first")
    world.pack_all()
    holder = next(worker_id for worker_id in names if world.leases_of(worker_id))
    world.work(holder)
    for number in range(3):
        world.submit(1, key=f"again {number}")
        world.pack_all()
        assert len(world.leases_of(holder)) == 1
        world.work(holder)
    world.submit(1, key="breaks", options=JobOptions(failed_rows_max=1))
    world.pack_all()
    world.take(world.fail_command(world.leases_of(holder)[0], Cause.WORKER, "the cache is broken"))
    assert world.state.workers[holder].bundles == {}
    assert world.state.bundles[world.bundle_digest].holders == {}


def test_own_jobs_come_first_on_own_workers() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    mine = world.ask(c.CreateAccount("mine"))
    assert isinstance(mine, AccountMade)
    world.register(mine.account_id)
    own = world.enroll("own", world.token(account_id=mine.account_id)).party_id
    world.connect(own, window=1)
    strangers = world.submit(1_000, key="strangers")
    used = world.submit(1_000, key="used", account_id=mine.account_id)
    for _ in range(10):
        world.pack_all()
        assert world.state.tasks[world.leases_of(own)[0].task_id].job_id in (used, strangers)
        world.work(own)
    world.pack_all()
    served = [world.state.tasks[lease.task_id].job_id for lease in world.leases_of(own)]
    assert served == [used], "however much the account was served, its own machine serves it"
    rows = {job_id: len(world.state.jobs[job_id].done) for job_id in (used, strangers)}
    assert rows[used] > 5 * max(1, rows[strangers])
