"""`fallow job quote`, and the options about price, time and machines that it shares with `map` and `submit`."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final, TypeVar, cast

import click

from fallow.bundle import BundleManifest, VariantForm
from fallow.cli.options import DurationType, split_names
from fallow.cli.output import counted
from fallow.client.terms import MEMORY_BYTES_MAX, PRIORITY_MAX, JobTerms
from fallow.credits import PoolMode, credits_text
from fallow.job import Objective
from fallow.quote import Quote
from fallow.session import DeviceKind

Command = TypeVar("Command", bound=Callable[..., Any])

_MEMORY_UNITS: Final = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_MEMORY: Final = re.compile(r"(\d{1,16})\s?([A-Z]*)", re.ASCII | re.IGNORECASE)


class DeadlineType(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A moment (`2026-11-22T18:00`, local time unless it says otherwise) or a time from now (`90m`)."""

    name = "deadline"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A moment with a time zone, or a time span."""
        if isinstance(value, datetime.datetime | datetime.timedelta):
            return value
        text = str(value)
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            moment = None
        if moment is not None and "-" in text:
            return moment if moment.tzinfo is not None else moment.astimezone()
        if not text[-1:].isalpha():
            self.fail(f"{text!r} is no moment; write 2026-11-22T18:00, or a time from now such as 90m", param, ctx)
        return DurationType().convert(text, param, ctx)


class MemoryType(click.ParamType):  # type: ignore[type-arg]  # as above
    """Bytes, such as `8GiB`, `512MiB` or a plain number."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        found = _MEMORY.fullmatch(str(value).strip())
        unit = _MEMORY_UNITS.get(found[2].upper()) if found is not None else None
        if found is None or unit is None or int(found[1]) * unit > MEMORY_BYTES_MAX:
            self.fail(f"{str(value)[:40]!r} is no size; write 8GiB, 512MiB or bytes, at most 1024TiB", param, ctx)
        return int(found[1]) * unit


def terms_options(command: Command) -> Command:
    """Options about price, time and machines; the command gets them as one dictionary's keys."""
    for option in reversed(
        (
            click.option("--limit", metavar="CREDITS", help="Highest price for 1,000 rows; dearer workers get none."),
            click.option(
                "--budget", metavar="CREDITS", help="Most that the job may cost. [default in market pools: quote x 1.2]"
            ),
            click.option(
                "--deadline",
                type=DeadlineType(),
                metavar="WHEN",
                help="When it shall have ended: 2026-11-22T18:00, or a time from now such as 90m or 24h.",
            ),
            click.option(
                "--objective",
                type=click.Choice([member.value for member in Objective]),
                help="What matters among workers that fit. [default: cost]",
            ),
            click.option(
                "--device",
                type=click.Choice([member.value for member in DeviceKind]),
                help="Kind of device that does the work. [default: any]",
            ),
            click.option("--memory", type=MemoryType(), metavar="SIZE", help="Memory that one device must have: 8GiB."),
            click.option("--region", help="Where the workers stand: de, us, us-east. [default: anywhere]"),
            click.option(
                "--priority",
                type=click.IntRange(0, PRIORITY_MAX),
                help="Among your own jobs; each step is an hour's head start. [default: 0]",
            ),
            click.option(
                "--assurance",
                metavar="LEVEL",
                help="How sure results shall be: basic, standard or strict, or as in standard,error=0.005. "
                "[default: unchecked]",
            ),
            click.option(
                "--accept",
                metavar="FORMS",
                help=f"Forms of the program that may stand in, with commas: {', '.join(VariantForm)}. [default: none]",
            ),
        )
    ):
        command = option(command)
    return command


def terms_given(given: Mapping[str, Any]) -> JobTerms:
    """The terms that were stated on the command line."""
    names = ("limit", "budget", "deadline", "objective", "device", "region", "priority", "assurance")
    terms = {name: given[name] for name in names}
    terms["memory_bytes"] = given["memory"]
    terms["accept"] = split_names(given["accept"]) or None
    return cast(JobTerms, {name: value for name, value in terms.items() if value is not None})


# ------------------------------------------------------------------------------------------------------------ telling


def quote_facts(quote: Quote) -> dict[str, Any]:
    """A quote for JSON."""
    facts = asdict(quote)
    facts["alternatives"] = [quote_facts(other) for other in quote.alternatives]
    return facts


def quote_text(quote: Quote, manifest: BundleManifest) -> str:
    """A quote for people."""
    lines = [
        f"rows      {quote.rows:,}, about {quote.units:,.3g} units of work"
        + (f" (learned: {quote.learned_permille / 1000:.2f} x inspected)" if quote.learned_permille != 1_000 else ""),
        f"price     {_price(quote)}",
        f"end       {_end(quote)}",
        f"energy    {_energy(quote)}",
        f"checks    policy {quote.policy}: "
        + (f"{quote.checking_permille / 10:g} % more work" if quote.checking_permille else "none, 0 % more work"),
        f"workers   {quote.workers_fitting} of {quote.workers_considered} fit, {quote.workers_free} free now"
        + (f", {quote.own_workers} your own" if quote.own_workers else ""),
    ]
    lines += [f"  {short.workers:>5} x   {short.words}: {short.advice}" for short in quote.fallen_out]
    if quote.alternatives or quote.form != "fp32":
        lines.append(f"form      {quote.form}{_agreement(quote.form, manifest)}")
    for other in quote.alternatives:
        time_s = (other.wait_ms + other.run_ms) / 1_000
        lines.append(
            f"  or      {other.form}: {credits_text(other.price_microcredits)} credits, {time_s:,.1f} s"
            f"{_agreement(other.form, manifest)}"
        )
    lines += [f"warning   {warning}" for warning in quote.warnings]
    return "\n".join(lines)


def _price(quote: Quote) -> str:
    if quote.pool_mode == PoolMode.DONATION:
        return "nothing: workers of this pool donate"
    if not quote.workers_fitting:
        return "unknown: no worker fits"
    what = "units of allotment" if quote.pool_mode == PoolMode.QUOTA else "credits"
    text = (
        f"{credits_text(quote.price_microcredits_per_1000_rows)} {what} for 1,000 rows, "
        f"{credits_text(quote.price_microcredits)} in all"
    )
    return text + (f"; budget {credits_text(quote.budget_microcredits)}" if quote.pool_mode == PoolMode.MARKET else "")


def _end(quote: Quote) -> str:
    if not quote.end_at_ms:
        return "unknown: no worker fits"
    seconds = (quote.wait_ms + quote.run_ms) / 1_000
    moment = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(quote.end_at_ms / 1_000))
    waiting = f", {quote.wait_ms / 1_000:,.1f} s of them waiting" if quote.wait_ms else ""
    return f"in about {seconds:,.1f} s{waiting} ({moment})"


def _energy(quote: Quote) -> str:
    if not quote.energy_source:
        return "unknown"
    source = {"accepted-work": "from accepted work", "rule-of-thumb": "rule of thumb"}[quote.energy_source]
    carbon = f", {quote.micrograms / 1e6:,.3g} g CO2" if quote.carbon_known else ", CO2 unknown"
    return f"{quote.millijoules / 3.6e6:,.3g} Wh ({source}){carbon}"


def _agreement(form: str, manifest: BundleManifest) -> str:
    for variant in manifest.variants:
        if variant.form.value == form:
            found = variant.agreement
            labels = (
                f", best label the same for {found.labels_agreeing} of {counted(found.labelled_rows, 'row')}"
                if found.labelled_rows
                else ""
            )
            return f" (off by at most {found.error_max:.3g} of {found.value_max:.3g}{labels})"
    return ""
