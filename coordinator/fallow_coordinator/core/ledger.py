"""Double entry in whole micro-credits: books, postings and what must hold of them.

Every event's postings sum to zero in each purse: what is made comes out of the treasury, which alone may be negative,
and what is used up ends in the sink (TigerBeetle's rules; treasury and sink as in AI Horde's ADRs). Nothing is edited:
a correction is a new transfer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from fallow.credits import Purse
from fallow.ids import AccountId, JobId, PoolId

NO_POOL = PoolId("")


class BookKind(StrEnum):
    """What a book is for."""

    TREASURY = "treasury"
    """Where everything comes from: minus what was ever made."""
    SINK = "sink"
    """Where what is used up goes."""
    AVAILABLE = "available"
    """An account may spend it."""
    HELD = "held"
    """A job's: for its leases, and for nothing else."""
    PENDING = "pending"
    """Earned, not yet released."""
    CONTRIBUTION = "contribution"
    ALLOTMENT = "allotment"
    """What an account may still use in a quota pool in this period."""


class Book(NamedTuple):
    """One pile of micro-credits."""

    kind: BookKind
    purse: Purse
    owner: str = ""
    """An account, or for HELD a job; empty for treasury and sink."""
    pool_id: PoolId = NO_POOL
    """Of an allotment."""


class Posting(NamedTuple):
    """So much comes to a book, or leaves it when negative."""

    book: Book
    microcredits: int


class LedgerError(AssertionError):
    """The books contradict each other: the core is wrong, or the journal is not what it was."""


@dataclass(frozen=True, slots=True)
class TransferFacts:
    """What a transfer that people asked for did, so that the same again is harmless and another is refused."""

    kind: str
    owner: str
    microcredits: int


@dataclass(slots=True)
class Allotment:
    """What an account gets in a quota pool."""

    microcredits: int
    """For each period."""
    period_ms: int
    renews_at_ms: int


@dataclass(slots=True)
class Ledger:
    """All balances. Books with nothing in them are not listed."""

    balances: dict[Book, int] = field(default_factory=dict[Book, int])
    transfers: dict[bytes, TransferFacts] = field(default_factory=dict[bytes, TransferFacts])
    """The newest transfers that people asked for, oldest first."""
    transfers_order: deque[bytes] = field(default_factory=deque[bytes])
    """The same, oldest first."""
    allotments: dict[tuple[PoolId, AccountId], Allotment] = field(
        default_factory=dict[tuple[PoolId, AccountId], Allotment]
    )
    renewals: list[tuple[int, PoolId, AccountId]] = field(default_factory=list[tuple[int, PoolId, AccountId]])
    """(renews_at_ms, pool, account) of every allotment, sorted."""

    def balance(self, book: Book) -> int:
        """What is in a book."""
        return self.balances.get(book, 0)

    def post(self, postings: Iterable[Posting]) -> None:
        """Applies one event's postings. Raises LedgerError when they don't sum to zero or overdraw a book."""
        sums: Counter[Purse] = Counter()
        for book, microcredits in postings:
            balance = self.balances.get(book, 0) + microcredits
            if balance:
                self.balances[book] = balance
            else:
                self.balances.pop(book, None)
            sums[book.purse] += microcredits
            if balance < 0 and book.kind is not BookKind.TREASURY:
                raise LedgerError(f"{' '.join(filter(None, book))} would go to {balance} micro-credits")
        if any(sums.values()):
            raise LedgerError("an event's postings do not sum to zero")

    def check(self) -> None:
        """Raises LedgerError with the first contradiction: a purse that does not sum to zero, a book below zero."""
        sums: Counter[Purse] = Counter()
        for book, microcredits in self.balances.items():
            if not microcredits:
                raise LedgerError("an empty book is listed")
            if microcredits < 0 and book.kind is not BookKind.TREASURY:
                raise LedgerError(f"{' '.join(filter(None, book))} stands at {microcredits} micro-credits")
            sums[book.purse] += microcredits
        for purse, total in sums.items():
            if total:
                raise LedgerError(f"the books of {purse} sum to {total} micro-credits, not to 0")


def treasury(purse: Purse) -> Book:
    """Where a purse comes from."""
    return Book(BookKind.TREASURY, purse)


def sink(purse: Purse) -> Book:
    """Where a purse ends."""
    return Book(BookKind.SINK, purse)


def available(account_id: AccountId) -> Book:
    """What an account may spend."""
    return Book(BookKind.AVAILABLE, Purse.CREDITS, account_id)


def pending(account_id: AccountId) -> Book:
    """What an account's workers earned and is not yet released."""
    return Book(BookKind.PENDING, Purse.CREDITS, account_id)


def contribution(account_id: AccountId) -> Book:
    """What an account's workers did without pay."""
    return Book(BookKind.CONTRIBUTION, Purse.CONTRIBUTION, account_id)


def held(job_id: JobId, purse: Purse) -> Book:
    """What a job may still spend."""
    return Book(BookKind.HELD, purse, job_id)


def allotment(pool_id: PoolId, account_id: AccountId) -> Book:
    """What an account may still use in a quota pool in this period."""
    return Book(BookKind.ALLOTMENT, Purse.ALLOTMENT, account_id, pool_id)


def transfer(source: Book, target: Book, microcredits: int) -> tuple[Posting, ...]:
    """So much goes from one book to another of the same purse; nothing for 0."""
    assert source.purse is target.purse, "nothing moves from one purse to another"
    assert microcredits >= 0, "a transfer goes one way"
    return (Posting(source, -microcredits), Posting(target, microcredits)) if microcredits else ()
