"""Enrolled parties that mean harm, and how a coordinator is while they try."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from fallow.blob_client import BlobClient
from fallow.channel import blob_channel, control_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError
from fallow.ids import digest_of
from fallow.session import BlobReference
from fallow.v1 import blob_pb2, identity_pb2, job_service_pb2, job_service_pb2_grpc
from fallow.wire.blob import grant_from_message, receipt_to_message, reference_to_message
from fallow.wire.errors import error_from_rpc
from integration.harness import CoordinatorService
from integration.raw_session import joined

CALL_S = 10.0
HONEST_CALL_S_MAX = 3.0
"""An honest call beside an attack on two shared cores; unhindered it takes a few milliseconds."""


@dataclass
class Submitter:
    """A client with its stubs."""

    credentials: Credentials
    jobs: job_service_pb2_grpc.JobServiceAsyncStub
    blobs: BlobClient

    async def upload(self, data: bytes, kind: blob_pb2.BlobKind.ValueType = blob_pb2.BLOB_KIND_OPAQUE) -> BlobReference:
        """Stores a blob for this account."""
        reference = BlobReference(digest_of(data), len(data))
        wanted = job_service_pb2.UploadWanted(blob=reference_to_message(reference), kind=kind)
        granted = await self.jobs.GrantUploads(job_service_pb2.GrantUploadsRequest(uploads=[wanted]), timeout=CALL_S)
        if not granted.uploads[0].have:
            receipt = await self.blobs.put(grant_from_message(granted.uploads[0].grant), data)
            request = job_service_pb2.RecordUploadsRequest(receipts=[receipt_to_message(receipt)])
            await self.jobs.RecordUploads(request, timeout=CALL_S)
        return reference

    async def register(self, manifest: bytes) -> job_service_pb2.BundleStatus:
        """What the coordinator says to a manifest."""
        request = job_service_pb2.RegisterBundleRequest(manifest=manifest)
        return (await self.jobs.RegisterBundle(request, timeout=CALL_S)).status

    async def ask(self) -> None:
        """Any small call."""
        protocol = identity_pb2.ProtocolVersion(version=1, min_supported=1)
        await self.jobs.GetSession(job_service_pb2.GetSessionRequest(protocol=protocol), timeout=CALL_S)


@contextlib.asynccontextmanager
async def submitter(line: str, folder: Path) -> AsyncIterator[Submitter]:
    """A client that joins by `line`."""
    credentials = await joined(line, folder / secrets.token_hex(4))
    async with control_channel(credentials) as control, blob_channel(credentials) as blobs:
        yield Submitter(credentials, job_service_pb2_grpc.JobServiceStub(control), BlobClient(blobs))


async def refused(call: Awaitable[object]) -> FallowError:
    """How a call was refused; that it was is part of the test."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as failure:
        return error_from_rpc(failure)
    raise AssertionError(f"this was let through: {answer}")


@dataclass
class Watch:
    """What an honest client saw, and what the machine paid, while something else went on."""

    slowest_s: float = 0.0
    calls: int = 0
    state_bytes: int = 0
    """Growth of the state folder, logs included."""
    memory_bytes: int = 0
    """Growth of the coordinator's resident memory."""
    failures: list[str] = field(default_factory=list[str])

    def was_harmless(self, *, state_bytes_max: int = 8_000_000, memory_bytes_max: int = 150_000_000) -> None:
        """Fails the test unless honest calls went through in time and neither disk nor memory filled."""
        assert not self.failures, self.failures[:3]
        assert self.calls and self.slowest_s < HONEST_CALL_S_MAX, self
        assert self.state_bytes < state_bytes_max, self
        assert self.memory_bytes < memory_bytes_max, self


@contextlib.asynccontextmanager
async def watched(service: CoordinatorService, honest: Submitter) -> AsyncIterator[Watch]:
    """Calls as an honest client all the while the block runs."""
    watch, done = Watch(), asyncio.Event()
    process = _coordinator_process(service)
    state_bytes, memory_bytes = _bytes_below(service.state), process.memory_info().rss

    async def calls() -> None:
        while not done.is_set():
            began = time.monotonic()
            try:
                await honest.ask()
            except grpc.aio.AioRpcError as failure:
                watch.failures.append(f"{failure.code()}: {failure.details()}")
            watch.slowest_s = max(watch.slowest_s, time.monotonic() - began)
            watch.calls += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.05)

    calling = asyncio.create_task(calls())
    try:
        yield watch
    finally:
        done.set()
        await calling
        watch.state_bytes = _bytes_below(service.state) - state_bytes
        watch.memory_bytes = process.memory_info().rss - memory_bytes


def _coordinator_process(service: CoordinatorService) -> psutil.Process:
    for process in service.family():
        if "start" in process.cmdline():
            return process
    raise AssertionError("the coordinator is gone")


def _bytes_below(folder: Path) -> int:
    def sizes() -> Iterator[int]:
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_size

    return sum(sizes())
