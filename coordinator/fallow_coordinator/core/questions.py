"""Read-only answers from the state, for the services; ask only when the state's events are durable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from fallow.bundle import InspectionReport, Precision
from fallow.challenge import OUTPUT_SCHEMA_DIGEST, ChallengePlan
from fallow.comparison import ToleranceProfile
from fallow.credits import BUDGET_WARNING_PERCENT, credits_text
from fallow.errors import Reason
from fallow.ids import AccountId, Digest, JobId, LeaseId, PartyId, PoolId, SessionId
from fallow.job import JOB_STATES_FINAL, JobProgress, JobStatus, TaskResult, WorkerShare
from fallow.limits import BLOCK_BYTES_MAX, JOB_SHARES_SHOWN_MAX
from fallow.roles import DataClass, Tier
from fallow.session import BlobReference, Capability, DeviceStanding, TaskKind
from fallow_coordinator.core.devices import certificate_of, challenge_of
from fallow_coordinator.core.events import PackedCandidate
from fallow_coordinator.core.evolve_tasks import MEASURING_KINDS
from fallow_coordinator.core.state import (
    ChallengeRecord,
    DeviceCertificate,
    Job,
    Lease,
    State,
    Task,
)
from fallow_coordinator.core.tolerances import profiles_of
from fallow_coordinator.core.waiting import (
    INSPECTING,
    NO_OPERATOR_WORKER,
    WAITING_STATES,
    inspectors_take_work,
    waiting_reason,
)


def job_status(state: State, job_id: JobId) -> JobStatus | None:
    """The job as its owner sees it, or None when it is not (any more) in the state.

    `output_schema` is empty: the service takes it from the bundle's manifest.
    """
    job = state.jobs.get(job_id)
    if job is None:
        return None
    if job.deleted_at_ms:
        reason, code = job.deleted_reason, Reason.JOB_DELETED.value
    elif job.state in WAITING_STATES:
        reason, code = waiting_reason(state, job_id)
    else:
        reason, code = job.reason, job.reason_code
    return status_told(
        job,
        reason=reason,
        reason_code=code,
        workers=_workers_of(state, job),
        deferred_until_ms=job.deferred_until_ms,
    )


def status_told(job: Job, *, reason: str, reason_code: str, workers: int, deferred_until_ms: int = 0) -> JobStatus:
    """What is known of a job, with what depends on who asks: the state as it is now, or the views."""
    return JobStatus(
        job_id=job.job_id,
        account_id=job.account_id,
        pool_id=job.pool_id,
        state=job.state,
        reason=reason,
        reason_code=reason_code,
        bundle_digest=job.bundle_digest,
        title=job.title,
        data_class=job.data_class.value,
        policy=job.policy,
        price_microcredits=job.price_microcredits,
        submitted_at_ms=job.submitted_at_ms,
        finished_at_ms=job.finished_at_ms,
        output_schema=b"",
        kept=job.kept,
        results=len(job.results),
        progress=JobProgress(
            rows_total=job.rows,
            rows_done=len(job.done),
            rows_failed=job.rows_failed,
            rows_leased=job.rows_leased,
            tasks_settled=job.tasks_settled,
            workers=workers,
        ),
        deleted_at_ms=job.deleted_at_ms,
        pool_mode=job.mode,
        budget_microcredits=job.budget_microcredits,
        spent_microcredits=job.microcredits,
        reserved_microcredits=job.reserved_microcredits,
        warnings=budget_warnings(job),
        footprint=job.footprint,
        deferred_until_ms=deferred_until_ms,
        checks=job.checks,
    )


def shares_told(job: Job) -> tuple[WorkerShare, ...]:
    """Rows by worker and node, the most first."""
    most = nsmallest(JOB_SHARES_SHOWN_MAX, job.shares.items(), key=lambda share: (-share[1], share[0]))
    return tuple([WorkerShare(worker_id, node, rows) for (worker_id, node), rows in most])


def budget_warnings(job: Job) -> tuple[str, ...]:
    """What its owner should know of its budget before it is used up."""
    if job.state in JOB_STATES_FINAL or not job.budget_microcredits:
        return ()
    if job.microcredits * 100 < job.budget_microcredits * BUDGET_WARNING_PERCENT:
        return ()
    percent = job.microcredits * 100 // job.budget_microcredits
    return (
        f"{percent} % of its budget of {credits_text(job.budget_microcredits)} credits is spent, "
        f"{len(job.done) * 100 // job.rows} % of its rows are done",
    )


def jobs_of(state: State, account_id: AccountId) -> tuple[JobStatus, ...]:
    """The account's jobs that are still in the state, newest first."""
    mine = [job for job in state.jobs.values() if job.account_id == account_id]
    mine.sort(key=lambda job: (job.submitted_at_ms, job.job_id), reverse=True)
    statuses = (job_status(state, job.job_id) for job in mine)
    return tuple(status for status in statuses if status is not None)


