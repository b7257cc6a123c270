"""`fallow-coordinator start`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from fallow.identity import write_private
from fallow.shown_text import log_to_stderr
from fallow_coordinator.cli.options import DurationType, json_option, state_option


@click.command()
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
    from fallow_coordinator.config import COLLECTOR_THRESHOLDS, MIB, CollectionSettings
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
