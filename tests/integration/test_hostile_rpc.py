"""Bytes and connections that no honest peer sends."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fallow.channel import control_channel, enrollment_channel
from fallow.credentials import Credentials
from fallow.errors import Reason
from fallow.limits import CONTROL_MESSAGE_BYTES_MAX
from fallow.v1 import (
    admin_service_pb2,
    enrollment_service_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    worker_service_pb2,
)
from fallow.wire.errors import error_from_rpc
from integration.harness import CoordinatorService
from integration.raw_session import joined, raw_session

pytestmark = pytest.mark.processes

MALFORMED = b"\xff\xff\xff\xff\xff\xff"
SERVICES = {
    "control": (
        job_service_pb2.DESCRIPTOR.services_by_name["JobService"],
        admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
    ),
    "enrollment": (enrollment_service_pb2.DESCRIPTOR.services_by_name["EnrollmentService"],),
}


@pytest.fixture
async def operator(shared_coordinator: CoordinatorService, tmp_path: Path) -> Credentials:
    return await joined(shared_coordinator.new_token("--role", "operator"), tmp_path / "operator")


def _channel(kind: str, service: CoordinatorService, credentials: Credentials) -> grpc.aio.Channel:
    if kind == "control":
        return control_channel(credentials)
    return enrollment_channel(service.facts["enrollment_endpoint"], credentials.authority_pem)


def _methods(kind: str) -> Iterator[tuple[str, bool]]:
    for service in SERVICES[kind]:
        for method in service.methods:
            yield f"/{service.full_name}/{method.name}", method.server_streaming


async def answer(channel: grpc.aio.Channel, method: str, raw: bytes, *, streams: bool) -> None:
    """Calls a method with raw bytes and waits for its first answer."""
    if streams:
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
        await stream(raw, timeout=10).read()
    else:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        await unary(raw, timeout=10)


def session_call(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    """A worker's stream of raw bytes."""
    stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/fallow.v1.WorkerService/Session")
    return stream()


@pytest.mark.parametrize("kind", ["control", "enrollment"])
async def test_malformed_bytes_are_invalid_arguments_in_every_method(
    kind: str, shared_coordinator: CoordinatorService, operator: Credentials
) -> None:
    async with _channel(kind, shared_coordinator, operator) as channel:
        count = 0
        for method, streams in _methods(kind):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(channel, method, MALFORMED, streams=streams)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
            assert error_from_rpc(caught.value).reason is Reason.MALFORMED_MESSAGE, method
            count += 1
        assert count == sum(len(service.methods) for service in SERVICES[kind])


async def test_noise_never_becomes_an_internal_error(
    shared_coordinator: CoordinatorService, operator: Credentials
) -> None:
    allowed = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
    unary = [method for method, streams in _methods("control") if not streams]
    async with control_channel(operator) as channel:
        for _ in range(300):
            noise = secrets.token_bytes(secrets.randbelow(40))
            method = secrets.choice(unary)
            try:
                await answer(channel, method, noise, streams=False)
            except grpc.aio.AioRpcError as failure:
                assert failure.code() in allowed, (method, noise.hex(), failure.details())


async def test_malformed_session_messages_end_the_stream(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    worker = await joined(shared_coordinator.worker_join_line, tmp_path / "worker")
    async with control_channel(worker) as channel:
        call = session_call(channel)
        await call.write(MALFORMED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise AssertionError(await call.code())
        assert error_from_rpc(caught.value).reason is Reason.MALFORMED_MESSAGE
    async with raw_session(worker) as session:
        await session.open()
        await session.send_request(worker_service_pb2.SessionRequest(sequence=2, payload=MALFORMED))
        assert (await session.ended()).reason is Reason.MALFORMED_MESSAGE


@pytest.mark.parametrize("kind", ["control", "enrollment"])
async def test_oversize_messages_are_refused_by_the_transport(
    kind: str, shared_coordinator: CoordinatorService, operator: Credentials
) -> None:
    method = next(method for method, streams in _methods(kind) if not streams)
    credentials = grpc.ssl_channel_credentials(
        operator.authority_pem, *((operator.key.pem, operator.certificate_pem) if kind == "control" else ())
    )
    options = [("grpc.ssl_target_name_override", f"{kind}.fallow"), ("grpc.max_send_message_length", -1)]
    endpoint = shared_coordinator.facts[f"{kind}_endpoint"]
    async with grpc.aio.secure_channel(endpoint, credentials, options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(channel, method, bytes(CONTROL_MESSAGE_BYTES_MAX + 1), streams=False)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_control_endpoint_wants_a_certificate(
    shared_coordinator: CoordinatorService, operator: Credentials
) -> None:
    options = [("grpc.ssl_target_name_override", "control.fallow")]
    credentials = grpc.ssl_channel_credentials(operator.authority_pem)
    async with grpc.aio.secure_channel(shared_coordinator.facts["control_endpoint"], credentials, options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = job_service_pb2.GetSessionRequest()
            await job_service_pb2_grpc.JobServiceStub(channel).GetSession(request, timeout=5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_certificate_of_the_authority_without_an_enrolment_lets_nobody_in(
    shared_coordinator: CoordinatorService, operator: Credentials, tmp_path: Path
) -> None:
    # A key that shows another party's certificate can't even shake hands.
    other = await joined(shared_coordinator.client_join_line, tmp_path / "other")
    async with control_channel(replace(other, key=operator.key)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = job_service_pb2.GetSessionRequest()
            await job_service_pb2_grpc.JobServiceStub(channel).GetSession(request, timeout=5)
        assert caught.value.code() is not grpc.StatusCode.OK


async def test_health_and_reflection_are_on(shared_coordinator: CoordinatorService, operator: Credentials) -> None:
    async with control_channel(operator) as channel:
        for name in ("", "fallow.v1.JobService"):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name async for part in call for service in part.list_services_response.service}
    assert {"fallow.v1.WorkerService", "fallow.v1.JobService", "fallow.v1.AdminService"} <= names


async def test_too_many_streams_of_one_party_are_refused_and_others_go_on(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    worker = await joined(shared_coordinator.worker_join_line, tmp_path / "worker")
    async with control_channel(worker) as channel:
        calls = [session_call(channel) for _ in range(80)]
        reads = [asyncio.create_task(_first(call)) for call in calls]
        done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert {task.result() for task in done} == {Reason.OVERLOADED}
        for call in calls:
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
    assert await asyncio.to_thread(shared_coordinator.cli, "status")
    async with raw_session(worker) as session:
        await session.open()


async def _first(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> Reason | None:
    try:
        if await call.read() is grpc.aio.EOF:
            await call.wait_for_connection()
    except grpc.aio.AioRpcError as failure:
        return error_from_rpc(failure).reason
    return None


def test_wrong_environment_for_protobuf_stops_the_start(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "fallow_coordinator", "start", "--state", str(tmp_path / "s"), "--port", "0"],
        capture_output=True, timeout=60, check=False,
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "upb" in done.stderr.decode()
