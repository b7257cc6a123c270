"""Submitting, working and collecting over the real services, with workers whose every message is the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from fallow.blob_client import BlobClient
from fallow.bundle import (
    Binding,
    BundleFile,
    BundleManifest,
    InspectionReport,
    Precision,
    ProgramFormat,
    ProgramStage,
)
from fallow.channel import blob_channel, control_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack
from fallow.rows import RowCodec
from fallow.schema import DType, Schema, TensorColumn
from fallow.session import (
    BlobReference,
    Commitment,
    Delivery,
    Draining,
    GrantsRenewed,
    GrantsWanted,
    Inspection,
    Lease,
    LeaseRevoked,
    Refused,
    Settled,
    SignedBytes,
    TaskKind,
    UploadOffer,
    Usage,
)
from fallow.v1 import blob_pb2, job_pb2, job_service_pb2, job_service_pb2_grpc
from fallow.wire.blob import (
    grant_from_message,
    receipt_to_message,
    reference_to_message,
)
from fallow.wire.bundle import decode_manifest, encode_manifest
from fallow.wire.errors import error_from_rpc
from fallow.wire.schema import encode_schema
from integration.harness import CoordinatorService
from integration.raw_session import RawSession, hello, joined, raw_session

pytestmark = pytest.mark.processes

PATIENCE_S = 20.0
INPUT = Schema((TensorColumn("x", DType.FLOAT32, (4,)),))
OUTPUT = Schema((TensorColumn("y", DType.FLOAT32, (4,)),))
INPUT_CODEC = RowCodec(INPUT, digest_of(encode_schema(INPUT)))
OUTPUT_CODEC = RowCodec(OUTPUT, digest_of(encode_schema(OUTPUT)))


@dataclass
class Client:
    """A submitter with its stubs."""

    credentials: Credentials
    jobs: job_service_pb2_grpc.JobServiceAsyncStub
    blobs: BlobClient

    async def upload(self, data: bytes, kind: blob_pb2.BlobKind.ValueType) -> BlobReference:
        """Stores a blob for this account, as the SDK does."""
        reference = BlobReference(digest_of(data), len(data))
        wanted = job_service_pb2.UploadWanted(blob=reference_to_message(reference), kind=kind)
        request = job_service_pb2.GrantUploadsRequest(uploads=[wanted])
        (granted,) = (await self.jobs.GrantUploads(request, timeout=10)).uploads
        if not granted.have:
            receipt = await self.blobs.put(grant_from_message(granted.grant), data)
            await self.jobs.RecordUploads(
                job_service_pb2.RecordUploadsRequest(receipts=[receipt_to_message(receipt)]), timeout=10
            )
        return reference

    async def bundle(self) -> Digest:
        """Registers a bundle of its own."""
        program = secrets.token_bytes(500)
        await self.upload(program, blob_pb2.BLOB_KIND_OPAQUE)
        manifest = encode_manifest(
            BundleManifest(
                name="double",
                files=(BundleFile("program.onnx", digest_of(program), len(program)),),
                stages=(ProgramStage(ProgramFormat.ONNX, "program.onnx", (Binding("x", "x"),), (Binding("y", "y"),)),),
                input_schema=INPUT,
                output_schema=OUTPUT,
            )
        )
        answer = await self.jobs.RegisterBundle(job_service_pb2.RegisterBundleRequest(manifest=manifest), timeout=10)
        assert answer.status.state == job_service_pb2.BUNDLE_STATE_INSPECTING
        assert answer.status.manifest == manifest
        return Digest(answer.status.bundle_digest)

    async def submit(self, request: job_service_pb2.SubmitMapJobRequest) -> str:
        """The job's identifier."""
        return (await self.jobs.SubmitMapJob(request, timeout=10)).job_id

    async def status(self, job_id: str) -> job_pb2.JobStatus:
        """The job now."""
        return (await self.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=10)).job

    async def watch(self, job_id: str, cursor: int = 0) -> tuple[list[job_pb2.TaskResult], job_pb2.JobStatus]:
        """All results after a cursor and the final status."""
        results: list[job_pb2.TaskResult] = []
        status = job_pb2.JobStatus()
        async with asyncio.timeout(PATIENCE_S):
            async for message in self.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id, cursor=cursor)):
                if message.WhichOneof("kind") == "result":
                    results.append(message.result)
                else:
                    status = message.status
        return results, status


