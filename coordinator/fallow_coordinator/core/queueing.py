"""When a job begins to wait for workers: its place among the jobs of its account."""

from __future__ import annotations

from fallow.bundle import InspectionReport
from fallow.ids import JobId
from fallow.job import DatasetBlock, JobOptions, JobState
from fallow_coordinator.core import events as e
from fallow_coordinator.core.limits import UNIT_MICROS
from fallow_coordinator.core.needs import Needs, misfit
from fallow_coordinator.core.shares import due_ms
from fallow_coordinator.core.state import State


def queued(
    state: State,
    job_id: JobId,
    *,
    needs: Needs,
    options: JobOptions,
    blocks: tuple[DatasetBlock, ...],
    report: InspectionReport,
    now_ms: int,
) -> e.JobStateChanged:
    """The event by which the job queues from now on."""
    rows = sum(block.rows for block in blocks)
    size_bytes = sum(block.blob.length_bytes for block in blocks)
    permille = state.bundles[report.bundle_digest].cost_permille
    unit_micros = (
        (report.unit_micros_per_row * rows + report.unit_micros_per_kib * size_bytes // 1024) * permille // 1_000
    )
    return e.JobStateChanged(
        job_id=job_id,
        state=JobState.QUEUED,
        reason="",
        reason_code="",
        cost_permille=permille,
        due_ms=due_ms(options, now_ms=now_ms, run_ms=run_ms(state, needs, unit_micros)),
    )


def run_ms(state: State, needs: Needs, unit_micros: int) -> int:
    """About how long work of this cost takes on all slots that fit now, at least one, with reference cores."""
    slots = sum(group.ahead_total for group in state.groups.values() if misfit(needs, group.ability) is None)
    return unit_micros * 1_000 // UNIT_MICROS // max(1, slots)
