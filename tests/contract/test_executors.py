"""What every executor does, on processes and on Ray: the same work, the same words when it fails, nothing left over."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from executor_rig import (
    NONCE,
    ancestors_of,
    bomb_bundle,
    busiest_child,
    command_of,
    dense_bundle,
    dense_rows,
    descendants,
    engine_children,
    gather_bundle,
    looping_bundle,
    looping_rows,
    silent,
    until,
)
from fallow.bundle import Precision
from fallow.comparison import Finding
from fallow.ids import PoolId, digest_of
from fallow.limits import GIB
from fallow.row_block import RowBlock, pack
from fallow.session import BlobReference, Candidate, Cause, DeviceLevel, Lease, SandboxLevel, TaskKind
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.on_processes import ProcessExecutor
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.executor.supervisor import Supervisor, SupervisorSettings
from fallow_worker.ports import Executor, Work
from fallow_worker.refereeing import Spreads, refereed

pytestmark = [
    pytest.mark.processes,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="the lock-down is Linux's"),
]

SETTINGS = SupervisorSettings(cores=2, still_share=0.2)
SECONDS_LONG = 100_000_000
"""Turns of the looping program that take minutes."""
BOMB_FLOATS = (3 * GIB // 2) // 4
"""A row of the bomb that its child does not survive."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["process", "ray"])
async def executor(request: pytest.FixtureRequest) -> AsyncIterator[Executor]:
    made: Executor = (
        ProcessExecutor(SETTINGS) if request.param == "process" else RayExecutor(RaySettings(supervisor=SETTINGS))
    )
    # Another file's coordinator may be running below the same test process.
    before = set(descendants())
    await made.start()
    yield made
    await made.stop()
    assert set(descendants()) <= before


async def failure(executor: Executor, work: object) -> WorkFailed:
    with pytest.raises(WorkFailed) as caught:
        await executor.run(work, silent)  # type: ignore[arg-type]
    return caught.value


async def test_capability_tells_the_sandbox_level_that_a_child_reached(executor: Executor) -> None:
    capability = await executor.capability()
    assert capability.sandbox_level is SandboxLevel.FULL
    [cpu] = capability.devices
    assert (cpu.level, cpu.cores, cpu.slots) == (DeviceLevel.USABLE, 2, 1)
    assert cpu.execution_class.startswith("ort-")
    assert capability.executor in {"process", "ray"}


async def test_sharded_rows_are_the_bytes_of_one_child(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path)
    work = bundle.work(dense_rows(1001))
    heard: list[int] = []
    outcome = await executor.run(work, heard.append)
    alone = Supervisor(SupervisorSettings(cores=1, children=1, spares=0))
    reference = await alone.run(bundle.work(dense_rows(1001)), silent)
    await alone.release()
    assert outcome.output_block == reference.output_block
    assert RowBlock.parse(outcome.output_block).nonce == NONCE
    assert outcome.failures == () and outcome.report is None
    assert outcome.execution_class.endswith("/b4")
    assert outcome.usage.cpu_microseconds > 0 and outcome.usage.memory_bytes_peak > 0
    assert heard == sorted(heard) and all(0 <= rows <= 1001 for rows in heard)


async def test_every_thread_of_a_child_is_locked_in_and_below_its_executor(executor: Executor, tmp_path: Path) -> None:
    await executor.run(dense_bundle(tmp_path).work(dense_rows(500)), silent)
    # A spare that is still on its way to readiness holds nothing foreign; soon it is locked in like the others.
    await until(lambda: all(is_locked_in(pid) for pid in engine_children()), "the lock-down of every thread", seconds=5)
    children = engine_children()
    assert children
    for pid in children:
        above = [command_of(ancestor) for ancestor in ancestors_of(pid)]
        is_ray = isinstance(executor, RayExecutor)
        assert any(command.startswith("ray::NodeSupervisor") for command in above) == is_ray


