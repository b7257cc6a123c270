"""How events about credits change the state, beside their postings."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import assert_never

from fallow.credits import PoolMode
from fallow.ids import AccountId, PoolId
from fallow_coordinator.core import events as e
from fallow_coordinator.core.groups import place, unplace
from fallow_coordinator.core.ledger import Allotment, Ledger, TransferFacts
from fallow_coordinator.core.limits import TRANSFERS_REMEMBERED_MAX
from fallow_coordinator.core.state import NO_GROUP, State

LedgerEvent = (
    e.PoolModeChanged | e.CreditsGranted | e.CreditsReleased | e.AllotmentSet | e.AllotmentRenewed | e.JobFunded
)


def evolve_ledger(state: State, event: LedgerEvent) -> None:
    """Applies one event about credits; its postings are posted already."""
    ledger = state.ledger
    match event:
        case e.PoolModeChanged():
            _change_mode(state, event.pool_id, PoolMode(event.mode))
        case e.CreditsGranted() | e.CreditsReleased() | e.JobFunded():
            if isinstance(event, e.JobFunded):
                state.jobs[event.job_id].budget_microcredits += event.microcredits
            _remember(ledger, event.transfer_id, transfer_facts(event))
        case e.AllotmentSet():
            _forget_renewal(ledger, event.pool_id, event.account_id)
            if event.microcredits:
                ledger.allotments[event.pool_id, event.account_id] = Allotment(
                    event.microcredits, event.period_ms, event.renews_at_ms
                )
                insort(ledger.renewals, (event.renews_at_ms, event.pool_id, event.account_id))
            else:
                ledger.allotments.pop((event.pool_id, event.account_id), None)
        case e.AllotmentRenewed():
            _forget_renewal(ledger, event.pool_id, event.account_id)
            ledger.allotments[event.pool_id, event.account_id].renews_at_ms = event.renews_at_ms
            insort(ledger.renewals, (event.renews_at_ms, event.pool_id, event.account_id))
        case _:
            assert_never(event)


def _change_mode(state: State, pool_id: PoolId, mode: PoolMode) -> None:
    """Workers' asks count in a market alone: they are placed anew."""
    members = [worker for worker in state.workers.values() if worker.pool_id == pool_id and worker.group != NO_GROUP]
    for worker in members:
        unplace(state, worker)
    state.pools[pool_id].mode = mode
    for worker in members:
        place(state, worker)


def transfer_facts(event: e.CreditsGranted | e.CreditsReleased | e.JobFunded) -> TransferFacts:
    """What a transfer does, to know it again."""
    match event:
        case e.CreditsGranted():
            return TransferFacts("grant", event.account_id, event.microcredits)
        case e.CreditsReleased():
            return TransferFacts("release", event.account_id, event.microcredits)
        case e.JobFunded():
            return TransferFacts("top up", event.job_id, event.microcredits)
        case _:
            assert_never(event)


def _remember(ledger: Ledger, transfer_id: bytes, facts: TransferFacts) -> None:
    assert transfer_id not in ledger.transfers, "a transfer happens once"
    ledger.transfers[transfer_id] = facts
    ledger.transfers_order.append(transfer_id)
    if len(ledger.transfers_order) > TRANSFERS_REMEMBERED_MAX:
        del ledger.transfers[ledger.transfers_order.popleft()]


def _forget_renewal(ledger: Ledger, pool_id: PoolId, account_id: AccountId) -> None:
    known = ledger.allotments.get((pool_id, account_id))
    if known is None:
        return
    entry = (known.renews_at_ms, pool_id, account_id)
    index = bisect_left(ledger.renewals, entry)
    assert ledger.renewals[index] == entry, "every allotment stands in the index"
    del ledger.renewals[index]
