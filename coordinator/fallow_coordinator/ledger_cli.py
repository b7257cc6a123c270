"""The commands of `fallow-coordinator` about credits, prices and modes of pools."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click
from google.protobuf.message import Message

from fallow.credits import TRANSFER_ID_BYTES, PoolMode, credits_text, parse_credits, price_per_hour
from fallow.errors import FallowError, Reason
from fallow.v1 import ledger_service_pb2 as pb
from fallow.v1 import ledger_service_pb2_grpc
from fallow.wire.moments import duration_to_message, moment_from_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S, ledger_stub
from fallow_coordinator.cli import DurationType, json_option, moment, state_option, table, tell

ResponseT = TypeVar("ResponseT", bound=Message)


def register(commands: click.Group, pool: click.Group) -> None:
    """Adds the commands to the command line."""
    commands.add_command(credits_group)
    commands.add_command(prices)
    for command in (pool_list, pool_set_mode, pool_allot):
        pool.add_command(command)


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
        one = _ask(state, lambda stub: stub.GetBalances(request, timeout=CALL_TIME_MAX_S))
        tell(one, as_json, _balances_table([one.balances]))
        return
    found = _ask(state, lambda stub: stub.ListBalances(pb.ListBalancesRequest(), timeout=CALL_TIME_MAX_S))
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
    done = _ask(state, lambda stub: stub.GrantCredits(request, timeout=CALL_TIME_MAX_S))
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
    done = _ask(state, lambda stub: stub.ReleaseCredits(request, timeout=CALL_TIME_MAX_S))
    words = (
        f"{credits_text(done.released_microcredits)} credits of {account_id} are released; "
        f"{credits_text(done.balances.pending_microcredits)} are pending"
    )
    tell(done, as_json, words)


@click.command("list")
@state_option
@json_option
def pool_list(state: Path, as_json: bool) -> None:
    """Pools and how work is paid in them."""
    found = _ask(state, lambda stub: stub.ListPools(pb.ListPoolsRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (one.pool_id, one.name, one.mode, one.policy, str(one.workers_connected), str(one.jobs_unfinished))
        for one in found.pools
    ]
    tell(found, as_json, table(("POOL", "NAME", "MODE", "POLICY", "WORKERS", "JOBS"), rows))


@click.command("set-mode")
@state_option
@click.argument("pool_id")
@click.argument("mode", type=click.Choice([mode.value for mode in PoolMode]))
@json_option
def pool_set_mode(state: Path, pool_id: str, mode: str, as_json: bool) -> None:
    """Says how work is paid in a pool: donation (not at all), quota (allotments) or market (asks and limits)."""
    request = pb.SetPoolModeRequest(pool_id=pool_id, mode=mode)
    done = _ask(state, lambda stub: stub.SetPoolMode(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"pool {done.pool.name} is in mode {done.pool.mode}")


@click.command("allot")
@state_option
@click.argument("pool_id")
@click.argument("account_id")
@click.argument("units", metavar="UNITS")
@click.option("--period", "period_ms", type=DurationType(), default="30d", show_default=True)
@json_option
def pool_allot(state: Path, pool_id: str, account_id: str, units: str, period_ms: int, as_json: bool) -> None:
    """Gives an account UNITS of work in a quota pool in each period; 0 takes its allotment away.

    A unit is what one reference core does in one second: 3600 are an hour of it.
    """
    request = pb.SetAllotmentRequest(
        pool_id=pool_id,
        account_id=account_id,
        microcredits=parse_credits(units, "UNITS"),
        period=duration_to_message(period_ms),
    )
    done = _ask(state, lambda stub: stub.SetAllotment(request, timeout=CALL_TIME_MAX_S))
    mine = [one for one in done.balances.allotments if one.pool_id == pool_id]
    words = f"{account_id} has no allotment in {pool_id} any more"
    if mine:
        words = f"{account_id} has {credits_text(mine[0].left_microcredits)} units in {pool_id} until "
        words += moment(moment_from_message(mine[0].renews_at))
    tell(done, as_json, words)


@click.command("prices")
@state_option
@click.option("--period", "period_ms", type=DurationType(), default="7d", show_default=True)
@json_option
def prices(state: Path, period_ms: int, as_json: bool) -> None:
    """Prices paid and asked by class of devices, in credits for an hour of a reference core, weighted by work."""
    request = pb.GetPricesRequest(period=duration_to_message(period_ms))
    found = _ask(state, lambda stub: stub.GetPrices(request, timeout=CALL_TIME_MAX_S))
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


def _ask(
    state: Path, call: Callable[[ledger_service_pb2_grpc.LedgerServiceAsyncStub], Awaitable[ResponseT]]
) -> ResponseT:
    async def ask() -> ResponseT:
        async with ledger_stub(state.expanduser().absolute()) as stub:
            return await call(stub)

    return asyncio.run(ask())
