"""The follower: each record once, whatever the chunks, crashes and restarts; rebuilt views are equal."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fallow.session import Cause, NodeRows
from fallow_coordinator.config import EXIT_STORAGE_FAILED, FollowerSettings
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.answers import PoolMade
from fallow_coordinator.core.questions import shares_told
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.view_file import VIEWS_FILE, ViewFile, view_rows
from fallow_coordinator.store.views import SqliteViews
from journal_world import World, WorldWorker

ROWS = [f"row {number}".encode() for number in range(12)]
LAG_MS_MAX = 200


async def a_life(store: SqliteStore) -> World:
    """A journal in which nearly everything happens once."""
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    worker = await world.volunteer("first")
    other = await world.volunteer("second")
    done = await world.submit_job(ROWS, title="done", failed_rows_max=3)
    lease = world.leases_of(worker)[0]
    rows = world.engine.state.tasks[lease.task_id].rows
    await world.commit(worker, lease, fail_rows=[0], nodes=(NodeRows(0, 1), NodeRows(1, rows - 1)))
    await fail_one(world, other)
    world.clock.now_ms += 60_000
    await world.tell(c.Tick())
    await world.work_until_idle(inspector, worker, other)
    cancelled = await world.submit_job(ROWS, title="cancelled")
    await world.tell(c.CancelJob(world.operator_account_id, cancelled))
    pool = await world.ask(PoolMade, c.CreatePool("lab pool", world.operator_account_id, closed=True))
    await world.tell(c.AdmitAccount(pool.pool_id, other.account_id))
    await world.tell(c.GrantCredits(world.operator_account_id, 5_000_000, "a gift", world.entropy(16)))
    await world.tell(c.QuarantineWorker(other.worker_id, "odd results"))
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    assert done not in world.engine.state.jobs
    await world.tell(c.DeleteJob(world.operator_account_id, cancelled, archived=True))
    await world.submit_job(ROWS, title="uploaded", inline=False)
    await world.submit_job(ROWS, title="running")
    await world.reconnect(worker)
    await world.tell(c.CloseSession(inspector.session_id, "gone"))
    await world.tell(c.RevokeParty(inspector.worker_id, "left"))
    return world


async def fail_one(world: World, worker: WorldWorker) -> None:
    for lease in world.leases_of(worker)[:1]:
        await world.tell(
            c.FailTask(
                worker.session_id, worker.worker_id, lease.lease_id, lease.fence, Cause.PLATFORM, "out of memory"
            )
        )


def rows_of(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the views in a folder."""
    return view_rows(folder / VIEWS_FILE)[1]


