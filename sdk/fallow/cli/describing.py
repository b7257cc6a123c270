"""Jobs and what was saved of them, in words and for JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fallow.cli.output import counted
from fallow.client.tables import Saved
from fallow.credits import PoolMode, credits_text
from fallow.explanation import JobExplanation
from fallow.job import JobStatus, RowChecks, WorkerShare


def saved_facts(saved: Saved) -> dict[str, Any]:
    """What was saved, for JSON."""
    return {
        "path": saved.path,
        "rows": saved.rows,
        "failed_path": saved.failed_path,
        "failed_rows": saved.failed_rows,
        "shares": saved.shares,
    }


def saved_text(saved: Saved) -> str:
    """What was saved, for people."""
    text = f"{counted(saved.rows, 'row')} in {saved.path}"
    if saved.failed_path is not None:
        text += f"\n{counted(saved.failed_rows, 'row')} failed, with reasons in {saved.failed_path}"
    return text


def status_facts(status: JobStatus) -> dict[str, Any]:
    """A status for JSON."""
    return {
        "job_id": status.job_id,
        "state": status.state,
        "reason": status.reason,
        "reason_code": status.reason_code,
        "title": status.title,
        "account_id": status.account_id,
        "pool_id": status.pool_id,
        "data_class": status.data_class,
        "bundle_digest": status.bundle_digest,
        "policy": status.policy,
        "price_microcredits": status.price_microcredits,
        "pool_mode": status.pool_mode,
        "budget_microcredits": status.budget_microcredits,
        "spent_microcredits": status.spent_microcredits,
        "reserved_microcredits": status.reserved_microcredits,
        "warnings": status.warnings,
        "submitted_at_ms": status.submitted_at_ms,
        "finished_at_ms": status.finished_at_ms,
        "progress": status.progress,
        "results": status.results,
        "deleted_at_ms": status.deleted_at_ms,
        "energy": energy_facts(status),
        "deferred_until_ms": status.deferred_until_ms,
        "checks": status.checks,
        "shares": status.shares,
    }


def energy_facts(status: JobStatus) -> dict[str, Any]:
    """What a job's settled rows spent and emitted, for JSON."""
    footprint, rows = status.footprint, status.progress.rows_done
    return {
        "joules": footprint.millijoules / 1_000,
        "joules_per_1000_rows": footprint.joules_per_1000_rows(rows),
        "share_measured": footprint.share_measured,
        "grams_co2": footprint.micrograms / 1_000_000,
        "joules_of_unknown_carbon": footprint.millijoules_unplaced / 1_000,
    }


def _energy_text(status: JobStatus) -> str:
    """What a job's settled rows spent and emitted, in words; empty while nothing is known."""
    footprint = status.footprint
    if not footprint.millijoules:
        return ""
    each = footprint.joules_per_1000_rows(status.progress.rows_done)
    known = f"{footprint.share_measured:.0%} measured" if footprint.millijoules_measured else "estimated"
    grams = f", {footprint.micrograms / 1_000_000:.3g} g CO2" if footprint.micrograms else ""
    return f"{footprint.millijoules / 1_000:.3g} J ({each:.3g} J for 1,000 rows, {known}){grams}"


def status_line(status: JobStatus) -> str:
    """A status in one line."""
    progress = status.progress
    done = f"{progress.rows_done:,}/{progress.rows_total:,} rows"
    failed = f", {progress.rows_failed:,} failed" if progress.rows_failed else ""
    title = f"  {status.title}" if status.title else ""
    return f"{status.job_id}  {status.state.value:<10} {done}{failed}{title}"


def price_text(status: JobStatus) -> str:
    """What the job cost so far, and of how much."""
    what = "units of allotment" if status.pool_mode is PoolMode.QUOTA else "credits"
    spent = f"{credits_text(status.spent_microcredits)} {what}"
    if not status.budget_microcredits:
        return spent
    reserved = f", {credits_text(status.reserved_microcredits)} reserved" if status.reserved_microcredits else ""
    return f"{spent} of {credits_text(status.budget_microcredits)}{reserved}"


def status_text(status: JobStatus) -> str:
    """A status in full."""
    progress = status.progress
    facts = {
        "job": status.job_id,
        "title": status.title,
        "state": status.state.value + (f" ({status.reason})" if status.reason else ""),
        "rows": f"{progress.rows_done:,} of {progress.rows_total:,} done, {progress.rows_failed:,} failed, "
        f"{progress.rows_leased:,} leased to {counted(progress.workers, 'worker')}",
        "data": status.data_class,
        "bundle": status.bundle_digest.hex(),
        "account": status.account_id,
        "pool": status.pool_id,
        "policy": status.policy,
        "checks": checks_text(status.checks) if status.checks is not None else "",
        "energy": _energy_text(status),
        "waits": f"for cleaner electricity until {_moment(status.deferred_until_ms)}"
        if status.deferred_until_ms
        else "",
        "price": price_text(status),
        "warning": "; ".join(status.warnings),
        "submitted": _moment(status.submitted_at_ms),
        "finished": _moment(status.finished_at_ms) if status.finished_at_ms else "",
    }
    lines = [f"{name:<10}{value}" for name, value in facts.items() if value]
    return "\n".join([*lines, *share_lines(status.shares)])


def share_lines(shares: Sequence[WorkerShare]) -> list[str]:
    """Rows by worker, and below a worker of several nodes by node."""
    by_worker: dict[str, list[WorkerShare]] = {}
    for share in shares:
        by_worker.setdefault(share.worker_id, []).append(share)
    lines: list[str] = []
    for worker_id, nodes in by_worker.items():
        lines.append(f"  {sum(node.rows for node in nodes):>10,}  {worker_id}")
        if len(nodes) > 1 or nodes[0].node:
            lines += [f"  {node.rows:>14,}  node {node.node}" for node in nodes]
    return lines


def checks_text(checks: RowChecks) -> str:
    """How a job's rows stand, for people."""
    parts = [
        f"{checks.rows_passed:,} of {checks.rows_drawn:,} drawn rows stand, {checks.rows_by_referee:,} by a referee",
        f"{checks.rows_trusted:,} trusted" if checks.rows_trusted else "",
        f"{checks.rows_tied:,} undecided" if checks.rows_tied else "",
        f"{checks.rows_wrong:,} proven wrong" if checks.rows_wrong else "",
        f"{checks.rows_withdrawn:,} done again" if checks.rows_withdrawn else "",
        "accepted by you as it was" if checks.accepted else "",
    ]
    return ", ".join(part for part in parts if part)


def explanation_facts(told: JobExplanation) -> dict[str, Any]:
    """Why a job waits, for JSON."""
    return asdict(told)


def explanation_text(told: JobExplanation) -> str:
    """Why a job waits, for people."""
    lines = [
        f"job        {told.job_id}  {told.state.value}",
        f"workers    {told.workers_considered} considered, {told.workers_fitting} fit, {told.workers_free} free now",
    ]
    lines += [f"  {reason.count:>6} × {reason.words}: {reason.advice}" for reason in told.fallen_out]
    lines.append(
        f"turn       {told.accounts_before} accounts and {told.jobs_before} of your jobs before it; "
        f"{told.usage_units:,} units used lately"
    )
    for reason in told.waits_for:
        lines.append(f"waits for  {reason.words}")
        lines += [f"  do       {reason.advice}"] if reason.advice else []
    return "\n".join(lines)


def _moment(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))
