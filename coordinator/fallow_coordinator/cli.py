"""The commands of `fallow-coordinator`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fallow.errors import FallowError
from fallow.identity import write_private
from fallow.places import coordinator_folder
from fallow.shown_text import log_to_stderr, shown
from fallow.v1 import admin_service_pb2 as pb
from fallow.v1 import admin_service_pb2_grpc, identity_pb2, session_pb2
from fallow.wire.moments import duration_to_message, moment_from_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S, admin_stub
from fallow_coordinator.config import EXIT_LEDGER_UNSOUND
from fallow_coordinator.latency import quantile_ms
from fallow_coordinator.ports import LedgerUnsound, StorageFailed

EXIT_FAILED: Final = 1
_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

ResponseT = TypeVar("ResponseT", bound=Message)
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A duration such as `90s`, `15m`, `24h` or `7d`; gives milliseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Milliseconds."""
        if isinstance(value, int):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _UNITS_MS or not number.isdecimal():
            self.fail(f"{value!r} is no duration; write 90s, 15m, 24h or 7d", param, ctx)
        return int(number) * _UNITS_MS[unit]


def main() -> None:
    """Runs the command line; errors that a person can act on come as one line on standard error."""
    from fallow_coordinator import ledger_cli

    ledger_cli.register(commands, pool)
    try:
        commands(prog_name="fallow-coordinator")
    except (FallowError, StorageFailed) as error:
        click.echo(shown(f"fallow-coordinator: {error}"), err=True)
        raise SystemExit(EXIT_LEDGER_UNSOUND if isinstance(error, LedgerUnsound) else EXIT_FAILED) from None
    except OSError as error:
        click.echo(f"fallow-coordinator: {error.strerror or error}: {error.filename or ''}", err=True)
        raise SystemExit(EXIT_FAILED) from None


def state_option(command: CommandT) -> CommandT:
    """`--state DIR`."""
    return click.option(
        "--state",
        type=click.Path(path_type=Path, file_okay=False),
        default=coordinator_folder,
        show_default="$FALLOW_STATE or ~/.local/state/fallow/coordinator",
        help="The coordinator's state folder.",
    )(command)


def json_option(command: CommandT) -> CommandT:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


COLLECTOR_THRESHOLDS: Final = (10_000, 20, 100)
"""Python's garbage collector looks for cycles this rarely: a busy writer makes much that is free at once and little
that is not, and with the usual thresholds the search took a seventh of its time."""


@click.group()
@click.version_option(package_name="fallow")
def commands() -> None:
    """Runs and controls a Fallow coordinator."""


# ------------------------------------------------------------------------------------------- start


