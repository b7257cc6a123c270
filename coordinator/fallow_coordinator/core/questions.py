"""Read-only answers from the state, for the services; ask only when the state's events are durable."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from fallow.bundle import InspectionReport, Precision
from fallow.challenge import OUTPUT_SCHEMA_DIGEST, ChallengePlan
from fallow.comparison import ToleranceProfile
from fallow.credits import BUDGET_WARNING_PERCENT, PoolMode, credits_text, price_per_hour
from fallow.errors import Reason
from fallow.ids import AccountId, Digest, JobId, LeaseId, PartyId, PoolId, SessionId, TaskId
from fallow.job import JOB_STATES_FINAL, JobProgress, JobState, JobStatus, RowChecks, TaskResult, WorkerShare
from fallow.limits import BLOCK_BYTES_MAX, JOB_SHARES_SHOWN_MAX
from fallow.roles import TIERS_ALLOWED, DataClass, Tier
from fallow.session import BlobReference, Capability, DeviceStanding, TaskKind
from fallow_coordinator.core.deferral import why_deferred
from fallow_coordinator.core.devices import certificate_of, challenge_of
from fallow_coordinator.core.events import PackedCandidate
from fallow_coordinator.core.evidence import Tally, Verification
from fallow_coordinator.core.evolve_tasks import MEASURING_KINDS
from fallow_coordinator.core.needs import INSPECTION, REFEREEING, Misfit, misfit
from fallow_coordinator.core.state import (
    ChallengeRecord,
    DeviceCertificate,
    Job,
    Lease,
    State,
    Task,
    TaskPhase,
)
from fallow_coordinator.core.tolerances import profiles_of


def job_status(state: State, job_id: JobId) -> JobStatus | None:
    """The job as its owner sees it, or None when it is not (any more) in the state.

    `output_schema` is empty: the service takes it from the bundle's manifest.
    """
    job = state.jobs.get(job_id)
    if job is None:
        return None
    if job.deleted_at_ms:
        reason, code = job.deleted_reason, Reason.JOB_DELETED.value
    elif job.state in _WAITING:
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
        checks=_row_checks(job.checks) if job.checks is not None else None,
    )


def _row_checks(tally: Tally) -> RowChecks:
    return RowChecks(
        rows_drawn=tally.rows_drawn,
        rows_passed=tally.rows_passed,
        rows_by_referee=tally.rows_by_referee,
        rows_tied=tally.rows_tied,
        rows_wrong=tally.rows_wrong,
        rows_withdrawn=tally.rows_withdrawn,
        rows_trusted=tally.rows_trusted,
        accepted=tally.accepted,
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


_WAITING = frozenset({JobState.PENDING, JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING})

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
    if job.state not in _WAITING:
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
    referees = any(group.window_total and misfit(REFEREEING, group.ability) is None for group in state.groups.values())
    accept = f"`fallow job accept {verification.job_id}` takes the rows with the checks made by now"
    waiting = sum(map(len, verification.audit_due.values()))
    live = any(audit.lease_id is None for audit in verification.audits.values())
    if verification.referee_due and not referees:
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
    if not _inspectors_take_work(state):
        return "its bundle waits for inspection, and no operator worker that inspects is connected", NO_OPERATOR_WORKER
    return "its bundle waits for inspection", INSPECTING


def _inspectors_take_work(state: State) -> bool:
    return any(group.window_total for group in state.groups.values() if misfit(INSPECTION, group.ability) is None)


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
        if _inspectors_take_work(state):
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


@dataclass(frozen=True, slots=True)
class PackSource:
    """A dataset block from which rows are packed."""

    digest: Digest
    length_bytes: int
    inline: bool
    """True: its bytes are a payload of the journal."""


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """A candidate's block, to be packed of single rows, each as (source, row), in order."""

    sources: tuple[PackSource, ...]
    places: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    """Rows of the task that they answer, rising."""
    class_numbers: tuple[int, ...]
    """Their execution classes, as places in the plan's list."""

    @property
    def inline(self) -> bool:
        """Whether it can be packed from payloads alone."""
        return all(source.inline for source in self.sources)


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """Rows of an audit, each beside the one that it checks, as (source, row)."""

    job_id: JobId
    task_id: TaskId
    sources: tuple[PackSource, ...]
    pairs: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    @property
    def inline(self) -> bool:
        """Whether the engine can compare at once, from payloads alone."""
        return all(source.inline for source in self.sources)


class _Sources:
    """Numbers blocks as they are named."""

    def __init__(self) -> None:
        self.listed: list[PackSource] = []
        self._numbers: dict[Digest, int] = {}

    def number(self, blob: BlobReference, *, inline: bool) -> int:
        if blob.digest not in self._numbers:
            self._numbers[blob.digest] = len(self.listed)
            self.listed.append(PackSource(blob.digest, blob.length_bytes, inline))
        return self._numbers[blob.digest]


