"""What the views shall show, found by folding the journal: fresh rows of tables for whatever an event touched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from fallow.ids import AccountId, Digest, JobId, PartyId, PoolId, SessionId, TaskId, TokenId
from fallow.job import JOB_STATES_FINAL, JobStatus, TaskResult
from fallow.wire.job import result_to_message, status_to_message
from fallow_coordinator.core import events as ev
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.evolve import evolve, evolve_posted
from fallow_coordinator.core.limits import RETENTION_MS_DEFAULT
from fallow_coordinator.core.postings import postings_of
from fallow_coordinator.core.questions import status_told
from fallow_coordinator.core.state import Bundle, Job, State
from fallow_coordinator.ports import Record
from fallow_coordinator.store.job_index import job_of
from fallow_coordinator.store.journal_nodes import JournalNodes
from fallow_coordinator.store.ledger_rows import posting_rows, settlement_row
from fallow_coordinator.store.work_events import encode_submission

_UNSEEN = frozenset({ev.TaskCreated, ev.PackRequested, ev.TaskInputPacked, ev.CommitmentRecorded})
"""Frequent events that post nothing and change nothing that a view shows."""

Row = tuple[object, ...]
"""Values in the order of the table's columns."""


_COUNTED = (
    v.DrawSecretSet,
    v.AuditsDrawn,
    v.AuditCompared,
    v.VerdictReached,
    v.RowsCorrected,
    v.PayVoided,
    v.AssuranceAccepted,
)
"""Events that change what a job's row says of its checks, rows or pay."""


@dataclass(slots=True)
class Changes:
    """Rows to write, by table; a row replaces the one with the same key."""

    rows: dict[str, list[Row]] = field(default_factory=dict[str, list[Row]])
    jobs_deleted: list[JobId] = field(default_factory=list[JobId])
    """Of which nothing but their rows in `jobs` and `deleted_jobs` stays, once `rows` are written."""


@dataclass(slots=True)
class _Touched:
    """What changed since the last look, in order of first touch."""

    accounts: dict[AccountId, None] = field(default_factory=dict[AccountId, None])
    pools: dict[PoolId, None] = field(default_factory=dict[PoolId, None])
    tokens: dict[TokenId, None] = field(default_factory=dict[TokenId, None])
    parties: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    workers: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    bundles: dict[Digest, None] = field(default_factory=dict[Digest, None])
    jobs: dict[JobId, None] = field(default_factory=dict[JobId, None])
    leaving: dict[JobId, Row] = field(default_factory=dict[JobId, Row])
    """Last rows of jobs that left the state."""
    results: list[Row] = field(default_factory=list[Row])
    result_nodes: list[Row] = field(default_factory=list[Row])
    job_blobs: dict[tuple[JobId, Digest], None] = field(default_factory=dict[tuple[JobId, Digest], None])
    job_payloads: dict[tuple[JobId, Digest], None] = field(default_factory=dict[tuple[JobId, Digest], None])
    job_submissions: list[Row] = field(default_factory=list[Row])
    pool_members: dict[tuple[PoolId, AccountId], Row] = field(default_factory=dict[tuple[PoolId, AccountId], Row])
    retained_jobs: dict[JobId, Row] = field(default_factory=dict[JobId, Row])
    deleted_jobs: dict[JobId, Row] = field(default_factory=dict[JobId, Row])
    postings: list[Row] = field(default_factory=list[Row])
    settlements: list[Row] = field(default_factory=list[Row])
    job_records: list[Row] = field(default_factory=list[Row])
    tree_nodes: list[Row] = field(default_factory=list[Row])


