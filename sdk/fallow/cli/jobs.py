"""`fallow job …`: list, show, watch, wait, results, cancel."""

from __future__ import annotations

import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click

from fallow.cli.options import json_option, login_option, run
from fallow.cli.output import Output, counted
from fallow.cli.progress import job_bar
from fallow.cli.submitting import attended, saved_facts, saved_text, submit_command
from fallow.client.client import JOBS_PER_PAGE, connect_async
from fallow.client.job import AsyncJob
from fallow.client.tables import check_result_path
from fallow.job import JobStatus


@click.group("job")
def job_group() -> None:
    """Submit jobs and look after them."""


job_group.add_command(submit_command)


@job_group.command("list")
@click.option(
    "--limit", type=click.IntRange(min=1), default=JOBS_PER_PAGE, show_default=True, help="Most jobs to list."
)
@login_option
@json_option
def list_command(limit: int, login: Path | None, as_json: bool) -> None:
    """List the account's jobs, newest first."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            jobs = await client.jobs(limit)
        for status in jobs:
            output.result(status_facts(status), _line(status))
        if not jobs:
            output.note("no jobs")

    run(output, work())


@job_group.command("show")
@click.argument("job_id")
@login_option
@json_option
def show_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Show one job."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            status = await (await client.job(job_id)).status()
        output.result(status_facts(status), _description(status))

    run(output, work())


@job_group.command("watch")
@click.argument("job_id")
@login_option
@json_option
def watch_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Follow a job until it has ended. Ctrl-C leaves it running."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            job = await client.job(job_id)
            with job_bar(shown=not as_json) as bar:
                async with aclosing(job.statuses()) as statuses:
                    async for status in statuses:
                        bar.status(status)
                        if as_json:
                            output.result(status_facts(status), "")
            await _ended(job, output, quiet=as_json)

    run(output, work())


@job_group.command("wait")
@click.argument("job_id")
@login_option
@json_option
def wait_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Wait in silence until a job has ended; exit code 1 when it did not succeed."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            await _ended(await client.job(job_id), output, quiet=False)

    run(output, work())


@job_group.command("results")
@click.argument("job_id")
@click.option(
    "-o",
    "--output",
    "path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the result goes: .parquet, .arrow or .jsonl.",
)
@click.option("--partial", is_flag=True, help="Save what there is of a job that failed or was cancelled.")
@login_option
@json_option
def results_command(job_id: str, path: Path, partial: bool, login: Path | None, as_json: bool) -> None:
    """Save a job's rows once it has ended, with failed rows and their reasons in a file beside."""
    output = Output(as_json=as_json)

    async def work() -> None:
        check_result_path(path)
        async with await connect_async(login) as client:
            job = await client.job(job_id)
            with job_bar(shown=not as_json) as bar:
                _, saved = await attended(job, path, bar, partial=partial)
        output.result({**saved_facts(saved), "job_id": job.id}, saved_text(saved))

    run(output, work())


@job_group.command("cancel")
@click.argument("job_id")
@login_option
@json_option
def cancel_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """End a job; rows that are done stay readable."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            status = await (await client.job(job_id)).cancel()
        output.result(status_facts(status), f"job {job_id}: {status.state.value}")

    run(output, work())


def status_facts(status: JobStatus) -> dict[str, Any]:
    """A status for JSON."""
    return {
        "job_id": status.job_id,
        "state": status.state,
        "reason": status.reason,
        "reason_code": status.reason_code,
        "title": status.title,
        "account_id": status.account_id,
        "pool_id": status.pool_id,
        "data_class": status.data_class,
        "bundle_digest": status.bundle_digest,
        "policy": status.policy,
        "price_microcredits": status.price_microcredits,
        "submitted_at_ms": status.submitted_at_ms,
        "finished_at_ms": status.finished_at_ms,
        "progress": status.progress,
        "results": status.results,
    }


async def _ended(job: AsyncJob, output: Output, *, quiet: bool) -> None:
    status = await job.wait()
    if not quiet:
        output.result(status_facts(status), _line(status))


def _line(status: JobStatus) -> str:
    progress = status.progress
    done = f"{progress.rows_done:,}/{progress.rows_total:,} rows"
    failed = f", {progress.rows_failed:,} failed" if progress.rows_failed else ""
    title = f"  {status.title}" if status.title else ""
    return f"{status.job_id}  {status.state.value:<10} {done}{failed}{title}"


def _description(status: JobStatus) -> str:
    progress = status.progress
    facts = {
        "job": status.job_id,
        "title": status.title,
        "state": status.state.value + (f" ({status.reason})" if status.reason else ""),
        "rows": f"{progress.rows_done:,} of {progress.rows_total:,} done, {progress.rows_failed:,} failed, "
        f"{progress.rows_leased:,} leased to {counted(progress.workers, 'worker')}",
        "data": status.data_class,
        "bundle": status.bundle_digest.hex(),
        "account": status.account_id,
        "pool": status.pool_id,
        "policy": status.policy,
        "price": f"{status.price_microcredits / 1_000_000:g} credits",
        "submitted": _moment(status.submitted_at_ms),
        "finished": _moment(status.finished_at_ms) if status.finished_at_ms else "",
    }
    return "\n".join(f"{name:<10}{value}" for name, value in facts.items() if value)


def _moment(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))
