"""Decisions about leases in workers' hands: commitments, deliveries, reports, failures, returns."""

from __future__ import annotations

from fallow.challenge import OUTPUT_SCHEMA_DIGEST
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, PartyId, SessionId
from fallow.limits import (
    BLOCK_BYTES_MAX,
    INLINE_PAYLOAD_BYTES_MAX,
    NODE_RUNS_PER_TASK_MAX,
    ROW_FAILURES_LISTED_PER_TASK_MAX,
)
from fallow.session import Cause, RowFailure, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import judging, measuring
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.bundles import crash_report, fault_of_report, inspected
from fallow_coordinator.core.draft import Bound, Draft, shortened
from fallow_coordinator.core.footprints import believed_energy, footprint_of
from fallow_coordinator.core.holding import blame_program
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import CommitmentFacts, EndedLease, Lease, State, Task
from fallow_coordinator.core.timings import timing

COMMITTED_KINDS = frozenset({TaskKind.MAP, TaskKind.CHALLENGE})


def commit(state: State, command: c.Commit, now_ms: int) -> Decision:
    """Records a commitment; an inline one settles at once, else the output is asked for.

    When another lease has delivered the rows it is compared and paid at once, and its output is not asked for.
    The same commitment again is harmless. Wrong content ends the lease as the worker's failure.
    Raises SESSION_REPLACED, LEASE_UNKNOWN, LEASE_ENDED, FENCE_STALE, FIELD_MISSING.
    """
    ended = state.ended_leases.get(command.lease_id)
    if ended is not None and ended.outcome is None and _is_same(ended.commitment, command):
        _check_holder(state, command, ended)
        return Decision()
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    if lease.commitment is not None:
        if _is_same(lease.commitment, command):
            return Decision()
        raise FallowError(Reason.FENCE_STALE, "this lease has committed to another output already", field="output_root")
    task = state.tasks[lease.task_id]
    if task.kind not in COMMITTED_KINDS:
        raise FallowError(Reason.FIELD_INVALID, "this lease is answered by a report", field="lease_id")
    if command.inline and command.stored is None:
        raise FallowError(Reason.FIELD_MISSING, "an inline output comes with what its frame says", field="stored")
    draft = Draft(state)
    fault = _fault_of_commitment(task, command)
    if not fault and command.stored is not None:
        fault = _fault_of_output(_facts(command), command.stored, _output_schema_digest(state, task))
    if task.kind is TaskKind.CHALLENGE and not fault:
        if not command.elapsed_ms:
            draft.end_lease(lease, e.LeaseOutcome.REVOKED, Cause.PLATFORM, "its time could not be taken")
            return Decision(tuple(draft.events))
        fault = measuring.answer_fault(state, task, command)
    if fault:
        draft.end_lease(lease, e.LeaseOutcome.FAILED, Cause.WORKER, fault)
        return Decision(tuple(draft.events))
    rows_failed = command.stored.rows_failed if command.stored is not None else len(command.failures)
    millijoules, measured = believed_energy(state, lease, command.usage, now_ms)
    draft.events.append(
        e.CommitmentRecorded(
            lease_id=command.lease_id,
            output_root=command.output_root,
            rows=command.rows,
            output=command.output,
            inline=command.inline,
            failures=_shortened_failures(command.failures),
            rows_failed=rows_failed,
            usage=command.usage,
            execution_class=command.execution_class,
            message_digest=command.message_digest,
            signature=command.signature,
            sequence=command.sequence,
            millijoules=millijoules,
            energy_measured=measured,
        )
    )
    if task.kind is TaskKind.CHALLENGE:
        draft.events.append(measuring.answered(state, task, command))
    if task.answer is not None:
        told = timing(state, task, lease, wall_us=command.usage.wall_microseconds, now_ms=now_ms)
        footprint = footprint_of(state, lease, millijoules, measured=measured, now_ms=now_ms)
        draft.settle_late(task, lease, task.answer, footprint=footprint, timing=told)
    elif command.inline:
        told = timing(state, task, lease, wall_us=command.usage.wall_microseconds, now_ms=now_ms)
        footprint = footprint_of(state, lease, millijoules, measured=measured, now_ms=now_ms)
        bound = Bound(command.message_digest, command.execution_class)
        draft.settle(task, lease, rows_failed=rows_failed, bound=bound, footprint=footprint, timing=told)
    return Decision(tuple(draft.events))