def results_after(state: State, job_id: JobId, cursor: int, limit: int) -> Sequence[TaskResult]:
    """Up to `limit` results with a cursor greater than `cursor`, rising; none for a job that is not here."""
    job = state.jobs.get(job_id)
    return () if job is None else tuple(job.results[max(0, cursor) : max(0, cursor) + limit])


def _workers_of(state: State, job: Job) -> int:
    tasks = (state.tasks[task_id] for task_id in (*job.tasks, *job.late))
    return len({state.leases[lease_id].worker_id for task in tasks for lease_id in task.lease_ids})


@dataclass(frozen=True, slots=True)
class BundleStatus:
    """A bundle as its owners see it."""

    bundle_digest: Digest
    files: tuple[BlobReference, ...]
    report: InspectionReport | None
    held_reason: str
    reason: str
    """Why it is not inspected yet; empty when it is."""
    reason_code: str


def bundle_status(state: State, account_id: AccountId, bundle_digest: Digest) -> BundleStatus | None:
    """The account's bundle, or None when it has none with this digest."""
    bundle = state.bundles.get(bundle_digest)
    if bundle is None or account_id not in bundle.owners:
        return None
    reason, code = "", ""
    if bundle.report is None and bundle.inspection_task_id is None:
        reason, code = f"it could not be inspected: {bundle.obstacle}", "INSPECTION_FAILED"
    elif bundle.report is None:
        if inspectors_take_work(state):
            reason, code = "it is being inspected", INSPECTING
        else:
            reason, code = "no operator worker that inspects is connected", NO_OPERATOR_WORKER
    return BundleStatus(bundle_digest, bundle.files, bundle.report, bundle.held_reason, reason, code)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as operators see it."""

    worker_id: PartyId
    name: str
    account_id: AccountId
    pool_id: PoolId
    tier: Tier
    session_id: SessionId | None
    capability: Capability
    window: int
    leases: int
    rows_settled: int
    tasks_settled: int
    quarantined: bool
    quarantine_reason: str
    revoked: bool
    certificates: tuple[DeviceCertificate, ...] = ()
    """Of its measured devices, whole ones only."""
    challenged: tuple[tuple[str, ChallengeRecord], ...] = ()
    """Devices whose last challenge came to nothing."""


def workers(state: State) -> tuple[WorkerStatus, ...]:
    """All workers that ever enrolled, by identifier."""
    made: list[WorkerStatus] = []
    for worker_id in sorted(state.workers):
        worker, party = state.workers[worker_id], state.parties[worker_id]
        made.append(
            WorkerStatus(
                worker_id=worker_id,
                name=party.name,
                account_id=worker.account_id,
                pool_id=worker.pool_id,
                tier=worker.tier,
                session_id=worker.session_id,
                capability=worker.capability,
                window=worker.window,
                leases=len(worker.leases),
                rows_settled=worker.rows_settled,
                tasks_settled=worker.tasks_settled,
                quarantined=worker.quarantined,
                quarantine_reason=worker.quarantine_reason,
                revoked=party.revoked,
                certificates=tuple(held for held in worker.certificates.values() if held.complete),
                challenged=tuple(worker.challenged.items()),
            )
        )
    return tuple(made)


@dataclass(frozen=True, slots=True)
class LeaseToSend:
    """Everything of a live lease that goes to its worker or into its grants."""

    lease_id: LeaseId
    fence: int
    kind: TaskKind
    worker_id: PartyId
    session_id: SessionId
    account_id: AccountId
    """Whose rows and bundle: the account that grants are about."""
    job_id: JobId | None
    bundle_digest: Digest
    bundle_files: tuple[BlobReference, ...]
    canonical_batch_rows: int
    slot_dependent: bool
    memory_bytes_peak: int
    rows: int
    input: BlobReference | None
    input_inline: bool
    deadline_ms: int
    runtime_max_ms: int
    precision: Precision | None
    """None: the bundle's own, from its manifest."""
    output_bytes_max: int
    output_schema_digest: Digest
    unit_micros: int
    pool_id: PoolId
    latency_ms_max: int
    challenge: ChallengePlan | None = None
    """Of a challenge or its check."""
    slots: tuple[int, ...] = ()
    """Of a referee's lease: where each row stood in its batch when it was done."""
    candidates: tuple[PackedCandidate, ...] = ()
    """Of a referee's lease."""
    execution_classes: tuple[str, ...] = ()
    """Of a referee's lease: those that its candidates name by number."""
    profiles: tuple[ToleranceProfile, ...] = ()
    """Of a referee's lease: how far classes lie apart."""
    data_class: DataClass | None = None
    """Of its job; None without one."""


