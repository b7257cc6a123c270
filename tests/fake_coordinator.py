"""A coordinator and blob service in one process, over real mTLS, that breaks when told: for tests of clients alone.

It keeps blobs and jobs in memory and computes rows with a Python function. Calls fail, streams end and grants expire as
many times as a test asks for.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np

from fallow.credentials import Credentials, key_of_folder, pem_of
from fallow.errors import FallowError, Reason
from fallow.explanation import JobExplanation, Obstacle
from fallow.identity import BLOBS_NAME, CONTROL_NAME, PrivateKey
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, PartyId, PoolId, digest_of
from fallow.job import JobProgress, JobRowFailure, JobState, JobStatus, RowSpan, TaskResult, WorkerShare
from fallow.limits import BLOB_CHUNK_BYTES, INLINE_PAYLOAD_BYTES_MAX
from fallow.quote import Quote, QuoteRequest, Shortfall
from fallow.roles import Role
from fallow.row_block import RowBlock, pack_selection
from fallow.rows import DecodedRows, RowCodec
from fallow.session import BlobReference, Cause, SignedBytes
from fallow.v1 import blob_service_pb2, blob_service_pb2_grpc, job_service_pb2, job_service_pb2_grpc
from fallow.wire.blob import (
    BlobKind,
    BlobOperation,
    Grant,
    decode_grant,
    encode_grant,
    grant_to_message,
    receipt_to_message,
    reference_from_message,
)
from fallow.wire.bundle import decode_manifest
from fallow.wire.chunks import LET_IN_METADATA
from fallow.wire.errors import ERROR_METADATA_KEY, encode_error
from fallow.wire.explanation import job_explanation_to_message
from fallow.wire.job import result_to_message, shares_to_messages, status_to_message
from fallow.wire.quote import quote_request_from_message, quote_to_message
from fallow.wire.schema import encode_schema
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.service.authority import Authority

Compute = Callable[[DecodedRows], dict[str, Any]]
"""Output columns for the input columns of some rows."""


@dataclass
class FakeJob:
    """A submitted job and the results it has so far."""

    request: job_service_pb2.SubmitMapJobRequest
    results: list[tuple[TaskResult, bytes]] = field(default_factory=list)
    state: JobState = JobState.RUNNING
    reason: str = ""
    rows: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Faults:
    """What goes wrong next, each counted down."""

    calls: Counter[str] = field(default_factory=Counter)
    """Method name: how many calls of it find the coordinator away."""
    expired_grants: int = 0
    watch_breaks: list[int] = field(default_factory=list)
    """After how many messages each of the next watches breaks."""
    watch_ends_early: int = 0
    """Watches that end without a final status."""
    put_breaks_after_bytes: list[int] = field(default_factory=list)
    get_breaks_after_chunks: list[int] = field(default_factory=list)


def quote_of(request: QuoteRequest) -> Quote:
    """One unit and 2,000 micro-credits for each row, one worker that fits."""
    rows = sum(group.rows for group in request.bins)
    return Quote(
        bundle_digest=request.bundle_digest,
        rows=rows,
        unit_micros=rows * 1_000_000,
        learned_permille=1_000,
        pool_id=request.pool_id or "pool-1",
        pool_mode="market",
        policy="unverified",
        price_microcredits_per_unit=2_000,
        price_microcredits_per_1000_rows=2_000_000,
        price_microcredits=rows * 2_000,
        budget_microcredits=rows * 2_400,
        wait_ms=0,
        run_ms=rows * 1_000,
        end_at_ms=1_800_000_000_000,
        millijoules=rows * 10_000,
        energy_source="rule-of-thumb",
        micrograms=0,
        carbon_known=False,
        checking_permille=0,
        workers_considered=3,
        workers_fitting=1,
        workers_free=1,
        own_workers=0,
        fallen_out=(Shortfall("tier", 2, "its tier may not see rows of this data class", "declare the rows public"),),
    )


class FakeCoordinator(job_service_pb2_grpc.JobServiceServicer, blob_service_pb2_grpc.BlobServiceServicer):
    """Start it, give its `credentials` to a client, and arrange faults."""

    def __init__(self, folder: Path, compute: Compute, *, task_rows: int = 3, inline: bool = True) -> None:
        self.compute = compute
        self.task_rows = task_rows
        self.inline = inline
        self.order: Callable[[list[TaskResult]], list[TaskResult]] = lambda results: results
        self.failing: dict[int, str] = {}
        """Job positions that fail, and why."""
        self.corrections: list[tuple[int, TaskResult, bytes]] = []
        self.finishes = True
        self.final = JobState.SUCCEEDED
        self.faults = Faults()
        self.blobs: dict[Digest, bytes] = {}
        self.partial: dict[Digest, bytearray] = {}
        self.bundles: dict[Digest, bytes] = {}
        self.refusals: tuple[str, ...] = ()
        self.jobs: dict[str, FakeJob] = {}
        self.keys: dict[bytes, str] = {}
        self.pool_mode = "donation"
        self.quote: Callable[[QuoteRequest], Quote] = quote_of
        self.quotes_asked: list[QuoteRequest] = []
        self.submitted: list[Any] = []
        """Every SubmitMapJobRequest that came."""
        self.seen: Counter[str] = Counter()
        """How often each method was called."""
        self._server: grpc.aio.Server | None = None
        self._port = 0
        now = datetime.datetime.now(datetime.UTC)
        self._authority = Authority.open(folder / "authority", now)
        self._key = PrivateKey.generate()
        self._certificate = self._authority.server_certificate(
            self._key.raw.public_key(), [CONTROL_NAME, BLOBS_NAME], now
        )
        self._folder = folder / "client"

    async def start(self) -> None:
        """Listens, on the same port as before."""
        options = [("grpc.so_reuseport", 0)]
        server = grpc.aio.server(options=options)
        job_service_pb2_grpc.add_JobServiceServicer_to_server(self, server)
        blob_service_pb2_grpc.add_BlobServiceServicer_to_server(self, server)
        pairs = [(self._key.pem, self._certificate)]
        tls = grpc.ssl_server_credentials(pairs, self._authority.certificate_pem, require_client_auth=True)
        self._port = server.add_secure_port(f"127.0.0.1:{self._port}", tls)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Goes away at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def credentials(self) -> Path:
        """The folder of a client's credentials, made on first use."""
        if not (self._folder / "certificate.pem").exists():
            key = key_of_folder(self._folder)
            granted = CertificateGranted(
                party_id=PartyId("party-1"),
                account_id=AccountId("account-1"),
                role=Role.CLIENT,
                tier=None,
                pool_id=PoolId("pool-1"),
                serial=b"\x01",
                not_after_ms=int(time.time() * 1000) + 24 * 3_600_000,
            )
            now = datetime.datetime.now(datetime.UTC)
            endpoint = f"127.0.0.1:{self._port}"
            Credentials(
                folder=self._folder,
                key=key,
                certificate_pem=pem_of(self._authority.party_certificate(key.raw.public_key(), granted, now)),
                authority_pem=self._authority.certificate_pem,
                party_id=granted.party_id,
                account_id=granted.account_id,
                role=granted.role,
                tier=None,
                pool_id=granted.pool_id,
                enrollment_endpoint=endpoint,
                control_endpoint=endpoint,
                blob_endpoint=endpoint,
                coordinator_public_key=self._key.public_der,
            ).save()
        return self._folder

    def finish(self, job_id: str, state: JobState, reason: str = "") -> None:
        """Ends a job."""
        self.jobs[job_id].state, self.jobs[job_id].reason = state, reason
        self.jobs[job_id].ended.set()

    # ------------------------------------------------------------------------------------------------------- jobs

    async def GetSession(self, request: Any, context: Any) -> Any:
        await self._arrive("GetSession", context)
        return job_service_pb2.GetSessionResponse(
            protocol=request.protocol,
            party_id="party-1",
            account_id="account-1",
            pool_id="pool-1",
            pool_mode=self.pool_mode,
        )

    async def GrantUploads(self, request: Any, context: Any) -> Any:
        await self._arrive("GrantUploads", context)
        answers = []
        for upload in request.uploads:
            blob = reference_from_message(upload.blob, "blob")
            if blob.digest in self.blobs:
                answers.append(job_service_pb2.UploadGranted(have=True))
            else:
                answers.append(job_service_pb2.UploadGranted(grant=grant_to_message(_grant(blob))))
        return job_service_pb2.GrantUploadsResponse(uploads=answers)

    async def RecordUploads(self, request: Any, context: Any) -> Any:
        await self._arrive("RecordUploads", context)
        for receipt in request.receipts:
            assert Digest(receipt.receipt) in self.blobs
        return job_service_pb2.RecordUploadsResponse()

    async def GrantDownloads(self, request: Any, context: Any) -> Any:
        await self._arrive("GrantDownloads", context)
        for digest in request.digests:
            if Digest(digest) not in self.blobs:
                await _abort(context, grpc.StatusCode.NOT_FOUND, FallowError(Reason.BLOB_UNKNOWN, "no such blob"))
        grants = [_grant(BlobReference(Digest(d), len(self.blobs[Digest(d)]))) for d in request.digests]
        return job_service_pb2.GrantDownloadsResponse(grants=[grant_to_message(grant) for grant in grants])

    async def RegisterBundle(self, request: Any, context: Any) -> Any:
        await self._arrive("RegisterBundle", context)
        for file in decode_manifest(request.manifest).files:
            assert file.digest in self.blobs, "files come before the manifest"
        digest = digest_of(request.manifest)
        self.bundles[digest] = request.manifest
        return job_service_pb2.RegisterBundleResponse(status=self._bundle_status(digest))

    async def GetBundle(self, request: Any, context: Any) -> Any:
        await self._arrive("GetBundle", context)
        digest = Digest(request.bundle_digest)
        if digest not in self.bundles:
            await _abort(context, grpc.StatusCode.NOT_FOUND, FallowError(Reason.BUNDLE_UNKNOWN, "no such bundle"))
        return job_service_pb2.GetBundleResponse(status=self._bundle_status(digest))

    async def SubmitMapJob(self, request: Any, context: Any) -> Any:
        self.submitted.append(request)
        if request.idempotency_key not in self.keys and Digest(request.bundle_digest) in self.bundles:
            job_id = f"job-{len(self.jobs) + 1}"
            self.keys[request.idempotency_key] = job_id
            self.jobs[job_id] = self._computed(request)
        # The job is there, and yet the caller may never hear of it.
        await self._arrive("SubmitMapJob", context)
        if Digest(request.bundle_digest) not in self.bundles:
            await _abort(context, grpc.StatusCode.NOT_FOUND, FallowError(Reason.BUNDLE_UNKNOWN, "no such bundle"))
        return job_service_pb2.SubmitMapJobResponse(job_id=self.keys[request.idempotency_key])

    async def QuoteMapJob(self, request: Any, context: Any) -> Any:
        await self._arrive("QuoteMapJob", context)
        asked = quote_request_from_message(request)
        self.quotes_asked.append(asked)
        return quote_to_message(self.quote(asked))

    async def GetJob(self, request: Any, context: Any) -> Any:
        await self._arrive("GetJob", context)
        await self._job(request.job_id, context)
        status = status_to_message(self._status(request.job_id))
        shares = [WorkerShare("worker-1", 0, 4), WorkerShare("worker-1", 1, 3), WorkerShare("worker-2", 0, 1)]
        return job_service_pb2.GetJobResponse(job=status, shares=shares_to_messages(shares))

    async def ExplainJob(self, request: Any, context: Any) -> Any:
        await self._arrive("ExplainJob", context)
        await self._job(request.job_id, context)
        status = self._status(request.job_id)
        away = Obstacle("away", 3, "it is not connected", "start it")
        told = JobExplanation(status.job_id, status.state, 5, 2, 0, (away,), (Obstacle("BUSY", 2, "busy"),), 1, 2, 30)
        return job_service_pb2.ExplainJobResponse(explanation=job_explanation_to_message(told))

    async def ListJobs(self, request: Any, context: Any) -> Any:
        await self._arrive("ListJobs", context)
        ids = sorted(self.jobs, key=lambda job_id: -int(job_id.removeprefix("job-")))
        first = int(request.page_token or "0")
        page = ids[first : first + min(request.page_size, 2)]
        following = str(first + len(page)) if first + len(page) < len(ids) else ""
        statuses = [status_to_message(self._status(job_id)) for job_id in page]
        return job_service_pb2.ListJobsResponse(jobs=statuses, next_page_token=following)

    async def CancelJob(self, request: Any, context: Any) -> Any:
        await self._arrive("CancelJob", context)
        await self._job(request.job_id, context)
        if self.jobs[request.job_id].state is JobState.RUNNING:
            self.finish(request.job_id, JobState.CANCELLED)
        return job_service_pb2.CancelJobResponse(job=status_to_message(self._status(request.job_id)))

    async def AcceptJob(self, request: Any, context: Any) -> Any:
        await self._arrive("AcceptJob", context)
        await self._job(request.job_id, context)
        if self.jobs[request.job_id].state is JobState.VERIFYING:
            self.finish(request.job_id, JobState.SUCCEEDED)
        return job_service_pb2.AcceptJobResponse(job=status_to_message(self._status(request.job_id)))

    async def DeleteJob(self, request: Any, context: Any) -> Any:
        await self._arrive("DeleteJob", context)
        job = await self._job(request.job_id, context)
        if job.state is JobState.RUNNING:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, FallowError(Reason.JOB_UNFINISHED, "it runs"))
        return job_service_pb2.DeleteJobResponse(job=status_to_message(self._status(request.job_id)))

    async def GetJobSubmission(self, request: Any, context: Any) -> Any:
        await self._arrive("GetJobSubmission", context)
        job = await self._job(request.job_id, context)
        page = job_service_pb2.SubmitMapJobRequest()
        page.CopyFrom(job.request)
        page.idempotency_key = b""
        blocks = list(page.blocks)
        del page.blocks[:]
        page.blocks.extend(blocks[request.first_block : request.first_block + 1])
        return job_service_pb2.GetJobSubmissionResponse(submission=page, blocks=len(blocks))

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._arrive("WatchJob", context)
        job = await self._job(request.job_id, context)
        breaks_after = self.faults.watch_breaks.pop(0) if self.faults.watch_breaks else None
        sent = 0
        if job.state is JobState.RUNNING:
            yield job_service_pb2.WatchJobResponse(status=status_to_message(self._status(request.job_id)))
        if not request.status_only:
            for result, inline in job.results:
                if result.cursor <= request.cursor:
                    continue
                if sent == breaks_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
                sent += 1
                yield job_service_pb2.WatchJobResponse(result=result_to_message(result, inline))
        if self.faults.watch_ends_early:
            self.faults.watch_ends_early -= 1
            return
        await job.ended.wait()
        yield job_service_pb2.WatchJobResponse(status=status_to_message(self._status(request.job_id)))

    # ------------------------------------------------------------------------------------------------------ blobs

    async def GetUpload(self, request: Any, context: Any) -> Any:
        await self._arrive("GetUpload", context)
        digest = _granted(request.grant)
        if digest in self.blobs:
            receipt = receipt_to_message(SignedBytes(digest, b"signed"))
            return blob_service_pb2.GetUploadResponse(offset_bytes=len(self.blobs[digest]), receipt=receipt)
        return blob_service_pb2.GetUploadResponse(offset_bytes=len(self.partial.get(digest, b"")))

    async def Put(self, requests: Any, context: Any) -> Any:
        await self._arrive("Put", context)
        await self._check_grant(context)
        stored = bytearray()
        digest = Digest(b"")
        breaks_after = self.faults.put_breaks_after_bytes.pop(0) if self.faults.put_breaks_after_bytes else None
        first = True
        async for part in requests:
            if first:
                first = False
                digest = _granted(part.grant)
                stored = self.partial.setdefault(digest, bytearray())
                if part.offset_bytes != len(stored):
                    error = FallowError(Reason.OFFSET_MISMATCH, f"the upload stands at {len(stored)}")
                    await _abort(context, grpc.StatusCode.OUT_OF_RANGE, error)
                # Lets the rest of the upload in.
                await context.send_initial_metadata(((LET_IN_METADATA, "1"),))
            assert len(part.chunk) <= BLOB_CHUNK_BYTES
            stored += part.chunk
            if breaks_after is not None and len(stored) >= breaks_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        data = bytes(self.partial.pop(digest))
        if digest_of(data) != digest:
            await _abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, FallowError(Reason.DIGEST_MISMATCH, "not that blob")
            )
        self.blobs[digest] = data
        return blob_service_pb2.PutResponse(receipt=receipt_to_message(SignedBytes(digest, b"signed")))

    async def Get(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._arrive("Get", context)
        await self._check_grant(context)
        data = self.blobs[_granted(request.grant)]
        breaks_after = self.faults.get_breaks_after_chunks.pop(0) if self.faults.get_breaks_after_chunks else None
        for count, start in enumerate(range(request.offset_bytes, len(data), 1000)):
            if count == breaks_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            yield blob_service_pb2.GetResponse(chunk=data[start : start + 1000])

    async def Pack(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "for the coordinator only")

    async def PackRows(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "for the coordinator only")

    async def CompareRows(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "for the coordinator only")

    async def ListBlobs(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "for the coordinator only")

    async def LocateBlob(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "older services do not know it")

    async def DeleteBlobs(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "for the coordinator only")

    # ----------------------------------------------------------------------------------------------------- inside

    async def _arrive(self, method: str, context: Any) -> None:
        self.seen[method] += 1
        if self.faults.calls[method]:
            self.faults.calls[method] -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody is here")

    async def _check_grant(self, context: Any) -> None:
        if self.faults.expired_grants:
            self.faults.expired_grants -= 1
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, FallowError(Reason.GRANT_EXPIRED, "too late"))

    async def _job(self, job_id: str, context: Any) -> FakeJob:
        if job_id not in self.jobs:
            await _abort(context, grpc.StatusCode.NOT_FOUND, FallowError(Reason.JOB_UNKNOWN, f"no job {job_id}"))
        return self.jobs[job_id]

    def _bundle_status(self, digest: Digest) -> job_service_pb2.BundleStatus:
        refused = job_service_pb2.BUNDLE_STATE_REFUSED
        state = refused if self.refusals else job_service_pb2.BUNDLE_STATE_ACCEPTED
        reason = "; ".join(self.refusals)
        return job_service_pb2.BundleStatus(bundle_digest=digest, state=state, reason=reason)

    def _status(self, job_id: str) -> JobStatus:
        job = self.jobs[job_id]
        manifest = decode_manifest(self.bundles[Digest(job.request.bundle_digest)])
        failed = sum(len(result.failures) for result, _ in job.results)
        return JobStatus(
            job_id=JobId(job_id),
            account_id="account-1",
            pool_id="pool-1",
            state=job.state,
            reason=job.reason,
            reason_code="",
            bundle_digest=Digest(job.request.bundle_digest),
            title=job.request.title,
            data_class={1: "public", 2: "internal", 3: "sensitive"}[job.request.data_class],
            policy="unverified",
            price_microcredits=0,
            submitted_at_ms=1,
            finished_at_ms=0,
            output_schema=encode_schema(manifest.output_schema),
            kept=reference_from_message(job.request.kept, "kept") if job.request.HasField("kept") else None,
            results=len(job.results),
            progress=JobProgress(rows_total=job.rows, rows_done=job.rows - failed, rows_failed=failed),
        )

    def _computed(self, request: job_service_pb2.SubmitMapJobRequest) -> FakeJob:
        manifest = decode_manifest(self.bundles[Digest(request.bundle_digest)])
        inputs = RowCodec(manifest.input_schema, digest_of(encode_schema(manifest.input_schema)))
        blocks = [RowBlock.parse(b.inline_block or self.blobs[Digest(b.blob.digest)]) for b in request.blocks]
        places = [(index, row) for index, block in enumerate(blocks) for row in range(len(block))]
        job = FakeJob(request, rows=len(places))
        results: list[TaskResult] = []
        outputs: dict[int, bytes] = {}
        for first in range(0, len(places), self.task_rows):
            chosen = places[first : first + self.task_rows]
            block = pack_selection(blocks, [(index, row, row + 1) for index, row in chosen], bytes(16))
            span = RowSpan(first, 0, len(chosen))
            result, output = self._result(manifest.output_schema, inputs.decode(RowBlock.parse(block)), [span])
            results.append(result)
            outputs[first] = output
        for cursor, result in zip(itertools.count(1), self.order(results), strict=False):
            job.results.append(self._kept_result(result, cursor, outputs[result.spans[0].job_position]))
        for corrects, result, output in self.corrections:
            kept, inline = self._kept_result(result, len(job.results) + 1, output, corrects)
            job.results.append((kept, inline))
        if self.finishes:
            job.state = self.final
            job.ended.set()
            job.reason = "the test says so" if self.final is JobState.FAILED else ""
        return job

    def _kept_result(
        self, result: TaskResult, cursor: int, output: bytes, corrects: int = 0
    ) -> tuple[TaskResult, bytes]:
        inline = output if self.inline and len(output) <= INLINE_PAYLOAD_BYTES_MAX else b""
        blob = BlobReference(digest_of(output), len(output))
        if not inline:
            self.blobs[blob.digest] = output
        kept = TaskResult(
            cursor=cursor,
            spans=result.spans,
            output=blob,
            failures=result.failures,
            worker_id=result.worker_id,
            node=result.node,
            output_root=RowBlock.parse(output).root(),
            corrects=corrects,
        )
        return kept, inline

    def _result(self, schema: Any, rows: DecodedRows, spans: Sequence[RowSpan]) -> tuple[TaskResult, bytes]:
        (span,) = spans
        wrong = [row for row in range(span.rows) if span.job_position + row in self.failing]
        right = np.asarray([row for row in range(span.rows) if row not in wrong], dtype=np.int64)
        computed = self.compute(rows)
        columns = {
            name: values[right] if isinstance(values, np.ndarray) else [values[row] for row in right]
            for name, values in computed.items()
        }
        codec = RowCodec(schema, digest_of(encode_schema(schema)))
        output = codec.encode(columns, nonce=bytes(16), positions=right, row_count=span.rows)
        failures = tuple(
            JobRowFailure(span.job_position + row, Cause.ROW, self.failing[span.job_position + row]) for row in wrong
        )
        made = TaskResult(0, tuple(spans), None, failures, f"worker-{span.job_position % 2}", 0, None)
        return made, output


def _grant(blob: BlobReference) -> SignedBytes:
    grant = Grant(
        operation=BlobOperation.PUT,
        blob=blob,
        kind=BlobKind.OPAQUE,
        account_id=AccountId("account-1"),
        holder_key_fingerprint=KeyFingerprint(bytes(32)),
        expires_at_ms=0,
    )
    return SignedBytes(encode_grant(grant), b"signed")


def _granted(grant: Any) -> Digest:
    return decode_grant(grant.grant).blob.digest


async def _abort(context: Any, status: grpc.StatusCode, error: FallowError) -> NoReturn:
    await context.abort(status, error.message, ((ERROR_METADATA_KEY, encode_error(error)),))
    raise AssertionError("an abort does not return")
