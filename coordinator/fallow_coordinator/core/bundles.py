"""Decisions about bundles and their inspection."""

from __future__ import annotations

from fallow.bundle import InspectionReport
from fallow.cost import fault_of_curve
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, TaskId
from fallow.job import JobState
from fallow.limits import BLOCK_ROWS_MAX, BUNDLE_FILES_MAX, ROW_BYTES_MAX, SIZE_FEATURES_MAX
from fallow.session import TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.deferral import held_back
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.holding import confirmed
from fallow_coordinator.core.limits import (
    BUNDLES_PER_ACCOUNT_MAX,
    COST_UNIT_MICROS_MAX,
    INSPECTIONS_WAITING_PER_ACCOUNT_MAX,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.queueing import queued
from fallow_coordinator.core.state import Account, Bundle, Lease, State, Task


def register_bundle(state: State, command: c.RegisterBundle, names: Names) -> Decision:
    """A bundle of the account; inspected once for all accounts.

    Raises ACCOUNT_UNKNOWN, BLOB_UNKNOWN, BUNDLE_INVALID, LIMIT_EXCEEDED.
    """
    account = account_of(state, command.account_id)
    _check_bundle(account, command)
    bundle = state.bundles.get(command.bundle_digest)
    events: list[e.Event] = []
    if bundle is None or command.account_id not in bundle.owners:
        if len(account.bundles) >= BUNDLES_PER_ACCOUNT_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                "the account holds too many bundles",
                field="bundle",
                limit=f"{BUNDLES_PER_ACCOUNT_MAX} bundles",
            )
        events.append(
            e.BundleRegistered(
                account_id=command.account_id,
                bundle_digest=command.bundle_digest,
                files=command.files,
                input_schema_digest=command.input_schema_digest,
                output_schema_digest=command.output_schema_digest,
                size_feature_count=command.size_feature_count,
                bytes_feature_index=command.bytes_feature_index,
                output_row_bytes=command.output_row_bytes,
            )
        )
    if bundle is None or (bundle.report is None and bundle.inspection_task_id is None):
        _check_inspections(state, account)
        events.append(
            e.TaskCreated(
                task_id=TaskId(names.new("task")),
                kind=TaskKind.INSPECT,
                job_id=None,
                bundle_digest=command.bundle_digest,
                pool_id=state.default_pool_id,
                spans=(),
                unit_micros=0,
            )
        )
    return Decision(tuple(events))


def inspected(state: State, lease: Lease, task: Task, report: InspectionReport, now_ms: int) -> Decision:
    """An inspection's end: jobs that waited for it move."""
    draft = Draft(state)
    bundle = state.bundles[task.bundle_digest]
    if bundle.report is not None:
        return confirmed(state, lease, task, report)
    draft.events.append(
        e.BundleInspected(
            bundle_digest=task.bundle_digest, task_id=task.task_id, worker_id=lease.worker_id, report=report
        )
    )
    draft.settle(task, lease, rows_failed=0)
    if report.accepted:
        for job_id in bundle.jobs:
            job = state.jobs[job_id]
            if job.state is JobState.PENDING:
                draft.events.append(
                    queued(
                        state,
                        job_id,
                        needs=job.lane,
                        options=job.options,
                        blocks=job.blocks,
                        report=report,
                        now_ms=now_ms,
                    )
                )
                draft.events.extend(held_back(state, job_id, job.options.objective, now_ms))
    else:
        draft.fail_jobs_of(task.bundle_digest, refusal_text(report), Reason.PROGRAM_REFUSED)
    return Decision(tuple(draft.events))


def crash_report(bundle_digest: Digest, reason: str) -> InspectionReport:
    """The report of a program that brought its inspector's child down: refused."""
    return InspectionReport(
        bundle_digest=bundle_digest,
        accepted=False,
        refusals=(shortened(reason) or "the program failed during inspection",),
        operators=(),
        canonical_batch_rows=0,
        slot_dependent=False,
        neighbour_dependent=False,
        unit_micros_per_row=0,
        unit_micros_per_kib=0,
        memory_bytes_peak=0,
        execution_class="",
        inspected_seconds=0.0,
    )


