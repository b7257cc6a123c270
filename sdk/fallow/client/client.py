"""The asynchronous client: bundles, jobs, and who the caller is."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyarrow carries no types.

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Unpack

from fallow.bundle import InspectionReport
from fallow.bundle_file import Bundle, bundle_file
from fallow.checkpoint import Checkpoint
from fallow.client.account import Balances, Statement, balances_from, lines_from
from fallow.client.blobs import BlobTransfers, Upload
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.client.evidence import follow_checkpoint
from fallow.client.job import AsyncJob
from fallow.client.kept import KeptColumns
from fallow.client.quoting import FP32_FORM, agreed_options, best_quote, check_forms, size_bins
from fallow.client.retry import PATIENCE_S
from fallow.client.submission import (
    MapRequest,
    check_failed_rows_max,
    check_texts,
    data_class_of,
    dataset_reader,
    submission,
    upload_dataset,
)
from fallow.client.terms import JobTerms, Terms, limit_per_unit, terms_of
from fallow.cost import SizeBin
from fallow.credentials import Credentials
from fallow.credits import PoolMode, StatementLine
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId
from fallow.job import JobOptions, JobStatus
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.places import STATE_VARIABLE, coordinator_folder, local_client_folder, login_folder
from fallow.quote import Quote, QuoteRequest
from fallow.roles import DataClass
from fallow.session import BlobReference
from fallow.sources import Rows
from fallow.v1 import identity_pb2, job_service_pb2, ledger_service_pb2
from fallow.wire.blob import BlobKind
from fallow.wire.bundle import report_from_message
from fallow.wire.job import status_from_message
from fallow.wire.moments import moment_to_message
from fallow.wire.quote import quote_from_message, quote_request_to_message
from fallow.wire.schema import encode_schema

CONNECT_PATIENCE_S: Final = 15.0
"""How long a first connection may take: somebody is waiting for it."""
JOBS_PER_PAGE: Final = 100
IDEMPOTENCY_KEY_BYTES: Final = 32
INSPECTION_WAIT_S: Final = 120.0
INSPECTION_ASK_INTERVAL_S: Final = 0.5

_STATES: Final = {
    job_service_pb2.BUNDLE_STATE_INSPECTING: "inspecting",
    job_service_pb2.BUNDLE_STATE_ACCEPTED: "accepted",
    job_service_pb2.BUNDLE_STATE_REFUSED: "refused",
    job_service_pb2.BUNDLE_STATE_HELD: "held",
}


@dataclass(frozen=True, slots=True)
class Session:
    """Who the caller is to the coordinator."""

    party_id: str
    account_id: str
    pool_id: str
    pool_mode: str = PoolMode.DONATION
    """How work is paid in the caller's own pool: `donation`, `quota` or `market`."""


@dataclass(frozen=True, slots=True)
class BundleState:
    """What the coordinator knows of a bundle."""

    digest: Digest
    state: str
    """`inspecting`, `accepted`, `refused` or `held`."""
    reason: str
    report: InspectionReport | None
    """None until it is inspected."""


async def connect_async(credentials: str | Path | None = None, *, patience_s: float = PATIENCE_S) -> AsyncClient:
    """A client of the coordinator that this user may use.

    `credentials` is a folder made by `fallow login`; without it: `$FALLOW_STATE`'s own client when set, else where
    `fallow login` put them, else those of a coordinator that this user runs here. `patience_s` is how long the
    coordinator may be away before a call gives up. Raises UNAUTHENTICATED, COORDINATOR_UNREACHABLE, PROTOCOL_TOO_OLD.
    """
    loaded = Credentials.load(Path(credentials).expanduser()) if credentials is not None else find_credentials()
    connection = Connection(loaded, patience_s=min(patience_s, CONNECT_PATIENCE_S))
    try:
        session = await _session(connection)
    except BaseException:
        await connection.close()
        raise
    connection.patience_s = patience_s
    return AsyncClient(connection, session)


