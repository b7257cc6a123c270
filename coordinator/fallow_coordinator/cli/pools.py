"""Commands about pools: who may submit there, and how work is paid."""

from __future__ import annotations

from pathlib import Path

import click

from fallow.credits import PoolMode, credits_text, parse_credits
from fallow.v1 import admin_service_pb2 as pb
from fallow.v1 import ledger_service_pb2 as ledger_pb
from fallow.wire.moments import duration_to_message, moment_from_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S
from fallow_coordinator.cli.asking import ask, ask_ledger, moment, table, tell
from fallow_coordinator.cli.options import DurationType, json_option, state_option


@click.group()
def pool() -> None:
    """Pools."""


@pool.command("create")
@state_option
@click.argument("name")
@click.option("--account", default="", help="Default: the operator's own.")
@click.option("--open", "is_open", is_flag=True, help="Let every account submit there, not only admitted ones.")
@json_option
def pool_create(state: Path, name: str, account: str, is_open: bool, as_json: bool) -> None:
    """Makes a pool and prints its identifier. Accounts that join by a token of the pool are admitted to it."""
    request = pb.CreatePoolRequest(name=name, account_id=account, open=is_open)
    made = ask(state, lambda stub: stub.CreatePool(request, timeout=CALL_TIME_MAX_S))
    tell(made, as_json, made.pool_id)


@pool.command("admit")
@state_option
@click.argument("pool_id")
@click.argument("account_id")
@json_option
def pool_admit(state: Path, pool_id: str, account_id: str, as_json: bool) -> None:
    """Lets an account submit to a pool."""
    request = pb.AdmitAccountRequest(pool_id=pool_id, account_id=account_id)
    done = ask(state, lambda stub: stub.AdmitAccount(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{account_id} may submit to {pool_id}")


@pool.command("expel")
@state_option
@click.argument("pool_id")
@click.argument("account_id")
@json_option
def pool_expel(state: Path, pool_id: str, account_id: str, as_json: bool) -> None:
    """Ends that; the account's jobs there go on."""
    request = pb.ExpelAccountRequest(pool_id=pool_id, account_id=account_id)
    done = ask(state, lambda stub: stub.ExpelAccount(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{account_id} may submit to {pool_id} no more, unless the pool is open")


@pool.command("list")
@state_option
@json_option
def pool_list(state: Path, as_json: bool) -> None:
    """Pools and how work is paid in them."""
    found = ask_ledger(state, lambda stub: stub.ListPools(ledger_pb.ListPoolsRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (one.pool_id, one.name, one.mode, one.policy, str(one.workers_connected), str(one.jobs_unfinished))
        for one in found.pools
    ]
    tell(found, as_json, table(("POOL", "NAME", "MODE", "POLICY", "WORKERS", "JOBS"), rows))


@pool.command("set-mode")
@state_option
@click.argument("pool_id")
@click.argument("mode", type=click.Choice([mode.value for mode in PoolMode]))
@json_option
def pool_set_mode(state: Path, pool_id: str, mode: str, as_json: bool) -> None:
    """Says how work is paid in a pool: donation (not at all), quota (allotments) or market (asks and limits)."""
    request = ledger_pb.SetPoolModeRequest(pool_id=pool_id, mode=mode)
    done = ask_ledger(state, lambda stub: stub.SetPoolMode(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"pool {done.pool.name} is in mode {done.pool.mode}")


@pool.command("allot")
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
    request = ledger_pb.SetAllotmentRequest(
        pool_id=pool_id,
        account_id=account_id,
        microcredits=parse_credits(units, "UNITS"),
        period=duration_to_message(period_ms),
    )
    done = ask_ledger(state, lambda stub: stub.SetAllotment(request, timeout=CALL_TIME_MAX_S))
    mine = [one for one in done.balances.allotments if one.pool_id == pool_id]
    words = f"{account_id} has no allotment in {pool_id} any more"
    if mine:
        words = f"{account_id} has {credits_text(mine[0].left_microcredits)} units in {pool_id} until "
        words += moment(moment_from_message(mine[0].renews_at))
    tell(done, as_json, words)
