"""Events of one decision as they add up: ends of leases, tasks and jobs, each counted once."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.credits import PoolMode
from fallow.errors import Reason
from fallow.ids import Digest, JobId, LeaseId, PartyId, TaskId
from fallow.job import JOB_STATES_FINAL, Footprint, JobState
from fallow.limits import ROW_FAILURE_REASON_BYTES_MAX, ROW_FAILURES_LISTED_PER_TASK_MAX, TASK_ATTEMPTS_MAX
from fallow.session import Cause, RowFailure, TaskKind
from fallow_coordinator.core.devices import challenge_of, ended
from fallow_coordinator.core.draws import drawn
from fallow_coordinator.core.duplicate_events import Agreement
from fallow_coordinator.core.events import (
    CommitmentRecorded,
    Event,
    JobStateChanged,
    LateLeaseSettled,
    LeaseEnded,
    LeaseOutcome,
    TaskAbandoned,
    TaskDropped,
    TaskSettled,
)
from fallow_coordinator.core.evolve_tasks import MEASURING_KINDS, counts_as_attempt
from fallow_coordinator.core.footprints import footprint_of
from fallow_coordinator.core.funding import is_short, resumed, settlement, short_of_allotment
from fallow_coordinator.core.health import is_strike, struck
from fallow_coordinator.core.learning import inspected_unit_micros, learned
from fallow_coordinator.core.limits import TASK_LOSSES_MAX
from fallow_coordinator.core.state import Answer, Job, Lease, State, Task
from fallow_coordinator.core.timings import NO_TIMING, Timing
from fallow_coordinator.core.verification_events import AuditGivenUp, Verdict, VerdictReached


@dataclass(slots=True)
class _Tally:
    """A job as it will be after the events drafted so far."""

    results: int
    rows_done: int
    rows_failed: int
    ended: bool
    verifying: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """What a commitment's message says beyond its rows."""

    message_digest: Digest
    execution_class: str