class Projection:
    """The state of a journal up to some record, and which rows of the views it changed since somebody last asked.

    A row depends on the state alone and never on how many records were folded at once, so that rebuilt views are equal.
    """

    def __init__(self, state: State | None = None, leaves: Sequence[bytes] = ()) -> None:
        """Begins with `state`, whose rows the views have; None: at the journal's beginning.

        `leaves` are those of the unfinished run before it (`journal_nodes.run_start`).
        """
        self.state = State() if state is None else state
        self._nodes = JournalNodes(self.state.sequence, leaves)
        self._touched = _Touched()

    def pass_over(self, record: Record) -> None:
        """Folds a record that the views have already."""
        evolve(self.state, record.event, record.at_ms)
        self._nodes.add(record.leaf)

    def fold(self, record: Record) -> None:
        """Folds the next record and notes what it touches."""
        event = record.event
        self._touched.tree_nodes += self._nodes.add(record.leaf)
        if (found := job_of(self.state, event)) is not None:
            self._touched.job_records.append((found.job_id, record.sequence, found.session_id))
        if type(event) in _UNSEEN:
            evolve(self.state, event, record.at_ms)
        elif isinstance(event, ev.LeaseGranted):
            self._fold_posted(record)
            self._touch_task(event.task_id)
        elif isinstance(event, ev.TaskSettled):
            self._fold_settled(record, event)
        else:
            # Work that was given up is delivered, too.
            job_id = self.state.tasks[event.task_id].job_id if isinstance(event, ev.TaskAbandoned) else None
            marked = self._results_marked(event)
            self._before(event)
            if isinstance(event, ev.LateLeaseSettled):
                self._note_settlement(record, event)
            self._fold_posted(record)
            self._after(event, record.at_ms)
            if isinstance(event, _COUNTED):
                self._touched.jobs[event.job_id] = None
            if marked is not None:
                job, cursor, rows_failed = marked
                self._touched.results.append(_result_row(job, job.results[cursor - 1], rows_failed))
            if job_id is not None and isinstance(event, ev.TaskAbandoned):
                self._note_result(job_id, event.rows)

    def _fold_posted(self, record: Record) -> None:
        """Folds a record and notes what it posts."""
        state, event = self.state, record.event
        postings = postings_of(state, event)
        if postings:
            self._touched.postings += posting_rows(state, event, postings, record.sequence, record.at_ms)
        evolve_posted(state, event, record.at_ms, postings)

    def _fold_settled(self, record: Record, event: ev.TaskSettled) -> None:
        """Most of what users see comes from these."""
        touched, job_id = self._touched, self.state.tasks[event.task_id].job_id
        touched.workers[self.state.leases[event.lease_id].worker_id] = None
        self._touch_task(event.task_id)
        self._note_settlement(record, event)
        self._fold_posted(record)
        if job_id is not None and event.cursor:
            # What only checks rows has no number, and delivers nothing.
            self._note_result(job_id, event.rows_failed)

    def _note_settlement(self, record: Record, event: ev.TaskSettled | ev.LateLeaseSettled) -> None:
        """Who did it and what they get; asked before the event is folded."""
        settled = settlement_row(self.state, event, record.sequence, record.at_ms)
        if settled is not None:
            self._touched.settlements.append(settled)

    def _note_result(self, job_id: JobId, rows_failed: int) -> None:
        """The newest result of a job is fresh."""
        job = self.state.jobs[job_id]
        self._touched.results.append(_result_row(job, job.results[-1], rows_failed))
        self._touched.result_nodes += _node_rows(job, job.results[-1], rows_failed)

    def take_changes(self) -> Changes:
        """Rows for everything touched since the last call, as it stands now."""
        state, touched = self.state, self._touched
        self._touched = _Touched()
        tables: dict[str, list[Row]] = {
            "accounts": [(account_id, state.accounts[account_id].name) for account_id in touched.accounts],
            "pools": [_pool_row(state, pool_id) for pool_id in touched.pools],
            "tokens": [_token_row(state, token_id) for token_id in touched.tokens],
            "parties": [_party_row(state, party_id) for party_id in touched.parties],
            "workers": [_worker_row(state, worker_id) for worker_id in touched.workers],
            "bundles": [row for digest in touched.bundles for row in _bundle_rows(state.bundles[digest])],
            "jobs": [*touched.leaving.values(), *(_job_row(state.jobs[job_id]) for job_id in touched.jobs)],
            "results": touched.results,
            "result_nodes": touched.result_nodes,
            "job_blobs": list(touched.job_blobs),
            "job_payloads": list(touched.job_payloads),
            "job_submissions": touched.job_submissions,
            "pool_members": list(touched.pool_members.values()),
            "retained_jobs": list(touched.retained_jobs.values()),
            "deleted_jobs": list(touched.deleted_jobs.values()),
            "postings": touched.postings,
            "settlements": touched.settlements,
            "job_records": touched.job_records,
            "tree_nodes": touched.tree_nodes,
        }
        return Changes({table: rows for table, rows in tables.items() if rows}, list(touched.deleted_jobs))

    # --------------------------------------------------------------------------------------------- what is touched

    def _before(self, event: ev.Event) -> None:
        """Notes what can only be found while the event has not happened yet."""
        match event:
            case ev.SessionClosed():
                self._touch_session(event.session_id)
            case ev.Restarted():
                for session_id in self.state.sessions:
                    self._touch_session(session_id)
            case ev.LateLeaseSettled():
                lease = self.state.leases[event.lease_id]
                self._touched.workers[lease.worker_id] = None
                self._touch_task(lease.task_id)
            case ev.LeaseEnded():
                self._touch_task(self.state.leases[event.lease_id].task_id)
            case ev.TaskAbandoned():
                self._touch_task(event.task_id)
            case ev.JobArchived():
                self._touched.jobs.pop(event.job_id, None)
                self._touched.leaving[event.job_id] = _job_row(self.state.jobs[event.job_id])
            case _:
                pass

    def _after(self, event: ev.Event, at_ms: int) -> None:
        touched = self._touched
        match event:
            case ev.JobSubmitted() | ev.JobStateChanged() | ev.JobDeleted():
                self._after_job(event, at_ms)
            case ev.JobFunded():
                touched.jobs[event.job_id] = None
            case ev.AccountCreated():
                touched.accounts[event.account_id] = None
            case ev.PoolCreated() | ev.PoolModeChanged():
                touched.pools[event.pool_id] = None
            case ev.AccountAdmitted() | ev.AccountExpelled():
                member = (event.pool_id, event.account_id)
                touched.pool_members[member] = (*member, isinstance(event, ev.AccountAdmitted))
            case ev.TokenIssued() | ev.TokenRevoked():
                touched.tokens[event.token_id] = None
            case ev.PartyEnrolled():
                touched.parties[event.party_id] = None
                if event.token_id is not None:
                    touched.tokens[event.token_id] = None
                if event.party_id in self.state.workers:
                    touched.workers[event.party_id] = None
            case ev.CertificateIssued() | ev.PartyRevoked():
                touched.parties[event.party_id] = None
            case ev.WorkerQuarantined() | ev.WorkerReleased() | ev.SessionOpened():
                touched.workers[event.worker_id] = None
            case ev.CapabilityReported():
                self._touch_session(event.session_id)
            case ev.BundleRegistered() | ev.BundleInspected() | ev.BundleHeld() | ev.BundleReleased():
                touched.bundles[event.bundle_digest] = None
            case _:
                pass

    def _after_job(self, event: ev.JobSubmitted | ev.JobStateChanged | ev.JobDeleted, at_ms: int) -> None:
        touched = self._touched
        match event:
            case ev.JobSubmitted():
                touched.jobs[event.job_id] = None
                blobs = [block.blob for block in event.blocks if not block.inline]
                for blob in [*blobs, *([event.kept] if event.kept is not None else [])]:
                    touched.job_blobs[event.job_id, blob.digest] = None
                for block in event.blocks:
                    if block.inline:
                        touched.job_payloads[event.job_id, block.blob.digest] = None
                touched.job_submissions.append((event.job_id, event.account_id, encode_submission(event)))
            case ev.JobStateChanged():
                touched.jobs[event.job_id] = None
                if event.state in JOB_STATES_FINAL:
                    touched.retained_jobs[event.job_id] = _retained_row(self.state.jobs[event.job_id], at_ms)
            case ev.JobDeleted():
                # A job that was deleted twice keeps its first moment.
                row = (event.job_id, event.account_id, at_ms, event.reason)
                touched.deleted_jobs.setdefault(event.job_id, row)
                if event.job_id in self.state.jobs:
                    touched.jobs[event.job_id] = None

    def _touch_session(self, session_id: SessionId) -> None:
        worker_id = self.state.sessions.get(session_id)
        if worker_id is not None:
            self._touched.workers[worker_id] = None

    def _touch_task(self, task_id: TaskId) -> None:
        task = self.state.tasks[task_id]
        if task.job_id is not None:
            self._touched.jobs[task.job_id] = None
        elif task.bundle_digest in self.state.bundles:
            self._touched.bundles[task.bundle_digest] = None

    def _results_marked(self, event: ev.Event) -> tuple[Job, int, int] | None:
        """(job, cursor, failed rows) of the result whose status this event changes, which has not happened yet."""
        if isinstance(event, v.AuditsDrawn) and event.trust is not v.Trust.NONE:
            facts = self.state.ended_leases[event.lease_id].commitment
            assert facts is not None, "what settled was committed"
            return self.state.jobs[event.job_id], event.cursor, facts.rows_failed
        if isinstance(event, v.EvidenceReleased):
            evidence = self.state.verifications[event.job_id].evidences.get(event.lease_id)
            if evidence is not None:
                return self.state.jobs[event.job_id], evidence.cursor, evidence.rows_failed
        return None