def fault_of_report(task: Task, report: InspectionReport, *, size_feature_count: int) -> str:
    """What is wrong with a report, or nothing."""
    if report.bundle_digest != task.bundle_digest:
        return "the report is about another bundle"
    if min(report.unit_micros_per_row, report.unit_micros_per_kib, report.memory_bytes_peak) < 0:
        return "the report's numbers are negative"
    if max(report.unit_micros_per_row, report.unit_micros_per_kib) > COST_UNIT_MICROS_MAX:
        return f"the report's costs are more than {COST_UNIT_MICROS_MAX} micro-units"
    if report.cost is not None and (fault := fault_of_curve(report.cost, feature_count=size_feature_count)):
        return fault
    if report.flops_per_row < 0:
        return "the report's operations are negative"
    if report.accepted and not 1 <= report.canonical_batch_rows <= BLOCK_ROWS_MAX:
        return f"the canonical batch has {report.canonical_batch_rows} rows"
    return ""


def refusal_text(report: InspectionReport) -> str:
    """Why a bundle was refused, in one line."""
    return "; ".join(report.refusals[:4]) or "the bundle was refused"


def usable_bundle(state: State, account: Account, bundle_digest: Digest) -> Bundle:
    """The account's bundle, fit for jobs or about to be inspected.

    Raises BUNDLE_UNKNOWN, PROGRAM_REFUSED, PROGRAM_HELD.
    """
    bundle = state.bundles.get(bundle_digest)
    if bundle is None or account.account_id not in bundle.owners:
        raise FallowError(
            Reason.BUNDLE_UNKNOWN,
            f"this account has no bundle {bundle_digest.hex()[:16]}…",
            field="bundle_digest",
            hint="create the bundle first",
        )
    if bundle.held_reason:
        raise FallowError(Reason.PROGRAM_HELD, f"the bundle is held: {bundle.held_reason}", field="bundle_digest")
    if bundle.report is not None and not bundle.report.accepted:
        raise FallowError(
            Reason.PROGRAM_REFUSED,
            f"the bundle was refused: {refusal_text(bundle.report)}",
            field="bundle_digest",
        )
    if bundle.report is None and bundle.inspection_task_id is None:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"the bundle could not be inspected: {bundle.obstacle}",
            field="bundle_digest",
            hint="register it again to have it inspected again",
        )
    return bundle


def account_of(state: State, account_id: AccountId) -> Account:
    """The account. Raises ACCOUNT_UNKNOWN."""
    account = state.accounts.get(account_id)
    if account is not None:
        return account
    raise FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {account_id}", field="account_id")


def _check_inspections(state: State, account: Account) -> None:
    waiting = sum(state.bundles[digest].inspection_task_id is not None for digest in account.bundles)
    if waiting >= INSPECTIONS_WAITING_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.OVERLOADED,
            f"{waiting} bundles of the account wait for inspection",
            field="bundle",
            limit=f"{INSPECTIONS_WAITING_PER_ACCOUNT_MAX} bundles at a time",
            hint="wait until some have been inspected",
        )


def _check_bundle(account: Account, command: c.RegisterBundle) -> None:
    if len(command.files) > BUNDLE_FILES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the bundle has {len(command.files)} files",
            field="files",
            limit=f"{BUNDLE_FILES_MAX} files",
        )
    for index, file in enumerate(command.files):
        stored = account.blobs.get(file.digest)
        if stored is None or stored.blob.length_bytes != file.length_bytes:
            raise FallowError(
                Reason.BLOB_UNKNOWN,
                f"the account has no blob {file.digest.hex()[:16]}… of {file.length_bytes} bytes",
                field=f"files[{index}]",
                hint="upload the file first",
            )
    if not 0 <= command.size_feature_count <= SIZE_FEATURES_MAX:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"the input schema has {command.size_feature_count} size features",
            field="input_schema",
            limit=f"{SIZE_FEATURES_MAX} size features",
        )
    if not -1 <= command.bytes_feature_index < max(command.size_feature_count, 0):
        raise FallowError(Reason.BUNDLE_INVALID, "the bytes feature is not a size feature", field="bytes_feature_index")
    if not 0 <= command.output_row_bytes <= ROW_BYTES_MAX:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"an output row of {command.output_row_bytes} bytes",
            field="output_schema",
            limit=f"0 to {ROW_BYTES_MAX} bytes",
        )
