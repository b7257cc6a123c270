"""A late task in two hands, over mTLS: the second worker delivers, the first is settled and delivers nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fallow.session import Lease, Settled, TaskKind
from fallow.v1 import job_pb2
from integration.harness import CoordinatorService
from integration.raw_session import hello, joined, raw_session
from integration.test_job_service import (
    Client,
    Crew,
    beat,
    client,
    commitment,
    crew,
    inline_request,
    input_block,
    output_of,
    values_of,
)

pytestmark = [pytest.mark.processes, pytest.mark.slow]
__all__ = ["client", "crew"]


async def test_a_job_does_not_wait_for_a_worker_that_is_late(
    client: Client, crew: Crew, shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    line = await asyncio.to_thread(shared_coordinator.new_token, "--role", "worker", "--pool", crew.pool_id)
    credentials = await joined(line, tmp_path / "second")
    bundle_digest = await client.bundle()
    job_id = await client.submit(inline_request(bundle_digest, crew.pool_id, input_block(4)))
    await crew.inspect(bundle_digest)
    late = await crew.volunteer.until(Lease)
    assert isinstance(late, Lease)
    async with raw_session(credentials) as second:
        await second.open(hello(TaskKind.MAP, window=1))
        beating = asyncio.create_task(beat(second))
        lease = await second.until(Lease)
        assert isinstance(lease, Lease)
        assert (lease.fence, late.fence) == (2, 1) and lease.lease_id != late.lease_id
        assert lease.inline_input == late.inline_input
        output = output_of(lease.inline_input)
        await second.send(commitment(lease, output))
        assert isinstance(await second.until(Settled), Settled)
        results, status = await client.watch(job_id)
        assert status.state == job_pb2.JOB_STATE_SUCCEEDED
        assert [result.worker_id for result in results] == [second.credentials.party_id]
        assert (values_of(results, 4) >= 0).all()
        # Not inline, and still nobody wants the upload.
        await crew.volunteer.send(commitment(late, output_of(late.inline_input), inline=False))
        told = await crew.volunteer.receive()
        assert isinstance(told, Settled) and told.lease_id == late.lease_id
        beating.cancel()
    again, status = await client.watch(job_id)
    assert [result.output_root for result in again] == [result.output_root for result in results]
    assert status.progress.rows_done == 4
