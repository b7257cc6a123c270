"""What a submitter may ask of price, time and machines: the keywords of `map` and `quote`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from typing import Final, TypedDict, TypeVar

from fallow.assurance import assurance_of
from fallow.bundle import Precision, VariantForm
from fallow.credits import MICROCREDITS_MAX, parse_credits
from fallow.errors import FallowError, Reason
from fallow.job import JobOptions, Objective
from fallow.quote import Quote
from fallow.region import REGION_BYTES_MAX, REGION_RULE, is_region
from fallow.session import DeviceKind

Credits = int | float | str | Decimal
"""An amount in credits; `"0.000001"` is the smallest."""

PRIORITY_MAX: Final = 9
MEMORY_BYTES_MAX: Final = 1 << 50
_THOUSAND_ROWS: Final = 1_000
_UNIT_MICROS: Final = 1_000_000

MemberT = TypeVar("MemberT", bound=StrEnum)


class JobTerms(TypedDict, total=False):
    """Keywords of `map` and `quote`; every one may be left out."""

    limit: Credits
    """Highest price for 1,000 rows, in credits; workers that ask for more get none of the job."""
    budget: Credits
    """Most that the job may cost, in credits. In a market pool: the quote and a fifth more."""
    deadline: datetime.datetime | datetime.timedelta
    """When the job shall have ended: a moment with a time zone, or a time from now."""
    objective: Objective | str
    """What matters among workers that fit: `cost` (the default), `speed` or `carbon`."""
    device: DeviceKind | str
    """Kind of device that does the work: `cpu`, `gpu` or `npu`. Any, when left out."""
    memory_bytes: int
    """Memory that one device must have."""
    region: str
    """Where the workers stand; `us` is met by `us-east` too."""
    priority: int
    """0 to 9: among the account's own jobs, each step is an hour's head start."""
    precision: Precision | str
    """Coarsest arithmetic that is accepted. The bundle's own, when left out."""
    assurance: str
    """How sure results shall be: `basic`, `standard` or `strict`, or one of them and shares that differ from it, as in
    `standard,error=0.005`. Nothing is checked, when left out."""
    accept: Sequence[VariantForm | str]
    """Forms of the bundle's program that may stand in for the fp32 form, such as `["fp16", "int8"]`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The keywords, checked; amounts in micro-credits."""

    options: JobOptions
    limit_microcredits_per_1000_rows: int | None
    budget_microcredits: int | None
    accept: tuple[VariantForm, ...]


def terms_of(given: JobTerms, options: JobOptions, *, now: datetime.datetime) -> Terms:
    """The checked terms. Raises FIELD_INVALID naming the keyword, what it was and what is allowed."""
    limit = given.get("limit")
    budget = given.get("budget")
    changes: dict[str, object] = {}
    if "deadline" in given:
        changes["deadline_ms"] = _deadline_ms(given["deadline"], now)
    if "assurance" in given:
        assurance_of(given["assurance"])
        changes["assurance"] = given["assurance"]
    if "objective" in given:
        changes["objective"] = _member(Objective, given["objective"], "objective")
    if "device" in given:
        changes["device_kind"] = _member(DeviceKind, given["device"], "device").value
    if "memory_bytes" in given:
        changes["memory_bytes_min"] = _within(given["memory_bytes"], "memory_bytes", MEMORY_BYTES_MAX)
    if "region" in given:
        changes["region"] = _region(given["region"])
    if "priority" in given:
        changes["priority"] = _within(given["priority"], "priority", PRIORITY_MAX)
    if "precision" in given:
        changes["precision"] = _member(Precision, given["precision"], "precision")
    accept = given.get("accept", ())
    forms = (accept,) if isinstance(accept, str) else tuple(accept)
    return Terms(
        options=replace(options, **changes),  # type: ignore[arg-type]  # each key goes with its own type above
        limit_microcredits_per_1000_rows=None if limit is None else _amount(limit, "limit"),
        # A budget among the options is stated as well.
        budget_microcredits=(options.budget_microcredits or None) if budget is None else _amount(budget, "budget"),
        accept=tuple(dict.fromkeys(_member(VariantForm, form, "accept") for form in forms)),
    )


def limit_per_unit(limit_microcredits_per_1000_rows: int, quote: Quote) -> int:
    """The limit for a unit of work that a limit for 1,000 rows of these sizes means. Raises FIELD_INVALID.

    Rounded down: the job never pays more than was said. Rows count by their mean cost.
    """
    per_unit = limit_microcredits_per_1000_rows * quote.rows * _UNIT_MICROS // (_THOUSAND_ROWS * quote.unit_micros)
    if per_unit < 1:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a limit of {limit_microcredits_per_1000_rows} micro-credits for 1,000 rows is less than one micro-credit "
            "for a unit of their work",
            field="limit",
            hint="leave the limit out for work that costs nothing, or raise it",
        )
    return per_unit


def _deadline_ms(given: datetime.datetime | datetime.timedelta, now: datetime.datetime) -> int:
    if isinstance(given, datetime.timedelta):
        moment = now + given
    elif given.tzinfo is None:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the deadline {given.isoformat()} has no time zone",
            field="deadline",
            limit="a moment with a time zone, or a time from now",
        )
    else:
        moment = given
    if moment <= now:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the deadline {moment.isoformat(timespec='seconds')} has passed",
            field="deadline",
            limit="from now on",
        )
    return round(moment.timestamp() * 1_000)


def _amount(given: Credits, field: str) -> int:
    # The shortest decimal that means this float is what its writer wrote.
    text = repr(given) if isinstance(given, float) else str(given)
    return parse_credits(text, field, MICROCREDITS_MAX)


def _within(given: int, field: str, most: int) -> int:
    if not 0 <= given <= most:
        raise FallowError(Reason.FIELD_INVALID, f"{field} is {given}", field=field, limit=f"0 to {most}")
    return given


def _region(given: str) -> str:
    if not is_region(given):
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{given[:REGION_BYTES_MAX]!r} is no name of a region",
            field="region",
            limit=REGION_RULE,
        )
    return given


def _member(members: type[MemberT], given: MemberT | str, field: str) -> MemberT:
    try:
        return members(given)
    except ValueError:
        allowed = ", ".join(member.value for member in members)
        raise FallowError(Reason.FIELD_INVALID, f"{given!r} is no {field}", field=field, limit=allowed) from None