def compare_plan(state: State, job_id: JobId, task_id: TaskId) -> ComparePlan | None:
    """What to compare for an audit that has settled, or None when nobody needs that (any more)."""
    verification = state.verifications.get(job_id)
    audit = verification.audits.get(task_id) if verification is not None else None
    if verification is None or audit is None or audit.compared or audit.output is None:
        return None
    sources = _Sources()
    own = sources.number(audit.output, inline=audit.inline)
    pairs: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for index, row in enumerate(audit.checks):
        evidence = verification.evidences.get(row.lease_id)
        if evidence is None:
            # Nobody needs it any more: beside itself it is equal, and that is heard by nobody.
            pairs.append(((own, index), (own, index)))
        else:
            pairs.append(((own, index), (sources.number(evidence.output, inline=evidence.inline), row.row)))
    return ComparePlan(job_id, task_id, tuple(sources.listed), tuple(pairs))


def _candidates_of(state: State, task: Task) -> tuple[tuple[RowsPlan, ...], tuple[str, ...]]:
    """The candidates of a referee's task: rows that it checks, and those that audits gave in their stead."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    verification = state.verifications[task.job_id]
    classes: dict[str, int] = {}
    checked, differing = _Candidate(classes), _Candidate(classes)
    for index, row in enumerate(verification.refereed[task.task_id]):
        evidence = verification.evidences.get(row.checks.lease_id)
        if evidence is None:
            continue
        checked.add(index, evidence.output, evidence.execution_class, inline=evidence.inline, row=row.checks.row)
        audit_id = verification.audit_of.get(row.differing.lease_id) if row.differing is not None else None
        audit = verification.audits[audit_id] if audit_id is not None else None
        if audit is not None and audit.output is not None and row.differing is not None:
            differing.add(index, audit.output, audit.execution_class, inline=audit.inline, row=row.differing.row)
    return tuple(one.plan() for one in (checked, differing) if one.rows), tuple(classes)


class _Candidate:
    """Gathers the rows of one candidate."""

    def __init__(self, classes: dict[str, int]) -> None:
        self._classes = classes
        self._sources = _Sources()
        self._places: list[tuple[int, int]] = []
        self._class_numbers: list[int] = []
        self.rows: list[int] = []

    def add(self, index: int, block: BlobReference, execution_class: str, *, inline: bool, row: int) -> None:
        self.rows.append(index)
        self._places.append((self._sources.number(block, inline=inline), row))
        self._class_numbers.append(self._classes.setdefault(execution_class, len(self._classes)))

    def plan(self) -> RowsPlan:
        return RowsPlan(tuple(self._sources.listed), tuple(self._places), tuple(self.rows), tuple(self._class_numbers))


@dataclass(frozen=True, slots=True)
class PackPlan:
    """How a task's input is made: `spans` are (source, first row in it, rows), in packing order."""

    task_id: TaskId
    pack_number: int
    account_id: AccountId
    job_id: JobId
    sources: tuple[PackSource, ...]
    spans: tuple[tuple[int, int, int], ...]
    candidates: tuple[RowsPlan, ...] = ()
    """Of a referee's task: blocks to pack beside the input."""
    execution_classes: tuple[str, ...] = ()

    @property
    def rows_inline(self) -> bool:
        """Whether the rows themselves can be packed from payloads alone."""
        return all(source.inline for source in self.sources)

    @property
    def inline(self) -> bool:
        """Whether the engine can pack it at once, from payloads alone."""
        return self.rows_inline and all(plan.inline for plan in self.candidates)


def pack_plan(state: State, task_id: TaskId) -> PackPlan | None:
    """How to pack the task now, or None when it is not to be packed (any more)."""
    task = state.tasks.get(task_id)
    if task is None or task.phase is not TaskPhase.PACKING or task.job_id is None:
        return None
    job = state.jobs[task.job_id]
    sources: list[PackSource] = []
    spans: list[tuple[int, int, int]] = []
    numbers: dict[int, int] = {}
    for start, end in task.spans:
        for block, first, rows in _pieces(job, start, end):
            if block not in numbers:
                numbers[block] = len(sources)
                dataset = job.blocks[block]
                sources.append(PackSource(dataset.blob.digest, dataset.blob.length_bytes, dataset.inline))
            spans.append((numbers[block], first, rows))
    candidates, classes = _candidates_of(state, task) if task.kind is TaskKind.REFEREE else ((), ())
    return PackPlan(
        task_id, task.pack_number, job.account_id, job.job_id, tuple(sources), tuple(spans), candidates, classes
    )


def _pieces(job: Job, start: int, end: int) -> list[tuple[int, int, int]]:
    """(block, first row in it, rows) that hold the job positions from `start` up to `end`."""
    made: list[tuple[int, int, int]] = []
    block = bisect_right(job.row_starts, start) - 1
    while start < end:
        rows = min(end, job.row_starts[block + 1]) - start
        if rows:
            made.append((block, start - job.row_starts[block], rows))
        start += rows
        block += 1
    return made


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
