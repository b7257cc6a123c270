"""Bugs with money, planted on purpose; each must be found by the market's seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fallow.ids import LeaseId
from fallow.roles import Tier
from fallow_coordinator.core import draft, evolve_tasks, funding, postings, treasury
from fallow_coordinator.core import events as e
from fallow_coordinator.core.ledger import Ledger, Posting
from fallow_coordinator.core.state import Job, State, Task, Worker
from simulation.coordinator_side import EngineBugs

Plant = Callable[[pytest.MonkeyPatch], EngineBugs]


def pays_twice(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A settlement is posted two times."""
    right = postings._POSTINGS[e.TaskSettled]
    patch.setitem(postings._POSTINGS, e.TaskSettled, lambda state, event: right(state, event) * 2)
    return EngineBugs()


def reservation_leaks(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A lease that ends undone keeps what it had reserved."""
    right = evolve_tasks._release

    def wrong(state: State, lease_id: LeaseId, outcome: e.LeaseOutcome | None) -> Task:
        lease = state.leases[lease_id]
        task = right(state, lease_id, outcome)
        if outcome is not None and task.job_id is not None:
            state.jobs[task.job_id].reserved_microcredits += lease.reserved_microcredits
        return task

    patch.setattr(evolve_tasks, "_release", wrong)
    return EngineBugs()


def reservations_are_not_counted(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Each lease may cost the whole rest of the budget, whatever others may cost."""
    right = funding.unreserved
    patch.setattr(funding, "unreserved", lambda state, job: right(state, job) + job.reserved_microcredits)
    return EngineBugs()


def budget_is_overrun(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Nobody looks whether a job can pay."""
    patch.setattr(funding, "_shortage", lambda state, job, reserved: None)
    return EngineBugs()


def pays_above_the_limit(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The next one's ask is paid also where it is above the limit."""

    def wrong(*, ask: int, runner_up_ask: int | None, limit: int | None) -> int:
        return max(ask, runner_up_ask or 0)

    patch.setattr(funding, "price_paid", wrong)
    return EngineBugs()


def pays_below_the_ask(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A worker that was taken although another is cheaper gets the other's ask."""

    def wrong(*, ask: int, runner_up_ask: int | None, limit: int | None) -> int:
        return ask // 2

    patch.setattr(funding, "price_paid", wrong)
    return EngineBugs()


def pays_for_failed_rows(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A task is paid whole, whatever became of its rows."""
    patch.setattr(funding, "pay", lambda reserved, *, rows, rows_failed: reserved)
    return EngineBugs()


def volunteers_are_released_at_once(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Nobody waits until results are checked."""
    patch.setattr(funding, "_RELEASED_AT_ONCE", frozenset(Tier))
    return EngineBugs()


def own_work_is_paid(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Contribution is recorded for nobody else's work."""
    right = funding.settlement

    def wrong(state: State, task: Task, lease: Any, *, rows_failed: int) -> funding.Settlement:
        return replace(right(state, task, lease, rows_failed=rows_failed), contribution_microcredits=7)

    patch.setattr(draft, "settlement", wrong)
    return EngineBugs()


def top_up_counts_twice(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A transfer said twice happens twice."""
    from fallow_coordinator.core import evolve_ledger

    patch.setattr(treasury, "_repeated", lambda state, transfer_id, facts: None)
    patch.setattr(evolve_ledger, "_remember", lambda ledger, transfer_id, facts: None)
    return EngineBugs()


def rest_of_a_budget_is_lost(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The end of a job does not give back what it holds."""
    patch.delitem(postings._POSTINGS, e.JobStateChanged)
    return EngineBugs()


def top_up_does_not_resume(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A job out of budget stays so, however much it gets."""
    patch.setattr(treasury, "BUDGET_EXHAUSTED", "")
    return EngineBugs()


def overdrafts_are_allowed(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Nobody looks whether an account has what it sets aside."""
    from fallow_coordinator.core import jobs

    def careless(self: Ledger, moved: tuple[Posting, ...]) -> None:
        for book, microcredits in moved:
            balance = self.balances.get(book, 0) + microcredits
            self.balances.pop(book, None)
            if balance:
                self.balances[book] = balance

    patch.setattr(jobs, "check_funds", lambda state, account_id, microcredits, field: None)
    patch.setattr(Ledger, "post", careless)
    patch.setattr(Ledger, "check", lambda self: None)
    return EngineBugs()


def strangers_work_for_nothing(patch: pytest.MonkeyPatch) -> EngineBugs:
    """Every worker counts as the submitter's own."""

    def wrong(job: Job, worker: Worker) -> bool:
        return True

    patch.setattr(funding, "is_own", wrong)
    return EngineBugs()


def tasks_of_a_job_without_funds_are_forgotten(patch: pytest.MonkeyPatch) -> EngineBugs:
    """A job that goes on leaves its packed tasks outside the lane."""
    from fallow_coordinator.core import evolve_jobs

    def wrong(state: State, job: Job) -> None:
        job.parked = False

    patch.setattr(evolve_jobs, "unpark", wrong)
    return EngineBugs()


def late_leases_keep_their_reservation(patch: pytest.MonkeyPatch) -> EngineBugs:
    """What a late lease does not cost comes back to nobody."""
    patch.setattr(postings, "_left_over", lambda job, microcredits: ())
    return EngineBugs()


def jobs_give_back_what_late_leases_may_cost(patch: pytest.MonkeyPatch) -> EngineBugs:
    """The end of a job leaves nothing to pay those who are late."""
    right = postings._POSTINGS[e.JobStateChanged]

    def wrong(state: State, event: e.JobStateChanged) -> tuple[Posting, ...]:
        job = state.jobs[event.job_id]
        reserved, job.reserved_microcredits = job.reserved_microcredits, 0
        try:
            return right(state, event)
        finally:
            job.reserved_microcredits = reserved

    patch.setitem(postings._POSTINGS, e.JobStateChanged, wrong)
    return EngineBugs()


PLANTED: tuple[Plant, ...] = (
    pays_twice,
    reservation_leaks,
    reservations_are_not_counted,
    budget_is_overrun,
    pays_above_the_limit,
    pays_below_the_ask,
    pays_for_failed_rows,
    volunteers_are_released_at_once,
    own_work_is_paid,
    top_up_counts_twice,
    rest_of_a_budget_is_lost,
    top_up_does_not_resume,
    overdrafts_are_allowed,
    strangers_work_for_nothing,
    tasks_of_a_job_without_funds_are_forgotten,
    late_leases_keep_their_reservation,
    jobs_give_back_what_late_leases_may_cost,
)