def find_credentials() -> Credentials:
    """The credentials that `connect` uses when none are named. Raises UNAUTHENTICATED saying where it looked."""
    local, login = local_client_folder(coordinator_folder()), login_folder()
    folders = [local] if os.environ.get(STATE_VARIABLE) else [login, local]
    for folder in folders:
        try:
            return Credentials.load(folder)
        except FallowError as error:
            if error.reason is not Reason.UNAUTHENTICATED:
                raise
    raise FallowError(
        Reason.UNAUTHENTICATED,
        f"nobody is logged in: there are no credentials in {' or '.join(map(str, folders))}",
        hint="`fallow login LINE` with a line from the operator; whoever runs a coordinator here needs none",
    )


class AsyncClient:
    """A connection that outlives the coordinator's restarts; an asynchronous context manager."""

    def __init__(self, connection: Connection, session: Session) -> None:
        """Call `connect_async`."""
        self.session = session
        """Who the caller is."""
        self._connection = connection
        self._transfers = BlobTransfers(connection)
        self._registered: set[Digest] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; jobs go on."""
        await self._connection.close()

    async def map(
        self,
        bundle: Bundle,
        rows: Rows,
        *,
        data: DataClass | str,
        keep: Sequence[str] = (),
        inputs: Mapping[str, str | Sequence[str]] | None = None,
        cast: bool = False,
        title: str = "",
        failed_rows_max: int | None = None,
        retention: timedelta | None = None,
        idempotency_key: str | bytes | None = None,
        options: JobOptions | None = None,
        pool: str = "",
        on_rows: Callable[[int], None] | None = None,
        **terms: Unpack[JobTerms],
    ) -> AsyncJob:
        """Submits a job that applies `bundle` to each row, and returns it once it is durable.

        `rows`: arrays by column name, one array, an Arrow table, a Parquet file or several, a folder, or a source.
        `data` states who may see the rows: `public`, `internal` or `sensitive`; there is no default. `keep` names
        columns of the rows to carry to the result. `inputs` maps an input of the bundle to the column, or the several
        columns side by side, that it is made of. `cast` allows conversions that may round. `failed_rows_max` rows may
        fail before the job does (1,000 when None). Results, dataset and kept columns stay for `retention` after the end
        (30 days when None). The same `idempotency_key` within 24 hours gives the same job.
        `on_rows` is told how many rows are uploaded so far. `terms`: limit, budget, deadline, objective and what is
        asked of workers (`JobTerms`); a budget that is not stated in a market pool is the quote and a fifth more.

        Raises what is wrong by name: SCHEMA_MISMATCH, DATASET_EMPTY, ROW_TOO_LARGE, PROGRAM_REFUSED, PROGRAM_HELD,
        DATA_CLASS_MISSING, IDEMPOTENCY_CONFLICT, …
        """
        options = options or JobOptions()
        if failed_rows_max is not None:
            options = replace(options, failed_rows_max=failed_rows_max)
        if retention is not None:
            options = replace(options, retention_ms=_milliseconds(retention))
        request = MapRequest(
            bundle=bundle,
            rows=rows,
            data=data_class_of(data),
            keep=(keep,) if isinstance(keep, str) else tuple(keep),
            inputs=inputs or {},
            cast=cast,
            title=title,
            options=options,
            idempotency_key=_key(idempotency_key),
            pool_id=pool,
        )
        agreed = terms_of(terms, options, now=datetime.datetime.now(datetime.UTC))
        check_forms(request, agreed.accept)
        request = replace(request, options=agreed.options)
        check_texts(request.title, request.idempotency_key)
        check_failed_rows_max(options.failed_rows_max)
        # What is wrong with the rows is told before anything travels.
        reader = await asyncio.to_thread(dataset_reader, request, nonce_key=self._connection.nonce_key)
        request = await self._agreed(request, agreed)
        bundle = request.bundle
        await self.register(bundle)
        kept: KeptColumns | None = None
        if reader.kept_schema is None:
            dataset = await upload_dataset(reader, self._transfers, kept_path=None, on_rows=on_rows)
        else:
            with tempfile.TemporaryDirectory(prefix="fallow-kept-") as folder:
                kept_path = Path(folder) / "kept.arrow"
                dataset = await upload_dataset(reader, self._transfers, kept_path=kept_path, on_rows=on_rows)
                # The mapping outlives the file's name.
                kept = KeptColumns(kept_path)
        job_id = await self._submit(submission(request, dataset), bundle)
        return AsyncJob(
            self._connection,
            self._transfers,
            job_id,
            output_schema=encode_schema(bundle.manifest.output_schema),
            kept=kept,
            has_kept=kept is not None,
        )

    async def quote(
        self,
        bundle: Bundle,
        rows: Rows,
        *,
        data: DataClass | str,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
        cast: bool = False,
        options: JobOptions | None = None,
        pool: str = "",
        **terms: Unpack[JobTerms],
    ) -> Quote:
        """What `map` with the same arguments would cost, when it would end and who could do it, now.

        The rows are read here for their sizes and don't travel; the bundle does, and is inspected first if it must be.
        With `accept` every form is quoted: the one that serves the objective best, the others as its `alternatives`.
        Nothing is reserved. Raises what `map` raises, and DEADLINE_EXCEEDED when nobody inspects the bundle.
        """
        agreed = terms_of(terms, options or JobOptions(), now=datetime.datetime.now(datetime.UTC))
        request = MapRequest(
            bundle=bundle,
            rows=rows,
            data=data_class_of(data),
            inputs=inputs or {},
            cast=cast,
            options=agreed.options,
            pool_id=pool,
        )
        check_forms(request, agreed.accept)
        return (await self._quoted(request, agreed))[0]

    async def _agreed(self, request: MapRequest, terms: Terms) -> MapRequest:
        """The request with limit, budget and form settled; asks for a quote only where it takes one."""
        own_pool = request.pool_id in {"", self.session.pool_id}
        free = own_pool and self.session.pool_mode != PoolMode.MARKET
        if terms.accept or not (
            free or (terms.budget_microcredits is not None and not terms.limit_microcredits_per_1000_rows)
        ):
            quote, asked = await self._quoted(request, terms)
            return replace(asked, options=agreed_options(asked.options, terms, quote))
        return replace(request, options=replace(request.options, budget_microcredits=terms.budget_microcredits or 0))

    async def _quoted(self, request: MapRequest, terms: Terms) -> tuple[Quote, MapRequest]:
        """The best quote of the forms that are accepted, and the request with form, limit and budget settled."""
        bins = await asyncio.to_thread(size_bins, request)
        bundles = {FP32_FORM: request.bundle} | {form.value: request.bundle.variants[form] for form in terms.accept}
        found: dict[str, tuple[Quote, MapRequest]] = {}
        refused: list[str] = []
        for form, bundle in bundles.items():
            try:
                state = await self.inspected(bundle)
            except FallowError as error:
                if form == FP32_FORM or error.reason not in {Reason.PROGRAM_REFUSED, Reason.PROGRAM_HELD}:
                    raise
                refused.append(f"the {form} form is not used: {error.message}")
                continue
            if state.state != "accepted":
                continue
            asked = replace(request, bundle=bundle)
            quote = replace(await self._ask_quote(asked, bins), form=form)
            if terms.limit_microcredits_per_1000_rows is not None and quote.pool_mode == PoolMode.MARKET:
                limit = limit_per_unit(terms.limit_microcredits_per_1000_rows, quote)
                asked = replace(asked, options=replace(asked.options, limit_microcredits_per_unit=limit))
                quote = replace(await self._ask_quote(asked, bins), form=form)
            found[form] = quote, asked
        best = best_quote([quote for quote, _ in found.values()], request.options.objective)
        best = replace(best, warnings=(*best.warnings, *refused))
        return best, found[best.form][1]

    async def _ask_quote(self, request: MapRequest, bins: tuple[SizeBin, ...]) -> Quote:
        message = quote_request_to_message(
            QuoteRequest(request.bundle.digest, bins, request.data, request.pool_id, request.options)
        )
        answer = await self._connection.call(lambda jobs: jobs.QuoteMapJob(message, timeout=CALL_TIMEOUT_S))
        return quote_from_message(answer)

    async def inspected(self, bundle: Bundle, *, wait_s: float = INSPECTION_WAIT_S) -> BundleState:
        """Registers `bundle` and waits until it is inspected.

        Raises DEADLINE_EXCEEDED when nobody does, and what `register` raises.
        """
        await self.register(bundle)
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            state = await self.bundle_state(bundle.digest)
            if state is not None and state.state != "inspecting":
                return state
            if asyncio.get_running_loop().time() >= deadline:
                raise FallowError(
                    Reason.DEADLINE_EXCEEDED,
                    f"no inspection after {wait_s:g} s" + (f": {state.reason}" if state and state.reason else ""),
                    hint="inspection needs an operator worker; the operator's `fallow-coordinator start` runs one",
                )
            await asyncio.sleep(INSPECTION_ASK_INTERVAL_S)

    async def job(self, job_id: str) -> AsyncJob:
        """A job of the account, from whatever process it was submitted. Raises JOB_UNKNOWN."""
        job = AsyncJob(self._connection, self._transfers, JobId(job_id))
        await job.status()
        return job

    async def jobs(self, limit: int = JOBS_PER_PAGE) -> list[JobStatus]:
        """The account's jobs, newest first, at most `limit`."""
        found: list[JobStatus] = []
        token = ""
        while len(found) < limit:
            request = job_service_pb2.ListJobsRequest(
                page_size=min(limit - len(found), JOBS_PER_PAGE), page_token=token
            )
            answer = await self._connection.call(lambda jobs: jobs.ListJobs(request, timeout=CALL_TIMEOUT_S))  # noqa: B023
            found += [status_from_message(job) for job in answer.jobs]
            token = answer.next_page_token
            if not token:
                break
        return found

    async def checkpoint(self) -> Checkpoint:
        """The coordinator's signed word on its journal now, which goes on from the one that was seen here last.

        Raises EVIDENCE_WRONG when it does not: the coordinator shows another history than before.
        """
        return await follow_checkpoint(self._connection)

    async def balances(self) -> Balances:
        """What the account has now."""
        request = ledger_service_pb2.GetBalancesRequest()
        answer = await self._connection.call_ledger(lambda ledger: ledger.GetBalances(request, timeout=CALL_TIMEOUT_S))
        return balances_from(answer.balances)

    async def statement(self, *, since_ms: int = 0, until_ms: int = 0) -> Statement:
        """What came and went from `since_ms` (0: the beginning) to before `until_ms` (0: now), the oldest first."""
        lines: list[StatementLine] = []
        token = ""
        while True:
            request = ledger_service_pb2.GetStatementRequest(
                since=moment_to_message(since_ms) if since_ms else None,
                until=moment_to_message(until_ms) if until_ms else None,
                page_token=token,
            )
            answer = await self._connection.call_ledger(
                lambda ledger: ledger.GetStatement(request, timeout=CALL_TIMEOUT_S)  # noqa: B023
            )
            lines += lines_from(answer)
            token = answer.next_page_token
            if not token:
                break
        return Statement(
            lines=tuple(lines),
            opening={one.book: one.microcredits for one in answer.opening},
            closing={one.book: one.microcredits for one in answer.closing},
            sequence=answer.sequence,
        )

    async def register(self, bundle: Bundle) -> None:
        """Makes `bundle` known to the coordinator, which has it inspected; `map` does it by itself.

        Raises PROGRAM_REFUSED or PROGRAM_HELD with the reasons, BUNDLE_INVALID.
        """
        if bundle.digest in self._registered:
            return
        state = await self.bundle_state(bundle.digest)
        if state is None:
            uploads: list[Upload] = []
            for file in bundle.manifest.files:
                source = bundle.files[file.name]
                if bundle_file(file.name, source) != file:
                    raise FallowError(
                        Reason.BUNDLE_INVALID,
                        f"{source!r} was changed after the bundle was made",
                        field=f"files[{file.name}]",
                    )
                uploads.append(Upload(BlobReference(file.digest, file.length_bytes), BlobKind.OPAQUE, source))
            await self._transfers.upload(uploads)
            request = job_service_pb2.RegisterBundleRequest(manifest=bundle.manifest_bytes)
            answer = await self._connection.call(lambda jobs: jobs.RegisterBundle(request, timeout=CALL_TIMEOUT_S))
            state = _bundle_state(answer.status)
        if state.state == "refused":
            refusals = "; ".join(state.report.refusals) if state.report is not None else state.reason
            raise FallowError(
                Reason.PROGRAM_REFUSED, f"bundle {bundle.manifest.name!r} was refused: {refusals}", field="bundle"
            )
        if state.state == "held":
            raise FallowError(
                Reason.PROGRAM_HELD, f"bundle {bundle.manifest.name!r} is held: {state.reason}", field="bundle"
            )
        self._registered.add(bundle.digest)

    async def bundle_state(self, digest: Digest) -> BundleState | None:
        """What the coordinator knows of a bundle; None when it is not registered in this account."""
        request = job_service_pb2.GetBundleRequest(bundle_digest=digest)
        try:
            answer = await self._connection.call(lambda jobs: jobs.GetBundle(request, timeout=CALL_TIMEOUT_S))
        except FallowError as error:
            if error.reason is Reason.BUNDLE_UNKNOWN:
                return None
            raise
        return _bundle_state(answer.status)

    async def _submit(self, request: job_service_pb2.SubmitMapJobRequest, bundle: Bundle) -> JobId:
        try:
            answer = await self._connection.call(lambda jobs: jobs.SubmitMapJob(request, timeout=CALL_TIMEOUT_S))
        except FallowError as error:
            if error.reason is not Reason.BUNDLE_UNKNOWN:
                raise
            # It was registered when this client began, and is no longer.
            self._registered.discard(bundle.digest)
            await self.register(bundle)
            answer = await self._connection.call(lambda jobs: jobs.SubmitMapJob(request, timeout=CALL_TIMEOUT_S))
        return JobId(answer.job_id)


