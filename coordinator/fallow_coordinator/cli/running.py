"""Commands about a coordinator and what it keeps: its numbers, its journal, held bundles."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from fallow.v1 import admin_service_pb2 as pb
from fallow.wire.moments import moment_from_message
from fallow_coordinator.admin_client import CALL_TIME_MAX_S
from fallow_coordinator.cli.asking import ask, moment, tell
from fallow_coordinator.cli.options import json_option, state_option
from fallow_coordinator.config import EXIT_FAILED
from fallow_coordinator.latency import quantile_ms


@click.command()
@state_option
@json_option
def status(state: Path, as_json: bool) -> None:
    """Numbers of the running coordinator."""
    now = ask(state, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_TIME_MAX_S))
    rows = [
        ("software", f"{now.protocol.software}, protocol {now.protocol.version}"),
        ("started", moment(moment_from_message(now.started_at))),
        ("workers connected", str(now.workers_connected)),
        ("jobs unfinished", str(now.jobs_unfinished)),
        ("leases", str(now.leases)),
        ("commitments", str(now.commitments)),
        ("leases sent", f"{sum(now.assign_buckets)}, 99 % within {quantile_ms(now.assign_buckets, 0.99):.1f} ms"),
        ("journal", f"{now.journal_sequence} records, {now.commits} commits, epoch {now.epoch}"),
        ("views", f"{now.view_sequence} records, {max(0, now.journal_sequence - now.view_sequence)} behind"),
        ("memory", f"{now.resident_bytes // (1024 * 1024)} MiB"),
    ]
    tell(now, as_json, "\n".join(f"{name:18} {value}" for name, value in rows))


@click.command()
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


@click.group()
def bundle() -> None:
    """Bundles."""


@bundle.command("release")
@state_option
@click.argument("digest")
@json_option
def bundle_release(state: Path, digest: str, as_json: bool) -> None:
    """Lets jobs use a held bundle again; DIGEST may be its first digits."""
    request = pb.ReleaseBundleRequest(bundle_digest=digest.strip().lower())
    done = ask(state, lambda stub: stub.ReleaseBundle(request, timeout=CALL_TIME_MAX_S))
    tell(done, as_json, f"bundle {done.bundle_digest.hex()} may be used again")
