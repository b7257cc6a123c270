"""Why a job does not move, in a sentence and a code."""

from __future__ import annotations

from fallow.credits import PoolMode, credits_text, price_per_hour
from fallow.ids import JobId
from fallow.job import JobState
from fallow.roles import TIERS_ALLOWED, Tier
from fallow_coordinator.core.auditing import referees
from fallow_coordinator.core.deferral import why_deferred
from fallow_coordinator.core.evidence import Verification
from fallow_coordinator.core.needs import INSPECTION, Misfit, misfit
from fallow_coordinator.core.state import (
    Job,
    State,
    TaskPhase,
)

WAITING_STATES = frozenset({JobState.PENDING, JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING})

NO_OPERATOR_WORKER = "NO_OPERATOR_WORKER"
INSPECTING = "INSPECTING"
NO_WORKER = "NO_WORKER"
BUSY = "BUSY"
PACKING = "PACKING"
LIMIT_BELOW_ASKS = "LIMIT_BELOW_ASKS"
DEFERRED = "DEFERRED"
CHECKING = "CHECKING"
NO_AUDITOR = "NO_AUDITOR"
NO_REFEREE = "NO_REFEREE"


def waiting_reason(state: State, job_id: JobId) -> tuple[str, str]:
    """Why the job does not move: (a sentence, a code); both empty when it does."""
    job = state.jobs[job_id]
    if job.state is JobState.PENDING:
        return _why_pending(state, job)
    if job.state not in WAITING_STATES:
        return "", ""
    if job.deferred_until_ms:
        return why_deferred(state, job, state.clock_ms), DEFERRED
    if job.state is JobState.VERIFYING:
        return _why_verifying(state, state.verifications[job_id])
    if job.rows_leased:
        return "", ""
    sentence, code = _why_waiting(state, job)
    sentence += _without_strangers(state.verifications.get(job_id))
    failures = (state.tasks[task_id].last_reason for task_id in job.tasks)
    last = next((reason for reason in failures if reason), "")
    return (f"{sentence}; the last try ended: {last}" if last else sentence), code


def _without_strangers(verification: Verification | None) -> str:
    """Who gets nothing of a verifying job any more, as the end of a sentence."""
    if verification is None or not verification.strangers:
        return ""
    classes = ", ".join(sorted(set(verification.strangers.values())))
    return (
        f"; {len(verification.strangers)} workers get no more of it, because their rows lie further from a referee's "
        f"than rounding explains (execution class {classes})"
    )


def _why_verifying(state: State, verification: Verification) -> tuple[str, str]:
    """All rows are there; who checks those that were drawn."""
    accept = f"`fallow job accept {verification.job_id}` takes the rows with the checks made by now"
    waiting = sum(map(len, verification.audit_due.values()))
    live = any(audit.lease_id is None for audit in verification.audits.values())
    if verification.referee_due and not referees(state):
        count = len(verification.referee_due)
        return (
            f"{count} rows wait for a referee, and no operator worker that referees is connected; {accept}",
            NO_REFEREE,
        )
    if waiting and not live and not verification.refereed:
        return (
            f"{waiting} rows wait for an audit, and no free worker of another account, token and machine than whose "
            f"rows they are is connected; {accept}",
            NO_AUDITOR,
        )
    return f"{verification.open_rows} of the rows drawn for checks are not decided", CHECKING


def _why_waiting(state: State, job: Job) -> tuple[str, str]:
    lane = state.lanes[job.lane]
    asks = _asks_above_limit(state, job)
    if asks is not None:
        return asks, LIMIT_BELOW_ASKS
    if not lane.window_total:
        allowed = ", ".join(tier.value for tier in Tier if tier in TIERS_ALLOWED[job.data_class])
        pool = state.pools[job.pool_id].name
        return (
            f"no worker is connected that may take {job.data_class.value} rows in pool {pool} (tiers: {allowed})",
            NO_WORKER,
        )
    phases = {state.tasks[task_id].phase for task_id in job.tasks}
    if TaskPhase.READY in phases or not lane.groups & state.free_groups:
        return "all workers are busy with other work", BUSY
    return "its rows are being packed", PACKING


def _asks_above_limit(state: State, job: Job) -> str | None:
    """Why nobody takes it for what its owner would pay; None when that is not why."""
    if job.mode is not PoolMode.MARKET:
        return None
    limit = job.options.limit_microcredits_per_unit
    fitting = [
        group.asks
        for group in state.groups.values()
        if group.asks and misfit(job.lane, group.ability) in (None, Misfit.ASK)
    ]
    lowest = min((asks[0] for asks in fitting), default=0)
    if lowest <= limit:
        return None
    return (
        f"each of the {sum(map(len, fitting))} workers that fit asks more than the job's limit: the lowest ask is "
        f"{credits_text(price_per_hour(lowest))} credits for an hour of a reference core, the limit is "
        f"{credits_text(price_per_hour(limit))}"
    )


def _why_pending(state: State, job: Job) -> tuple[str, str]:
    bundle = state.bundles[job.bundle_digest]
    task = state.tasks.get(bundle.inspection_task_id) if bundle.inspection_task_id is not None else None
    if task is not None and task.phase is TaskPhase.LEASED:
        return "its bundle is being inspected", INSPECTING
    if not inspectors_take_work(state):
        return "its bundle waits for inspection, and no operator worker that inspects is connected", NO_OPERATOR_WORKER
    return "its bundle waits for inspection", INSPECTING


def inspectors_take_work(state: State) -> bool:
    """Whether an operator worker that inspects takes work."""
    return any(group.window_total for group in state.groups.values() if misfit(INSPECTION, group.ability) is None)