@commands.command()
@state_option
@click.option("--listen", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--advertise", default="", help="Host name or address that parties are told; default: as --listen.")
@click.option(
    "--port", type=click.IntRange(0, 65533), help="First of three ports; 0: free. Default: as before, or 7440."
)
@click.option(
    "--single-port",
    type=click.IntRange(1, 65535),
    help="Let parties reach everything at this port, such as 443; the other three then serve this machine alone.",
)
@click.option(
    "--operator-worker/--no-operator-worker",
    default=True,
    help="Run the operator's own worker, which inspects bundles.",
)
@click.option(
    "--heartbeat",
    "heartbeat_ms",
    type=DurationType(),
    default="10s",
    show_default=True,
    help="How often workers report.",
)
@click.option(
    "--collect-every",
    "collect_ms",
    type=DurationType(),
    default="10m",
    show_default=True,
    help="How often expired jobs and superfluous blobs are looked for.",
)
@click.option(
    "--blob-grace",
    "blob_grace_ms",
    type=DurationType(),
    default="2h",
    show_default=True,
    help="Blobs stored or receipted within this time are never deleted; more than twice any difference of clocks.",
)
@click.option(
    "--upload-grace",
    "upload_grace_ms",
    type=DurationType(),
    default="24h",
    show_default=True,
    help="How long an upload stays that no job or bundle uses.",
)
@click.option("--blobs", "blobs_place", default="", help="Keep blobs in s3://bucket/prefix. Default: as before.")
@click.option("--s3-endpoint", default="", help="Of a store that is not Amazon's; keys come from AWS_* variables.")
@click.option("--s3-region", default="us-east-1", show_default=True)
@click.option(
    "--measure/--no-measure",
    default=True,
    help="Challenge devices to show their speed and memory; only measured ones get paid work.",
)
@click.option(
    "--measure-after",
    "measure_after_ms",
    type=DurationType(),
    default="60s",
    show_default=True,
    help="How long a worker of a donation pool must have been idle; in other pools a second is enough.",
)
@click.option(
    "--measure-for",
    "measure_for_ms",
    type=click.IntRange(10, 60_000),
    default=1_500,
    show_default=True,
    metavar="MS",
    help="How long a challenge takes a device that is as fast as it says, in milliseconds.",
)
@click.option(
    "--measure-memory",
    "measure_memory_mib",
    type=click.IntRange(1, 16_384),
    default=512,
    show_default=True,
    metavar="MIB",
    help="Most memory that a challenge fills, in MiB; never more than a quarter of what is free.",
)
@click.option(
    "--carbon",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Grams of CO2 per kWh by region and hour (CSV). Default: carbon.csv in the state folder, else synthetic.",
)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the facts here (0600, JSON) once it runs.",
)
@click.option("--log-level", default="INFO", show_default=True, type=click.Choice(["DEBUG", "INFO", "WARNING"]))
@json_option
def start(
    state: Path,
    listen: str,
    advertise: str,
    port: int | None,
    single_port: int | None,
    operator_worker: bool,
    heartbeat_ms: int,
    collect_ms: int,
    blob_grace_ms: int,
    upload_grace_ms: int,
    blobs_place: str,
    s3_endpoint: str,
    s3_region: str,
    measure: bool,
    measure_after_ms: int,
    measure_for_ms: int,
    measure_memory_mib: int,
    carbon: Path | None,
    ready_file: Path | None,
    log_level: str,
    as_json: bool,
) -> None:
    """Starts a coordinator; the first start makes its keys and journal. Ctrl-C stops it and everything it started."""
    from fallow_coordinator.blobs.bucket import BucketPlace
    from fallow_coordinator.config import MIB, CollectionSettings
    from fallow_coordinator.coordinator import StartOptions
    from fallow_coordinator.core.commands import MeasuringRules

    log_to_stderr(log_level, "%(asctime)s %(levelname)s %(name)s %(message)s")
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    options = StartOptions(
        state=state.expanduser().absolute(),
        listen=listen,
        advertise=advertise,
        first_port=port,
        single_port=single_port,
        operator_worker=operator_worker,
        heartbeat_interval_ms=heartbeat_ms,
        collection=CollectionSettings(collect_ms, blob_grace_ms, upload_grace_ms),
        bucket=BucketPlace.parse(blobs_place, s3_endpoint, s3_region) if blobs_place else None,
        measuring=MeasuringRules(
            idle_ms=measure_after_ms, target_ms=measure_for_ms, fill_bytes_max=measure_memory_mib * MIB
        )
        if measure
        else None,
        carbon=carbon.expanduser().absolute() if carbon is not None else None,
    )
    asyncio.run(_run(options, ready_file, as_json))


async def _run(options: Any, ready_file: Path | None, as_json: bool) -> None:
    from fallow_coordinator.coordinator import running

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with running(options) as started:
        facts = {
            "state": str(options.state),
            "enrollment_endpoint": started.endpoints.enrollment,
            "control_endpoint": started.endpoints.control,
            "blob_endpoint": started.endpoints.blobs,
            "authority_fingerprint": started.authority_fingerprint,
            "worker_join_line": started.worker_join_line,
            "client_join_line": started.client_join_line,
            "client_credentials": str(options.state / "client"),
        }
        if ready_file is not None:
            await asyncio.to_thread(write_private, ready_file, json.dumps(facts).encode())
        if as_json:
            click.echo(json.dumps(facts))
        else:
            click.echo(
                f"The coordinator runs at {started.endpoints.control}; its state lies in {options.state}.\n\n"
                f"Workers join within a day with:\n  fallow-worker join {started.worker_join_line}\n\n"
                f"Clients on other machines log in within a day with:\n  fallow login {started.client_join_line}\n\n"
                "You yourself need no login here. Ctrl-C stops the coordinator."
            )
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
        await stopped.wait()


# ------------------------------------------------------------------------------------------- asking


@commands.group()
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
    made = _ask(state, lambda stub: stub.CreateToken(request, timeout=CALL_TIME_MAX_S))
    _tell(made, as_json, made.join_line)