def lease_to_send(state: State, lease_id: LeaseId) -> LeaseToSend | None:
    """A live lease in full, or None when it is over."""
    lease = state.leases.get(lease_id)
    if lease is None:
        return None
    task = state.tasks[lease.task_id]
    if task.kind in MEASURING_KINDS:
        return _measurement_to_send(state, lease, task)
    bundle = state.bundles[task.bundle_digest]
    job = state.jobs[task.job_id] if task.job_id is not None else None
    report = bundle.report
    batch_rows = report.canonical_batch_rows if report is not None else 0
    return LeaseToSend(
        lease_id=lease_id,
        fence=lease.fence,
        kind=task.kind,
        worker_id=lease.worker_id,
        session_id=lease.session_id,
        account_id=job.account_id if job is not None else next(iter(bundle.owners)),
        job_id=task.job_id,
        bundle_digest=bundle.bundle_digest,
        bundle_files=bundle.files,
        canonical_batch_rows=batch_rows,
        slot_dependent=report.slot_dependent if report is not None else False,
        memory_bytes_peak=report.memory_bytes_peak if report is not None else 0,
        rows=task.rows,
        input=task.input,
        input_inline=task.input_inline,
        deadline_ms=lease.deadline_ms,
        runtime_max_ms=lease.runtime_max_ms,
        precision=job.options.precision if job is not None else None,
        output_bytes_max=BLOCK_BYTES_MAX,
        output_schema_digest=bundle.output_schema_digest,
        unit_micros=task.unit_micros,
        pool_id=task.pool_id,
        latency_ms_max=job.options.latency_ms_max if job is not None else 0,
        slots=tuple(row.row % max(1, batch_rows) for row in task.checks) if task.kind is TaskKind.REFEREE else (),
        candidates=task.candidates,
        execution_classes=task.execution_classes,
        profiles=profiles_of(state, task.bundle_digest) if task.kind is TaskKind.REFEREE else (),
        data_class=job.data_class if job is not None else None,
    )


def device_standing(state: State, worker_id: PartyId, device_id: str) -> DeviceStanding:
    """What the worker is told of its device."""
    worker = state.workers[worker_id]
    held = certificate_of(worker, device_id)
    if held is not None:
        return DeviceStanding(device_id, held.units_milli_per_s, held.memory_bytes, held.expires_at_ms)
    record = worker.challenged.get(device_id)
    half = "" if device_id not in worker.certificates else "speed and memory are measured one after the other"
    return DeviceStanding(device_id, reason=record.reason if record is not None else half)


