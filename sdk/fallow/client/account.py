"""What an account has and what came and went, as plain values."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from fallow.credits import TRANSFER_ID_BYTES, StatementLine
from fallow.v1 import ledger_service_pb2 as pb
from fallow.wire.moments import duration_from_message, moment_from_message


@dataclass(frozen=True, slots=True)
class AllotmentLeft:
    """What an account gets in a quota pool in each period; one credit of allotment buys one unit."""

    pool_id: str
    microcredits: int
    left_microcredits: int
    period_ms: int
    renews_at_ms: int


@dataclass(frozen=True, slots=True)
class Balances:
    """What an account has, in micro-credits."""

    account_id: str
    name: str
    available_microcredits: int
    """It may spend it."""
    held_microcredits: int
    """Set aside for its unfinished jobs."""
    pending_microcredits: int
    """Earned by its workers and not yet released."""
    contribution_microcredits: int
    """Work of its workers that nobody paid: one credit for a unit."""
    allotments: tuple[AllotmentLeft, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """All lines of a time, and what each book had before and after: opening + lines = closing."""

    lines: tuple[StatementLine, ...]
    opening: Mapping[str, int]
    closing: Mapping[str, int]
    sequence: int
    """The journal's record up to which it goes: the newest ones may take a second."""


def balances_from(message: pb.Balances) -> Balances:
    """Balances of a message."""
    return Balances(
        account_id=message.account_id,
        name=message.name,
        available_microcredits=message.available_microcredits,
        held_microcredits=message.held_microcredits,
        pending_microcredits=message.pending_microcredits,
        contribution_microcredits=message.contribution_microcredits,
        allotments=tuple(
            AllotmentLeft(
                one.pool_id,
                one.microcredits,
                one.left_microcredits,
                duration_from_message(one.period),
                moment_from_message(one.renews_at),
            )
            for one in message.allotments
        ),
    )


def lines_from(message: pb.GetStatementResponse) -> list[StatementLine]:
    """Lines of a message."""
    return [
        StatementLine(
            first_at_ms=moment_from_message(line.first_at),
            last_at_ms=moment_from_message(line.last_at),
            what=line.what,
            book=line.book,
            microcredits=line.microcredits,
            job_id=line.job_id,
            worker_id=line.worker_id,
            pool_id=line.pool_id,
            note=line.note,
            count=line.count,
        )
        for line in message.lines
    ]


def new_transfer_id() -> bytes:
    """A fresh name for a transfer: the same one again is harmless."""
    return secrets.token_bytes(TRANSFER_ID_BYTES)
