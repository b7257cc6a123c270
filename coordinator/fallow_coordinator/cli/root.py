"""The command line of `fallow-coordinator`."""

from __future__ import annotations

import click

from fallow.errors import FallowError
from fallow.shown_text import shown
from fallow_coordinator.cli.carbon import carbon_group
from fallow_coordinator.cli.credits import credits_group, prices
from fallow_coordinator.cli.parties import account, party, token, worker
from fallow_coordinator.cli.pools import pool
from fallow_coordinator.cli.running import bundle, check, status
from fallow_coordinator.cli.starting import start
from fallow_coordinator.config import EXIT_FAILED, EXIT_LEDGER_UNSOUND
from fallow_coordinator.ports import LedgerUnsound, StorageFailed


def main() -> None:
    """Runs the command line; errors that a person can act on come as one line on standard error."""
    try:
        commands(prog_name="fallow-coordinator")
    except (FallowError, StorageFailed) as error:
        click.echo(shown(f"fallow-coordinator: {error}"), err=True)
        raise SystemExit(EXIT_LEDGER_UNSOUND if isinstance(error, LedgerUnsound) else EXIT_FAILED) from None
    except OSError as error:
        click.echo(f"fallow-coordinator: {error.strerror or error}: {error.filename or ''}", err=True)
        raise SystemExit(EXIT_FAILED) from None


@click.group()
@click.version_option(package_name="fallow")
def commands() -> None:
    """Runs and controls a Fallow coordinator."""


for _command in (
    start,
    token,
    worker,
    party,
    account,
    pool,
    bundle,
    status,
    check,
    carbon_group,
    credits_group,
    prices,
):
    commands.add_command(_command)