async def test_many_leases_at_once_all_come_back(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path)
    outcomes = await asyncio.gather(*(executor.run(bundle.work(dense_rows(40 + n, seed=n)), silent) for n in range(12)))
    assert [len(RowBlock.parse(outcome.output_block)) for outcome in outcomes] == [40 + n for n in range(12)]
    assert len(engine_children()) <= 3


async def test_bundles_take_turns(executor: Executor, tmp_path: Path) -> None:
    bundles = [dense_bundle(tmp_path, hidden=hidden) for hidden in (8, 9, 8, 10, 9)]
    values = []
    for bundle in bundles:
        outcome = await executor.run(bundle.work(dense_rows(5)), silent)
        values.append(np.asarray(bundle.decoded(outcome).columns["y"]).tobytes())
    assert values[0] == values[2] and values[1] == values[4]
    assert len(set(values)) == 3


async def test_failed_rows_are_told_by_their_place_in_the_lease(executor: Executor, tmp_path: Path) -> None:
    bundle = gather_bundle(tmp_path)
    rows = np.arange(200, dtype=np.int64).reshape(-1, 1) % 4
    rows[[7, 150]] = 99
    outcome = await executor.run(bundle.work({"x": rows}), silent)
    assert [(failure.row, failure.cause) for failure in outcome.failures] == [(7, Cause.ROW), (150, Cause.ROW)]
    decoded = bundle.decoded(outcome)
    assert len(decoded.positions) == 198
    assert {7, 150}.isdisjoint(decoded.positions.tolist())


async def test_a_program_that_overruns_its_time_is_killed(executor: Executor, tmp_path: Path) -> None:
    bundle = looping_bundle(tmp_path)
    await executor.run(bundle.work(looping_rows(1)), silent)
    begun = time.monotonic()
    failed = await failure(executor, bundle.work(looping_rows(SECONDS_LONG), runtime_max_ms=500))
    assert failed.cause is Cause.PROGRAM and "500 ms" in failed.reason
    assert time.monotonic() - begun < 5
    assert bundle.decoded(await executor.run(bundle.work(looping_rows(3, 4)), silent)).columns["y"] is not None


async def test_a_memory_bomb_is_the_programs_fault(executor: Executor, tmp_path: Path) -> None:
    bundle = bomb_bundle(tmp_path)
    rows = {"x": np.array([BOMB_FLOATS] * 8, np.int64)}
    failed = await failure(executor, bundle.work(rows))
    assert failed.cause is Cause.PROGRAM and "MiB of memory" in failed.reason
    outcome = await executor.run(bundle.work({"x": np.array([1, 2], np.int64)}), silent)
    assert len(bundle.decoded(outcome).positions) == 2


async def test_a_row_that_its_program_does_not_survive_fails_alone(executor: Executor, tmp_path: Path) -> None:
    bundle = bomb_bundle(tmp_path, batch_rows=8)
    rows = np.arange(1, 25, dtype=np.int64)
    rows[13] = BOMB_FLOATS
    before = executor.supervisor.isolation_spawns if isinstance(executor, ProcessExecutor) else 0
    outcome = await executor.run(bundle.work({"x": rows}), silent)
    [failure] = outcome.failures
    assert (failure.row, failure.cause) == (13, Cause.ROW) and "MiB of memory" in failure.reason
    decoded = bundle.decoded(outcome)
    assert decoded.positions.tolist() == [row for row in range(24) if row != 13]
    assert len(RowBlock.parse(outcome.output_block)) == 24
    if isinstance(executor, ProcessExecutor):
        assert 1 <= executor.supervisor.isolation_spawns - before <= 3 + 2  # ⌈log₂ 8⌉ + 2


async def test_a_row_that_hangs_fails_alone_and_in_time(executor: Executor, tmp_path: Path) -> None:
    bundle = looping_bundle(tmp_path, batch_rows=2)
    begun = time.monotonic()
    work = bundle.work(looping_rows(1, 2, 3, SECONDS_LONG, 4), runtime_max_ms=15_000)
    outcome = await executor.run(work, silent)
    assert time.monotonic() - begun < 60
    [failure] = outcome.failures
    assert (failure.row, failure.cause) == (3, Cause.ROW) and "did not end within" in failure.reason
    assert bundle.decoded(outcome).positions.tolist() == [0, 1, 2, 4]


