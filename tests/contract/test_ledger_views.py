"""What every LedgerViews promises: statements that add up to the books, also when their jobs have left the state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fallow.credits import PoolMode
from fallow.ids import AccountId
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import groups
from fallow_coordinator.core.balances import balances_of
from fallow_coordinator.core.prices import price_at
from fallow_coordinator.follower import Follower
from fallow_coordinator.ports import LedgerViews
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.ledger_views import SqliteLedgerViews
from fallow_coordinator.store.sqlite import SqliteStore
from journal_world import DAY_MS, World, WorldWorker

ROWS = [f"row {number}".encode() for number in range(60)]
FOR_EVER = 1 << 62


@dataclass(slots=True)
class Viewed:
    """A market with a finished, archived job, and views of it."""

    world: World
    cheap: WorldWorker
    dear: WorldWorker
    follower: Follower
    views: LedgerViews
    folder: Path


@pytest.fixture(params=["sqlite"])
async def viewed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Viewed]:
    assert request.param == "sqlite"
    monkeypatch.setattr(groups, "measured", lambda worker: True)
    store = SqliteStore(tmp_path)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    await world.tell(c.SetPoolMode(world.engine.state.default_pool_id, PoolMode.MARKET))
    account_id = world.operator_account_id
    await world.tell(c.GrantCredits(account_id, 90_000_000, "a gift", world.entropy(16)))
    cheap, dear = await world.volunteer("cheap", window=1), await world.volunteer("dear", window=1)
    for worker, ask in ((cheap, 300_000), (dear, 700_000)):
        worker.capability = replace(worker.capability, ask_microcredits_per_unit=ask)
        await world.tell(c.ChangeCapability(worker.session_id, worker.capability, 1))
    job_id = await world.submit_job(ROWS, budget_microcredits=12_000_000)
    await world.commit(cheap, world.leases_of(cheap)[0], fail_rows=[0])
    await world.work_until_idle(cheap, dear)
    await world.tell(c.TopUpJob(account_id, job_id, 30_000_000, world.entropy(16)))
    await world.work_until_idle(cheap, dear)
    await world.tell(c.ReleaseCredits(cheap.account_id, 100, "looked right", world.entropy(16)))
    follower = Follower(tmp_path)
    follower.catch_up()
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    views = SqliteLedgerViews(tmp_path)
    yield Viewed(world, cheap, dear, follower, views, tmp_path)
    follower.close()
    views.close()
    await world.engine.stop()
    store.close()


def sums(viewed: Viewed, account_id: AccountId, **when: int) -> tuple[dict[str, int], dict[str, int]]:
    """(sum of lines for each book, closing less opening)."""
    times = {"since_ms": 0, "until_ms": FOR_EVER} | when
    page = viewed.views.statement(account_id, offset=0, limit=1_000, **times)
    of_lines: dict[str, int] = {}
    for row in page.rows:
        of_lines[row.book] = of_lines.get(row.book, 0) + row.microcredits
    change = {book: page.closing[book] - page.opening.get(book, 0) for book in page.closing}
    return of_lines, change


async def test_statements_of_both_sides_add_up_to_the_books(viewed: Viewed) -> None:
    state = viewed.world.engine.state
    assert not state.jobs, "the job has left the state"
    for account_id in (viewed.world.operator_account_id, viewed.cheap.account_id, viewed.dear.account_id):
        of_lines, change = sums(viewed, account_id)
        balances = balances_of(state, account_id)
        assert balances is not None
        assert of_lines == change
        assert of_lines.get("available", 0) == balances.available
        assert of_lines.get("pending", 0) == balances.pending
        assert of_lines.get("held", 0) == balances.held == 0


async def test_a_statement_tells_what_happened_in_order_with_work_summed_up(viewed: Viewed) -> None:
    page = viewed.views.statement(
        viewed.world.operator_account_id, since_ms=0, until_ms=FOR_EVER, offset=0, limit=1_000
    )
    told = [(row.what, row.book) for row in page.rows]
    assert told[0] == ("grant", "available")
    assert page.rows[0].note == "a gift"
    assert ("budget", "held") in told and ("top up", "held") in told and ("returned", "available") in told
    work = [row for row in page.rows if row.what == "work"]
    assert {row.worker_id for row in work} == {viewed.cheap.worker_id, viewed.dear.worker_id}
    assert all(row.microcredits < 0 and row.book == "held" for row in work)
    assert sum(row.count for row in work) > len(work)
    second = viewed.views.statement(viewed.world.operator_account_id, since_ms=0, until_ms=FOR_EVER, offset=1, limit=2)
    assert second.rows == page.rows[1:3]


async def test_a_part_of_a_statement_begins_with_what_was_there(viewed: Viewed) -> None:
    viewed.world.clock.now_ms += DAY_MS
    since_ms = viewed.world.clock.now_ms
    await viewed.world.tell(c.GrantCredits(viewed.world.operator_account_id, 5, "later", viewed.world.entropy(16)))
    viewed.follower.catch_up()
    of_lines, change = sums(viewed, viewed.world.operator_account_id, since_ms=since_ms)
    assert of_lines == {"available": 5}
    assert change["available"] == 5


async def test_earnings_are_what_a_worker_did_each_day(viewed: Viewed) -> None:
    sequence, days = viewed.views.earnings(viewed.cheap.worker_id, since_ms=0)
    assert sequence > 0 and len(days) == 1
    (day,) = days
    assert day.rows_failed == 1 and day.tasks > 0 and day.contribution_microcredits == 0
    _, change = sums(viewed, viewed.cheap.account_id)
    assert day.microcredits == change["pending"] + change["available"]
    assert day.unit_micros == 500_000 * (day.rows - 1)
    assert viewed.views.earnings(viewed.cheap.worker_id, since_ms=FOR_EVER)[1] == []


async def test_prices_paid_are_told_by_class_of_devices(viewed: Viewed) -> None:
    prices = viewed.views.prices(since_ms=0)
    assert set(prices) == {"cpu"}
    points = prices["cpu"]
    # Its own ask when the other one is busy, the other's when it is free.
    assert [point.price_microcredits_per_unit for point in points] == [300_000, 700_000]
    assert price_at(points, 0) == 300_000 and price_at(points, 100) == 700_000
    assert sum(point.tasks for point in points) > 1


async def test_rebuilt_views_of_credits_are_equal(viewed: Viewed) -> None:
    viewed.follower.catch_up()
    report = check_journal(viewed.folder)
    assert not report.faults


def test_views_that_nobody_wrote_yet_are_empty(tmp_path: Path) -> None:
    views = SqliteLedgerViews(tmp_path)
    page = views.statement(AccountId("nobody"), since_ms=0, until_ms=FOR_EVER, offset=0, limit=10)
    assert not page.rows and not page.closing
    assert views.prices(since_ms=0) == {}
    views.close()