def rebuilt(folder: Path, scratch: Path, chunk_records: int) -> dict[str, list[tuple[object, ...]]]:
    """Views made anew from the same journal."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with sqlite3.connect(folder / "journal.db") as source, sqlite3.connect(scratch / "journal.db") as target:
        source.backup(target)
    source.close()
    target.close()
    follower = Follower(scratch, FollowerSettings(chunk_records=chunk_records))
    follower.catch_up()
    follower.close()
    return rows_of(scratch)


async def test_views_do_not_depend_on_chunks_or_restarts(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state")
    world = await a_life(store)
    expected = rebuilt(tmp_path / "state", tmp_path / "at-once", 100_000)
    assert {table for table, rows in expected.items() if rows} == set(expected) - {"tree_nodes"}, "every table has rows"
    chance = random.Random(5)
    for chunk in (1, 2, 7):
        assert rebuilt(tmp_path / "state", tmp_path / "chunked", chunk) == expected
    for _ in range(3):
        follower = Follower(tmp_path / "state", FollowerSettings(chunk_records=chance.randrange(1, 9)))
        for _ in range(chance.randrange(1, 12)):
            follower.step()
        follower.close()
    follower = Follower(tmp_path / "state")
    follower.catch_up()
    follower.close()
    assert rows_of(tmp_path / "state") == expected
    await world.engine.stop()
    store.close()


async def test_chunk_whose_transaction_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    world = await a_life(store)
    follower = Follower(tmp_path, FollowerSettings(chunk_records=10))
    follower.step()
    before = rows_of(tmp_path)
    views: ViewFile = follower._views
    views._connection.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON view_meta BEGIN SELECT RAISE(ABORT, 'x'); END")
    with pytest.raises(StorageFailed):
        follower.step()
    follower.close()
    assert rows_of(tmp_path) == before
    follower = Follower(tmp_path)
    follower.catch_up()
    follower.close()
    assert rows_of(tmp_path) == rebuilt(tmp_path, tmp_path / "anew", 50)
    await world.engine.stop()
    store.close()


async def test_views_of_another_journal_are_made_anew(tmp_path: Path) -> None:
    one, other = SqliteStore(tmp_path / "one"), SqliteStore(tmp_path / "other")
    worlds = [await a_life(one), await a_life(other)]
    for folder in ("one", "other"):
        follower = Follower(tmp_path / folder)
        follower.catch_up()
        follower.close()
    follower = Follower(tmp_path / "one")
    follower.close()
    for name in (VIEWS_FILE, f"{VIEWS_FILE}-wal", f"{VIEWS_FILE}-shm"):
        (tmp_path / "one" / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "other" / VIEWS_FILE, tmp_path / "one" / VIEWS_FILE)
    follower = Follower(tmp_path / "one")
    assert follower.applied_sequence == 0, "the salts differ, and so do the leaves"
    follower.catch_up()
    follower.close()
    assert rows_of(tmp_path / "one") == rebuilt(tmp_path / "one", tmp_path / "anew", 50)
    for world in worlds:
        await world.engine.stop()
    one.close()
    other.close()


async def test_damaged_record_is_refused_with_its_number(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    world = await a_life(store)
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("UPDATE journal SET at_ms = at_ms + 1 WHERE sequence = 7")
    connection.close()
    follower = Follower(tmp_path)
    with pytest.raises(StorageFailed, match="record 7 does not match its hash"):
        follower.catch_up()
    follower.close()
    await world.engine.stop()
    store.close()


async def test_rows_by_worker_count_what_each_delivered(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    world = await a_life(store)
    follower = Follower(tmp_path)
    follower.catch_up()
    follower.close()
    with sqlite3.connect(tmp_path / VIEWS_FILE) as connection:
        counted = connection.execute(
            """SELECT sum(by_worker.rows), sum(by_worker.rows_failed)
               FROM rows_by_worker AS by_worker JOIN jobs USING (job_id) WHERE title = 'done'"""
        ).fetchone()
        accounts = connection.execute("SELECT count(*) FROM rows_by_worker WHERE account_id IS NULL").fetchone()
    connection.close()
    assert counted == (len(ROWS), 1)
    assert accounts == (0,)
    await world.engine.stop()
    store.close()


@pytest.mark.processes
async def test_follower_process_keeps_up_and_ends_when_told(tmp_path: Path) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs on this loop
        [sys.executable, "-m", "fallow_coordinator.follower", "--state", str(tmp_path)],
    )
    views = SqliteViews(tmp_path)
    try:
        store = SqliteStore(tmp_path)
        world = await a_life(store)
        wait_for(views, store.last_sequence, 20_000)
        lags: list[int] = []
        for number in range(5):
            await world.tell(c.CreateAccount(f"late {number}"))
            lags.append(wait_for(views, store.last_sequence, 20_000))
        assert sorted(lags)[len(lags) // 2] <= LAG_MS_MAX
        assert process.poll() is None
        await world.engine.stop()
        store.close()
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
        views.close()


@pytest.mark.processes
def test_follower_of_a_foreign_file_ends_with_words(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("CREATE TABLE something (x)")
    connection.close()
    ended = subprocess.run(
        [sys.executable, "-m", "fallow_coordinator.follower", "--state", str(tmp_path)],
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert ended.returncode == EXIT_STORAGE_FAILED
    assert b"is not a journal of fallow" in ended.stderr


def wait_for(views: SqliteViews, sequence: int, deadline_ms: int) -> int:
    """Milliseconds until the views stand there."""
    began = time.monotonic()
    while views.view_sequence() < sequence:
        waited_ms = (time.monotonic() - began) * 1_000
        assert waited_ms < deadline_ms, f"the views stay at {views.view_sequence()}, wanted {sequence}"
        time.sleep(0.002)
    return round((time.monotonic() - began) * 1_000)


async def test_rows_of_a_lease_that_was_spread_are_counted_by_node(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    worker = await world.volunteer()
    job_id = await world.submit_job(ROWS)
    while world.leases_of(worker):
        lease = world.leases_of(worker)[0]
        rows = world.engine.state.tasks[lease.task_id].rows
        nodes = (NodeRows(2, rows - 2), NodeRows(0, 2))
        await world.commit(worker, lease, fail_rows=[0, rows - 1], nodes=nodes)
    told = shares_told(world.engine.state.jobs[job_id])
    tasks = world.engine.state.jobs[job_id].tasks_settled
    follower = Follower(tmp_path)
    follower.catch_up()
    follower.close()
    views = SqliteViews(tmp_path)
    assert tuple(views.shares(job_id, limit=9)) == told
    assert sum(share.rows for share in told) == len(ROWS)
    views.close()
    with sqlite3.connect(tmp_path / VIEWS_FILE) as connection:
        failed = dict(connection.execute("SELECT node, rows_failed FROM rows_by_worker").fetchall())
        counted = connection.execute("SELECT DISTINCT tasks FROM rows_by_worker").fetchall()
    connection.close()
    assert failed == {0: tasks, 2: tasks}
    assert counted == [(tasks,)]
    await world.engine.stop()
    store.close()