class Draft:
    """Collects events and knows what they will have changed; the state itself stands still."""

    def __init__(self, state: State) -> None:
        self.events: list[Event] = []
        self._state = state
        self._tallies: dict[JobId, _Tally] = {}
        self._leases_ended: set[LeaseId] = set()
        self._tasks_gone: set[TaskId] = set()
        self._struck: set[PartyId] = set()
        self._resumed: set[JobId] = set()
        self._left_out: list[Lease] = []
        """Leases whose tasks were delivered by other leases in this draft."""

    def end_lease(self, lease: Lease, outcome: LeaseOutcome, cause: Cause, reason: str) -> None:
        """Ends a lease without result; its task is tried again, or given up when it has been tried often enough."""
        if lease.lease_id in self._leases_ended:
            return
        reason = shortened(reason)
        task = self._state.tasks[lease.task_id]
        self._leases_ended.add(lease.lease_id)
        self.events.append(LeaseEnded(lease_id=lease.lease_id, outcome=outcome, cause=cause, reason=reason))
        if lease.worker_id not in self._struck and is_strike(self._state, lease, outcome, cause):
            self._struck.add(lease.worker_id)
            self.events.append(struck(self._state.workers[lease.worker_id]))
        self._given_back(task, lease.reserved_microcredits)
        if task.kind in MEASURING_KINDS:
            self._drop_measurement(task, outcome, cause, reason)
            return
        if task.answer is not None or self._other_live(task, lease) is not None:
            # Its rows are delivered, or in other hands: there is nothing to try again.
            return
        if counts_as_attempt(outcome, cause):
            if task.attempts + 1 >= TASK_ATTEMPTS_MAX:
                self.abandon(task, cause, reason)
        elif task.losses + 1 >= TASK_LOSSES_MAX:
            self.abandon(task, cause, f"lost {TASK_LOSSES_MAX} times, last: {reason}")

    def _other_live(self, task: Task, lease: Lease) -> Lease | None:
        """The task's other lease, unless it has ended."""
        other_id = task.other_lease_id(lease.lease_id)
        return None if other_id is None or other_id in self._leases_ended else self._state.leases[other_id]

    def _drop_measurement(self, task: Task, outcome: LeaseOutcome, cause: Cause, reason: str) -> None:
        """A challenge or a check is never tried again as such: the next look decides anew."""
        self._tasks_gone.add(task.task_id)
        self.events.append(TaskDropped(task_id=task.task_id))
        if task.kind is TaskKind.CHALLENGE:
            faults = {Cause.WORKER, Cause.PROGRAM, Cause.ROW}
            blamed = outcome is LeaseOutcome.EXPIRED or (outcome is LeaseOutcome.FAILED and cause in faults)
            self.events.extend(ended(self._state, challenge_of(self._state, task), reason, blamed=blamed))

    def abandon(self, task: Task, cause: Cause, reason: str) -> None:
        """Gives a task up, whose lease has ended: its rows fail."""
        if task.task_id in self._tasks_gone:
            return
        self._tasks_gone.add(task.task_id)
        reason = shortened(reason)
        if task.checks and task.job_id is not None:
            self._leave_unchecked(task, reason)
            return
        if task.job_id is None:
            self.events.append(TaskAbandoned(task_id=task.task_id, cursor=0, rows=0, cause=cause, reason=reason))
            if self._state.bundles[task.bundle_digest].report is None:
                self._fail_jobs(task.bundle_digest, f"the bundle could not be inspected: {reason}", Reason.JOB_FAILED)
            return
        tally = self._tally(task.job_id)
        tally.results += 1
        tally.rows_done += task.rows
        tally.rows_failed += task.rows
        self.events.append(
            TaskAbandoned(task_id=task.task_id, cursor=tally.results, rows=task.rows, cause=cause, reason=reason)
        )
        self._judge(self._state.jobs[task.job_id], tally)

    def _leave_unchecked(self, task: Task, reason: str) -> None:
        """Nobody could audit: a referee does. No referee could tell either: the rows stand, and teach nothing."""
        assert task.job_id is not None, "what is checked is a job's"
        verification = self._state.verifications[task.job_id]
        held = tuple(row for row in task.checks if verification.checked_by(row, task.task_id) is not None)
        self.events.append(TaskDropped(task_id=task.task_id))
        if task.kind is TaskKind.MAP:
            self.events.append(AuditGivenUp(job_id=task.job_id, rows=held, reason=reason))
            return
        for row in held:
            worker_id = verification.evidences[row.lease_id].worker_id
            self.events.append(VerdictReached(task.job_id, row.lease_id, row.row, worker_id, Verdict.TIE, LeaseId("")))

    def settle(
        self,
        task: Task,
        lease: Lease,
        *,
        rows_failed: int,
        bound: Bound | None = None,
        footprint: Footprint = Footprint(),  # noqa: B008 - frozen
        timing: Timing = NO_TIMING,
    ) -> None:
        """The lease's commitment becomes the task's result; `timing` tells what the time that it took says.

        Rows that `bound` binds its worker to are drawn from, when the job asks for that.
        """
        self._tasks_gone.add(task.task_id)
        self._leases_ended.add(lease.lease_id)
        cursor = 0
        tally = None
        if task.job_id is not None and not task.checks:
            tally = self._tally(task.job_id)
            tally.results += 1
            tally.rows_done += task.rows
            tally.rows_failed += rows_failed
            cursor = tally.results
        got = settlement(self._state, task, lease, rows_failed=rows_failed)
        settled = TaskSettled(
            task_id=task.task_id,
            lease_id=lease.lease_id,
            cursor=cursor,
            rows=task.rows,
            rows_failed=rows_failed,
            speed_milliunits_per_s=timing.speed_milliunits_per_s,
            worked_unit_micros=timing.worked_unit_micros,
            microcredits=got.microcredits,
            released=got.released,
            contribution_microcredits=got.contribution_microcredits,
            footprint=footprint,
        )
        self.events.append(settled)
        if tally is not None and self._state.verifications and task.job_id in self._state.verifications:
            assert bound is not None and task.job_id is not None, "rows of jobs are committed to"
            job = self._state.jobs[task.job_id]
            self.events.append(
                drawn(
                    self._state,
                    job,
                    lease,
                    settled,
                    commitment=bound.message_digest,
                    execution_class=bound.execution_class,
                )
            )
        if task.job_id is not None and timing.worked_unit_micros:
            job, bundle = self._state.jobs[task.job_id], self._state.bundles[task.bundle_digest]
            told = learned(bundle, inspected=inspected_unit_micros(job, task), worked=timing.worked_unit_micros)
            self.events += [told] if told is not None else []
        self._given_back(task, lease.reserved_microcredits - got.microcredits)
        other = self._other_live(task, lease)
        if other is not None and other.commitment is not None:
            self.settle_late(task, other, self._answer(lease))
        elif other is not None:
            self._left_out.append(other)
        if task.job_id is not None and tally is not None:
            self._judge(self._state.jobs[task.job_id], tally)

    def settle_late(
        self,
        task: Task,
        lease: Lease,
        answer: Answer,
        *,
        footprint: Footprint = Footprint(),  # noqa: B008 - frozen
        timing: Timing = NO_TIMING,
    ) -> None:
        """A lease has committed to rows that `answer` delivered: compared and paid, and nothing is delivered again.

        What nobody could compare, or contradicts, is paid as pending whatever the worker's tier: no byte of it was
        uploaded.
        """
        self._leases_ended.add(lease.lease_id)
        mine = self._answer(lease)
        if lease.commitment is not None:
            spent, measured = lease.commitment.millijoules, lease.commitment.energy_measured
            footprint = footprint_of(self._state, lease, spent, measured=measured, now_ms=self._state.clock_ms)
        if mine.execution_class != answer.execution_class:
            agreement = Agreement.INCOMPARABLE
        else:
            agreement = Agreement.SAME if mine.output_root == answer.output_root else Agreement.DIFFERENT
        listed = self._failures_of(lease)
        # A full list may be a part of it, and nobody has counted.
        rows_failed = task.rows if len(listed) >= ROW_FAILURES_LISTED_PER_TASK_MAX else len(listed)
        got = settlement(self._state, task, lease, rows_failed=rows_failed)
        self.events.append(
            LateLeaseSettled(
                task_id=task.task_id,
                lease_id=lease.lease_id,
                delivered_lease_id=answer.lease_id,
                agreement=agreement,
                rows=task.rows,
                rows_failed=rows_failed,
                microcredits=got.microcredits,
                released=got.released and agreement is Agreement.SAME,
                contribution_microcredits=got.contribution_microcredits,
                speed_milliunits_per_s=timing.speed_milliunits_per_s,
                footprint=footprint,
            )
        )
        self._given_back(task, lease.reserved_microcredits - got.microcredits)

    def _answer(self, lease: Lease) -> Answer:
        """What a lease is bound to, by a commitment from before or of this draft."""
        known = lease.commitment or self._commitment_of(lease)
        assert known is not None, "what settles was committed"
        return Answer(lease.lease_id, known.output_root, known.execution_class)

    def _failures_of(self, lease: Lease) -> tuple[RowFailure, ...]:
        known = lease.commitment or self._commitment_of(lease)
        return known.failures if known is not None else ()

    def _commitment_of(self, lease: Lease) -> CommitmentRecorded | None:
        made = (event for event in self.events if isinstance(event, CommitmentRecorded))
        return next((event for event in made if event.lease_id == lease.lease_id), None)

    def _given_back(self, task: Task, microcredits: int) -> None:
        """A lease ended and left something of what it could have cost: jobs that lacked it try again."""
        if not microcredits or task.job_id is None:
            return
        job = self._state.jobs[task.job_id]
        waiting = [job] if is_short(job) else []
        if job.mode is PoolMode.QUOTA:
            waiting += [other for other in short_of_allotment(self._state, job.pool_id, job.account_id) if other != job]
        for one in waiting:
            if one.job_id not in self._resumed and not self._tally(one.job_id).ended:
                self._resumed.add(one.job_id)
                self.events.append(resumed(one))

    def finish(self, job: Job, state: JobState, reason: str, code: Reason | None) -> None:
        """Ends a job: its leases are revoked, its tasks dropped. Late leases of one that succeeded may still commit."""
        tally = self._tally(job.job_id)
        if tally.ended:
            return
        tally.ended = True
        for task_id in job.tasks:
            if task_id in self._tasks_gone:
                continue
            self._tasks_gone.add(task_id)
            for lease_id in self._state.tasks[task_id].lease_ids:
                self._revoke(lease_id, f"its job is {state.value}")
            self.events.append(TaskDropped(task_id=task_id))
        if state is not JobState.SUCCEEDED:
            self.end_late_leases(job, f"its job is {state.value}")
            for lease in self._left_out:
                if self._state.tasks[lease.task_id].job_id == job.job_id:
                    self._revoke(lease.lease_id, f"its job is {state.value}")
        self.events.append(
            JobStateChanged(
                job_id=job.job_id, state=state, reason=reason, reason_code=code.value if code is not None else ""
            )
        )

    def end_late_leases(self, job: Job, reason: str) -> None:
        """Takes back leases whose rows came from another lease before."""
        for task_id in job.late:
            for lease_id in self._state.tasks[task_id].lease_ids:
                self._revoke(lease_id, reason)

    def _revoke(self, lease_id: LeaseId, reason: str) -> None:
        """Ends a lease of a task that nobody needs any more."""
        if lease_id in self._leases_ended:
            return
        self._leases_ended.add(lease_id)
        ended = LeaseEnded(lease_id=lease_id, outcome=LeaseOutcome.REVOKED, cause=Cause.PLATFORM, reason=reason)
        self.events.append(ended)

    def fail_jobs_of(self, bundle_digest: Digest, reason: str, code: Reason) -> None:
        """Ends all unfinished jobs that use a bundle."""
        self._fail_jobs(bundle_digest, reason, code)

    def _fail_jobs(self, bundle_digest: Digest, reason: str, code: Reason) -> None:
        for job_id in self._state.bundles[bundle_digest].jobs:
            self.finish(self._state.jobs[job_id], JobState.FAILED, reason, code)

    def conclude(self, job: Job) -> None:
        """All rows of a verifying job are there and checked as far as they will be: it ends, well or not."""
        self._judge(job, self._tally(job.job_id), checked=True)

    def _judge(self, job: Job, tally: _Tally, *, checked: bool = False) -> None:
        if tally.ended:
            return
        if not checked and job.job_id in self._state.verifications:
            # Who says that rows fail may lie: what fails counts once it is checked.
            if tally.rows_done == job.rows and not tally.verifying:
                tally.verifying = True
                self.events.append(JobStateChanged(job.job_id, JobState.VERIFYING, "", ""))
            return
        if tally.rows_failed > job.options.failed_rows_max:
            reason = (
                f"{tally.rows_failed} of {job.rows} rows failed, {tally.rows_done - tally.rows_failed} succeeded; "
                f"allowed: {job.options.failed_rows_max} failed rows"
            )
            self.finish(job, JobState.FAILED, reason, Reason.JOB_FAILED)
        elif tally.rows_done == job.rows and tally.rows_failed == job.rows and not job.options.all_rows_may_fail:
            reason = shortened(f"none of its {job.rows} rows has a value: {self._last_reason()}")
            self.finish(job, JobState.FAILED, reason, Reason.JOB_FAILED)
        elif tally.rows_done == job.rows:
            self.finish(job, JobState.SUCCEEDED, "", None)

    def _last_reason(self) -> str:
        """Why a row failed, the last that is known."""
        for event in reversed(self.events):
            if isinstance(event, TaskAbandoned):
                return event.reason
            if isinstance(event, TaskSettled):
                commitment = self._state.leases[event.lease_id].commitment
                failures = commitment.failures if commitment is not None else ()
                if failures:
                    return failures[-1].reason
            if isinstance(event, CommitmentRecorded) and event.failures:
                return event.failures[-1].reason
        return "the rows' failures say why"

    def _tally(self, job_id: JobId) -> _Tally:
        tally = self._tallies.get(job_id)
        if tally is None:
            job = self._state.jobs[job_id]
            tally = self._tallies[job_id] = _Tally(
                results=len(job.results),
                rows_done=len(job.done),
                rows_failed=job.rows_failed,
                ended=job.state in JOB_STATES_FINAL,
                verifying=job.state is JobState.VERIFYING,
            )
        return tally


def shortened(text: str) -> str:
    """`text` in at most `ROW_FAILURE_REASON_BYTES_MAX` bytes of UTF-8."""
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= ROW_FAILURE_REASON_BYTES_MAX:
        return text
    return encoded[:ROW_FAILURE_REASON_BYTES_MAX].decode("utf-8", errors="ignore")
