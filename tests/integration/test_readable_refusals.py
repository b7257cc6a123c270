"""Whoever is refused learns why, also while its messages are on the way and many are refused at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from fallow.blob_client import BlobClient
from fallow.channel import blob_channel, control_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import MIB
from fallow.session import BlobReference, Heartbeat
from fallow.v1 import blob_pb2, job_service_pb2, job_service_pb2_grpc
from fallow.v1 import worker_service_pb2 as pb
from fallow.wire.blob import grant_from_message, reference_to_message
from fallow_worker.link import Greeting, ResumeToken, open_session
from integration.harness import CoordinatorService
from integration.proxies import connect_proxy
from integration.raw_session import RawSession, capability, hello, joined

pytestmark = [pytest.mark.processes]

TIMES = 160
AT_ONCE = 16
MESSAGES_BEHIND = 40
"""What a client still writes that has not heard yet that it is refused."""


@pytest.fixture
async def worker(shared_coordinator: CoordinatorService, tmp_path: Path) -> AsyncIterator[Credentials]:
    yield await joined(shared_coordinator.worker_join_line, tmp_path / "worker")


async def many(refusal: Callable[[], Awaitable[FallowError]]) -> Counter[Reason]:
    """How `TIMES` refusals read, several at once."""
    reasons: Counter[Reason] = Counter()
    left = iter(range(TIMES))

    async def some() -> None:
        for _ in left:
            error = await refusal()
            reasons[error.reason] += 1
            if error.reason in {Reason.INTERNAL, Reason.COORDINATOR_UNREACHABLE}:
                print(error)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return reasons


async def chattered(session: RawSession) -> FallowError:
    """How a stream ended to which more and more was written."""
    for _ in range(MESSAGES_BEHIND):
        await session.send(Heartbeat(()), sign=False)
    return await session.ended()


async def test_a_stream_that_is_refused_at_once_is_told_why_while_it_writes(
    shared_coordinator: CoordinatorService,
) -> None:
    async with control_channel(shared_coordinator.operator) as channel:

        async def refusal() -> FallowError:
            return await chattered(RawSession(shared_coordinator.operator, channel))

        reasons = await many(refusal)
    # Not a worker's key; and who opens streams without end is told to wait.
    assert set(reasons) <= {Reason.PERMISSION_DENIED, Reason.OVERLOADED}, reasons
    assert reasons[Reason.PERMISSION_DENIED]


async def test_a_stream_whose_first_message_is_refused_is_told_why_while_it_writes(
    worker: Credentials,
) -> None:
    async with control_channel(worker) as channel:

        async def refusal() -> FallowError:
            session = RawSession(worker, channel)
            await session.send_request(pb.SessionRequest(sequence=1, payload=b"\xff" * 64))
            return await chattered(session)

        reasons = await many(refusal)
    assert set(reasons) <= {Reason.MALFORMED_MESSAGE, Reason.OVERLOADED}, reasons
    assert reasons[Reason.MALFORMED_MESSAGE]


async def test_an_open_session_that_breaks_the_rules_is_told_why_while_it_writes(worker: Credentials) -> None:
    reasons: Counter[Reason] = Counter()
    async with control_channel(worker) as channel:
        for _ in range(TIMES // AT_ONCE):
            session = RawSession(worker, channel)
            try:
                await session.open(hello())
            except FallowError as error:
                # The last session's end has not been decided yet.
                assert error.reason is Reason.KEY_IN_USE
                continue
            await session.send(Heartbeat(()), sign=False, sequence=1)
            reasons[(await chattered(session)).reason] += 1
    assert set(reasons) == {Reason.SEQUENCE_REPLAYED}, reasons


async def test_a_worker_far_away_gets_its_answer_and_no_timeout(
    shared_coordinator: CoordinatorService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection takes a round trip for TCP, one for TLS and one for HTTP/2 before the first word."""
    with connect_proxy(delay_s=0.2) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(FallowError) as refused:
            await open_session(
                shared_coordinator.operator, Greeting(capability(), 1, ()), ResumeToken(tmp_path / "token")
            )
    assert refused.value.reason is Reason.PERMISSION_DENIED


async def test_a_worker_that_the_coordinator_refuses_hears_the_reason_every_time(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    """The daemon's own link, with a key that is no worker's."""
    token = ResumeToken(tmp_path / "token")
    greeting = Greeting(capability(), 1, ())

    async def refusal() -> FallowError:
        with pytest.raises(FallowError) as refused:
            await open_session(shared_coordinator.operator, greeting, token)
        return refused.value

    reasons = await many(refusal)
    assert set(reasons) <= {Reason.PERMISSION_DENIED, Reason.OVERLOADED}, reasons


async def test_a_long_upload_that_is_refused_in_the_middle_is_told_why(shared_coordinator: CoordinatorService) -> None:
    """Its bytes are not those of the grant, which shows only at the end; and another account's grant at once."""
    data = bytes(4 * MIB)
    altered = data[:-1] + b"\x01"
    party = shared_coordinator.operator
    async with control_channel(party) as control, blob_channel(party) as blobs:
        stub = job_service_pb2_grpc.JobServiceStub(control)
        client = BlobClient(blobs, attempts_max=2)

        async def refusal() -> FallowError:
            reference = BlobReference(digest_of(altered), len(data))
            wanted = job_service_pb2.UploadWanted(blob=reference_to_message(reference), kind=blob_pb2.BLOB_KIND_OPAQUE)
            granted = None
            while granted is None:
                try:
                    granted = await stub.GrantUploads(job_service_pb2.GrantUploadsRequest(uploads=[wanted]), timeout=20)
                except grpc.aio.AioRpcError as failure:
                    # Other tests call with the same key, and calls of a key are paced.
                    if failure.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise AssertionError(failure) from None
            grant = grant_from_message(granted.uploads[0].grant)
            with pytest.raises(FallowError) as refused:
                await client.put(grant, data)
            return refused.value

        # One after the other: uploads of one blob for one account take turns.
        reasons = Counter([(await refusal()).reason for _ in range(AT_ONCE)])
    assert set(reasons) == {Reason.DIGEST_MISMATCH}, reasons
