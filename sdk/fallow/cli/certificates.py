"""`fallow job certificate`, `fallow verify`, `fallow checkpoint`: evidence that outlives the coordinator's word."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any, Final

import click

from fallow.certificate import read_certificate
from fallow.certificate_check import (
    Checked,
    authority_fingerprint,
    check_certificate,
    outputs_of,
    story_of_certificate,
)
from fallow.certificate_results import ResultsChecked, check_results
from fallow.cli.options import json_option, login_option, run
from fallow.cli.output import Output, counted
from fallow.client.client import connect_async
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.identity import load_certificate
from fallow.ids import Digest
from fallow.places import coordinator_folder, local_client_folder, login_folder

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("certificate")
@click.argument("job_id")
@click.option("-o", "--output", "path", required=True, type=_FILE, help="Where the certificate goes: one JSON file.")
@click.option(
    "--without-outputs",
    is_flag=True,
    help="Leave out rows that workers signed inline; those signatures then can't be checked with the file alone.",
)
@login_option
@json_option
def certificate_command(job_id: str, path: Path, without_outputs: bool, login: Path | None, as_json: bool) -> None:
    """Save what became of a finished job, with the evidence, for `fallow verify`."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            certificate = await (await client.job(job_id)).certificate(outputs=not without_outputs)
        certificate.save(path)
        job = certificate.job
        output.result(
            {"job_id": job_id, "path": path, "state": job["state"], "rows": job["rows"]},
            f"job {job_id}: certificate in {path}; `fallow verify {path}` checks it",
        )

    run(output, work())


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Saved results (.parquet or .arrow): are these the rows that workers committed to?")  # fmt: skip
@click.option("--authority", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Certificate of the coordinator's authority. [default: that of your login]")  # fmt: skip
@click.option("--fingerprint", metavar="HEX", help="Its SHA-256, as `fallow-coordinator start` prints it.")
@login_option
@json_option
def verify_command(
    file: Path,
    results: Path | None,
    authority: Path | None,
    fingerprint: str | None,
    login: Path | None,
    as_json: bool,
) -> None:
    """Check a certificate without asking anybody; exit code 1, and the first wrong thing by name, when it is wrong."""
    output = Output(as_json=as_json)

    async def work() -> None:
        trusted = _trusted(authority, fingerprint, login)
        certificate = read_certificate(file)
        checked = check_certificate(certificate, trusted)
        compared: ResultsChecked | None = None
        if results is not None:
            story = story_of_certificate(certificate)
            compared = check_results(results, certificate, story, outputs_of(certificate))
        output.result(_facts(checked, compared), _text(checked, compared))

    run(output, work())


@click.command("checkpoint")
@login_option
@json_option
def checkpoint_command(login: Path | None, as_json: bool) -> None:
    """Take the coordinator's signed word on its journal, and check that it goes on from the one you saw last."""
    output = Output(as_json=as_json)

    async def work() -> None:
        async with await connect_async(login) as client:
            checkpoint = await client.checkpoint()
        facts = {
            "journal_id": checkpoint.journal_id,
            "records": checkpoint.size,
            "root": checkpoint.root,
            "at_ms": checkpoint.at_ms,
        }
        output.result(facts, f"{counted(checkpoint.size, 'record')}, root {checkpoint.root.hex()}")

    run(output, work())


def _trusted(authority: Path | None, fingerprint: str | None, login: Path | None) -> Digest:
    """The fingerprint of the authority that is trusted. Raises FIELD_MISSING when nobody says which."""
    if fingerprint is not None:
        if not _FINGERPRINT.fullmatch(fingerprint.lower()):
            raise FallowError(
                Reason.FIELD_INVALID, "this is no fingerprint", field="fingerprint", limit="64 hexadecimal digits"
            )
        return Digest(bytes.fromhex(fingerprint))
    if authority is not None:
        return authority_fingerprint(load_certificate(authority.read_bytes()))
    folders = [login] if login is not None else [login_folder(), local_client_folder(coordinator_folder())]
    for folder in folders:
        try:
            return authority_fingerprint(load_certificate(Credentials.load(folder).authority_pem))
        except FallowError as error:
            if error.reason is not Reason.UNAUTHENTICATED:
                raise
    raise FallowError(
        Reason.FIELD_MISSING,
        "nothing says which coordinator is to be trusted",
        field="authority",
        hint="log in, or name the authority's certificate with --authority or its --fingerprint",
    )


def _facts(checked: Checked, compared: ResultsChecked | None) -> dict[str, Any]:
    return {
        "job_id": checked.job_id,
        "state": checked.state,
        "rows": checked.rows,
        "rows_failed": checked.rows_failed,
        "results": checked.results,
        "journal_records": checked.records,
        "checkpoint_records": checked.checkpoint.size,
        "checkpoint_at_ms": checked.checkpoint.at_ms,
        "signatures_checked": checked.signatures,
        "signatures_unchecked": checked.signatures_unchecked,
        "roots_checked": checked.roots,
        "rows_checked": checked.rows_checked,
        "rows_by_referee": checked.rows_by_referee,
        "rows_withdrawn": checked.rows_withdrawn,
        "wrong_ppm_max": checked.wrong_ppm_max,
        "wrong_ppm_max_of_colluders": checked.wrong_ppm_max_of_colluders,
        "rows_compared": compared.rows if compared is not None else None,
    }


def _text(checked: Checked, compared: ResultsChecked | None) -> str:
    moment = datetime.datetime.fromtimestamp(checked.checkpoint.at_ms / 1000, datetime.UTC)
    unchecked = checked.signatures_unchecked
    lines = [
        f"job {checked.job_id} {checked.state}: {counted(checked.rows, 'row')}, {checked.rows_failed:,} failed",
        f"{counted(checked.records, 'record')} of the journal stand under the checkpoint of {moment:%Y-%m-%d %H:%M:%S} "
        f"UTC over {checked.checkpoint.size:,}",
        f"{counted(checked.signatures, 'signature')} of workers hold"
        + (f"; {unchecked:,} can't be checked without the rows that were signed" if unchecked else ""),
        f"{counted(checked.roots, 'root')} worked out again from the rows in the certificate",
    ]
    if checked.rows_checked or checked.rows_withdrawn:
        lines.append(
            f"{counted(checked.rows_checked, 'row')} checked by others, {checked.rows_by_referee:,} of them by a "
            f"referee; {checked.rows_withdrawn:,} withdrawn and done again"
        )
        lines.append(
            f"of no worker's rows more than {_percent(checked.wrong_ppm_max)} are wrong if it cheats by itself, "
            f"{_percent(checked.wrong_ppm_max_of_colluders)} if workers collude (with 99 % confidence)"
        )
    else:
        lines.append("no row was checked by anybody else")
    if compared is not None:
        lines.append(f"{counted(compared.rows, 'saved row')} are those of {compared.roots:,} committed roots")
    return "\n".join(lines)


def _percent(share_ppm: int) -> str:
    return f"{share_ppm / 10_000:.2g} %"
