"""Jobs and blobs that nobody needs any more, with a real coordinator and blob service, while others go on uploading."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.row_block import pack
from fallow.session import BlobReference
from fallow.v1 import blob_pb2, job_pb2, job_service_pb2
from fallow.wire.blob import grant_from_message, reference_to_message
from fallow.wire.errors import error_from_rpc
from integration.harness import CoordinatorService, coordinator
from integration.test_job_service import INPUT_CODEC, Client, client_of

pytestmark = pytest.mark.processes

PATIENCE_S = 40.0
GRACE_S = 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator in a hurry to let go."""
    options = ("--collect-every", "1s", "--blob-grace", f"{GRACE_S}s", "--upload-grace", "4s")
    with coordinator(tmp_path_factory.mktemp("hasty"), *options) as running:
        yield running


@pytest.fixture
async def client(service: CoordinatorService) -> AsyncIterator[Client]:
    async with client_of(service.operator) as made:
        yield made


async def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        await asyncio.sleep(0.05)


def file_of(service: CoordinatorService, digest: Digest) -> Path:
    return service.state / "blobs" / "blobs" / digest.hex()[:2] / digest.hex()[2:]


async def refusal(call: Awaitable[object]) -> FallowError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def has(client: Client, data: bytes) -> bool:
    wanted = job_service_pb2.UploadWanted(
        blob=reference_to_message(BlobReference(digest_of(data), len(data))), kind=blob_pb2.BLOB_KIND_OPAQUE
    )
    answer = await client.jobs.GrantUploads(job_service_pb2.GrantUploadsRequest(uploads=[wanted]), timeout=10)
    return answer.uploads[0].have


async def submitted(client: Client, retention_s: int = 0) -> tuple[str, BlobReference]:
    """A job over an uploaded block, cancelled at once."""
    bundle = await client.bundle()
    rows = [secrets.token_bytes(16)]
    block = pack(INPUT_CODEC.schema_digest, rows, [()], secrets.token_bytes(16))
    dataset = await client.upload(block, blob_pb2.BLOB_KIND_ROW_BLOCK)
    options = job_pb2.JobOptions()
    if retention_s:
        options.retention.seconds = retention_s
    answer = await client.jobs.SubmitMapJob(
        job_service_pb2.SubmitMapJobRequest(
            idempotency_key=secrets.token_bytes(16),
            bundle_digest=bundle,
            blocks=[job_pb2.DatasetBlock(blob=reference_to_message(dataset), rows=1)],
            data_class=job_pb2.DATA_CLASS_PUBLIC,
            options=options,
        ),
        timeout=10,
    )
    return answer.job_id, dataset


async def test_a_deleted_job_is_not_found_with_a_reason_and_its_dataset_goes(
    service: CoordinatorService, client: Client
) -> None:
    job_id, dataset = await submitted(client)
    unfinished = await refusal(client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job_id), timeout=10))
    assert unfinished.reason is Reason.JOB_UNFINISHED
    await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=10)
    status = (await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job_id), timeout=10)).job
    assert status.HasField("deleted_at") and status.reason_code == "JOB_DELETED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id), timeout=10):
            pass
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_from_rpc(caught.value).reason is Reason.JOB_DELETED
    await until(lambda: not file_of(service, dataset.digest).exists(), "the dataset to go")
    wanted = job_service_pb2.GrantDownloadsRequest(digests=[dataset.digest])
    assert (await refusal(client.jobs.GrantDownloads(wanted, timeout=10))).reason is Reason.BLOB_UNKNOWN


async def test_a_job_whose_retention_is_over_lets_go_by_itself(service: CoordinatorService, client: Client) -> None:
    job_id, dataset = await submitted(client, retention_s=1)
    kept_id, kept = await submitted(client)
    for one in (job_id, kept_id):
        await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=one), timeout=10)
    await until(lambda: not file_of(service, dataset.digest).exists(), "the dataset to go")
    status = (await client.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=10)).job
    assert status.reason == "its retention is over"
    assert file_of(service, kept.digest).exists(), "the other job keeps what is its"


@pytest.mark.slow
async def test_have_and_lack_stay_true_while_blobs_are_let_go_under_load(
    service: CoordinatorService, client: Client
) -> None:
    """Whoever was told that the blob is there, or uploaded it, reads it at once, however often it was let go before."""
    contents = [bytes([number]) * 20_000 for number in range(4)]
    ends_at = time.monotonic() + 14
    lacked = 0

    async def use(number: int) -> None:
        nonlocal lacked
        while time.monotonic() < ends_at:
            data = contents[secrets.randbelow(len(contents))]
            lacked += not await has(client, data)
            reference = await client.upload(data, blob_pb2.BLOB_KIND_OPAQUE)
            wanted = job_service_pb2.GrantDownloadsRequest(digests=[reference.digest])
            (grant,) = (await client.jobs.GrantDownloads(wanted, timeout=10)).grants
            assert await client.blobs.get(grant_from_message(grant), reference) == data
            # Long enough for some blobs to be let go between two uses.
            await asyncio.sleep(secrets.randbelow(4_000 * (number + 1)) / 1_000)

    await asyncio.gather(*(use(number) for number in range(4)))
    for data in contents:
        await until(lambda data=data: not file_of(service, digest_of(data)).exists(), "unused blobs to go")  # type: ignore[misc]
        assert not await has(client, data)


async def test_an_account_beyond_its_quota_is_told_what_it_has_and_may_have(
    service: CoordinatorService, client: Client
) -> None:
    account_id = client.credentials.account_id
    now = service.cli("account", "quota", account_id, "10000")
    assert int(now["bytes_max"]) == 10_000
    data = secrets.token_bytes(10_001)
    wanted = job_service_pb2.UploadWanted(
        blob=reference_to_message(BlobReference(digest_of(data), len(data))), kind=blob_pb2.BLOB_KIND_OPAQUE
    )
    try:
        request = job_service_pb2.GrantUploadsRequest(uploads=[wanted])
        error = await refusal(client.jobs.GrantUploads(request, timeout=10))
    finally:
        service.cli("account", "quota", account_id, "0")
    assert error.reason is Reason.LIMIT_EXCEEDED
    assert "of 10000 bytes" in error.message
