"""Commands about credits and prices."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from fallow.credits import TRANSFER_ID_BYTES, credits_text, parse_credits, price_per_hour
from fallow.errors import FallowError, Reason
from fallow.v1 import ledger_service_pb2 as pb
from fallow.wire.moments import duration_to_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S
from fallow_coordinator.cli.asking import ask_ledger, table, tell
from fallow_coordinator.cli.options import DurationType, json_option, state_option


@click.group("credits")
def credits_group() -> None:
    """Credits of accounts."""


@credits_group.command("show")
@state_option
@click.argument("account_id", required=False, default="")
@json_option
def credits_show(state: Path, account_id: str, as_json: bool) -> None:
    """What an account has, or all accounts that have anything."""
    if account_id:
        request = pb.GetBalancesRequest(account_id=account_id)
        one = ask_ledger(state, lambda stub: stub.GetBalances(request, timeout=CALL_TIME_MAX_S))
        tell(one, as_json, _balances_table([one.balances]))
        return
    found = ask_ledger(state, lambda stub: stub.ListBalances(pb.ListBalancesRequest(), timeout=CALL_TIME_MAX_S))
    words = f"{_balances_table(list(found.balances))}\n{credits_text(found.made_microcredits)} credits were ever made"
    tell(found, as_json, words)


@credits_group.command("grant")
@state_option
@click.argument("account_id")
@click.argument("amount", metavar="CREDITS")
@click.option("--note", default="", help="Why, for people; shown in statements.")
@click.option("--transfer-id", default="", help="32 hexadecimal digits: the same again is harmless. Default: fresh.")
@json_option
def credits_grant(state: Path, account_id: str, amount: str, note: str, transfer_id: str, as_json: bool) -> None:
    """Makes CREDITS and gives them to an account."""
    request = pb.GrantCreditsRequest(
        account_id=account_id,
        microcredits=parse_credits(amount, "CREDITS"),
        note=note,
        transfer_id=_transfer_id(transfer_id),
    )
    done = ask_ledger(state, lambda stub: stub.GrantCredits(request, timeout=CALL_TIME_MAX_S))
    again = " (granted before)" if done.repeated else ""
    tell(done, as_json, f"{account_id} has {credits_text(done.balances.available_microcredits)} credits{again}")


@credits_group.command("release")
@state_option
@click.argument("account_id")
@click.argument("amount", metavar="[CREDITS]", required=False, default="")
@click.option("--note", default="", help="Why, for people; shown in statements.")
@click.option("--transfer-id", default="", help="32 hexadecimal digits: the same again is harmless. Default: fresh.")
@json_option
def credits_release(state: Path, account_id: str, amount: str, note: str, transfer_id: str, as_json: bool) -> None:
    """Lets an account spend what its workers earned: CREDITS, or all that is pending."""
    microcredits = parse_credits(amount, "CREDITS") if amount else 0
    if amount and not microcredits:
        raise FallowError(Reason.FIELD_INVALID, "nothing is to be released", field="CREDITS", limit="more than 0")
    request = pb.ReleaseCreditsRequest(
        account_id=account_id, microcredits=microcredits, note=note, transfer_id=_transfer_id(transfer_id)
    )
    done = ask_ledger(state, lambda stub: stub.ReleaseCredits(request, timeout=CALL_TIME_MAX_S))
    words = (
        f"{credits_text(done.released_microcredits)} credits of {account_id} are released; "
        f"{credits_text(done.balances.pending_microcredits)} are pending"
    )
    tell(done, as_json, words)


@click.command("prices")
@state_option
@click.option("--period", "period_ms", type=DurationType(), default="7d", show_default=True)
@json_option
def prices(state: Path, period_ms: int, as_json: bool) -> None:
    """Prices paid and asked by class of devices, in credits for an hour of a reference core, weighted by work."""
    request = pb.GetPricesRequest(period=duration_to_message(period_ms))
    found = ask_ledger(state, lambda stub: stub.GetPrices(request, timeout=CALL_TIME_MAX_S))
    rows = [
        (
            one.device_class,
            _hourly(one.low_microcredits_per_unit),
            _hourly(one.median_microcredits_per_unit),
            _hourly(one.high_microcredits_per_unit),
            str(one.tasks),
            credits_text(one.unit_micros),
            credits_text(one.microcredits),
            f"{_hourly(one.median_ask_microcredits_per_unit)} ({one.workers_asking})",
        )
        for one in found.prices
    ]
    heads = ("DEVICES", "LOW", "MEDIAN", "HIGH", "TASKS", "UNITS", "PAID", "MEDIAN ASK (WORKERS)")
    tell(found, as_json, table(heads, rows) if rows else "nothing was paid, and nobody asks anything")


def _hourly(microcredits_per_unit: int) -> str:
    return credits_text(price_per_hour(microcredits_per_unit)) if microcredits_per_unit else "-"


def _balances_table(balances: list[pb.Balances]) -> str:
    rows = [
        (
            one.account_id,
            one.name,
            credits_text(one.available_microcredits),
            credits_text(one.held_microcredits),
            credits_text(one.pending_microcredits),
            credits_text(one.contribution_microcredits),
        )
        for one in balances
    ]
    return table(("ACCOUNT", "NAME", "AVAILABLE", "HELD", "PENDING", "CONTRIBUTED"), rows)


def _transfer_id(given: str) -> bytes:
    if not given:
        return secrets.token_bytes(TRANSFER_ID_BYTES)
    try:
        named = bytes.fromhex(given)
    except ValueError:
        named = b""
    if len(named) != TRANSFER_ID_BYTES:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{given[:64]!r} is no transfer id",
            field="--transfer-id",
            limit=f"{2 * TRANSFER_ID_BYTES} hexadecimal digits",
        )
    return named