@contextlib.asynccontextmanager
async def client_of(credentials: Credentials) -> AsyncIterator[Client]:
    async with control_channel(credentials) as control, blob_channel(credentials) as blobs:
        yield Client(credentials, job_service_pb2_grpc.JobServiceStub(control), BlobClient(blobs))


@pytest.fixture
async def client(shared_coordinator: CoordinatorService, tmp_path: Path) -> AsyncIterator[Client]:
    """A submitter of an account of its own."""
    line = shared_coordinator.new_token("--role", "client", "--account", _account(shared_coordinator))
    async with client_of(await joined(line, tmp_path / "client")) as made:
        yield made


@dataclass
class Crew:
    """An inspecting operator's worker and a volunteer, alone in a pool of their own."""

    pool_id: str
    inspector: RawSession
    volunteer: RawSession

    async def inspection_of(self, bundle_digest: bytes) -> Lease:
        """The lease for inspecting this bundle; those that other tests left behind are accepted on the way."""
        while True:
            lease = await self.inspector.until(Lease)
            assert isinstance(lease, Lease) and lease.kind is TaskKind.INSPECT
            if lease.bundle_digest == bundle_digest:
                return lease
            await self.report(lease)

    async def report(self, lease: Lease, *, accepted: bool = True) -> None:
        """Answers an inspection."""
        report = report_on(lease.bundle_digest, accepted=accepted)
        await self.inspector.send(Inspection(lease.lease_id, lease.fence, report, Usage()))

    async def inspect(self, bundle_digest: bytes) -> None:
        """Accepts this bundle."""
        await self.report(await self.inspection_of(bundle_digest))


@pytest.fixture
async def crew(shared_coordinator: CoordinatorService, tmp_path: Path) -> AsyncIterator[Crew]:
    pool_id = shared_coordinator.cli("pool", "create", f"pool {secrets.token_hex(4)}", "--open")["pool_id"]
    operator = shared_coordinator.new_token("--role", "worker", "--tier", "operator")
    line = shared_coordinator.new_token("--role", "worker", "--pool", pool_id)
    inspector = await joined(operator, tmp_path / "inspector")
    volunteer = await joined(line, tmp_path / "volunteer")
    async with raw_session(inspector) as first, raw_session(volunteer) as second:
        await first.open(hello(TaskKind.INSPECT))
        await second.open(hello(TaskKind.MAP, window=1))
        beating = asyncio.create_task(beat(first, second))
        yield Crew(pool_id, first, second)
        beating.cancel()


async def beat(*sessions: RawSession) -> None:
    from fallow.session import Heartbeat

    while True:
        await asyncio.sleep(1)
        for session in sessions:
            await session.send(Heartbeat(), sign=False)


def _account(service: CoordinatorService) -> str:
    account: str = service.cli("account", "create", f"account {secrets.token_hex(4)}")["account_id"]
    return account


def report_on(bundle_digest: Digest, *, accepted: bool = True) -> InspectionReport:
    return InspectionReport(
        bundle_digest=bundle_digest,
        accepted=accepted,
        refusals=() if accepted else ("op Loop is not on the list",),
        operators=(("ai.onnx.Add", 1),),
        canonical_batch_rows=4,
        slot_dependent=False,
        neighbour_dependent=False,
        unit_micros_per_row=10,
        unit_micros_per_kib=10,
        memory_bytes_peak=1_000_000,
        execution_class="test",
        inspected_seconds=0.1,
    )


def input_block(rows: int, seed: int = 0) -> bytes:
    values = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + seed
    return INPUT_CODEC.encode({"x": values}, nonce=secrets.token_bytes(16))


