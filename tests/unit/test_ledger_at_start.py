"""A coordinator does not start on books that do not add up, and `check` says where they break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.credits import PoolMode
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import groups
from fallow_coordinator.ports import LedgerUnsound
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.encoding import decode_event, encode_event
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.sqlite import SqliteStore
from journal_world import World
from unit.test_journal_check import rewrite

ROWS = [f"row {number}".encode() for number in range(24)]


@pytest.fixture(autouse=True)
def everybody_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """How devices come to be measured is told elsewhere; paid work goes to measured ones alone."""
    monkeypatch.setattr(groups, "measured", lambda worker: True)


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A journal with a paid lease at work."""
    state = tmp_path / "state"
    store = SqliteStore(state)
    world = World(store=store)
    await world.begin()
    inspector = await world.operator_worker()
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    await world.tell(c.SetPoolMode(world.engine.state.default_pool_id, PoolMode.MARKET))
    await world.tell(c.GrantCredits(world.operator_account_id, 90_000_000, "", world.entropy(16)))
    worker = await world.volunteer()
    worker.capability = replace(worker.capability, ask_microcredits_per_unit=1_000_000)
    await world.tell(c.ChangeCapability(worker.session_id, worker.capability, 1))
    await world.submit_job(ROWS, budget_microcredits=80_000_000)
    await world.commit(worker, world.leases_of(worker)[0])
    assert world.leases_of(worker)
    await world.engine.stop()
    store.close()
    return state


def falsify(folder: Path, kind: type[e.Event], change: Callable[[e.Event], e.Event]) -> int:
    """Changes the last event of a kind, as someone who covers traces would; gives its sequence."""
    with JournalReader(folder / JOURNAL_FILE) as journal:
        stored = journal.stored(after_sequence=0, limit=10_000)
    events = [(one.sequence, decode_event(one.event)) for one in stored]
    sequence, event = next(pair for pair in reversed(events) if isinstance(pair[1], kind))
    rewrite(folder, sequence, event=encode_event(change(event)))
    return sequence


async def start(folder: Path) -> None:
    store = SqliteStore(folder)
    try:
        await World(store=store).engine.start()
    finally:
        store.close()


async def test_books_that_overdraw_an_account_stop_the_start(folder: Path) -> None:
    def less(event: e.Event) -> e.Event:
        assert isinstance(event, e.CreditsGranted)
        return replace(event, microcredits=1_000_000)

    falsify(folder, e.CreditsGranted, less)
    with pytest.raises(LedgerUnsound, match=r"available credits account-.* would go to -79000000 micro-credits"):
        await start(folder)
    report = check_journal(folder)
    assert "would go to -79000000" in report.faults[0]


async def test_a_lease_that_may_cost_more_than_is_held_stops_the_start(folder: Path) -> None:
    def more(event: e.Event) -> e.Event:
        assert isinstance(event, e.LeaseGranted)
        return replace(event, reserved_microcredits=90_000_000)

    falsify(folder, e.LeaseGranted, more)
    with pytest.raises(LedgerUnsound, match="what leases may cost is held"):
        await start(folder)
    assert "what leases may cost is held" in check_journal(folder).faults[0]


async def test_sound_books_start(folder: Path) -> None:
    world = World(store=SqliteStore(folder))
    await world.engine.start()
    await world.engine.stop()
    world.store.close()
    assert not check_journal(folder).faults
