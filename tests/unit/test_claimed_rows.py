"""Rows on which a program is said to have crashed run once more before it is inspected."""

from __future__ import annotations

import pytest

from fallow.ids import Digest, LeaseId
from fallow.row_block import pack
from fallow.session import Cause, TaskKind
from fallow_worker.claimed_rows import INSPECTION_MS, run_claimed_rows
from fallow_worker.executor import WorkFailed
from fallow_worker.ports import LoadedBundle, Work
from fallow_worker.testing import FakeExecutor

BUNDLE = LoadedBundle(Digest(b"b" * 32), b"", {}, 4, slot_dependent=False, memory_bytes_peak=0)
BLOCK = pack(Digest(b"s" * 32), [b"a", b"b"], [], bytes(16))


class Recorder(FakeExecutor):
    """Keeps what it was asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    async def run(self, work, progress):  # type: ignore[no-untyped-def]
        self.works.append(work)
        return await super().run(work, progress)


def inspection(runtime_max_ms: int) -> Work:
    return Work(LeaseId("lease-1"), TaskKind.INSPECT, BUNDLE, BLOCK, 2, bytes(16), 1 << 20, runtime_max_ms)


@pytest.mark.parametrize(
    ("runtime_ms", "for_rows_ms"), [(60_000, 30_000), (INSPECTION_MS + 60_000, 330_000), (7_200_000, 6_600_000)]
)
async def test_claimed_rows_run_as_a_lease_of_rows_and_are_dropped(runtime_ms: int, for_rows_ms: int) -> None:
    executor = Recorder()
    left = await run_claimed_rows(executor, inspection(runtime_ms), lambda _: None)
    (ran,) = executor.works
    assert (ran.kind, ran.input_block, ran.rows, ran.runtime_max_ms) == (TaskKind.MAP, BLOCK, 2, for_rows_ms)
    assert (left.kind, left.input_block, left.rows) == (TaskKind.INSPECT, b"", 0)


@pytest.mark.parametrize("cause", [Cause.PROGRAM, Cause.PLATFORM])
async def test_how_claimed_rows_end_is_told_with_its_cause(cause: Cause) -> None:
    executor = Recorder()
    executor.next_failures.append(WorkFailed(cause, "killed by signal 11"))
    with pytest.raises(WorkFailed) as failed:
        await run_claimed_rows(executor, inspection(60_000), lambda _: None)
    assert failed.value.cause is cause
    assert failed.value.reason == "on 2 rows of a job: killed by signal 11"
