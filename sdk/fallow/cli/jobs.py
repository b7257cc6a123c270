"""`fallow job …`: quote, submit, list, show, watch, wait, results, certificate, retry, cancel, accept, delete."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import click

from fallow.cli.certificates import certificate_command
from fallow.cli.describing import (
    explanation_facts,
    explanation_text,
    saved_facts,
    saved_text,
    status_facts,
    status_line,
    status_text,
)
from fallow.cli.options import json_option, login_option, run
from fallow.cli.output import Output
from fallow.cli.progress import job_bar
from fallow.cli.submitting import attended, quote_command, submit_command
from fallow.client.client import JOBS_PER_PAGE, connect_async
from fallow.client.job import AsyncJob
from fallow.client.tables import check_result_path
from fallow.credits import credits_text, parse_credits


@click.group("job")
def job_group() -> None:
    """Submit jobs and look after them."""


job_group.add_command(submit_command)
job_group.add_command(quote_command)
job_group.add_command(certificate_command)


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
            output.result(status_facts(status), status_line(status))
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
        output.result(status_facts(status), status_text(status))

    run(output, work())


@job_group.command("explain")
@click.argument("job_id")
@login_option
@json_option
def explain_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Tell why a job waits: who could do its work, who cannot and why, and what it waits for now."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            told = await (await client.job(job_id)).explain()
        output.result(explanation_facts(told), explanation_text(told))

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


@job_group.command("accept")
@click.argument("job_id")
@login_option
@json_option
def accept_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Take a verifying job's rows with the checks made by now, without waiting for the rest."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            status = await (await client.job(job_id)).accept()
        output.result(status_facts(status), f"job {job_id}: {status.state.value}")

    run(output, work())


@job_group.command("retry")
@click.argument("job_id")
@click.option("--failed", is_flag=True, required=True, help="Retry the rows that have no value.")
@login_option
@json_option
def retry_command(job_id: str, failed: bool, login: Path | None, as_json: bool) -> None:
    """Submit a finished job's rows without a value as a new job, and print its id.

    The kept column `first_row` of its result tells where each row stood in the job that was submitted first.
    """
    del failed  # the only choice there is, said in words
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            retried = await (await client.job(job_id)).retry_failed()
            rows = (await retried.status()).progress.rows_total
        output.result({"job_id": retried.id, "retried_job_id": job_id, "rows": rows}, retried.id)

    run(output, work())


@job_group.command("topup")
@click.argument("job_id")
@click.argument("credits_added", metavar="CREDITS")
@login_option
@json_option
def topup_command(job_id: str, credits_added: str, login: Path | None, as_json: bool) -> None:
    """Add CREDITS to a job's budget; one that was out of it goes on."""
    output = Output(as_json=as_json)

    async def work() -> None:
        parse_credits(credits_added, "CREDITS")
        async with await connect_async(login) as client:
            status = await (await client.job(job_id)).top_up(credits_added)
        budget, spent = credits_text(status.budget_microcredits), credits_text(status.spent_microcredits)
        output.result(
            status_facts(status), f"job {job_id}: {status.state.value}, {spent} of {budget} credits are spent"
        )

    run(output, work())


@job_group.command("delete")
@click.argument("job_id")
@login_option
@json_option
def delete_command(job_id: str, login: Path | None, as_json: bool) -> None:
    """Let go of a finished job's results, dataset and kept columns, for good."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            status = await (await client.job(job_id)).delete()
        output.result(status_facts(status), f"job {job_id}: its results are deleted")

    run(output, work())


async def _ended(job: AsyncJob, output: Output, *, quiet: bool) -> None:
    status = await job.wait()
    if not quiet:
        output.result(status_facts(status), status_line(status))
