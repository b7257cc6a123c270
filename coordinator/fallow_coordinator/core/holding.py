"""Decisions about programs that crash: what workers claim, what an operator's inspection confirms, what is let go.

Claims of two accounts alone hold nothing, for whoever has two accounts could hold any bundle of anybody: they bring
about one more inspection, which also runs the rows of the second claim, and its outcome counts.
"""

from __future__ import annotations

from fallow.bundle import InspectionReport
from fallow.errors import FallowError, Reason
from fallow.ids import TaskId
from fallow.roles import Tier
from fallow.session import TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Bundle, Lease, State, Task

CRASHED_ACCOUNTS_MAX = 2
"""A program that crashes workers of so many accounts is inspected once more."""
CLEARANCES_MAX = 3
"""Inspections that claims alone may bring about; later claims change nothing until an operator releases the bundle."""


def blame_program(state: State, draft: Draft, lease: Lease, task: Task, reason: str, names: Names) -> None:
    """A worker says that the program crashed it: drafted, and confirmed or not when it is the second to say so."""
    bundle = state.bundles[task.bundle_digest]
    worker = state.workers[lease.worker_id]
    if worker.account_id in bundle.crashed_accounts or bundle.held_reason or bundle.clearances >= CLEARANCES_MAX:
        return
    draft.events.append(
        e.BundleCrashed(bundle_digest=bundle.bundle_digest, account_id=worker.account_id, reason=shortened(reason))
    )
    accounts = len(bundle.crashed_accounts) + 1
    if accounts < CRASHED_ACCOUNTS_MAX:
        return
    if worker.tier is Tier.OPERATOR:
        _hold(draft, bundle, f"it crashed workers of {accounts} accounts, an operator's among them, last: {reason}")
    elif bundle.inspection_task_id is None:
        inspection = TaskId(names.new("task"))
        draft.events.append(
            e.TaskCreated(
                task_id=inspection,
                kind=TaskKind.INSPECT,
                job_id=None,
                bundle_digest=bundle.bundle_digest,
                pool_id=state.default_pool_id,
                spans=(),
                # What its rows cost: they are run as well.
                unit_micros=task.unit_micros,
            )
        )
        if task.input is not None:
            draft.events.append(e.InspectionRowsGiven(inspection, task.input, task.input_inline, task.rows))


def confirmed(state: State, lease: Lease, task: Task, report: InspectionReport) -> Decision:
    """The end of an inspection that claims of crashes brought about: the bundle is held, or cleared of them."""
    draft = Draft(state)
    bundle = state.bundles[task.bundle_digest]
    if report.accepted:
        draft.events.append(
            e.BundleCleared(bundle_digest=bundle.bundle_digest, task_id=task.task_id, worker_id=lease.worker_id)
        )
    draft.settle(task, lease, rows_failed=0)
    if not report.accepted and not bundle.held_reason:
        found = "; ".join(report.refusals[:2]) or "the bundle was refused"
        accounts = len(bundle.crashed_accounts)
        _hold(draft, bundle, f"it crashed workers of {accounts} accounts, and the operator's inspection says: {found}")
    return Decision(tuple(draft.events))


def release_bundle(state: State, command: c.ReleaseBundle) -> Decision:
    """An operator lets jobs use a held bundle again, and forgets what was claimed of it. Raises BUNDLE_UNKNOWN."""
    bundle = state.bundles.get(command.bundle_digest)
    if bundle is None:
        raise FallowError(
            Reason.BUNDLE_UNKNOWN, f"there is no bundle {command.bundle_digest.hex()[:16]}…", field="bundle_digest"
        )
    if not (bundle.held_reason or bundle.crashed_accounts or bundle.clearances):
        return Decision()
    return Decision((e.BundleReleased(bundle_digest=bundle.bundle_digest),))


def _hold(draft: Draft, bundle: Bundle, reason: str) -> None:
    text = shortened(reason)
    draft.events.append(e.BundleHeld(bundle_digest=bundle.bundle_digest, reason=text))
    draft.fail_jobs_of(bundle.bundle_digest, f"the bundle is held: {text}", Reason.PROGRAM_HELD)
