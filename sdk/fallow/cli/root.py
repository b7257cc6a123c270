"""The root of the `fallow` command."""

from __future__ import annotations

import getpass
import logging
import socket
from importlib.metadata import version
from pathlib import Path

import click

from fallow.cli.accounts import account_group
from fallow.cli.bundles import bundle_group
from fallow.cli.certificates import checkpoint_command, verify_command
from fallow.cli.jobs import job_group
from fallow.cli.options import json_option, run
from fallow.cli.output import Output
from fallow.cli.submitting import map_command
from fallow.enrollment import join
from fallow.join_line import parse_join_line
from fallow.places import login_folder
from fallow.shown_text import log_to_stderr


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(version("fallow"), prog_name="fallow")
def fallow() -> None:
    """Run models over your rows on idle machines.

    Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted (a submitted job goes on).
    """
    log_to_stderr(logging.WARNING, "fallow: %(message)s")


@fallow.command("login")
@click.argument("line")
@click.option("--name", help="What the operator sees. [default: user@host]")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the credentials go. [default: found again by itself]"
)
@json_option
def login_command(line: str, name: str | None, folder: Path | None, as_json: bool) -> None:
    """Enrol this machine as a client with a join LINE from the operator. The key is made here and stays here."""
    output = Output(as_json=as_json)

    async def work() -> None:
        target = folder or login_folder()
        credentials = await join(parse_join_line(line), target, name or f"{getpass.getuser()}@{socket.gethostname()}")
        output.result(
            {"party_id": credentials.party_id, "account_id": credentials.account_id, "folder": target},
            f"logged in to account {credentials.account_id} as {credentials.party_id}; credentials in {target}",
        )

    run(output, work())


fallow.add_command(map_command)
fallow.add_command(job_group)
fallow.add_command(account_group)
fallow.add_command(bundle_group)
fallow.add_command(verify_command)
fallow.add_command(checkpoint_command)