def inline_request(bundle_digest: Digest, pool_id: str, *blocks: bytes) -> job_service_pb2.SubmitMapJobRequest:
    return job_service_pb2.SubmitMapJobRequest(
        idempotency_key=secrets.token_bytes(16),
        bundle_digest=bundle_digest,
        blocks=[
            job_pb2.DatasetBlock(
                blob=reference_to_message(BlobReference(digest_of(block), len(block))),
                rows=len(RowBlock.parse(block)),
                inline_block=block,
            )
            for block in blocks
        ],
        data_class=job_pb2.DATA_CLASS_PUBLIC,
        pool_id=pool_id,
        title="a test",
    )


def output_of(block: bytes) -> bytes:
    """What an honest worker computes: every value doubled."""
    decoded = INPUT_CODEC.decode(RowBlock.parse(block))
    return OUTPUT_CODEC.encode({"y": np.asarray(decoded.columns["x"], np.float32) * 2}, nonce=secrets.token_bytes(16))


def commitment(lease: Lease, output: bytes, *, inline: bool = True) -> Commitment:
    block = RowBlock.parse(output)
    return Commitment(
        lease_id=lease.lease_id,
        fence=lease.fence,
        output_root=block.root(),
        rows=len(block),
        output=BlobReference(digest_of(output), len(output)),
        usage=Usage(wall_microseconds=5, node=0),
        execution_class="test",
        inline_output=output if inline else b"",
    )


async def work(session: RawSession) -> Lease:
    """Does the next inline lease honestly."""
    lease = await session.until(Lease)
    assert isinstance(lease, Lease)
    await session.send(commitment(lease, output_of(lease.inline_input)))
    settled = await session.until(Settled)
    assert isinstance(settled, Settled) and settled.lease_id == lease.lease_id
    return lease


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, FallowError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), error_from_rpc(caught.value)