def _measurement_to_send(state: State, lease: Lease, task: Task) -> LeaseToSend:
    """A challenge is its plan; a check is the plan and the answer, which is the challenged worker's account's."""
    challenge = challenge_of(state, task)
    checks = task.kind is TaskKind.CHECK
    return LeaseToSend(
        lease_id=lease.lease_id,
        fence=lease.fence,
        kind=task.kind,
        worker_id=lease.worker_id,
        session_id=lease.session_id,
        account_id=state.workers[challenge.worker_id].account_id,
        job_id=None,
        bundle_digest=task.bundle_digest,
        bundle_files=(),
        canonical_batch_rows=0,
        slot_dependent=False,
        memory_bytes_peak=0,
        rows=1,
        input=challenge.output if checks else None,
        input_inline=checks and challenge.output_inline,
        deadline_ms=lease.deadline_ms,
        runtime_max_ms=lease.runtime_max_ms,
        precision=challenge.plan.precision,
        output_bytes_max=BLOCK_BYTES_MAX,
        output_schema_digest=OUTPUT_SCHEMA_DIGEST,
        unit_micros=task.unit_micros,
        pool_id=task.pool_id,
        latency_ms_max=0,
        challenge=challenge.plan,
    )


@dataclass(frozen=True, slots=True)
class UploadToOffer:
    """What the upload grant of a committed lease says."""

    lease_id: LeaseId
    fence: int
    session_id: SessionId
    worker_id: PartyId
    account_id: AccountId
    output: BlobReference
    output_root: Digest


def upload_to_offer(state: State, lease_id: LeaseId) -> UploadToOffer | None:
    """The upload that a live, committed, not inline lease owes; None when it owes none."""
    lease = state.leases.get(lease_id)
    if lease is None or lease.commitment is None or lease.commitment.inline:
        return None
    job_id = state.tasks[lease.task_id].job_id
    # What a challenge gives belongs to whose device it is.
    account_id = state.workers[lease.worker_id].account_id if job_id is None else state.jobs[job_id].account_id
    return UploadToOffer(
        lease_id=lease_id,
        fence=lease.fence,
        session_id=lease.session_id,
        worker_id=lease.worker_id,
        account_id=account_id,
        output=lease.commitment.output,
        output_root=lease.commitment.output_root,
    )


def may_read_blob(state: State, account_id: AccountId, digest: Digest) -> bool:
    """Whether the account may read a blob: its own (bundles' files are among them), its unarchived jobs' outputs."""
    return readable_blob(state, account_id, digest) is not None


def readable_blob(state: State, account_id: AccountId, digest: Digest) -> BlobReference | None:
    """The blob with this digest if the account may read it (`may_read_blob`), with its length; else None."""
    account = state.accounts.get(account_id)
    if account is None:
        return None
    if digest in account.blobs:
        return account.blobs[digest].blob
    if digest in account.outputs:
        return BlobReference(digest, account.outputs[digest][0])
    return None


def has_blobs(state: State, account_id: AccountId, digests: Sequence[Digest]) -> tuple[bool, ...]:
    """Which of these blobs the account has already; says nothing of other accounts."""
    account = state.accounts.get(account_id)
    return tuple(account is not None and digest in account.blobs for digest in digests)


def live_payloads(state: State) -> frozenset[Digest]:
    """Payloads that something in the state refers to: manifests, inline blocks, inline inputs and outputs."""
    digests: set[Digest] = set(state.bundles)
    for job in state.jobs.values():
        digests.update(block.blob.digest for block in job.blocks if block.inline)
        digests.update(result.output.digest for result in job.results if result.output is not None)
    digests.update(task.input.digest for task in state.tasks.values() if task.input is not None and task.input_inline)
    digests.update(one.block.digest for task in state.tasks.values() for one in task.candidates if one.inline)
    for verification in state.verifications.values():
        audits = verification.audits.values()
        digests.update(audit.output.digest for audit in audits if audit.output is not None and audit.inline)
    digests.update(
        lease.commitment.output.digest
        for lease in state.leases.values()
        if lease.commitment is not None and lease.commitment.inline
    )
    digests.update(
        challenge.output.digest
        for challenge in state.challenges.values()
        if challenge.output is not None and challenge.output_inline
    )
    return frozenset(digests)