async def test_a_crash_that_does_not_come_again_costs_no_row(executor: Executor, tmp_path: Path) -> None:
    looping, dense = looping_bundle(tmp_path), dense_bundle(tmp_path)
    await executor.run(looping.work(looping_rows(1)), silent)
    before = set(engine_children())
    crashing = asyncio.create_task(executor.run(looping.work(looping_rows(1_500_000)), silent))
    victim = await busiest_child(cpu_seconds_more=0.1)
    other = asyncio.create_task(executor.run(dense.work(dense_rows(100)), silent))
    os.kill(victim, signal.SIGSEGV)
    outcome = await crashing
    assert outcome.failures == () and len(looping.decoded(outcome).positions) == 1
    assert len(RowBlock.parse((await other).output_block)) == 100
    assert victim in before


async def test_rows_of_a_child_that_was_killed_from_outside_are_redone(executor: Executor, tmp_path: Path) -> None:
    bundle = looping_bundle(tmp_path)
    await executor.run(bundle.work(looping_rows(1)), silent)
    running = asyncio.create_task(executor.run(bundle.work(looping_rows(1_500_000)), silent))
    os.kill(await busiest_child(cpu_seconds_more=0.1), signal.SIGKILL)
    assert len(RowBlock.parse((await running).output_block)) == 1


async def test_cancelling_stops_the_work_at_once(executor: Executor, tmp_path: Path) -> None:
    bundle = looping_bundle(tmp_path)
    await executor.run(bundle.work(looping_rows(1)), silent)
    running = asyncio.create_task(executor.run(bundle.work(looping_rows(SECONDS_LONG)), silent))
    victim = await busiest_child()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: victim not in engine_children(), "the cancelled child's end", seconds=5)
    await executor.run(bundle.work(looping_rows(1)), silent)


async def test_an_output_over_its_limit_fails_the_task(executor: Executor, tmp_path: Path) -> None:
    failed = await failure(executor, dense_bundle(tmp_path).work(dense_rows(400), output_bytes_max=1000))
    assert failed.cause is Cause.PROGRAM


async def test_a_changed_file_is_the_workers_fault(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path, hidden=11)
    for path in bundle.loaded.files.values():
        data = bytearray(Path(path).read_bytes())
        data[-1] ^= 1
        Path(path).write_bytes(bytes(data))
    failed = await failure(executor, bundle.work(dense_rows(4)))
    assert failed.cause is Cause.WORKER and "was changed" in failed.reason


async def test_a_lease_that_contradicts_itself_is_the_platforms_fault(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path)
    assert (await failure(executor, bundle.work(dense_rows(4), rows=5))).cause is Cause.PLATFORM
    assert (await failure(executor, bundle.work(dense_rows(4), kind=TaskKind.TRAIN))).cause is Cause.PLATFORM
    assert (await failure(executor, bundle.work(dense_rows(4), input_block=b"no block"))).cause is Cause.PLATFORM


async def test_an_inspection_gives_a_report(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path)
    outcome = await executor.run(bundle.work(dense_rows(4), kind=TaskKind.INSPECT, input_block=b"", rows=0), silent)
    assert outcome.report is not None and outcome.report.accepted
    assert outcome.report.bundle_digest == bundle.loaded.bundle_digest
    assert outcome.output_block == b""


