"""Credits in numbers and words: a credit is 10⁶ micro-credits, and everything is counted in whole micro-credits."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Final

from fallow.errors import FallowError, Reason

MICROCREDITS_PER_CREDIT: Final = 1_000_000
MICROCREDITS_MAX: Final = 10**15
"""Most of any one grant, budget or allotment: a billion credits."""
ASK_MICROCREDITS_PER_UNIT_MAX: Final = 10**9
"""Dearest ask and limit: 1,000 credits for a second of a reference core."""
UNITS_PER_HOUR: Final = 3_600
"""A reference core does one unit a second."""
BUDGET_WARNING_PERCENT: Final = 80
"""From this part of a budget on, a job's status warns."""
NOTE_BYTES_MAX: Final = 200
TRANSFER_ID_BYTES: Final = 16
"""Length of the random name by which whoever moves credits makes repeating harmless."""
_WORD_CHARACTERS_MAX = 40


class PoolMode(StrEnum):
    """How work is paid in a pool."""

    DONATION = "donation"
    """Nobody pays; what workers contribute is recorded."""
    QUOTA = "quota"
    """Accounts have an allotment for each period; what workers contribute is recorded."""
    MARKET = "market"
    """Workers ask, submitters set limits and budgets."""


class Purse(StrEnum):
    """What is counted; nothing ever moves from one purse to another."""

    CREDITS = "credits"
    CONTRIBUTION = "contribution"
    """Work done for others without pay: one credit for a unit."""
    ALLOTMENT = "allotment"
    """What quota pools grant: one credit buys a unit."""


def parse_credits(text: str, field: str, most: int = MICROCREDITS_MAX) -> int:
    """Micro-credits of a number of credits such as `12.5`. Raises FIELD_INVALID naming `field`.

    Negative numbers, NaN, infinities, fractions of a micro-credit and more than `most` micro-credits are refused.
    """
    allowed = f"0 to {credits_text(most)} credits, in steps of 0.000001"
    try:
        if len(text) > _WORD_CHARACTERS_MAX:
            raise InvalidOperation
        value = Decimal(text)
        # A comparison and a product of huge exponents would be slow or inexact: both are refused first.
        if not value.is_finite() or value < 0 or value > most or value.adjusted() < -6:
            if value.is_finite() and value.is_zero():
                return 0
            raise InvalidOperation
        micro = value * MICROCREDITS_PER_CREDIT
        if micro != micro.to_integral_value() or micro > most:
            raise InvalidOperation
    except InvalidOperation:
        raise FallowError(
            Reason.FIELD_INVALID, f"{text[:_WORD_CHARACTERS_MAX]!r} is no amount of credits", field=field, limit=allowed
        ) from None
    return int(micro)


def credits_text(microcredits: int) -> str:
    """`12.5`, `0.000001`, `1,000`: an amount in credits, exactly."""
    whole, micro = divmod(abs(microcredits), MICROCREDITS_PER_CREDIT)
    fraction = f".{micro:06}".rstrip("0").rstrip(".")
    return f"{'-' if microcredits < 0 else ''}{whole:,}{fraction}"


def ask_per_unit(microcredits_per_hour: int) -> int:
    """Micro-credits for a unit, when an hour of a reference core shall cost so much; at least 1 unless it is free."""
    return -(-microcredits_per_hour // UNITS_PER_HOUR)


def price_per_hour(microcredits_per_unit: int) -> int:
    """Micro-credits for an hour of a reference core at a price for a unit."""
    return microcredits_per_unit * UNITS_PER_HOUR


def check_amount(microcredits: int, field: str, *, least: int = 0, most: int = MICROCREDITS_MAX) -> int:
    """The amount, when it is within bounds. Raises FIELD_INVALID naming `field`."""
    if not least <= microcredits <= most:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{microcredits} micro-credits",
            field=field,
            limit=f"{least} to {most} micro-credits",
        )
    return microcredits


@dataclass(frozen=True, slots=True)
class StatementLine:
    """What one event, or all work of one worker for one job, did to one book of the account."""

    first_at_ms: int
    last_at_ms: int
    what: str
    """`grant`, `budget`, `top up`, `work`, `returned`, `released`, `allotment`, `lapsed`."""
    book: str
    """`available`, `held`, `pending` or `allotment`."""
    microcredits: int
    """What came; negative: what went."""
    job_id: str
    worker_id: str
    pool_id: str
    note: str
    count: int
    """Events that the line sums up."""