def _pool_row(state: State, pool_id: PoolId) -> Row:
    pool = state.pools[pool_id]
    return (pool.pool_id, pool.account_id, pool.name, pool.mode, pool.policy)


def _token_row(state: State, token_id: TokenId) -> Row:
    token = state.tokens[token_id]
    return (
        token.token_id,
        token.account_id,
        token.pool_id,
        token.role.value,
        token.tier.value if token.tier is not None else None,
        token.uses_max,
        token.uses,
        token.expires_at_ms,
        token.revoked,
        " ".join(token.tags),
    )


def _party_row(state: State, party_id: PartyId) -> Row:
    party = state.parties[party_id]
    return (
        party.party_id,
        party.account_id,
        party.pool_id,
        party.role.value,
        party.tier.value if party.tier is not None else None,
        party.name,
        party.token_id,
        party.key_fingerprint,
        party.enrolled_at_ms,
        party.not_after_ms,
        party.revoked,
        party.revoked_reason,
    )


def _worker_row(state: State, worker_id: PartyId) -> Row:
    worker = state.workers[worker_id]
    return (
        worker.worker_id,
        worker.account_id,
        worker.pool_id,
        worker.tier.value,
        worker.session_id is not None,
        worker.sessions,
        worker.window,
        worker.quarantined,
        worker.quarantine_reason,
        worker.rows_settled,
        worker.tasks_settled,
    )


