"""A worker's stream against a real coordinator: who is let in, what is refused, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, SessionId
from fallow.limits import LEASES_PER_WORKER_MAX
from fallow.session import (
    BlobReference,
    CapabilityChanged,
    Cause,
    Commitment,
    Delivery,
    GrantsWanted,
    Heartbeat,
    Refused,
    SignedBytes,
    TaskFailed,
    TaskKind,
)
from fallow.v1 import worker_service_pb2 as pb
from integration.conftest import HEARTBEAT_S
from integration.harness import CoordinatorService, coordinator
from integration.raw_session import capability, hello, joined, raw_session

pytestmark = pytest.mark.processes

NOBODYS = LeaseId("lease-nobody")
SOON_S = 5.0


@pytest.fixture
async def member(shared_coordinator: CoordinatorService, tmp_path: Path) -> Credentials:
    """A volunteer of its own account."""
    return await joined(shared_coordinator.worker_join_line, tmp_path / "worker")


async def test_session_outlives_the_watchdog_while_heartbeats_come(member: Credentials) -> None:
    async with raw_session(member) as session:
        welcome = await session.open()
        assert welcome.heartbeat_interval_ms == HEARTBEAT_S * 1000
        for _ in range(4):
            await asyncio.sleep(HEARTBEAT_S)
            await session.send(Heartbeat(), sign=False)
        await session.send(GrantsWanted(NOBODYS, 1), sign=False)
        answer = await session.receive()
        assert isinstance(answer, Refused)
        assert (answer.reason, answer.lease_id, answer.sequence) == ("LEASE_UNKNOWN", NOBODYS, 6)


async def test_silent_worker_is_taken_for_gone(member: Credentials, shared_coordinator: CoordinatorService) -> None:
    async with raw_session(member) as session:
        await session.open()
        began = asyncio.get_running_loop().time()
        await asyncio.wait_for(session.ended(), HEARTBEAT_S * 5)
        assert asyncio.get_running_loop().time() - began >= HEARTBEAT_S * 2.5
    workers = {one["worker_id"]: one for one in shared_coordinator.cli("worker", "list")["workers"]}
    assert workers[member.party_id]["connected"] is False


async def test_stream_that_does_not_begin_with_hello_is_closed(member: Credentials) -> None:
    async with raw_session(member) as session:
        await session.send_request(pb.SessionRequest(sequence=1, payload=b""))
        assert (await session.ended()).reason is Reason.FIELD_INVALID
    async with raw_session(member) as session:
        await session.send(Heartbeat(), sign=False)
        assert (await session.ended()).reason is Reason.MALFORMED_MESSAGE


async def test_hello_without_a_good_signature_is_refused(member: Credentials) -> None:
    for wrong in ({"sign": False}, {"tamper": True}, {"session": SessionId("session-of-before")}):
        async with raw_session(member) as session:
            await session.send(hello(), **wrong)
            error = await session.ended()
            assert (error.reason, error.field) == (Reason.SIGNATURE_INVALID, "signature"), wrong


async def test_hello_recorded_from_another_worker_is_refused(
    member: Credentials, shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    thief = await joined(shared_coordinator.worker_join_line, tmp_path / "thief")
    async with raw_session(thief) as session:
        session.credentials = member
        await session.send(hello())
        assert (await session.ended()).reason is Reason.SIGNATURE_INVALID


async def test_evidence_must_be_signed_for_this_session_and_place(member: Credentials) -> None:
    failed = TaskFailed(NOBODYS, 1, Cause.PROGRAM, "it broke")
    for wrong in ({"sign": False}, {"tamper": True}, {"session": SessionId("")}):
        async with raw_session(member) as session:
            await session.open()
            await session.send(failed, **wrong)
            assert (await session.ended()).reason is Reason.SIGNATURE_INVALID, wrong


async def test_repeated_sequence_number_ends_the_session(member: Credentials) -> None:
    async with raw_session(member) as session:
        await session.open()
        await session.send(Heartbeat(), sign=False)
        await session.send(Heartbeat(), sign=False, sequence=2)
        assert (await session.ended()).reason is Reason.SEQUENCE_REPLAYED


async def test_message_signed_for_another_place_in_the_stream_is_refused(member: Credentials) -> None:
    async with raw_session(member) as session:
        await session.open()
        failed = TaskFailed(NOBODYS, 1, Cause.PROGRAM, "it broke")
        await session.send(failed)
        assert isinstance(await session.receive(), Refused)
        from fallow.session_signature import sign_worker_payload
        from fallow.wire.session import encode_worker_message

        payload = encode_worker_message(failed)
        signature = sign_worker_payload(
            member.key, payload, session=session.session_id, sequence=2, coordinator_key=member.coordinator_public_key
        )
        await session.send_request(pb.SessionRequest(sequence=3, payload=payload, signature=signature))
        assert (await session.ended()).reason is Reason.SIGNATURE_INVALID


async def test_what_no_lease_covers_is_refused_and_the_session_goes_on(member: Credentials) -> None:
    blob = BlobReference(Digest(b"d" * 32), 10)
    async with raw_session(member) as session:
        await session.open()
        for message, reason in (
            (Commitment(NOBODYS, 1, Digest(b"r" * 32), 1, blob), Reason.LEASE_UNKNOWN),
            (Commitment(NOBODYS, 1, Digest(b"r" * 32), 1, blob, inline_output=b"x" * 10), Reason.DIGEST_MISMATCH),
            (Commitment(NOBODYS, 1, Digest(b"r" * 32), 1, blob, partial=True), Reason.FIELD_INVALID),
            (Delivery(NOBODYS, 1, SignedBytes(b"receipt", b"signature")), Reason.LEASE_UNKNOWN),
            (TaskFailed(NOBODYS, 1, Cause.ROW, "x"), Reason.LEASE_UNKNOWN),
            (CapabilityChanged(None, LEASES_PER_WORKER_MAX + 1), Reason.LIMIT_EXCEEDED),
        ):
            await session.send(message)
            answer = await session.receive()
            assert isinstance(answer, Refused)
            assert (answer.reason, answer.sequence) == (reason.value, session.sequence), message
        await session.send(CapabilityChanged(capability(TaskKind.MAP), 3), sign=False)
        await session.send(GrantsWanted(NOBODYS, 1), sign=False)
        assert isinstance(await session.receive(), Refused)


async def test_stranger_with_a_copied_key_is_refused_and_an_honest_reconnect_replaces(member: Credentials) -> None:
    async with raw_session(member) as first, raw_session(member) as stranger, raw_session(member) as second:
        await first.open()
        await stranger.send(hello())
        assert (await stranger.ended()).reason is Reason.KEY_IN_USE
        await second.send(await first.reopen_hello())
        await second.receive()
        assert second.welcome is not None and first.welcome is not None
        assert second.welcome.resume_token != first.welcome.resume_token
        assert second.session_id != first.session_id
        assert (await asyncio.wait_for(first.ended(), SOON_S)).reason is Reason.SESSION_REPLACED


async def test_protocol_and_window_out_of_range_are_refused(member: Credentials) -> None:
    for changed, reason in (
        (replace(hello(), protocol_version=9, protocol_min_supported=9), Reason.PROTOCOL_TOO_NEW),
        (replace(hello(), protocol_version=0), Reason.FIELD_MISSING),
        (replace(hello(), window=LEASES_PER_WORKER_MAX + 1), Reason.LIMIT_EXCEEDED),
        (replace(hello(), resume_token=b"short"), Reason.FIELD_INVALID),
    ):
        async with raw_session(member) as session:
            await session.send(changed)
            assert (await session.ended()).reason is reason


async def test_client_certificate_opens_no_session(shared_coordinator: CoordinatorService, tmp_path: Path) -> None:
    client = await joined(shared_coordinator.client_join_line, tmp_path / "client")
    async with raw_session(client) as session:
        await session.send(hello())
        assert (await session.ended()).reason is Reason.PERMISSION_DENIED


async def test_revoked_party_is_out_at_once_and_for_good(
    member: Credentials, shared_coordinator: CoordinatorService
) -> None:
    async with raw_session(member) as session:
        await session.open()
        ending = asyncio.create_task(session.ended())
        await asyncio.to_thread(shared_coordinator.cli, "party", "revoke", member.party_id, "--reason", "stolen")
        assert (await asyncio.wait_for(ending, SOON_S)).reason is Reason.PARTY_REVOKED
    async with raw_session(member) as session:
        await session.send(hello())
        assert (await session.ended()).reason is Reason.PARTY_REVOKED


async def test_quarantined_worker_is_out_until_released(
    member: Credentials, shared_coordinator: CoordinatorService
) -> None:
    async with raw_session(member) as session:
        await session.open()
        ending = asyncio.create_task(session.ended())
        await asyncio.to_thread(shared_coordinator.cli, "worker", "quarantine", member.party_id, "--reason", "odd")
        assert (await asyncio.wait_for(ending, SOON_S)).reason is Reason.PARTY_QUARANTINED
    async with raw_session(member) as session:
        await session.send(hello())
        assert (await session.ended()).reason is Reason.PARTY_QUARANTINED
    await asyncio.to_thread(shared_coordinator.cli, "worker", "release", member.party_id)
    async with raw_session(member) as session:
        await session.open()


async def test_stopping_coordinator_says_goodbye(tmp_path: Path) -> None:
    with coordinator(tmp_path / "state") as service:
        credentials = await joined(service.worker_join_line, tmp_path / "worker")
        async with raw_session(credentials) as session:
            await session.open()
            ending = asyncio.create_task(session.ended())
            assert await asyncio.to_thread(service.stop) == 0
            error = await asyncio.wait_for(ending, SOON_S)
            assert error.reason in (Reason.COORDINATOR_STOPPING, Reason.COORDINATOR_UNREACHABLE)


async def test_oversize_message_ends_the_stream_and_nothing_else(member: Credentials) -> None:
    async with raw_session(member) as session:
        await session.open()
        await session.send_request(pb.SessionRequest(sequence=2, payload=b"\0" * (600 * 1024)))
        error = await session.ended()
        assert error.reason is Reason.LIMIT_EXCEEDED
        assert error.limit
    async with raw_session(member) as session:
        with pytest.raises((grpc.aio.AioRpcError, FallowError, asyncio.InvalidStateError)):
            await session.send_request(pb.SessionRequest(sequence=1, payload=b"\0" * (2 * 1024 * 1024)))
            raise await session.ended()


async def test_worker_that_hangs_up_while_it_joins_is_never_locked_out(member: Credentials) -> None:
    for _ in range(20):
        async with raw_session(member) as session:
            await session.send(hello())
    deadline = asyncio.get_running_loop().time() + SOON_S
    while True:
        async with raw_session(member) as session:
            await session.send(hello())
            try:
                await session.receive()
                return
            except FallowError as error:
                assert error.reason is Reason.KEY_IN_USE
        assert asyncio.get_running_loop().time() < deadline
