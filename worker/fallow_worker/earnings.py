"""What this worker earned, in words, JSON and CSV; and what it might ask."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass
from typing import Final

import grpc

from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.credits import credits_text, price_per_hour
from fallow.v1 import ledger_service_pb2 as pb
from fallow.v1 import ledger_service_pb2_grpc
from fallow.wire.errors import error_from_rpc
from fallow.wire.moments import duration_to_message, moment_from_message

CALL_TIME_MAX_S: Final = 20.0
MILLIJOULES_PER_KWH: Final = 3_600_000_000
MARGIN_PERCENT: Final = 20
"""A suggested ask is at least so much above what the electricity costs."""
_COLUMNS = ("day", "pool", "tasks", "rows", "rows_failed", "units", "credits", "contributed", "kwh")


@dataclass(frozen=True, slots=True)
class Totals:
    """All days together."""

    tasks: int
    rows: int
    rows_failed: int
    unit_micros: int
    microcredits: int
    contribution_microcredits: int
    energy_millijoules: int


async def earnings_of(credentials: Credentials, days: int) -> pb.GetEarningsResponse:
    """What the coordinator knows of this worker's last days. Raises FallowError."""
    request = pb.GetEarningsRequest(period=duration_to_message(days * 86_400_000))
    async with control_channel(credentials) as channel:
        try:
            return await ledger_service_pb2_grpc.LedgerServiceStub(channel).GetEarnings(
                request, timeout=CALL_TIME_MAX_S
            )
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None


def totals(found: pb.GetEarningsResponse) -> Totals:
    """The sums of all days."""
    return Totals(
        tasks=sum(day.tasks for day in found.days),
        rows=sum(day.rows for day in found.days),
        rows_failed=sum(day.rows_failed for day in found.days),
        unit_micros=sum(day.unit_micros for day in found.days),
        microcredits=sum(day.microcredits for day in found.days),
        contribution_microcredits=sum(day.contribution_microcredits for day in found.days),
        energy_millijoules=sum(day.energy_millijoules for day in found.days),
    )


def energy_cost(total: Totals, tariff_microcredits_per_kwh: int) -> int:
    """Micro-credits that the electricity cost, rounded up."""
    return -(-total.energy_millijoules * tariff_microcredits_per_kwh // MILLIJOULES_PER_KWH)


def suggested_ask(total: Totals, tariff_microcredits_per_kwh: int, median_microcredits_per_unit: int) -> int | None:
    """Micro-credits for a unit: what others of its class are paid, but never below electricity and a fifth.

    None when nobody was paid and its own electricity is not known.
    """
    floor = 0
    if total.unit_micros and total.energy_millijoules and tariff_microcredits_per_kwh:
        cost_per_unit = -(-energy_cost(total, tariff_microcredits_per_kwh) * 1_000_000 // total.unit_micros)
        floor = -(-cost_per_unit * (100 + MARGIN_PERCENT) // 100)
    return max(median_microcredits_per_unit, floor) or None


def facts(found: pb.GetEarningsResponse, tariff_microcredits_per_kwh: int) -> dict[str, object]:
    """Earnings for JSON."""
    total = totals(found)
    return {
        "worker_id": found.worker_id,
        "account_id": found.balances.account_id,
        "available_microcredits": found.balances.available_microcredits,
        "pending_microcredits": found.balances.pending_microcredits,
        "contribution_microcredits": found.balances.contribution_microcredits,
        "ask_microcredits_per_unit": found.ask_microcredits_per_unit,
        "suggested_ask_microcredits_per_unit": suggested_ask(
            total, tariff_microcredits_per_kwh, found.prices.median_microcredits_per_unit
        ),
        "device_class": found.device_class,
        "tariff_microcredits_per_kwh": tariff_microcredits_per_kwh,
        "energy_cost_microcredits": energy_cost(total, tariff_microcredits_per_kwh),
        "tasks": total.tasks,
        "rows": total.rows,
        "rows_failed": total.rows_failed,
        "unit_micros": total.unit_micros,
        "microcredits": total.microcredits,
        "worker_contribution_microcredits": total.contribution_microcredits,
        "energy_millijoules": total.energy_millijoules,
        "days": [
            {
                "day": _day(day),
                "pool_id": day.pool_id,
                "tasks": day.tasks,
                "rows": day.rows,
                "rows_failed": day.rows_failed,
                "unit_micros": day.unit_micros,
                "microcredits": day.microcredits,
                "contribution_microcredits": day.contribution_microcredits,
                "energy_millijoules": day.energy_millijoules,
            }
            for day in found.days
        ],
        "sequence": found.sequence,
    }


def text(found: pb.GetEarningsResponse, days: int, tariff_microcredits_per_kwh: int) -> str:
    """Earnings for people."""
    total = totals(found)
    failed = f", {total.rows_failed:,} failed" if total.rows_failed else ""
    lines = [
        f"worker       {found.worker_id}  ({found.device_class})",
        f"pending      {credits_text(found.balances.pending_microcredits)} credits of the account, until released",
        f"available    {credits_text(found.balances.available_microcredits)} credits of the account",
        f"contributed  {credits_text(found.balances.contribution_microcredits)} units of the account, unpaid",
        f"last {days} days: {total.rows:,} rows{failed} in {total.tasks:,} tasks, {credits_text(total.unit_micros)} "
        f"units, {credits_text(total.microcredits)} credits earned",
    ]
    if total.energy_millijoules:
        kwh = f"{total.energy_millijoules / MILLIJOULES_PER_KWH:.3g} kWh"
        cost = energy_cost(total, tariff_microcredits_per_kwh)
        net = total.microcredits - cost
        told = f", which cost {credits_text(cost)} credits; {credits_text(net)} are left"
        lines.append(f"electricity  {kwh}{told if tariff_microcredits_per_kwh else '; --tariff tells what it cost'}")
    else:
        lines.append("electricity  not known")
    ask = suggested_ask(total, tariff_microcredits_per_kwh, found.prices.median_microcredits_per_unit)
    lines.append(f"ask          {_hourly(found.ask_microcredits_per_unit)}")
    lines.append(f"suggested    {_hourly(ask) if ask else 'nobody was paid for such devices yet'}")
    return "\n".join(lines)


def csv_text(found: pb.GetEarningsResponse) -> str:
    """One line for each day and pool."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for day in found.days:
        writer.writerow(
            (
                _day(day),
                day.pool_id,
                day.tasks,
                day.rows,
                day.rows_failed,
                _plain(day.unit_micros),
                _plain(day.microcredits),
                _plain(day.contribution_microcredits),
                f"{day.energy_millijoules / MILLIJOULES_PER_KWH:.6f}",
            )
        )
    return sheet.getvalue()


def _hourly(microcredits_per_unit: int) -> str:
    return f"{credits_text(price_per_hour(microcredits_per_unit))} credits for an hour of a reference core"


def _plain(microcredits: int) -> str:
    return credits_text(microcredits).replace(",", "")


def _day(day: pb.EarningsDay) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment_from_message(day.day) / 1_000))