async def _session(connection: Connection) -> Session:
    protocol = identity_pb2.ProtocolVersion(
        version=PROTOCOL_VERSION, min_supported=PROTOCOL_VERSION_MIN_SUPPORTED, software="fallow"
    )
    request = job_service_pb2.GetSessionRequest(protocol=protocol)
    answer = await connection.call(lambda jobs: jobs.GetSession(request, timeout=CALL_TIMEOUT_S))
    if answer.protocol.version < PROTOCOL_VERSION_MIN_SUPPORTED:
        raise FallowError(
            Reason.PROTOCOL_TOO_OLD,
            f"the coordinator speaks protocol {answer.protocol.version}",
            limit=f"{PROTOCOL_VERSION_MIN_SUPPORTED} or newer",
            hint="ask its operator to upgrade fallow",
        )
    return Session(answer.party_id, answer.account_id, answer.pool_id, answer.pool_mode or PoolMode.DONATION)


def _bundle_state(message: job_service_pb2.BundleStatus) -> BundleState:
    return BundleState(
        digest=Digest(message.bundle_digest),
        state=_STATES.get(message.state, "unknown"),
        reason=message.reason,
        report=report_from_message(message.report) if message.HasField("report") else None,
    )


def _key(given: str | bytes | None) -> bytes:
    """An idempotency key: chance when none is given, a digest for text of any length."""
    if given is None:
        return secrets.token_bytes(IDEMPOTENCY_KEY_BYTES)
    return hashlib.sha256(given.encode()).digest() if isinstance(given, str) else given


def _milliseconds(retention: timedelta) -> int:
    """A retention in milliseconds. Raises FIELD_INVALID unless it is positive."""
    milliseconds = retention // timedelta(milliseconds=1)
    if milliseconds < 1:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a retention of {retention}",
            field="retention",
            limit="1 second to 366 days",
            hint="`job.delete()` lets go of results at once",
        )
    return milliseconds