def deliver(state: State, command: c.Deliver, now_ms: int) -> Decision:
    """Settles a committed lease with the blob service's receipt; another root than the committed one fails the lease.

    Raises SESSION_REPLACED, LEASE_UNKNOWN, LEASE_ENDED, FENCE_STALE, FIELD_INVALID.
    """
    ended = state.ended_leases.get(command.lease_id)
    if ended is not None and ended.outcome is None and ended.commitment is not None:
        _check_holder(state, command, ended)
        if ended.commitment.output == command.stored.blob:
            return Decision()
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    if lease.commitment is None:
        raise FallowError(Reason.FIELD_INVALID, "nothing was committed for this lease yet", field="lease_id")
    task = state.tasks[lease.task_id]
    fault = _fault_of_output(lease.commitment, command.stored, _output_schema_digest(state, task))
    draft = Draft(state)
    if fault:
        draft.end_lease(lease, e.LeaseOutcome.FAILED, Cause.WORKER, fault)
    else:
        told = timing(state, task, lease, wall_us=lease.commitment.wall_us, now_ms=now_ms)
        committed = lease.commitment
        footprint = footprint_of(state, lease, committed.millijoules, measured=committed.energy_measured, now_ms=now_ms)
        draft.settle(
            task,
            lease,
            rows_failed=command.stored.rows_failed,
            bound=Bound(committed.message_digest, committed.execution_class),
            footprint=footprint,
            timing=told,
        )
    return Decision(tuple(draft.events))


def report_inspection(state: State, command: c.ReportInspection, now_ms: int) -> Decision:
    """An inspection's report: the bundle is accepted or refused. Raises as `commit`, and FIELD_INVALID."""
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    task = state.tasks[lease.task_id]
    if task.kind is not TaskKind.INSPECT:
        raise FallowError(Reason.FIELD_INVALID, "this lease is no inspection", field="lease_id")
    bundle = state.bundles[task.bundle_digest]
    fault = fault_of_report(task, command.report, size_feature_count=bundle.size_feature_count)
    if fault:
        draft = Draft(state)
        draft.end_lease(lease, e.LeaseOutcome.FAILED, Cause.WORKER, fault)
        return Decision(tuple(draft.events))
    return inspected(state, lease, task, command.report, now_ms)


def report_check(state: State, command: c.ReportCheck, now_ms: int, names: Names) -> Decision:
    """A checker's verdict: the device that was challenged is certified, or its challenge ends. Raises as `commit`."""
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    task = state.tasks[lease.task_id]
    if task.kind is not TaskKind.CHECK:
        raise FallowError(Reason.FIELD_INVALID, "this lease is no check", field="lease_id")
    draft = Draft(state)
    draft.settle(task, lease, rows_failed=0)
    return Decision((*draft.events, *measuring.checked(state, command, lease, task, now_ms, names)))


def report_referee(state: State, command: c.ReportReferee) -> Decision:
    """What a referee found: verdicts, and what follows from them. Raises as `commit`."""
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    task = state.tasks[lease.task_id]
    if task.kind is not TaskKind.REFEREE:
        raise FallowError(Reason.FIELD_INVALID, "this lease is no referee's", field="lease_id")
    draft = Draft(state)
    fault = judging.fault_of_findings(state, task, command)
    if fault:
        draft.end_lease(lease, e.LeaseOutcome.FAILED, Cause.WORKER, fault)
        return Decision(tuple(draft.events))
    draft.settle(task, lease, rows_failed=0)
    judging.refereed(state, draft, task, lease, command)
    return Decision(tuple(draft.events))


def fail_task(state: State, command: c.FailTask, now_ms: int, names: Names) -> Decision:
    """The task could not be done there: tried again elsewhere, unless the program is to blame for sure.

    Raises SESSION_REPLACED, LEASE_UNKNOWN, LEASE_ENDED, FENCE_STALE.
    """
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    task = state.tasks[lease.task_id]
    if command.cause is Cause.PROGRAM and task.kind is TaskKind.INSPECT:
        return inspected(state, lease, task, crash_report(task.bundle_digest, command.reason), now_ms)
    draft = Draft(state)
    if command.cause is Cause.PROGRAM and task.bundle_digest in state.bundles:
        blame_program(state, draft, lease, task, command.reason, names)
    draft.end_lease(lease, e.LeaseOutcome.FAILED, command.cause, command.reason)
    return Decision(tuple(draft.events))


def return_lease(state: State, command: c.ReturnLease) -> Decision:
    """The worker gives it back undone. Raises SESSION_REPLACED, LEASE_UNKNOWN, LEASE_ENDED, FENCE_STALE."""
    lease = _live_lease(state, command.session_id, command.worker_id, command.lease_id, command.fence)
    draft = Draft(state)
    draft.end_lease(lease, e.LeaseOutcome.RETURNED, command.cause, command.reason)
    return Decision(tuple(draft.events))


def _output_schema_digest(state: State, task: Task) -> Digest:
    return (
        OUTPUT_SCHEMA_DIGEST
        if task.kind is TaskKind.CHALLENGE
        else state.bundles[task.bundle_digest].output_schema_digest
    )


