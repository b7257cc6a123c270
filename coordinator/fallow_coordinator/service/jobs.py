"""Jobs for submitters: uploads, bundles, submission, status, results. Everything is seen from the caller's account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Final

import grpc

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId, PoolId, digest_of
from fallow.job import JOB_STATES_FINAL, DatasetBlock
from fallow.limits import (
    GRANTS_PER_REQUEST_MAX,
    INLINE_PAYLOAD_BYTES_MAX,
    JOB_BLOCKS_MAX,
    MANIFEST_BYTES_MAX,
    TITLE_BYTES_MAX,
)
from fallow.roles import Role
from fallow.schema import Schema, SizeFeature, TensorColumn
from fallow.session import BlobReference
from fallow.v1 import job_pb2
from fallow.v1 import job_service_pb2 as pb
from fallow.wire.blob import (
    BLOB_KINDS,
    BlobKind,
    digest_from,
    grant_to_message,
    receipt_from_message,
    reference_from_message,
    reference_to_message,
)
from fallow.wire.bundle import decode_manifest, report_to_message
from fallow.wire.enums import DATA_CLASSES
from fallow.wire.explanation import job_explanation_to_message
from fallow.wire.job import (
    block_from_message,
    block_to_message,
    options_from_message,
    options_to_message,
    result_to_message,
    shares_to_messages,
    status_to_message,
)
from fallow.wire.quote import quote_request_from_message, quote_to_message
from fallow.wire.schema import encode_schema
from fallow_coordinator.config import CollectionSettings
from fallow_coordinator.core.answers import JobAccepted
from fallow_coordinator.core.blobs import check_blob_quota, record_is_old
from fallow_coordinator.core.commands import (
    AcceptAssurance,
    CancelJob,
    ClaimBlobs,
    DeleteJob,
    RecordBlobs,
    RegisterBundle,
    StoredBlob,
    SubmitMapJob,
)
from fallow_coordinator.core.events import JobDeleted
from fallow_coordinator.core.explaining import explain_ended, explain_job
from fallow_coordinator.core.questions import BundleStatus, bundle_status
from fallow_coordinator.core.quotes import quote
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.auth import Caller, Doorkeeper
from fallow_coordinator.service.calls import (
    Answer,
    Call,
    Peer,
    RequestT,
    ResponseT,
    method_name,
    server_stream,
    service_handlers,
    unary,
)
from fallow_coordinator.service.grants import Grants, Holder, stored_blob
from fallow_coordinator.service.inline_blocks import inspected_block
from fallow_coordinator.service.job_reads import JobReads, check_not_deleted
from fallow_coordinator.service.live_streams import LiveStreams
from fallow_coordinator.service.outbox import Outbox
from fallow_coordinator.service.protocol import check_protocol, spoken
from fallow_coordinator.service.rate_limit import RateLimit

IDEMPOTENCY_KEY_BYTES: Final = (16, 64)
PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1_000
GRANTS_OF_ONE_CALL: Final = 20
"""So many signatures take about as long as a call of another kind."""
EXPLANATION_COST: Final = 10.0
"""Looking at every worker takes as long as so many calls of another kind."""
BLOCKS_PER_PAGE: Final = 2_000
"""Blocks of a dataset told at a time."""
BLOCKS_OF_ONE_CALL: Final = 200
LOOKED_AT_OF_ONE_CALL: Final = 200
"""Looking at so many workers and jobs takes about as long as a call of another kind."""
RESULTS_PER_READ_MAX: Final = 64
"""Results looked up at a time for one watcher: with inline outputs at most 4 MiB are held for it."""
STATUS_INTERVAL_S: Final = 0.2
"""A watcher hears of progress no more often than this; results come at once."""
WATCH_AGAIN_S: Final = 5.0
"""A watcher looks by itself after so long without being woken."""

_SERVICE = pb.DESCRIPTOR.services_by_name["JobService"]


class JobService:
    """All of JobService, for parties of role client or operator."""

    def __init__(
        self,
        *,
        engine: Engine,
        reads: JobReads,
        doorkeeper: Doorkeeper,
        streams: LiveStreams,
        outbox: Outbox,
        grants: Grants,
        blob_service_key: bytes,
        blob_endpoint: str,
        now_ms: Callable[[], int],
        collection: CollectionSettings | None = None,
    ) -> None:
        """`blob_service_key` is the public key whose receipts are believed."""
        self._engine = engine
        self._reads = reads
        self._doorkeeper = doorkeeper
        self._streams = streams
        self._outbox = outbox
        self._grants = grants
        self._blob_service_key = blob_service_key
        self._blob_endpoint = blob_endpoint
        self._now_ms = now_ms
        self._collection = collection or CollectionSettings()

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """All methods; `limit` counts by key."""

        def handler(
            method: str, request_type: type[RequestT], answer: Answer[RequestT, ResponseT]
        ) -> tuple[str, grpc.RpcMethodHandler[bytes, bytes]]:
            return method, unary(method_name(_SERVICE, method), request_type, answer, limit)

        return service_handlers(
            _SERVICE,
            dict(
                (
                    handler("GetSession", pb.GetSessionRequest, self.get_session),
                    handler("GrantUploads", pb.GrantUploadsRequest, self.grant_uploads),
                    handler("RecordUploads", pb.RecordUploadsRequest, self.record_uploads),
                    handler("GrantDownloads", pb.GrantDownloadsRequest, self.grant_downloads),
                    handler("RegisterBundle", pb.RegisterBundleRequest, self.register_bundle),
                    handler("GetBundle", pb.GetBundleRequest, self.get_bundle),
                    handler("SubmitMapJob", pb.SubmitMapJobRequest, self.submit_map_job),
                    handler("QuoteMapJob", pb.QuoteMapJobRequest, self.quote_map_job),
                    handler("GetJob", pb.GetJobRequest, self.get_job),
                    handler("ExplainJob", pb.ExplainJobRequest, self.explain_job),
                    handler("ListJobs", pb.ListJobsRequest, self.list_jobs),
                    handler("CancelJob", pb.CancelJobRequest, self.cancel_job),
                    handler("AcceptJob", pb.AcceptJobRequest, self.accept_job),
                    handler("DeleteJob", pb.DeleteJobRequest, self.delete_job),
                    handler("GetJobSubmission", pb.GetJobSubmissionRequest, self.get_job_submission),
                    (
                        "WatchJob",
                        server_stream(method_name(_SERVICE, "WatchJob"), pb.WatchJobRequest, self.watch_job, limit),
                    ),
                )
            ),
        )

    async def _caller(self, peer: Peer) -> Caller:
        return await self._doorkeeper.admit(peer, Role.CLIENT, Role.OPERATOR)

    # ------------------------------------------------------------------------------------------- session, blobs

    async def get_session(self, call: Call[pb.GetSessionRequest]) -> pb.GetSessionResponse:
        """Who the caller is and where blobs go."""
        caller = await self._caller(call.peer)
        check_protocol(call.request.protocol)
        return pb.GetSessionResponse(
            protocol=spoken(),
            party_id=caller.party_id,
            account_id=caller.account_id,
            pool_id=caller.pool_id,
            blob_endpoint=self._blob_endpoint,
            pool_mode=self._engine.state.pools[caller.pool_id].mode.value,
        )

    async def grant_uploads(self, call: Call[pb.GrantUploadsRequest]) -> pb.GrantUploadsResponse:
        """Have, or a grant to put, for each blob; other accounts' blobs do not count."""
        caller = await self._caller(call.peer)
        wanted = call.request.uploads
        check_count(len(wanted), GRANTS_PER_REQUEST_MAX, "uploads")
        call.charge(len(wanted) / GRANTS_OF_ONE_CALL)
        asked = [
            (
                reference_from_message(item.blob, f"uploads[{index}].blob"),
                BLOB_KINDS.member(item.kind, f"uploads[{index}].kind"),
            )
            for index, item in enumerate(wanted)
        ]
        holder, now_ms = Holder(caller.key_fingerprint, caller.account_id), self._now_ms()
        await self._claim(caller, [blob.digest for blob, _ in asked])
        account = self._engine.state.accounts[caller.account_id]
        owned = account.blobs
        lacking = {blob.digest: blob.length_bytes for blob, _ in asked if blob.digest not in owned}
        check_blob_quota(account, sum(lacking.values()))
        answers: list[pb.UploadGranted] = []
        for blob, kind in asked:
            known = owned.get(blob.digest)
            if known is not None and (kind is BlobKind.OPAQUE or known.rows):
                answers.append(pb.UploadGranted(have=True))
            else:
                grant = self._grants.put(blob, holder, now_ms=now_ms, kind=kind)
                answers.append(pb.UploadGranted(grant=grant_to_message(grant)))
        return pb.GrantUploadsResponse(uploads=answers)

    async def _claim(self, caller: Caller, digests: Sequence[Digest]) -> None:
        """Whoever is told that a blob is there can rely on it for half of the grace at least."""
        account, grace_ms = self._engine.state.accounts[caller.account_id], self._collection.upload_grace_ms
        now_ms = self._now_ms()
        if any(record_is_old(account, digest, now_ms=now_ms, grace_ms=grace_ms) for digest in digests):
            await self._engine.submit(ClaimBlobs(caller.account_id, tuple(digests), grace_ms))

    async def record_uploads(self, call: Call[pb.RecordUploadsRequest]) -> pb.RecordUploadsResponse:
        """The receipts' blobs belong to the caller's account from now on."""
        caller = await self._caller(call.peer)
        receipts = call.request.receipts
        check_count(len(receipts), GRANTS_PER_REQUEST_MAX, "receipts")
        stored = tuple(
            stored_blob(
                receipt_from_message(receipt),
                self._blob_service_key,
                caller.account_id,
                f"receipts[{index}]",
                issued_after_ms=self._now_ms() - self._collection.receipt_valid_ms,
            )
            for index, receipt in enumerate(receipts)
        )
        if stored:
            await self._engine.submit(RecordBlobs(caller.account_id, stored, self._collection.upload_grace_ms))
        return pb.RecordUploadsResponse()

    async def grant_downloads(self, call: Call[pb.GrantDownloadsRequest]) -> pb.GrantDownloadsResponse:
        """A grant to get for each digest, if all of them are the account's."""
        caller = await self._caller(call.peer)
        check_count(len(call.request.digests), GRANTS_PER_REQUEST_MAX, "digests")
        call.charge(len(call.request.digests) / GRANTS_OF_ONE_CALL)
        digests = [digest_from(digest, f"digests[{index}]") for index, digest in enumerate(call.request.digests)]
        blobs = await self._reads.owned_blobs(caller.account_id, digests)
        holder, now_ms = Holder(caller.key_fingerprint, caller.account_id), self._now_ms()
        grants = [grant_to_message(self._grants.get(blob, holder, now_ms=now_ms)) for blob in blobs]
        return pb.GrantDownloadsResponse(grants=grants)

    # ------------------------------------------------------------------------------------------- bundles

    async def register_bundle(self, call: Call[pb.RegisterBundleRequest]) -> pb.RegisterBundleResponse:
        """The bundle, known and on its way to inspection."""
        caller = await self._caller(call.peer)
        manifest_bytes = call.request.manifest
        if not 1 <= len(manifest_bytes) <= MANIFEST_BYTES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED if manifest_bytes else Reason.FIELD_MISSING,
                f"a manifest of {len(manifest_bytes)} bytes",
                field="manifest",
                limit=f"1 to {MANIFEST_BYTES_MAX} bytes",
            )
        manifest = decode_manifest(manifest_bytes)
        bundle_digest = digest_of(manifest_bytes)
        features = manifest.input_schema.size_features
        await self._engine.submit(
            RegisterBundle(
                account_id=caller.account_id,
                party_id=caller.party_id,
                bundle_digest=bundle_digest,
                files=tuple(BlobReference(file.digest, file.length_bytes) for file in manifest.files),
                input_schema_digest=digest_of(encode_schema(manifest.input_schema)),
                output_schema_digest=digest_of(encode_schema(manifest.output_schema)),
                size_feature_count=len(features),
                bytes_feature_index=features.index(SizeFeature.BYTES) if SizeFeature.BYTES in features else -1,
                output_row_bytes=_fixed_bytes(manifest.output_schema),
            ),
            {bundle_digest: manifest_bytes},
        )
        return pb.RegisterBundleResponse(status=self._bundle_status(caller, bundle_digest))

    async def get_bundle(self, call: Call[pb.GetBundleRequest]) -> pb.GetBundleResponse:
        """What is known of a bundle of the account."""
        caller = await self._caller(call.peer)
        digest = digest_from(call.request.bundle_digest, "bundle_digest")
        return pb.GetBundleResponse(status=self._bundle_status(caller, digest))

    def _bundle_status(self, caller: Caller, bundle_digest: Digest) -> pb.BundleStatus:
        bundle = bundle_status(self._engine.state, caller.account_id, bundle_digest)
        if bundle is None:
            raise FallowError(
                Reason.BUNDLE_UNKNOWN, "this account has no such bundle", field="bundle_digest", hint="register it"
            )
        state, reason = _state_of_bundle(bundle)
        return pb.BundleStatus(
            bundle_digest=bundle_digest,
            state=state,
            reason=reason,
            report=report_to_message(bundle.report) if bundle.report is not None else None,
            manifest=self._engine.payload(bundle_digest) or b"",
        )

    # ------------------------------------------------------------------------------------------- jobs

    async def submit_map_job(self, call: Call[pb.SubmitMapJobRequest]) -> pb.SubmitMapJobResponse:
        """The job, or the one that the same key made before."""
        caller = await self._caller(call.peer)
        command, payloads = submission(call, caller)
        decision = await self._engine.submit(command, payloads)
        answer = decision.answer
        assert isinstance(answer, JobAccepted), "submitting gives a job"
        return pb.SubmitMapJobResponse(job_id=answer.job_id)

    async def quote_map_job(self, call: Call[pb.QuoteMapJobRequest]) -> pb.QuoteMapJobResponse:
        """What such a job would cost here, now."""
        caller = await self._caller(call.peer)
        request = quote_request_from_message(call.request)
        state = self._engine.state
        call.charge((len(state.workers) + len(state.jobs)) / LOOKED_AT_OF_ONE_CALL)
        answer = quote(
            state, caller.account_id, replace(request, pool_id=request.pool_id or caller.pool_id), self._now_ms()
        )
        return quote_to_message(answer)

    async def get_job(self, call: Call[pb.GetJobRequest]) -> pb.GetJobResponse:
        """One job now."""
        caller = await self._caller(call.peer)
        job_id = JobId(call.request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        shares = await self._reads.shares(job_id)
        return pb.GetJobResponse(job=status_to_message(status), shares=shares_to_messages(shares))

    async def explain_job(self, call: Call[pb.ExplainJobRequest]) -> pb.ExplainJobResponse:
        """Why one job waits."""
        caller = await self._caller(call.peer)
        call.charge(EXPLANATION_COST)
        job_id = JobId(call.request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        now_ms = self._now_ms()
        told = await self._engine.read(lambda state: explain_job(state, job_id, now_ms))
        return pb.ExplainJobResponse(explanation=job_explanation_to_message(told or explain_ended(status)))

    async def list_jobs(self, call: Call[pb.ListJobsRequest]) -> pb.ListJobsResponse:
        """A page of the account's jobs, newest first."""
        caller = await self._caller(call.peer)
        size = call.request.page_size or PAGE_SIZE_DEFAULT
        check_count(size, PAGE_SIZE_MAX, "page_size")
        before = _page_position(call.request.page_token)
        jobs = await self._reads.page(caller.account_id, before=before, limit=size + 1)
        token = f"{jobs[size - 1].submitted_at_ms}:{jobs[size - 1].job_id}" if len(jobs) > size else ""
        return pb.ListJobsResponse(jobs=[status_to_message(job) for job in jobs[:size]], next_page_token=token)

    async def cancel_job(self, call: Call[pb.CancelJobRequest]) -> pb.CancelJobResponse:
        """The job, ended."""
        caller = await self._caller(call.peer)
        job_id = JobId(call.request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        if status.state not in JOB_STATES_FINAL:
            await self._engine.submit(CancelJob(caller.account_id, job_id))
            status = await self._reads.status(caller.account_id, job_id)
        return pb.CancelJobResponse(job=status_to_message(status))

    async def accept_job(self, call: Call[pb.AcceptJobRequest]) -> pb.AcceptJobResponse:
        """The job, ended with the checks that were made by now."""
        caller = await self._caller(call.peer)
        job_id = JobId(call.request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        if status.state not in JOB_STATES_FINAL:
            await self._engine.submit(AcceptAssurance(caller.account_id, job_id))
            status = await self._reads.status(caller.account_id, job_id)
        return pb.AcceptJobResponse(job=status_to_message(status))

    async def get_job_submission(self, call: Call[pb.GetJobSubmissionRequest]) -> pb.GetJobSubmissionResponse:
        """A page of the job's dataset, and how it was to be run."""
        caller = await self._caller(call.peer)
        job = await self._reads.submission(caller.account_id, JobId(call.request.job_id))
        first = call.request.first_block
        page = job.blocks[first : first + BLOCKS_PER_PAGE]
        call.charge(len(page) / BLOCKS_OF_ONE_CALL)
        blocks: list[job_pb2.DatasetBlock] = []
        for block in page:
            data = self._engine.payload(block.blob.digest) if block.inline else b""
            if data is None:
                raise FallowError(
                    Reason.BLOB_UNKNOWN, "the job's inline dataset is gone", field="job_id", hint="submit the rows anew"
                )
            blocks.append(block_to_message(block, data))
        submission = pb.SubmitMapJobRequest(
            bundle_digest=job.bundle_digest,
            blocks=blocks,
            data_class=DATA_CLASSES.number(job.data_class),
            pool_id=job.pool_id,
            title=job.title,
            options=options_to_message(job.options),
            kept=reference_to_message(job.kept) if job.kept is not None else None,
        )
        return pb.GetJobSubmissionResponse(submission=submission, blocks=len(job.blocks))

    async def delete_job(self, call: Call[pb.DeleteJobRequest]) -> pb.DeleteJobResponse:
        """The job, without its results, dataset and kept columns."""
        caller = await self._caller(call.peer)
        job_id = JobId(call.request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        if not status.deleted_at_ms:
            archived = job_id not in self._engine.state.jobs
            decision = await self._engine.submit(DeleteJob(caller.account_id, job_id, archived=archived))
            if any(isinstance(event, JobDeleted) for event in decision.events):
                self._reads.remember_deleted(job_id, self._engine.state.clock_ms)
            status = await self._reads.status(caller.account_id, job_id)
        return pb.DeleteJobResponse(job=status_to_message(status))

    async def watch_job(self, call: Call[pb.WatchJobRequest]) -> AsyncGenerator[pb.WatchJobResponse, None]:
        """Results after the cursor as they settle, progress in between, the final status last."""
        caller = await self._caller(call.peer)
        job_id, cursor = JobId(call.request.job_id), call.request.cursor
        status = await self._reads.status(caller.account_id, job_id)
        if not call.request.status_only:
            check_not_deleted(status)
        if cursor > status.results:
            raise FallowError(
                Reason.OFFSET_MISMATCH,
                f"the job has {status.results} results, none after {cursor}",
                field="cursor",
                limit=f"0 to {status.results}",
            )
        clock = asyncio.get_running_loop().time
        told, told_at = None, 0.0
        with (
            self._streams.open(caller.party_id, caller.not_after_ms) as stream,
            self._outbox.watching(job_id) as changed,
        ):
            while True:
                changed.clear()
                status = await self._reads.status(caller.account_id, job_id)
                final = status.state in JOB_STATES_FINAL
                if not call.request.status_only:
                    check_not_deleted(status)
                while not call.request.status_only and cursor < status.results:
                    batch = await self._reads.results(job_id, after_cursor=cursor, limit=RESULTS_PER_READ_MAX)
                    for result in batch:
                        yield pb.WatchJobResponse(result=result_to_message(result, self._inline(result.output)))
                        cursor = result.cursor
                    if stream.ended.done():
                        raise stream.ended.result()
                    if not batch:
                        break
                if final:
                    yield pb.WatchJobResponse(status=status_to_message(status))
                    return
                if status != told and clock() - told_at >= STATUS_INTERVAL_S:
                    told, told_at = status, clock()
                    yield pb.WatchJobResponse(status=status_to_message(status))
                patience_s = WATCH_AGAIN_S if status == told else STATUS_INTERVAL_S
                await _changed_or_ended(changed, stream.ended, patience_s)

    def _inline(self, output: BlobReference | None) -> bytes:
        """The output block if it is kept inline; empty when the blob service has it."""
        if output is None or output.length_bytes > INLINE_PAYLOAD_BYTES_MAX:
            return b""
        return self._engine.payload(output.digest) or b""


def submission(call: Call[pb.SubmitMapJobRequest], caller: Caller) -> tuple[SubmitMapJob, dict[Digest, bytes]]:
    """The command of a request and its inline blocks. Raises what is wrong with the request, naming the field."""
    request = call.request
    low, high = IDEMPOTENCY_KEY_BYTES
    if not low <= len(request.idempotency_key) <= high:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"an idempotency key of {len(request.idempotency_key)} bytes",
            field="idempotency_key",
            limit=f"{low} to {high} bytes",
        )
    if request.data_class == 0:
        raise FallowError(
            Reason.DATA_CLASS_MISSING,
            "the job does not say where its rows may go",
            field="data_class",
            limit="public, internal, sensitive",
            hint="public rows may be read on volunteers' machines, sensitive ones on the operator's only",
        )
    if not request.blocks:
        raise FallowError(Reason.DATASET_EMPTY, "the dataset has no block", field="blocks", limit="at least 1 row")
    check_count(len(request.blocks), JOB_BLOCKS_MAX, "blocks")
    if len(request.title.encode()) > TITLE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, "the title is too long", field="title", limit=f"{TITLE_BYTES_MAX} bytes"
        )
    inline_bytes = 0
    blocks: list[DatasetBlock] = []
    inline: list[StoredBlob] = []
    payloads: dict[Digest, bytes] = {}
    for index, message in enumerate(request.blocks):
        block, data = block_from_message(message, f"blocks[{index}]")
        blocks.append(block)
        if not block.inline:
            continue
        # Counted before it is looked at, repeated blocks too: hashing thousands would hold up everybody.
        inline_bytes += len(data)
        if len(data) < inline_bytes > INLINE_PAYLOAD_BYTES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"more than {INLINE_PAYLOAD_BYTES_MAX} bytes of inline blocks",
                field="blocks",
                limit=f"{INLINE_PAYLOAD_BYTES_MAX} bytes; upload larger datasets",
            )
        _, stored = inspected_block(data, block.blob, f"blocks[{index}].inline_block")
        inline.append(stored)
        payloads[block.blob.digest] = data
    command = SubmitMapJob(
        account_id=caller.account_id,
        party_id=caller.party_id,
        idempotency_key=request.idempotency_key,
        request_digest=digest_of(call.raw),
        bundle_digest=digest_from(request.bundle_digest, "bundle_digest"),
        blocks=tuple(blocks),
        inline_blocks=tuple(inline),
        data_class=DATA_CLASSES.member(request.data_class, "data_class"),
        pool_id=PoolId(request.pool_id) if request.pool_id else None,
        title=request.title,
        options=options_from_message(request.options),
        kept=reference_from_message(request.kept, "kept") if request.HasField("kept") else None,
    )
    return command, payloads


def check_count(count: int, most: int, field: str) -> None:
    """Returns when a list or page is not too long. Raises LIMIT_EXCEEDED."""
    if count > most:
        raise FallowError(Reason.LIMIT_EXCEEDED, f"{count} {field}", field=field, limit=f"at most {most}")


def _state_of_bundle(bundle: BundleStatus) -> tuple[pb.BundleState.ValueType, str]:
    if bundle.held_reason:
        return pb.BUNDLE_STATE_HELD, bundle.held_reason
    if bundle.report is None:
        return pb.BUNDLE_STATE_INSPECTING, bundle.reason
    if not bundle.report.accepted:
        return pb.BUNDLE_STATE_REFUSED, "; ".join(bundle.report.refusals)
    return pb.BUNDLE_STATE_ACCEPTED, ""


def _fixed_bytes(schema: Schema) -> int:
    """Bytes that every row of the schema takes at least."""
    return sum(column.row_bytes for column in schema.columns if isinstance(column, TensorColumn))


def _page_position(token: str) -> tuple[int, str] | None:
    if not token:
        return None
    at_ms, _, job_id = token.partition(":")
    if not at_ms.isdecimal() or len(at_ms) > 15 or not job_id:
        raise FallowError(
            Reason.FIELD_INVALID, "this page token was not given here", field="page_token", hint="start over"
        )
    return int(at_ms), job_id


async def _changed_or_ended(changed: asyncio.Event, ended: asyncio.Future[FallowError], patience_s: float) -> None:
    """Waits for either, at most so long. Raises why the stream must end."""
    waiting = asyncio.create_task(changed.wait())
    try:
        await asyncio.wait((waiting, ended), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if ended.done():
        raise ended.result()
