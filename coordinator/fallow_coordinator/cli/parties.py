"""Commands about who takes part: tokens, workers, parties, accounts."""

from __future__ import annotations

from pathlib import Path

import click

from fallow.v1 import admin_service_pb2 as pb
from fallow.v1 import identity_pb2, session_pb2
from fallow.wire.moments import duration_to_message, moment_from_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S
from fallow_coordinator.cli.asking import ask, moment, table, tell
from fallow_coordinator.cli.options import DurationType, json_option, state_option


@click.group()
def token() -> None:
    """Join tokens."""


@token.command("new")
@state_option
@click.option("--role", type=click.Choice(["worker", "client", "operator"]), required=True)
@click.option(
    "--tier", type=click.Choice(["volunteer", "managed", "operator"]), help="Workers only. Default: volunteer."
)
@click.option(
    "--account", default="", help="Account of whoever joins. Default: a new one for each; the operator's for operators."
)
@click.option("--pool", default="", help="Default: the default pool.")
@click.option("--uses", default=1, show_default=True, help="How often it may be used.")
@click.option("--valid-for", type=DurationType(), default="1h", show_default=True)
@click.option("--tag", "tags", multiple=True, help="A word to find it by; may be repeated.")
@json_option
def token_new(
    state: Path,
    role: str,
    tier: str | None,
    account: str,
    pool: str,
    uses: int,
    valid_for: int,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Makes a token and prints its join line, which is shown this once."""
    request = pb.CreateTokenRequest(
        account_id=account,
        role=identity_pb2.Role.Value(f"ROLE_{role.upper()}"),
        tier=identity_pb2.Tier.Value(f"TIER_{tier.upper()}") if tier else identity_pb2.TIER_UNSPECIFIED,
        pool_id=pool,
        uses_max=uses,
        valid_for=duration_to_message(valid_for),
        tags=tags,
    )
    made = ask(state, lambda stub: stub.CreateToken(request, timeout=CALL_TIME_MAX_S))
    tell(made, as_json, made.join_line)


@token.command("list")
@state_option
@json_option
def token_list(state: Path, as_json: bool) -> None:
    """Tokens that still let somebody in."""
    found = ask(state, lambda stub: stub.ListTokens(pb.ListTokensRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (
            one.token_id,
            identity_pb2.Role.Name(one.role).removeprefix("ROLE_").lower(),
            identity_pb2.Tier.Name(one.tier).removeprefix("TIER_").lower() if one.tier else "-",
            one.pool_id,
            f"{one.uses}/{one.uses_max}",
            moment(moment_from_message(one.expires_at)),
            ",".join(one.tags),
        )
        for one in found.tokens
    ]
    tell(found, as_json, table(("TOKEN", "ROLE", "TIER", "POOL", "USES", "EXPIRES", "TAGS"), rows))


@token.command("revoke")
@state_option
@click.argument("token_id")
@json_option
def token_revoke(state: Path, token_id: str, as_json: bool) -> None:
    """Ends a token."""
    request = pb.RevokeTokenRequest(token_id=token_id)
    done = ask(state, lambda stub: stub.RevokeToken(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{token_id} lets nobody in any more")


@click.group()
def worker() -> None:
    """Workers."""


@worker.command("list")
@state_option
@json_option
def worker_list(state: Path, as_json: bool) -> None:
    """Workers and what they are doing."""
    found = ask(state, lambda stub: stub.ListWorkers(pb.ListWorkersRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (
            one.worker_id,
            one.name,
            identity_pb2.Tier.Name(one.tier).removeprefix("TIER_").lower(),
            one.pool_id,
            _state_of(one),
            str(one.leases),
            str(one.rows_settled),
            str(one.rows_verified),
            "; ".join(map(_standing, one.device_standings)) or "no",
        )
        for one in found.workers
    ]
    tell(
        found,
        as_json,
        table(("WORKER", "NAME", "TIER", "POOL", "STATE", "LEASES", "ROWS", "VERIFIED", "MEASURED"), rows),
    )


def _state_of(one: pb.Worker) -> str:
    if one.quarantined:
        return "quarantined"
    there = "connected" if one.connected else "away"
    return f"{there}, distrusted" if one.distrusted_reason else there


def _standing(device: session_pb2.DeviceStanding) -> str:
    """What is known of a device, in a few words."""
    if not device.units_milli_per_s:
        return f"{device.device_id}: no ({device.reason})"
    memory = device.memory_bytes // 1024**2
    return f"{device.device_id}: {device.units_milli_per_s / 1_000:.2f} units/s, {memory} MiB"


@worker.command("quarantine")
@state_option
@click.argument("worker_id")
@click.option("--reason", default="")
@json_option
def worker_quarantine(state: Path, worker_id: str, reason: str, as_json: bool) -> None:
    """Keeps a worker from getting work."""
    request = pb.QuarantineWorkerRequest(worker_id=worker_id, reason=reason)
    done = ask(state, lambda stub: stub.QuarantineWorker(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{worker_id} gets no work until it is released")


@worker.command("release")
@state_option
@click.argument("worker_id")
@json_option
def worker_release(state: Path, worker_id: str, as_json: bool) -> None:
    """Ends a quarantine."""
    request = pb.ReleaseWorkerRequest(worker_id=worker_id)
    done = ask(state, lambda stub: stub.ReleaseWorker(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{worker_id} may work again")


@click.group()
def party() -> None:
    """Anyone with a certificate."""


@party.command("revoke")
@state_option
@click.argument("party_id")
@click.option("--reason", default="")
@json_option
def party_revoke(state: Path, party_id: str, reason: str, as_json: bool) -> None:
    """Ends a party's certificate for good, on live streams too."""
    request = pb.RevokePartyRequest(party_id=party_id, reason=reason)
    done = ask(state, lambda stub: stub.RevokeParty(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"{party_id} is revoked")


@click.group()
def account() -> None:
    """Accounts."""


@account.command("create")
@state_option
@click.argument("name")
@json_option
def account_create(state: Path, name: str, as_json: bool) -> None:
    """Makes an account and prints its identifier."""
    request = pb.CreateAccountRequest(name=name)
    made = ask(state, lambda stub: stub.CreateAccount(request, timeout=CALL_TIME_MAX_S))
    tell(made, as_json, made.account_id)


@account.command("quota")
@state_option
@click.argument("account_id")
@click.argument("bytes_max", type=click.IntRange(min=0), metavar="BYTES")
@json_option
def account_quota(state: Path, account_id: str, bytes_max: int, as_json: bool) -> None:
    """Sets how many bytes of uploads an account may have recorded; 0 stands for the default of 100 GiB."""
    request = pb.SetBlobQuotaRequest(account_id=account_id, bytes_max=bytes_max)
    now = ask(state, lambda stub: stub.SetBlobQuota(request, timeout=CALL_TIME_MAX_S))
    tell(now, as_json, f"{account_id} has {now.bytes_recorded} of {now.bytes_max} bytes of uploads in use")
