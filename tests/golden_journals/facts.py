"""What a folded journal says, in plain values: the state may be built otherwise one day and must say the same."""

from __future__ import annotations

from collections.abc import Iterable

from fallow_coordinator.core.state import State
from fallow_coordinator.ports import Record
from fallow_coordinator.store.projection import Projection, Row

Facts = dict[str, object]


def facts_of(records: Iterable[Record]) -> Facts:
    """The facts after the last record: the views' rows, and what the views do not show."""
    projection = Projection()
    tables: dict[str, dict[str, list[object]]] = {}
    for record in records:
        projection.fold(record)
        changes = projection.take_changes()
        for table, rows in changes.rows.items():
            for row in rows:
                tables.setdefault(table, {})[_key(table, row)] = [_plain(value) for value in row]
        for table in ("results", "job_blobs", "job_submissions", "job_payloads", "retained_jobs"):
            for job_id in changes.jobs_deleted:
                held = tables.get(table, {})
                tables[table] = {key: row for key, row in held.items() if row[0] != job_id}
    return {**{table: dict(sorted(rows.items())) for table, rows in sorted(tables.items())}, **_live(projection.state)}


def _key(table: str, row: Row) -> str:
    parts = (
        row[:2] if table in {"results", "bundles", "job_blobs", "postings", "job_payloads", "pool_members"} else row[:1]
    )
    return " ".join(str(_plain(part)) for part in parts)


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def _live(state: State) -> Facts:
    """Sessions, tasks, leases and keys: unsettled things that decide what happens next."""
    return {
        "journal": {
            "journal_id": state.journal_id.hex(),
            "epoch": state.epoch,
            "sequence": state.sequence,
            "clock_ms": state.clock_ms,
        },
        "sessions": dict(sorted(state.sessions.items())),
        "tasks": {
            task.task_id: {
                "kind": task.kind.value,
                "job_id": task.job_id,
                "phase": task.phase.value,
                "spans": [list(span) for span in task.spans],
                "pack_number": task.pack_number,
                "fence": task.fence,
                "attempts": task.attempts,
                "losses": task.losses,
                "not_before_ms": task.not_before_ms,
                "input": task.input.digest.hex() if task.input is not None else None,
                "avoid": list(task.avoid),
            }
            for task in state.tasks.values()
        },
        "leases": {
            lease.lease_id: {
                "task_id": lease.task_id,
                "worker_id": lease.worker_id,
                "fence": lease.fence,
                "deadline_ms": lease.deadline_ms,
                "committed": lease.commitment is not None,
            }
            for lease in state.leases.values()
        },
        "ended_leases": {
            lease_id: [ended.task_id, ended.fence, ended.outcome.value if ended.outcome is not None else "settled"]
            for lease_id, ended in state.ended_leases.items()
        },
        "idempotency": {
            f"{account_id} {key.hex()}": record.job_id for (account_id, key), record in state.idempotency.items()
        },
        "balances": {
            " ".join(filter(None, book)): microcredits for book, microcredits in sorted(state.ledger.balances.items())
        },
        "allotments": {
            f"{pool_id} {account_id}": [one.microcredits, one.period_ms, one.renews_at_ms]
            for (pool_id, account_id), one in state.ledger.allotments.items()
        },
        "jobs_live": {
            job.job_id: {"state": job.state.value, "next_row": job.next_row, "done": list(job.done.flat)}
            for job in state.jobs.values()
        },
    }