def _bundle_rows(bundle: Bundle) -> list[Row]:
    """One row for each account that owns it."""
    report = bundle.report
    if bundle.held_reason:
        standing, reason = "held", bundle.held_reason
    elif report is None:
        standing, reason = "waiting", bundle.obstacle
    elif report.accepted:
        standing, reason = "accepted", ""
    else:
        standing, reason = "refused", "; ".join(report.refusals)
    batch_rows = report.canonical_batch_rows if report is not None else 0
    return [(account_id, bundle.bundle_digest, standing, reason, batch_rows) for account_id in bundle.owners]


def _job_row(job: Job) -> Row:
    status = status_of(job)
    return (
        job.job_id,
        job.account_id,
        job.pool_id,
        job.party_id,
        job.bundle_digest,
        job.title,
        job.data_class.value,
        job.state.value,
        job.reason,
        job.reason_code,
        job.policy,
        job.microcredits,
        job.submitted_at_ms,
        job.finished_at_ms,
        job.rows,
        len(job.done),
        job.rows_failed,
        job.tasks_settled,
        len(job.results),
        status_to_message(status).SerializeToString(deterministic=True),
    )


def _retained_row(job: Job, at_ms: int) -> Row:
    return (job.job_id, job.account_id, at_ms + (job.options.retention_ms or RETENTION_MS_DEFAULT))


def status_of(job: Job) -> JobStatus:
    """The job as the views tell it: what its own events say, not why it waits just now.

    `progress.workers` counts those who delivered a result, once the job is finished. `output_schema` is empty: the
    service takes it from the bundle's manifest.
    """
    finished = job.state in JOB_STATES_FINAL
    return status_told(
        job,
        reason=job.reason,
        reason_code=job.reason_code,
        workers=len({result.worker_id for result in job.results if result.worker_id}) if finished else 0,
    )


def _result_row(job: Job, result: TaskResult, rows_failed: int) -> Row:
    return (
        job.job_id,
        result.cursor,
        job.account_id,
        result.worker_id,
        result.node,
        sum(span.rows for span in result.spans),
        rows_failed,
        result.output.digest if result.output is not None else None,
        result.output.length_bytes if result.output is not None else 0,
        result.status,
        result_to_message(result, b"").SerializeToString(deterministic=True),
    )


def _node_rows(job: Job, result: TaskResult, rows_failed: int) -> list[Row]:
    """One row for each part of a task that was spread over nodes.

    Failed rows beyond those that are listed count for the first part: nobody says where they lie.
    """
    if not result.nodes:
        return []
    failed = [0] * len(result.nodes)
    starts = list(accumulate((run.rows for run in result.nodes), initial=0))
    for failure in result.failures:
        for span in result.spans:
            inside = failure.job_position - span.job_position
            if 0 <= inside < span.rows:
                failed[bisect_right(starts, span.block_row + inside) - 1] += 1
    failed[0] += max(0, rows_failed - sum(failed))
    return [
        (job.job_id, result.cursor, number, run.node, run.rows, failed[number])
        for number, run in enumerate(result.nodes)
    ]
