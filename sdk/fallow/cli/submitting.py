"""`fallow map` and `fallow job submit`: bundle, rows, and where they may go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from fallow.bundle_file import Bundle
from fallow.cli.describing import saved_facts, saved_text, share_lines, status_facts
from fallow.cli.options import (
    DurationType,
    bundle_of,
    input_columns,
    is_made,
    json_option,
    login_option,
    model_options,
    run,
    split_names,
    stated_data,
)
from fallow.cli.output import Output
from fallow.cli.progress import JobBar, job_bar
from fallow.cli.quoting import quote_facts, quote_text, terms_given, terms_options
from fallow.client.client import AsyncClient, connect_async
from fallow.client.job import AsyncJob
from fallow.client.tables import Saved, check_result_path
from fallow.client.terms import JobTerms
from fallow.credits import credits_text
from fallow.errors import FallowError, Reason
from fallow.job import JobOptions, JobStatus
from fallow.limits import FAILED_ROWS_MAX_DEFAULT
from fallow.roles import DataClass

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Submission:
    """What both commands take."""

    model: str
    rows: str
    data: str | None
    keep: str | None
    inputs: tuple[str, ...]
    cast: bool
    title: str
    failed_rows_max: int
    all_rows_may_fail: bool
    retention: timedelta | None
    idempotency_key: str | None
    pool: str
    login: Path | None
    outputs: str | None
    shapes: tuple[str, ...]
    dims: tuple[str, ...]
    precision: str
    terms: JobTerms

    def bundle(self) -> Bundle:
        """The bundle of MODEL; for one that is made already the precision is the job's, not the bundle's."""
        precision = "fp32" if is_made(self.model) else self.precision
        return bundle_of(
            self.model, outputs=self.outputs, shapes=self.shapes, dims=self.dims, precision=precision, about={}
        )

    async def submit(self, client: AsyncClient, bundle: Bundle, data: str, bar: JobBar) -> AsyncJob:
        """The submitted job."""
        try:
            return await client.map(
                bundle,
                self.rows,
                data=data,
                keep=split_names(self.keep),
                inputs=input_columns(self.inputs),
                cast=self.cast,
                title=self.title,
                failed_rows_max=self.failed_rows_max,
                retention=self.retention,
                options=JobOptions(all_rows_may_fail=self.all_rows_may_fail),
                idempotency_key=self.idempotency_key,
                pool=self.pool,
                on_rows=bar.uploaded,
                **self.terms,
            )
        except asyncio.CancelledError:
            click.echo(
                "\ninterrupted before the job was submitted; rows that were uploaded need not be again", err=True
            )
            raise


def submission_options(command: Command) -> Command:
    """MODEL, INPUT and the options about them."""
    for option in reversed(
        (
            click.argument("model"),
            click.argument("rows", metavar="INPUT"),
            click.option(
                "--data",
                type=click.Choice([member.value for member in DataClass]),
                help="Who may see the rows. There is no default.",
            ),
            click.option("--keep", help="Columns of INPUT to carry to the result, with commas."),
            click.option(
                "--input",
                "inputs",
                multiple=True,
                metavar="NAME=COLUMN[,COLUMN…]",
                help="Columns that make up an input of the model, where names differ or several go side by side.",
            ),
            click.option("--cast", is_flag=True, help="Convert values even where that may round them."),
            model_options,
            terms_options,
            click.option("--title", default="", help="What the job is called in lists."),
            click.option(
                "--failed-rows-max",
                type=click.IntRange(min=0),
                default=FAILED_ROWS_MAX_DEFAULT,
                show_default=True,
                help="Rows that may fail before the job does.",
            ),
            click.option(
                "--all-rows-may-fail",
                is_flag=True,
                help="Count the job as done even when no row has a value.",
            ),
            click.option(
                "--retention",
                type=DurationType(),
                metavar="DURATION",
                help="How long results, dataset and kept columns stay after the end: 90s, 15m, 24h, 7d. [default: 30d]",
            ),
            click.option("--idempotency-key", help="The same key within 24 hours gives the same job."),
            click.option("--pool", default="", help="Pool to run in. [default: your own]"),
            login_option,
            json_option,
        )
    ):
        command = option(command)
    return command


@click.command("map")
@submission_options
@click.option(
    "-o",
    "--output",
    "path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the result goes: .parquet, .arrow or .jsonl.",
)
def map_command(path: Path, as_json: bool, **given: Any) -> None:
    """Apply MODEL to each row of INPUT on other people's machines and save the result.

    MODEL is an ONNX file, a bundle folder, or `magika`. INPUT is a Parquet, .npy or .npz file, or a folder: of files
    for models of bytes, else of Parquet files.
    """
    submission, output = _submission(given), Output(as_json=as_json)
    data = stated_data(submission.data)
    run(output, _map(submission, data, path, output))


@click.command("submit")
@submission_options
def submit_command(as_json: bool, **given: Any) -> None:
    """Submit a job and print its id; the arguments are those of `fallow map`."""
    submission, output = _submission(given), Output(as_json=as_json)
    data = stated_data(submission.data)
    run(output, _submit(submission, data, output))


@click.command("quote")
@submission_options
def quote_command(as_json: bool, **given: Any) -> None:
    """Tell what a job would cost, when it would end and who could do it; the arguments are those of `fallow map`.

    INPUT is read here for the sizes of its rows and does not travel. Nothing is reserved.
    """
    submission, output = _submission(given), Output(as_json=as_json)
    data = stated_data(submission.data)
    run(output, _quote(submission, data, output))


def _submission(given: dict[str, Any]) -> Submission:
    terms = terms_given(given)
    if is_made(given["model"]) and given["precision"] != "fp32":
        terms["precision"] = given["precision"]
    names = {field.name for field in fields(Submission)} - {"terms"}
    return Submission(terms=terms, **{name: given[name] for name in names})


async def _quote(submission: Submission, data: str, output: Output) -> None:
    bundle = submission.bundle()
    async with await connect_async(submission.login) as client:
        quote = await client.quote(
            bundle,
            submission.rows,
            data=data,
            inputs=input_columns(submission.inputs),
            cast=submission.cast,
            pool=submission.pool,
            **submission.terms,
        )
    output.result(quote_facts(quote), quote_text(quote, bundle.manifest))


async def _submit(submission: Submission, data: str, output: Output) -> None:
    bundle = submission.bundle()
    async with await connect_async(submission.login) as client:
        with job_bar(shown=not output.as_json) as bar:
            job = await submission.submit(client, bundle, data, bar)
        output.result({"job_id": job.id}, job.id)


async def _map(submission: Submission, data: str, path: Path, output: Output) -> None:
    check_result_path(path)
    if path.exists() and Path(submission.rows).exists() and path.samefile(submission.rows):
        raise FallowError(Reason.FIELD_INVALID, f"the result would replace its own input {path}", field="output")
    began = time.monotonic()
    bundle = submission.bundle()
    async with await connect_async(submission.login) as client:
        with job_bar(shown=not output.as_json) as bar:
            job = await submission.submit(client, bundle, data, bar)
            output.note(f"job {job.id}")
            status, saved = await attended(job, path, bar, partial=False)
    seconds = time.monotonic() - began
    output.result(
        {**saved_facts(saved), "job_id": job.id, "seconds": seconds, "status": status_facts(status)},
        _summary(job, status, saved, seconds),
    )


async def attended(job: AsyncJob, path: Path, bar: JobBar, *, partial: bool) -> tuple[JobStatus, Saved]:
    """Shows a job's progress until it has ended, and saves its rows; Ctrl-C leaves the job running and tells its id."""

    async def show() -> None:
        async with aclosing(job.statuses()) as statuses:
            async for status in statuses:
                bar.status(status)

    showing = asyncio.ensure_future(show())
    try:
        saved = await job.save(path, partial=partial)
        return await job.status(), saved
    except asyncio.CancelledError:
        click.echo(f"\ndetached: job {job.id} goes on; `fallow job watch {job.id}` returns to it", err=True)
        raise
    except FallowError as error:
        if error.reason in {Reason.JOB_FAILED, Reason.JOB_CANCELLED} and not error.hint:
            error.hint = f"`fallow job results {job.id} -o OUT --partial` saves the rows there are"
        raise
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


def _summary(job: AsyncJob, status: JobStatus, saved: Saved, seconds: float) -> str:
    rate = (saved.rows + saved.failed_rows) / seconds if seconds > 0 else 0
    lines = [saved_text(saved)]
    lines += share_lines(saved.shares)
    price = credits_text(status.spent_microcredits)
    lines.append(f"job {job.id}: {seconds:.1f} s, {rate:,.0f} rows/s, policy {status.policy}, price {price} credits")
    return "\n".join(lines)