@token.command("list")
@state_option
@json_option
def token_list(state: Path, as_json: bool) -> None:
    """Tokens that still let somebody in."""
    found = _ask(state, lambda stub: stub.ListTokens(pb.ListTokensRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (
            one.token_id,
            identity_pb2.Role.Name(one.role).removeprefix("ROLE_").lower(),
            identity_pb2.Tier.Name(one.tier).removeprefix("TIER_").lower() if one.tier else "-",
            one.pool_id,
            f"{one.uses}/{one.uses_max}",
            _moment(moment_from_message(one.expires_at)),
            ",".join(one.tags),
        )
        for one in found.tokens
    ]
    _tell(found, as_json, _table(("TOKEN", "ROLE", "TIER", "POOL", "USES", "EXPIRES", "TAGS"), rows))


@token.command("revoke")
@state_option
@click.argument("token_id")
@json_option
def token_revoke(state: Path, token_id: str, as_json: bool) -> None:
    """Ends a token."""
    request = pb.RevokeTokenRequest(token_id=token_id)
    done = _ask(state, lambda stub: stub.RevokeToken(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{token_id} lets nobody in any more")


@commands.group()
def worker() -> None:
    """Workers."""


@worker.command("list")
@state_option
@json_option
def worker_list(state: Path, as_json: bool) -> None:
    """Workers and what they are doing."""
    found = _ask(state, lambda stub: stub.ListWorkers(pb.ListWorkersRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        (
            one.worker_id,
            one.name,
            identity_pb2.Tier.Name(one.tier).removeprefix("TIER_").lower(),
            one.pool_id,
            "quarantined" if one.quarantined else "connected" if one.connected else "away",
            str(one.leases),
            str(one.rows_settled),
            "; ".join(map(_standing, one.device_standings)) or "no",
        )
        for one in found.workers
    ]
    _tell(found, as_json, _table(("WORKER", "NAME", "TIER", "POOL", "STATE", "LEASES", "ROWS", "MEASURED"), rows))


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
    done = _ask(state, lambda stub: stub.QuarantineWorker(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{worker_id} gets no work until it is released")


@worker.command("release")
@state_option
@click.argument("worker_id")
@json_option
def worker_release(state: Path, worker_id: str, as_json: bool) -> None:
    """Ends a quarantine."""
    request = pb.ReleaseWorkerRequest(worker_id=worker_id)
    done = _ask(state, lambda stub: stub.ReleaseWorker(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{worker_id} may work again")


@commands.group()
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
    done = _ask(state, lambda stub: stub.RevokeParty(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{party_id} is revoked")


@commands.group()
def account() -> None:
    """Accounts."""


@account.command("create")
@state_option
@click.argument("name")
@json_option
def account_create(state: Path, name: str, as_json: bool) -> None:
    """Makes an account and prints its identifier."""
    request = pb.CreateAccountRequest(name=name)
    made = _ask(state, lambda stub: stub.CreateAccount(request, timeout=CALL_TIME_MAX_S))
    _tell(made, as_json, made.account_id)


@account.command("quota")
@state_option
@click.argument("account_id")
@click.argument("bytes_max", type=click.IntRange(min=0), metavar="BYTES")
@json_option
def account_quota(state: Path, account_id: str, bytes_max: int, as_json: bool) -> None:
    """Sets how many bytes of uploads an account may have recorded; 0 stands for the default of 100 GiB."""
    request = pb.SetBlobQuotaRequest(account_id=account_id, bytes_max=bytes_max)
    now = _ask(state, lambda stub: stub.SetBlobQuota(request, timeout=CALL_TIME_MAX_S))
    _tell(now, as_json, f"{account_id} has {now.bytes_recorded} of {now.bytes_max} bytes of uploads in use")


@commands.group()
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
    made = _ask(state, lambda stub: stub.CreatePool(request, timeout=CALL_TIME_MAX_S))
    _tell(made, as_json, made.pool_id)


@pool.command("admit")
@state_option
@click.argument("pool_id")
@click.argument("account_id")
@json_option
def pool_admit(state: Path, pool_id: str, account_id: str, as_json: bool) -> None:
    """Lets an account submit to a pool."""
    request = pb.AdmitAccountRequest(pool_id=pool_id, account_id=account_id)
    done = _ask(state, lambda stub: stub.AdmitAccount(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{account_id} may submit to {pool_id}")


@pool.command("expel")
@state_option
@click.argument("pool_id")
@click.argument("account_id")
@json_option
def pool_expel(state: Path, pool_id: str, account_id: str, as_json: bool) -> None:
    """Ends that; the account's jobs there go on."""
    request = pb.ExpelAccountRequest(pool_id=pool_id, account_id=account_id)
    done = _ask(state, lambda stub: stub.ExpelAccount(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"{account_id} may submit to {pool_id} no more, unless the pool is open")


@commands.group()
def bundle() -> None:
    """Bundles."""


@bundle.command("release")
@state_option
@click.argument("digest")
@json_option
def bundle_release(state: Path, digest: str, as_json: bool) -> None:
    """Lets jobs use a held bundle again; DIGEST may be its first digits."""
    request = pb.ReleaseBundleRequest(bundle_digest=digest.strip().lower())
    done = _ask(state, lambda stub: stub.ReleaseBundle(request, timeout=CALL_TIME_MAX_S))
    _tell(done, as_json, f"bundle {done.bundle_digest.hex()} may be used again")


@commands.command()
@state_option
@json_option
def status(state: Path, as_json: bool) -> None:
    """Numbers of the running coordinator."""
    now = _ask(state, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        ("software", f"{now.protocol.software}, protocol {now.protocol.version}"),
        ("started", _moment(moment_from_message(now.started_at))),
        ("workers connected", str(now.workers_connected)),
        ("jobs unfinished", str(now.jobs_unfinished)),
        ("leases", str(now.leases)),
        ("commitments", str(now.commitments)),
        ("leases sent", f"{sum(now.assign_buckets)}, 99 % within {quantile_ms(now.assign_buckets, 0.99):.1f} ms"),
        ("journal", f"{now.journal_sequence} records, {now.commits} commits, epoch {now.epoch}"),
        ("views", f"{now.view_sequence} records"),
        ("memory", f"{now.resident_bytes // (1024 * 1024)} MiB"),
    ]
    _tell(now, as_json, "\n".join(f"{name:18} {value}" for name, value in rows))


@commands.command()
@state_option
@click.option("--deep", is_flag=True, help="Read every blob that a job, bundle or account refers to, and compare it.")
@json_option
def check(state: Path, deep: bool, as_json: bool) -> None:
    """Replays the journal from its first record and compares segments, snapshots, views and blobs; changes nothing.

    A coordinator may be running meanwhile. Ends with status 1 when something is wrong.
    """
    from fallow_coordinator.blob_folder import BlobFiles
    from fallow_coordinator.blobs.bucket import BucketBlobs, BucketPlace
    from fallow_coordinator.state_folder import StateFolder
    from fallow_coordinator.store.check import check_journal

    folder = StateFolder(state.expanduser().absolute())
    key, place = folder.coordinator_public_key, BucketPlace.of_folder(folder.blobs)
    files = BlobFiles(folder.blobs) if folder.blobs.is_dir() else None
    report = check_journal(
        folder.journal,
        public_der=key.read_bytes() if key.exists() else None,
        blobs=BucketBlobs(place) if place is not None else files,
        deep=deep,
    )
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        click.echo(
            f"{report.records} records ({report.sealed_sequence} of them in {report.segments} sealed segments), "
            f"{report.snapshots} snapshots, {report.view_rows} rows of the views and {report.blobs} blobs were checked."
        )
        for fault in report.faults:
            click.echo(f"FAULT: {fault}")
        if not report.faults:
            click.echo("All is well.")
    if report.faults:
        raise SystemExit(EXIT_FAILED)


@commands.group("carbon")
def carbon_group() -> None:
    """Grams of CO2 per kWh by region and hour: what the coordinator reckons with."""


@carbon_group.command("show")
@state_option
@click.option("--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="Another table than the state's.")
@click.option("--region", default="", help="One region, by its two letters. Default: all, this hour.")
@click.option("--hours", type=click.IntRange(1, 8_784), default=24, show_default=True, help="How many, from now on.")
@json_option
def carbon_show(state: Path, path: Path | None, region: str, hours: int, as_json: bool) -> None:
    """The hours to come, in UTC, and where the figures come from."""
    from fallow_coordinator.carbon.showing import told

    facts, words = told(state.expanduser().absolute(), path, region, hours)
    click.echo(json.dumps(facts) if as_json else shown(words))


@carbon_group.command("check")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def carbon_check(path: Path, as_json: bool) -> None:
    """Reads a table as the coordinator would, and tells the line that is wrong."""
    from fallow_coordinator.carbon.table import read_table

    table = read_table(path)
    facts = {"path": str(path), "source": table.label, "regions": list(table.regions())}
    words = f"{path} is good: {len(table.regions())} regions ({', '.join(table.regions())}); source: {table.label}"
    click.echo(json.dumps(facts) if as_json else shown(words))


@carbon_group.command("export")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--region", "regions", multiple=True, help="Only these; may be repeated.")
@json_option
def carbon_export(path: Path, regions: tuple[str, ...], as_json: bool) -> None:
    """Writes the synthetic default as a table to change; it says of itself that it is synthetic."""
    from fallow_coordinator.carbon.showing import export

    count = export(path, regions)
    facts = {"path": str(path), "regions": count}
    click.echo(json.dumps(facts) if as_json else f"{count} regions in {path}; put it in the state folder as carbon.csv")


# ------------------------------------------------------------------------------------------- telling


def _ask(
    state: Path, call: Callable[[admin_service_pb2_grpc.AdminServiceAsyncStub], Awaitable[ResponseT]]
) -> ResponseT:
    async def ask() -> ResponseT:
        async with admin_stub(state.expanduser().absolute()) as stub:
            return await call(stub)

    return asyncio.run(ask())


def _tell(message: Message, as_json: bool, words: str) -> None:
    if as_json:
        click.echo(
            json.dumps(
                MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            )
        )
    else:
        click.echo(shown(words))


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _moment(at_ms: int) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


tell, table, moment = _tell, _table, _moment
"""For the commands of `ledger_cli`."""
