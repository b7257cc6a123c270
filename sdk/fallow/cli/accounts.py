"""`fallow account …`: what the account has, and what came and went."""

from __future__ import annotations

import csv
import io
import time
from datetime import timedelta
from pathlib import Path

import click

from fallow.cli.options import DurationType, json_option, login_option, run
from fallow.cli.output import Output
from fallow.client.account import Balances, Statement
from fallow.client.client import connect_async
from fallow.credits import StatementLine, credits_text

_COLUMNS = ("first_at", "last_at", "what", "book", "credits", "job", "worker", "pool", "count", "note")


@click.group("account")
def account_group() -> None:
    """Look at your account."""


@account_group.command("show")
@login_option
@json_option
def show_command(login: Path | None, as_json: bool) -> None:
    """Show what the account has: available, held by jobs, pending, contributed, allotted."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            balances = await client.balances()
        output.result(plain_balances(balances), balances_text(balances))

    run(output, work())


@account_group.command("statement")
@click.option("--since", type=DurationType(), metavar="DURATION", help="Only so far back: 24h, 30d. [default: all]")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values, one line each.")
@login_option
@json_option
def statement_command(since: timedelta | None, as_csv: bool, login: Path | None, as_json: bool) -> None:
    """Show what came and went; work is one line for each job and worker."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            since_ms = int((time.time() - since.total_seconds()) * 1_000) if since is not None else 0
            statement = await client.statement(since_ms=since_ms)
        if as_csv and not as_json:
            click.echo(csv_text(statement), nl=False)
            return
        facts = {
            "lines": statement.lines,
            "opening": statement.opening,
            "closing": statement.closing,
            "sequence": statement.sequence,
        }
        output.result(facts, statement_text(statement))

    run(output, work())


def plain_balances(balances: Balances) -> dict[str, object]:
    """Balances for JSON."""
    return {
        "account_id": balances.account_id,
        "name": balances.name,
        "available_microcredits": balances.available_microcredits,
        "held_microcredits": balances.held_microcredits,
        "pending_microcredits": balances.pending_microcredits,
        "contribution_microcredits": balances.contribution_microcredits,
        "allotments": balances.allotments,
    }


def balances_text(balances: Balances) -> str:
    """Balances for people."""
    lines = [
        f"account      {balances.account_id}  {balances.name}",
        f"available    {credits_text(balances.available_microcredits)} credits",
        f"held         {credits_text(balances.held_microcredits)} credits for unfinished jobs",
        f"pending      {credits_text(balances.pending_microcredits)} credits earned, not yet released",
        f"contributed  {credits_text(balances.contribution_microcredits)} units of work for others, unpaid",
    ]
    lines += [
        f"allotment    {credits_text(one.left_microcredits)} of {credits_text(one.microcredits)} units left in pool "
        f"{one.pool_id} until {_moment(one.renews_at_ms)}"
        for one in balances.allotments
    ]
    return "\n".join(lines)


def statement_text(statement: Statement) -> str:
    """A statement for people."""
    rows = [
        (
            _moment(line.last_at_ms),
            line.what,
            line.book,
            f"{'+' if line.microcredits > 0 else ''}{credits_text(line.microcredits)}",
            " ".join(filter(None, (line.job_id, line.worker_id, line.note))),
        )
        for line in statement.lines
    ]
    width = max([len(row[3]) for row in rows], default=0)
    text = [f"{at}  {what:<9}  {book:<9}  {sum_:>{width}}  {about}".rstrip() for at, what, book, sum_, about in rows]
    closing = ", ".join(f"{book} {credits_text(amount)}" for book, amount in sorted(statement.closing.items()))
    return "\n".join([*text, f"now: {closing or 'nothing'}"])


def csv_text(statement: Statement) -> str:
    """A statement as comma-separated values; words that a spreadsheet would compute are quoted with an apostrophe."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for line in statement.lines:
        writer.writerow(_csv_row(line))
    return sheet.getvalue()


def _csv_row(line: StatementLine) -> tuple[str, ...]:
    note = f"'{line.note}" if line.note[:1] in ("=", "+", "-", "@") else line.note
    amount = credits_text(line.microcredits).replace(",", "")
    return (
        _moment(line.first_at_ms),
        _moment(line.last_at_ms),
        line.what,
        line.book,
        amount,
        line.job_id,
        line.worker_id,
        line.pool_id,
        str(line.count),
        note,
    )


def _moment(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1_000))