def values_of(results: list[job_pb2.TaskResult], rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Output rows in job order, each delivered once."""
    out = np.full((rows, 4), np.nan, dtype=np.float32)
    for result in results:
        block = RowBlock.parse(result.inline_output)
        decoded = OUTPUT_CODEC.decode(block)
        for span in result.spans:
            target = slice(span.job_position, span.job_position + span.rows)
            assert np.isnan(out[target]).all(), "each row comes once"
            out[target] = decoded.columns["y"][span.block_row : span.block_row + span.rows]
    return out


async def test_inline_job_goes_through_inspection_leases_and_results(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    request = inline_request(bundle_digest, crew.pool_id, input_block(5), input_block(3, seed=100))
    job_id = await client.submit(request)
    assert (await client.status(job_id)).state == job_pb2.JOB_STATE_PENDING
    await crew.inspect(bundle_digest)
    watching = asyncio.create_task(client.watch(job_id))
    rows = 0
    while rows < 8:
        rows += (await work(crew.volunteer)).rows
    results, status = await watching
    assert status.state == job_pb2.JOB_STATE_SUCCEEDED
    assert (status.progress.rows_total, status.progress.rows_done) == (8, 8)
    assert (status.policy, status.price_microcredits) == ("unverified", 0)
    assert status.output_schema == encode_schema(OUTPUT)
    expected = np.concatenate([np.arange(20), np.arange(12) + 100]).reshape(8, 4).astype(np.float32) * 2
    assert np.array_equal(values_of(results, 8), expected)
    assert {result.worker_id for result in results} == {crew.volunteer.credentials.party_id}
    again, _ = await client.watch(job_id, cursor=len(results) - 1)
    assert [result.cursor for result in again] == [len(results)]
    code, error = await refusal(client.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id, cursor=99)).read())
    assert (code, error.field) == (grpc.StatusCode.OUT_OF_RANGE, "cursor")


@pytest.mark.parametrize("takes_several", [True, False])
async def test_what_became_true_together_comes_as_one_to_a_worker_that_takes_it(
    client: Client, crew: Crew, shared_coordinator: CoordinatorService, tmp_path: Path, takes_several: bool
) -> None:
    bundle_digest = await client.bundle()
    await crew.volunteer.send(Draining("for another"), sign=False)
    jobs = [await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(2, seed))) for seed in (1, 2)]
    await crew.inspect(bundle_digest)
    line = shared_coordinator.new_token("--role", "worker", "--pool", crew.pool_id)
    async with raw_session(await joined(line, tmp_path / "worker")) as session:
        await session.open(replace(hello(window=1), takes_several=takes_several))
        assert await work(session)
        assert [type(message) for message in session.unread] == ([Lease] if takes_several else [])
        await work(session)
    for job_id in jobs:
        _, status = await client.watch(job_id)
        assert status.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_same_idempotency_key_gives_the_same_job_and_another_request_a_conflict(
    client: Client, crew: Crew
) -> None:
    request = inline_request(await client.bundle(), crew.pool_id, input_block(2))
    job_ids = await asyncio.gather(*(client.submit(request) for _ in range(20)))
    assert len(set(job_ids)) == 1
    changed = job_service_pb2.SubmitMapJobRequest()
    changed.CopyFrom(request)
    changed.title = "another"
    code, error = await refusal(client.submit(changed))
    assert (code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.IDEMPOTENCY_CONFLICT)
    cancelled = await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_ids[0]), timeout=10)
    assert cancelled.job.state == job_pb2.JOB_STATE_CANCELLED
    again = await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_ids[0]), timeout=10)
    assert again.job.state == job_pb2.JOB_STATE_CANCELLED


async def test_other_accounts_see_neither_job_nor_bundle_nor_blob(
    client: Client, crew: Crew, shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    data = input_block(3)
    reference = await client.upload(data, blob_pb2.BLOB_KIND_ROW_BLOCK)
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(2)))
    line = shared_coordinator.new_token("--role", "client", "--account", _account(shared_coordinator))
    async with client_of(await joined(line, tmp_path / "other")) as other:
        jobs = other.jobs
        calls: tuple[tuple[Callable[[], Awaitable[object]], Reason], ...] = (
            (lambda: jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id)), Reason.JOB_UNKNOWN),
            (lambda: jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id)), Reason.JOB_UNKNOWN),
            (lambda: jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id)).read(), Reason.JOB_UNKNOWN),
            (
                lambda: jobs.GetBundle(job_service_pb2.GetBundleRequest(bundle_digest=bundle_digest)),
                Reason.BUNDLE_UNKNOWN,
            ),
            (
                lambda: jobs.GrantDownloads(job_service_pb2.GrantDownloadsRequest(digests=[reference.digest])),
                Reason.BLOB_UNKNOWN,
            ),
            (
                lambda: other.submit(inline_request(bundle_digest, crew.pool_id, input_block(2))),
                Reason.BUNDLE_UNKNOWN,
            ),
        )
        for call, reason in calls:
            code, error = await refusal(call())
            assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, reason)
        assert not (await jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=10)).jobs
        wanted = job_service_pb2.UploadWanted(blob=reference_to_message(reference), kind=blob_pb2.BLOB_KIND_ROW_BLOCK)
        request = job_service_pb2.GrantUploadsRequest(uploads=[wanted])
        (granted,) = (await jobs.GrantUploads(request, timeout=10)).uploads
        assert not granted.have, "what others have is not told"
        assert (await client.jobs.GrantUploads(request, timeout=10)).uploads[0].have
        # A dataset that names another account's blob is as unknown as one that nobody has.
        stolen = inline_request(await other.bundle(), crew.pool_id, input_block(2))
        del stolen.blocks[:]
        stolen.blocks.add(blob=reference_to_message(reference), rows=3)
        code, error = await refusal(other.submit(stolen))
        assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, Reason.BLOB_UNKNOWN)
    await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=10)


async def test_receipts_that_are_forged_or_anothers_are_denied(
    client: Client, shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    data = secrets.token_bytes(100)
    wanted = job_service_pb2.UploadWanted(
        blob=reference_to_message(BlobReference(digest_of(data), len(data))), kind=blob_pb2.BLOB_KIND_OPAQUE
    )
    grant = (await client.jobs.GrantUploads(job_service_pb2.GrantUploadsRequest(uploads=[wanted]), timeout=10)).uploads[
        0
    ]
    receipt = await client.blobs.put(grant_from_message(grant.grant), data)
    line = shared_coordinator.new_token("--role", "client", "--account", _account(shared_coordinator))

    def record(which: SignedBytes) -> job_service_pb2.RecordUploadsRequest:
        return job_service_pb2.RecordUploadsRequest(receipts=[receipt_to_message(which)])

    async with client_of(await joined(line, tmp_path / "other")) as other:
        code, error = await refusal(other.jobs.RecordUploads(record(receipt), timeout=10))
        assert (code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.PERMISSION_DENIED)
    forged = replace(receipt, payload=receipt.payload[:-1] + bytes((receipt.payload[-1] ^ 1,)))
    code, error = await refusal(client.jobs.RecordUploads(record(forged), timeout=10))
    assert (code, error.reason, error.field) == (
        grpc.StatusCode.PERMISSION_DENIED,
        Reason.GRANT_INVALID,
        "receipts[0]",
    )
    await client.jobs.RecordUploads(record(receipt), timeout=10)
    grants = (
        await client.jobs.GrantDownloads(job_service_pb2.GrantDownloadsRequest(digests=[digest_of(data)]), timeout=10)
    ).grants
    assert await client.blobs.get(grant_from_message(grants[0]), BlobReference(digest_of(data), len(data))) == data


async def test_every_wrong_submission_names_its_field(client: Client, crew: Crew) -> None:
    good = inline_request(await client.bundle(), crew.pool_id, input_block(2))
    other_schema = pack(Digest(b"s" * 32), [b"x" * 16], [], secrets.token_bytes(16))
    cases: dict[str, tuple[dict[str, object], Reason, str]] = {
        "no data class": ({"data_class": 0}, Reason.DATA_CLASS_MISSING, "data_class"),
        "short key": ({"idempotency_key": b"short"}, Reason.FIELD_INVALID, "idempotency_key"),
        "long title": ({"title": "t" * 300}, Reason.LIMIT_EXCEEDED, "title"),
        "bad digest": ({"bundle_digest": b"x"}, Reason.FIELD_INVALID, "bundle_digest"),
        "unknown bundle": ({"bundle_digest": b"x" * 32}, Reason.BUNDLE_UNKNOWN, "bundle_digest"),
        "unknown pool": ({"pool_id": "pool-nowhere"}, Reason.POOL_UNKNOWN, "pool_id"),
        "unknown class": ({"data_class": 77}, Reason.FIELD_INVALID, "data_class"),
    }
    for what, (changes, reason, field) in cases.items():
        request = job_service_pb2.SubmitMapJobRequest()
        request.CopyFrom(good)
        for name, value in changes.items():
            setattr(request, name, value)
        _, error = await refusal(client.submit(request))
        assert (error.reason, error.field) == (reason, field), what
    blocks = {
        "none": ([], Reason.DATASET_EMPTY, "blocks"),
        "no row block": ([b"no row block" * 10], Reason.ROW_BLOCK_MALFORMED, None),
        "another schema": ([other_schema], Reason.SCHEMA_MISMATCH, None),
        "too much inline": ([input_block(3000), input_block(3000)], Reason.LIMIT_EXCEEDED, "blocks"),
        "one too large": ([input_block(6000)], Reason.LIMIT_EXCEEDED, "blocks[0].inline_block"),
    }
    for what, (data, reason, wrong_field) in blocks.items():
        request = job_service_pb2.SubmitMapJobRequest()
        request.CopyFrom(good)
        del request.blocks[:]
        for one in data:
            request.blocks.add(
                blob=reference_to_message(BlobReference(digest_of(one), len(one))), rows=1, inline_block=one
            )
        _, error = await refusal(client.submit(request))
        assert error.reason is reason, what
        assert wrong_field is None or error.field == wrong_field, what
    wrong_digest = job_service_pb2.SubmitMapJobRequest()
    wrong_digest.CopyFrom(good)
    wrong_digest.blocks[0].blob.digest = b"d" * 32
    assert (await refusal(client.submit(wrong_digest)))[1].reason is Reason.DIGEST_MISMATCH
    wrong_rows = job_service_pb2.SubmitMapJobRequest()
    wrong_rows.CopyFrom(good)
    wrong_rows.blocks[0].rows = 9
    code, error = await refusal(client.submit(wrong_rows))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and error.field.startswith("blocks[0]")


async def test_worker_cannot_lie_about_rows_roots_digests_or_fences(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(4)))
    await crew.inspect(bundle_digest)
    lease = await crew.volunteer.until(Lease)
    assert isinstance(lease, Lease)
    output = output_of(lease.inline_input)
    honest = commitment(lease, output)
    for what, lie, reason in (
        ("root", replace(honest, output_root=Digest(b"r" * 32)), Reason.ROOT_MISMATCH),
        ("rows", replace(honest, rows=3), Reason.FIELD_INVALID),
        ("digest", replace(honest, output=BlobReference(Digest(b"d" * 32), len(output))), Reason.DIGEST_MISMATCH),
        ("old fence", replace(honest, fence=lease.fence - 1), Reason.FENCE_STALE),
        ("future fence", replace(honest, fence=lease.fence + 1), Reason.FENCE_STALE),
    ):
        await crew.volunteer.send(lie)
        answer = await crew.volunteer.until(Refused)
        assert isinstance(answer, Refused)
        assert answer.reason == reason.value, (what, answer)
        assert answer.lease_id == lease.lease_id
    await crew.volunteer.send(honest)
    await crew.volunteer.until(Settled)
    # Word for word again is harmless.
    await crew.volunteer.send(honest)
    results, status = await client.watch(job_id)
    assert status.state == job_pb2.JOB_STATE_SUCCEEDED
    assert status.progress.tasks_settled == len(results)


async def test_rows_of_another_schema_cost_the_worker_its_lease(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(4)))
    await crew.inspect(bundle_digest)
    lease = await crew.volunteer.until(Lease)
    assert isinstance(lease, Lease)
    rows = [bytes(row) for row in RowBlock.parse(output_of(lease.inline_input))]
    strange = pack(Digest(b"s" * 32), rows, [], secrets.token_bytes(16))
    await crew.volunteer.send(commitment(lease, strange))
    revoked = await crew.volunteer.until(LeaseRevoked)
    assert isinstance(revoked, LeaseRevoked) and revoked.lease_id == lease.lease_id
    assert (await client.status(job_id)).progress.tasks_settled == 0
    await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=10)


async def test_large_rows_travel_through_the_blob_service(client: Client, crew: Crew) -> None:
    block = input_block(6000)
    assert len(block) > INLINE_PAYLOAD_BYTES_MAX
    reference = await client.upload(block, blob_pb2.BLOB_KIND_ROW_BLOCK)
    bundle_digest = await client.bundle()
    request = inline_request(bundle_digest, crew.pool_id)
    request.blocks.add(blob=reference_to_message(reference), rows=6000)
    job_id = await client.submit(request)
    await crew.inspect(bundle_digest)
    watching = asyncio.create_task(client.watch(job_id))
    rows, outputs = 0, {}
    async with blob_channel(crew.volunteer.credentials) as channel:
        blobs = BlobClient(channel)
        while rows < 6000:
            lease = await crew.volunteer.until(Lease)
            assert isinstance(lease, Lease) and lease.input is not None and not lease.inline_input
            await crew.volunteer.send(GrantsWanted(lease.lease_id, lease.fence), sign=False)
            renewed = await crew.volunteer.until(GrantsRenewed)
            assert isinstance(renewed, GrantsRenewed) and renewed.input_grant is not None and renewed.offer is not None
            data = await blobs.get(renewed.input_grant, lease.input)
            output = output_of(data)
            outputs[digest_of(output)] = output
            await crew.volunteer.send(commitment(lease, output, inline=False))
            offer = await crew.volunteer.until(UploadOffer)
            assert isinstance(offer, UploadOffer)
            receipt = await blobs.put(offer.grant, output)
            await crew.volunteer.send(Delivery(lease.lease_id, lease.fence, receipt), sign=False)
            await crew.volunteer.until(Settled)
            rows += lease.rows
    results, status = await watching
    assert status.state == job_pb2.JOB_STATE_SUCCEEDED
    assert status.progress.rows_done == 6000
    digests = [result.output.digest for result in results]
    assert set(digests) == set(outputs)
    grants = (
        await client.jobs.GrantDownloads(job_service_pb2.GrantDownloadsRequest(digests=digests), timeout=10)
    ).grants
    for result, grant in zip(results, grants, strict=True):
        wanted = BlobReference(Digest(result.output.digest), result.output.length_bytes)
        assert await client.blobs.get(grant_from_message(grant), wanted) == outputs[wanted.digest]
        # The worker that made it has no way back to it: no grant of its own, and another's is bound to another key.
        async with blob_channel(crew.volunteer.credentials) as channel:
            with pytest.raises(FallowError) as caught:
                await BlobClient(channel).get(grant_from_message(grant), wanted)
            assert caught.value.reason is Reason.GRANT_INVALID


async def test_cancelled_job_takes_its_lease_back(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(4)))
    await crew.inspect(bundle_digest)
    lease = await crew.volunteer.until(Lease)
    assert isinstance(lease, Lease)
    await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=10)
    revoked = await crew.volunteer.until(LeaseRevoked)
    assert isinstance(revoked, LeaseRevoked) and revoked.lease_id == lease.lease_id
    await crew.volunteer.send(commitment(lease, output_of(lease.inline_input)))
    refused = await crew.volunteer.until(Refused)
    assert isinstance(refused, Refused) and refused.reason in {"LEASE_ENDED", "LEASE_UNKNOWN", "FENCE_STALE"}
    results, status = await client.watch(job_id)
    assert (results, status.state) == ([], job_pb2.JOB_STATE_CANCELLED)


async def test_refused_bundle_fails_its_jobs_with_the_refusals(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(2)))
    lease = await crew.inspection_of(bundle_digest)
    assert lease.offer is not None
    assert decode_manifest(lease.offer.manifest).precision is Precision.FP32
    await crew.report(lease, accepted=False)
    _, status = await client.watch(job_id)
    assert (status.state, status.reason_code) == (job_pb2.JOB_STATE_FAILED, "PROGRAM_REFUSED")
    assert "Loop" in status.reason
    known = await client.jobs.GetBundle(job_service_pb2.GetBundleRequest(bundle_digest=bundle_digest), timeout=10)
    assert known.status.state == job_service_pb2.BUNDLE_STATE_REFUSED
    code, error = await refusal(client.submit(inline_request(bundle_digest, crew.pool_id, input_block(2))))
    assert (code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.PROGRAM_REFUSED)


async def test_jobs_are_listed_page_by_page_newest_first(client: Client, crew: Crew) -> None:
    bundle_digest = await client.bundle()
    submitted = [
        await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(1, seed=n))) for n in range(5)
    ]
    found: list[str] = []
    token = ""
    while True:
        page = await client.jobs.ListJobs(job_service_pb2.ListJobsRequest(page_size=2, page_token=token), timeout=10)
        assert len(page.jobs) <= 2
        found += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert sorted(found) == sorted(submitted)
    code, error = await refusal(client.jobs.ListJobs(job_service_pb2.ListJobsRequest(page_token="?")))
    assert (code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")
    for job_id in submitted:
        await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=10)


async def test_watcher_hears_the_end_of_its_party(
    client: Client, crew: Crew, shared_coordinator: CoordinatorService
) -> None:
    job_id = await client.submit(inline_request(await client.bundle(), crew.pool_id, input_block(2)))
    call = client.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id))
    first = await call.read()
    assert isinstance(first, job_service_pb2.WatchJobResponse)
    assert first.status.job_id == job_id
    await asyncio.to_thread(shared_coordinator.cli, "party", "revoke", client.credentials.party_id)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            while await call.read() is not grpc.aio.EOF:
                pass
            raise AssertionError(await call.code())
    assert error_from_rpc(caught.value).reason is Reason.PARTY_REVOKED
