"""What accounts have, read from the books."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.credits import Purse
from fallow.ids import AccountId, JobId, PoolId
from fallow_coordinator.core.ledger import BookKind, allotment, available, contribution, held, pending, treasury
from fallow_coordinator.core.postings import purse_of
from fallow_coordinator.core.state import State


@dataclass(frozen=True, slots=True)
class AllotmentLeft:
    """An account's allotment in one pool."""

    pool_id: PoolId
    microcredits: int
    left_microcredits: int
    period_ms: int
    renews_at_ms: int


@dataclass(frozen=True, slots=True)
class AccountBalances:
    """What an account has; `held` is set aside for its unfinished jobs in market pools."""

    account_id: AccountId
    name: str
    available: int
    held: int
    pending: int
    contribution: int
    allotments: tuple[AllotmentLeft, ...]


def balances_of(state: State, account_id: AccountId) -> AccountBalances | None:
    """What the account has now, or None when there is no such account. Costs as much as there are unfinished jobs."""
    return _balances(state, account_id, _held(state).get(account_id, 0))


def all_balances(state: State) -> list[AccountBalances]:
    """Accounts that have anything at all."""
    of_jobs = _held(state)
    owners: dict[AccountId, None] = dict.fromkeys(of_jobs)
    for book in state.ledger.balances:
        if book.kind in (BookKind.AVAILABLE, BookKind.PENDING, BookKind.CONTRIBUTION, BookKind.ALLOTMENT):
            owners[AccountId(book.owner)] = None
    owners.update(dict.fromkeys(account_id for _, account_id in state.ledger.allotments))
    found = (_balances(state, account_id, of_jobs.get(account_id, 0)) for account_id in sorted(owners))
    return [one for one in found if one is not None]


def made(state: State) -> int:
    """All credits that there are."""
    return -state.ledger.balance(treasury(Purse.CREDITS))


def _held(state: State) -> dict[AccountId, int]:
    sums: dict[AccountId, int] = {}
    for book, microcredits in state.ledger.balances.items():
        if book.kind is BookKind.HELD and book.purse is Purse.CREDITS:
            account_id = state.jobs[JobId(book.owner)].account_id
            sums[account_id] = sums.get(account_id, 0) + microcredits
    return sums


def _balances(state: State, account_id: AccountId, held_microcredits: int) -> AccountBalances | None:
    account = state.accounts.get(account_id)
    if account is None:
        return None
    ledger = state.ledger
    return AccountBalances(
        account_id=account_id,
        name=account.name,
        available=ledger.balance(available(account_id)),
        held=held_microcredits,
        pending=ledger.balance(pending(account_id)),
        contribution=ledger.balance(contribution(account_id)),
        allotments=tuple(
            AllotmentLeft(
                pool_id,
                one.microcredits,
                ledger.balance(allotment(pool_id, account_id)),
                one.period_ms,
                one.renews_at_ms,
            )
            for (pool_id, owner), one in ledger.allotments.items()
            if owner == account_id
        ),
    )


def held_by(state: State, job_id: JobId) -> int:
    """What the job holds and has not paid yet."""
    return state.ledger.balance(held(job_id, purse_of(state.jobs[job_id])))