def _live_lease(state: State, session_id: SessionId, worker_id: PartyId, lease_id: LeaseId, fence: int) -> Lease:
    """The worker's own live lease with this very fence; anything else is refused and changes nothing."""
    if state.sessions.get(session_id) != worker_id:
        raise FallowError(Reason.SESSION_REPLACED, "this session is over", hint="open a new one")
    lease = state.leases.get(lease_id)
    if lease is None:
        raise _ended(state, worker_id, lease_id, fence)
    if lease.worker_id != worker_id:
        raise _unknown(lease_id)
    if fence != lease.fence:
        raise FallowError(
            Reason.FENCE_STALE, f"fence {fence} is not the lease's", field="fence", limit=f"{lease.fence}"
        )
    return lease


def _ended(state: State, worker_id: PartyId, lease_id: LeaseId, fence: int) -> FallowError:
    ended = state.ended_leases.get(lease_id)
    if ended is None or ended.worker_id != worker_id:
        return _unknown(lease_id)
    task = state.tasks.get(ended.task_id)
    if fence != ended.fence or (task is not None and task.fence > ended.fence):
        return FallowError(
            Reason.FENCE_STALE, f"fence {fence} is stale: the task has been leased anew", field="fence", hint="drop it"
        )
    word = "settled" if ended.outcome is None else ended.outcome.value
    return FallowError(Reason.LEASE_ENDED, f"lease {lease_id} is over: {word}", field="lease_id", hint="drop it")


def _unknown(lease_id: LeaseId) -> FallowError:
    return FallowError(Reason.LEASE_UNKNOWN, f"this worker has no lease {lease_id}", field="lease_id", hint="drop it")


def _check_holder(state: State, command: c.Commit | c.Deliver, ended: EndedLease) -> None:
    if state.sessions.get(command.session_id) != command.worker_id:
        raise FallowError(Reason.SESSION_REPLACED, "this session is over", hint="open a new one")
    if ended.worker_id != command.worker_id:
        raise _unknown(command.lease_id)
    if ended.fence != command.fence:
        raise FallowError(Reason.FENCE_STALE, f"fence {command.fence} is not the lease's", field="fence")


def _facts(command: c.Commit) -> CommitmentFacts:
    return CommitmentFacts(
        output_root=command.output_root,
        rows=command.rows,
        output=command.output,
        inline=command.inline,
        failures=_shortened_failures(command.failures),
        rows_failed=len(command.failures),
        node=command.usage.node,
        nodes=command.usage.nodes,
    )


def _is_same(facts: CommitmentFacts | None, command: c.Commit) -> bool:
    return (
        facts is not None
        and facts.output_root == command.output_root
        and facts.rows == command.rows
        and facts.output == command.output
        and facts.failures == _shortened_failures(command.failures)
    )


def _shortened_failures(failures: tuple[RowFailure, ...]) -> tuple[RowFailure, ...]:
    if not failures:
        return failures
    return tuple(RowFailure(failure.row, failure.cause, shortened(failure.reason)) for failure in failures)


def _fault_of_commitment(task: Task, command: c.Commit) -> str:
    """What is wrong with a commitment, or nothing."""
    if command.rows != task.rows:
        return f"committed {command.rows} rows, leased were {task.rows}"
    size_max = INLINE_PAYLOAD_BYTES_MAX if command.inline else BLOCK_BYTES_MAX
    if not 1 <= command.output.length_bytes <= size_max:
        return f"the output has {command.output.length_bytes} bytes, allowed are 1 to {size_max}"
    nodes = command.usage.nodes
    if nodes and (len(nodes) > NODE_RUNS_PER_TASK_MAX or sum(run.rows for run in nodes) != command.rows):
        return f"the rows by node are {sum(run.rows for run in nodes)} in {len(nodes)} runs, not {command.rows}"
    failures = command.failures
    if not failures:
        return ""
    if len(failures) > min(task.rows, ROW_FAILURES_LISTED_PER_TASK_MAX):
        return f"{len(failures)} failed rows are listed, allowed are {ROW_FAILURES_LISTED_PER_TASK_MAX} of {task.rows}"
    rows = {failure.row for failure in failures}
    if len(rows) != len(failures) or min(rows) < 0 or max(rows) >= task.rows:
        return "a failed row is listed twice or not of this task"
    return ""


def _fault_of_output(committed: CommitmentFacts, stored: c.StoredBlob, schema_digest: bytes) -> str:
    """How an output differs from what was committed, or nothing."""
    if stored.blob != committed.output or stored.root != committed.output_root:
        return "ROOT_MISMATCH: the output's rows do not have the committed root"
    if stored.rows != committed.rows:
        return f"ROOT_MISMATCH: the output has {stored.rows} rows, committed were {committed.rows}"
    if stored.schema_digest != schema_digest:
        return "SCHEMA_MISMATCH: the output's schema is not the bundle's"
    listed = len(committed.failures)
    full = listed >= ROW_FAILURES_LISTED_PER_TASK_MAX
    if stored.rows_failed != listed and not (full and listed <= stored.rows_failed <= stored.rows):
        return f"the output has {stored.rows_failed} failed rows, listed are {listed}"
    return ""