async def test_a_referee_runs_the_rows_itself_and_puts_others_beside_them(executor: Executor, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path, hidden=64)
    work = bundle.work(dense_rows(9), kind=TaskKind.REFEREE)
    own = await executor.run(bundle.work(dense_rows(9)), silent)
    lied = bundle.rewritten(own, lambda y: y * np.float32(1.01))
    near = bundle.rewritten(own, lambda y: y * np.float32(1 + 2**-23))
    spreads = Spreads()
    classes = (own.execution_class, "another class")
    for _ in range(2 if isinstance(executor, ProcessExecutor) else 1):  # the second time the spread is known
        blocks = [own.output_block, lied, lied, near]
        lease = referees_lease(work, classes, list(zip(blocks, (0, 0, 1, 1), [()] * 4, strict=True)))
        outcome = await refereed(executor, work, lease, blocks, silent, spreads)
        assert RowBlock.parse(outcome.output_block).root() == RowBlock.parse(own.output_block).root()
        assert outcome.execution_class == own.execution_class
        assert [row.row for row in outcome.findings] == list(range(9))
        kinds = [{row.candidates[index].finding for row in outcome.findings} for index in range(4)]
        assert kinds == [{Finding.EQUAL}, {Finding.WRONG}, {Finding.UNEXPLAINED}, {Finding.TIE}]
        assert spreads.get(bundle.loaded.bundle_digest, own.execution_class) is not None


async def test_a_referee_meets_rows_without_values_as_a_map_does(executor: Executor, tmp_path: Path) -> None:
    bundle = gather_bundle(tmp_path)
    work = bundle.work({"x": np.array([[1], [9], [2]], np.int64)}, kind=TaskKind.REFEREE)
    whole = (await executor.run(bundle.work({"x": np.array([[1], [2], [2]], np.int64)}), silent)).output_block
    # The second candidate answers the last two rows, and has no value for the last one.
    part = RowBlock.parse(whole)
    blocks = [whole, pack(part.schema_digest, [part[1], b""], [], NONCE)]
    lease = referees_lease(work, ("another class",), [(blocks[0], 0, ()), (blocks[1], 0, (1, 2))])
    outcome = await refereed(executor, work, lease, blocks, silent, Spreads())
    assert [[one.finding for one in row.candidates] for row in outcome.findings] == [
        [Finding.EQUAL, None],
        [Finding.TIE, Finding.TIE],
        [Finding.EQUAL, Finding.WITHHELD],
    ]


async def test_release_leaves_no_process_and_the_next_run_starts_anew(executor: Executor, tmp_path: Path) -> None:
    await executor.release()
    before = set(descendants())
    bundle = looping_bundle(tmp_path)
    running = asyncio.create_task(executor.run(bundle.work(looping_rows(SECONDS_LONG)), silent))
    await busiest_child()
    await executor.release()
    with pytest.raises(WorkFailed) as caught:
        await running
    assert caught.value.cause is Cause.OWNER_PREEMPT
    assert set(descendants()) <= before
    assert len(RowBlock.parse((await executor.run(bundle.work(looping_rows(2)), silent)).output_block)) == 1


def referees_lease(work: Work, classes: tuple[str, ...], candidates: list[tuple[bytes, int, tuple[int, ...]]]) -> Lease:
    """A referee's lease over the rows of `work` with these candidates: (block, class number, rows)."""
    return Lease(
        lease_id=work.lease_id,
        fence=1,
        kind=TaskKind.REFEREE,
        bundle_digest=work.bundle.bundle_digest,
        offer=None,
        rows=work.rows,
        input=None,
        inline_input=work.input_block,
        input_grant=None,
        deadline_ms=0,
        runtime_max_ms=work.runtime_max_ms,
        precision=Precision.FP32,
        output_bytes_max=work.output_bytes_max,
        unit_micros=0,
        pool_id=PoolId("pool"),
        candidates=tuple(
            Candidate(
                BlobReference(digest_of(block), len(block)), None, block, (number,) * (len(rows) or work.rows), rows
            )
            for block, number, rows in candidates
        ),
        execution_classes=classes,
    )


def is_locked_in(pid: int) -> bool:
    """Whether every thread of a process has a system call filter and can gain no privileges."""
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        if (fields["Seccomp"].strip(), fields["NoNewPrivs"].strip()) != ("2", "1"):
            return False
    return True
