"""Which rows of a settled lease are checked, and how many it takes until its pay is released."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fallow.assurance import Assurance, assurance_of, audit_rate_ppm, drawn_count, drawn_rows, goes_to_referee
from fallow.assurance import rows_to_audit as rows_for
from fallow.credits import PoolMode
from fallow.ids import Digest
from fallow.roles import Tier
from fallow_coordinator.core.events import TaskSettled
from fallow_coordinator.core.evidence import Evidence, Verification
from fallow_coordinator.core.funding import is_own
from fallow_coordinator.core.state import Job, Lease, State, Worker
from fallow_coordinator.core.verification_events import AuditsDrawn, Trust


def drawn(
    state: State, job: Job, lease: Lease, settled: TaskSettled, *, commitment: Digest, execution_class: str
) -> AuditsDrawn:
    """The draw for a lease that settles now, by the digest of the message that committed to its rows."""
    worker = state.workers[lease.worker_id]
    verification = state.verifications[job.job_id]
    assurance = assurance_of(job.options.assurance)
    trust = _trust(job, worker)
    rate_ppm = 0 if trust is not Trust.NONE else _rate_ppm(assurance, worker, execution_class)
    count = drawn_count(secret=verification.secret, commitment=commitment, rows=settled.rows, rate_ppm=rate_ppm)
    rows = drawn_rows(secret=verification.secret, commitment=commitment, rows=settled.rows, count=count)
    return AuditsDrawn(
        lease_id=lease.lease_id,
        job_id=job.job_id,
        worker_id=worker.worker_id,
        cursor=settled.cursor,
        rows=settled.rows,
        execution_class=execution_class,
        rate_ppm=rate_ppm,
        drawn=rows,
        refereed=_refereed(state, job, verification.secret, commitment, rows),
        trust=trust,
        microcredits=0 if settled.released or trust is not Trust.NONE else _pending(job, settled),
        further_rows=0 if worker.tier is not Tier.VOLUNTEER else rows_needed(assurance),
    )


def rows_needed(assurance: Assurance) -> int:
    """Checked rows that must stand for one worker: they would show a share of wrong rows beyond what is allowed."""
    return rows_for(wrong_ppm=assurance.wrong_rows_ppm_max, confidence_ppm=assurance.confidence_ppm)


def topped_up(state: State, job: Job, verification: Verification) -> tuple[AuditsDrawn, ...]:
    """Further draws at the end of a job, so that `further_rows` of each worker's unreleased rows are checked.

    Spread evenly: then whoever altered the allowed share of its rows, wherever, is found with the confidence asked.
    """
    made: list[AuditsDrawn] = []
    for share in verification.shares.values():
        evidences = [verification.evidences[lease_id] for lease_id in share.leases]
        rows = sum(evidence.rows for evidence in evidences)
        for evidence in evidences:
            wanted = min(evidence.rows, -(-evidence.further_rows * evidence.rows // rows))
            if wanted > len(evidence.checked):
                made.append(_more(state, job, verification, evidence, wanted))
    return tuple(made)


def _more(state: State, job: Job, verification: Verification, evidence: Evidence, wanted: int) -> AuditsDrawn:
    secret, commitment = verification.secret, evidence.commitment
    rows = drawn_rows(secret=secret, commitment=commitment, rows=evidence.rows, count=wanted)
    fresh = tuple(row for row in rows if row not in evidence.checked)
    assert fresh, "a larger draw holds the smaller one"
    return AuditsDrawn(
        lease_id=evidence.lease_id,
        job_id=job.job_id,
        worker_id=evidence.worker_id,
        cursor=evidence.cursor,
        rows=evidence.rows,
        execution_class=evidence.execution_class,
        rate_ppm=wanted * 1_000_000 // evidence.rows,
        drawn=fresh,
        refereed=_refereed(state, job, secret, commitment, fresh),
        microcredits=evidence.microcredits,
        further_rows=evidence.further_rows,
    )


def _trust(job: Job, worker: Worker) -> Trust:
    if is_own(job, worker):
        return Trust.OWN
    return Trust.OPERATOR if worker.tier is Tier.OPERATOR else Trust.NONE


def _rate_ppm(assurance: Assurance, worker: Worker, execution_class: str) -> int:
    if worker.tier is Tier.MANAGED:
        return assurance.audit_rate_ppm_min
    record = worker.rows_verified
    if worker.record_class and worker.record_class != execution_class:
        record //= 2
    return audit_rate_ppm(assurance, rows_verified=record, stake_rows=record + worker.rows_unverified)


def _refereed(state: State, job: Job, secret: bytes, commitment: Digest, rows: tuple[int, ...]) -> tuple[int, ...]:
    report = state.bundles[job.bundle_digest].report
    assert report is not None, "a job runs when its bundle is inspected"
    if report.slot_dependent:
        # NOTE: an audit is an ordinary block, where rows stand in other slots; it could place each at its own slot.
        return rows
    share = assurance_of(job.options.assurance).referee_share_ppm
    return tuple(
        row for row in rows if goes_to_referee(secret=secret, commitment=commitment, row=row, referee_share_ppm=share)
    )


def _pending(job: Job, settled: TaskSettled) -> int:
    return settled.microcredits if job.mode is PoolMode.MARKET else 0


def expected_checks_permille(assurance_text: str, workers: Iterable[tuple[Worker, bool]], rows: int) -> int:
    """Work that checks add to a job of so many rows, shared evenly by these workers; `True`: the submitter's own.

    The rate falls as K / (K + n) while a worker's rows are verified, which adds up to K·ln((K + n + r) / (K + n)) rows;
    at least the floor, and at least K rows of each newcomer by the end (`topped_up`). Nothing is known where nobody is.
    """
    assurance = assurance_of(assurance_text)
    needed, floor = rows_needed(assurance), assurance.audit_rate_ppm_min / 1_000_000
    shared = list(workers)
    each = rows / max(1, len(shared))
    checked = 0.0
    for worker, own in shared:
        if own or worker.tier is Tier.OPERATOR:
            continue
        if worker.tier is Tier.MANAGED:
            checked += floor * each
            continue
        falling = needed * math.log1p(each / (needed + worker.rows_verified))
        checked += min(each, max(falling, floor * each, min(each, needed)))
    return min(1_000, math.ceil(1_000 * checked / rows))
