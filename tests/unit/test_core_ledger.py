"""The ledger against a slow model that keeps every posting, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.credits import Purse
from fallow.ids import AccountId, JobId, PoolId
from fallow_coordinator.core.ledger import (
    Book,
    BookKind,
    Ledger,
    LedgerError,
    Posting,
    allotment,
    available,
    contribution,
    held,
    pending,
    sink,
    transfer,
    treasury,
)

ACCOUNTS = [AccountId("account-a"), AccountId("account-b")]
BOOKS: list[Book] = [
    *(treasury(purse) for purse in Purse),
    *(sink(purse) for purse in Purse),
    *(make(account) for make in (available, pending, contribution) for account in ACCOUNTS),
    *(held(JobId(f"job-{n}"), purse) for n in range(2) for purse in (Purse.CREDITS, Purse.ALLOTMENT)),
    allotment(PoolId("pool"), ACCOUNTS[0]),
]


@dataclass
class Model:
    """Every posting there ever was; a balance is their sum."""

    postings: list[Posting] = field(default_factory=list[Posting])

    def balance(self, book: Book) -> int:
        return sum(microcredits for other, microcredits in self.postings if other == book)

    def allows(self, postings: tuple[Posting, ...]) -> bool:
        if any(sum(m for book, m in postings if book.purse is purse) for purse in Purse):
            return False
        # One by one: a book that an event overdraws and fills again is overdrawn.
        for n in range(len(postings)):
            after = Model([*self.postings, *postings[: n + 1]])
            if postings[n].book.kind is not BookKind.TREASURY and after.balance(postings[n].book) < 0:
                return False
        return True


@st.composite
def transfers(draw: st.DrawFn) -> tuple[Posting, ...]:
    source = draw(st.sampled_from(BOOKS))
    target = draw(st.sampled_from([book for book in BOOKS if book.purse is source.purse]))
    return transfer(source, target, draw(st.integers(0, 100)))


@st.composite
def several_postings(draw: st.DrawFn) -> tuple[Posting, ...]:
    made = [posting for one in draw(st.lists(transfers(), max_size=3)) for posting in one]
    if draw(st.integers(0, 9)) == 0:
        made.append(Posting(draw(st.sampled_from(BOOKS)), draw(st.integers(-5, 5))))
    return tuple(made)


@given(st.lists(several_postings(), max_size=30))
def test_the_ledger_says_what_the_sum_of_all_postings_says(events: list[tuple[Posting, ...]]) -> None:
    ledger, model = Ledger(), Model()
    for postings in events:
        if model.allows(postings):
            ledger.post(postings)
            model.postings.extend(postings)
        else:
            before = dict(ledger.balances)
            with pytest.raises(LedgerError):
                ledger.post(postings)
            ledger.balances = before
        ledger.check()
        for book in BOOKS:
            assert ledger.balance(book) == model.balance(book)
        for purse in Purse:
            assert sum(m for book, m in ledger.balances.items() if book.purse is purse) == 0


def test_what_is_made_for_one_purse_cannot_be_spent_in_another() -> None:
    with pytest.raises(AssertionError):
        transfer(treasury(Purse.CONTRIBUTION), available(ACCOUNTS[0]), 1)


def test_a_transfer_goes_one_way() -> None:
    with pytest.raises(AssertionError):
        transfer(available(ACCOUNTS[0]), pending(ACCOUNTS[0]), -1)


@pytest.mark.parametrize(
    "balances",
    [
        {available(ACCOUNTS[0]): 5},
        {treasury(Purse.CREDITS): -5, available(ACCOUNTS[0]): 10, pending(ACCOUNTS[0]): -5},
        {treasury(Purse.CONTRIBUTION): -5, available(ACCOUNTS[0]): 5},
        {sink(Purse.CREDITS): 0},
    ],
)
def test_a_ledger_that_does_not_add_up_is_told(balances: dict[Book, int]) -> None:
    with pytest.raises(LedgerError):
        Ledger(balances).check()
