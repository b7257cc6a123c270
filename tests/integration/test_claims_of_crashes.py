"""Workers that say a program crashed them: an operator's worker runs their very rows before anybody believes it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.client import connect_async
from fallow.credentials import Credentials
from fallow.job import JobState
from fallow.session import Cause, Lease, LeaseRevoked, TaskFailed
from integration.harness import coordinator, wait_for, worker
from integration.raw_session import hello, joined, raw_session

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]

ROWS = 40_000


async def claimed(credentials: Credentials) -> int:
    """Takes a lease and says that the program crashed; how many rows the lease had."""
    async with raw_session(credentials) as session:
        await session.open(hello(window=1))
        lease = await session.until(Lease)
        assert isinstance(lease, Lease)
        await session.send(TaskFailed(lease.lease_id, lease.fence, Cause.PROGRAM, "it crashed, we say"))
        await session.until(LeaseRevoked)
        return lease.rows


async def test_two_colluding_accounts_hold_no_honest_bundle(tmp_path: Path) -> None:
    model = tmp_path / "dense.onnx"
    model.write_bytes(dense_model())
    rows = np.random.default_rng(1).standard_normal((ROWS, FEATURES), dtype=np.float32)
    with coordinator(tmp_path / "coordinator", "--no-measure", operator_worker=True) as service:
        operators_log = service.state / "logs" / "operator-worker.log"
        liars = [await joined(service.worker_join_line, tmp_path / f"liar-{number}") for number in range(2)]
        async with await connect_async(service.facts["client_credentials"]) as client:
            job = await client.map(Bundle.from_onnx(model), rows, data="public")
            async for status in job.statuses():
                if status.state is not JobState.PENDING:
                    # Inspected: there is something to lease.
                    break
            told = [await claimed(liar) for liar in liars]
            line = await asyncio.to_thread(
                wait_for, lambda: _line(operators_log, "inspection.rows_ran"), 90, "the operator's own run of the rows"
            )
            assert f"rows={told[1]} " in f"{line} ", "the rows of the second claim"
            with worker(service, tmp_path / "honest", "--executor", "process"):
                status = await asyncio.wait_for(job.wait(), 120)
            assert status.state is JobState.SUCCEEDED


def _line(log: Path, word: str) -> str:
    return next((line for line in log.read_text(errors="replace").splitlines() if word in line), "")
