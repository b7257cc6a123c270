"""Rows on which other workers say that a program crashed: run once more, here, before anybody believes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from fallow.session import TaskKind
from fallow_worker.executor import WorkFailed
from fallow_worker.output import clipped
from fallow_worker.ports import Executor, Work

_log = logging.getLogger(__name__)

INSPECTION_MS: Final = 600_000
"""What an inspection itself may take of its lease's time; the rest, or half if that is more, is for its rows."""


async def run_claimed_rows(executor: Executor, work: Work, progress: Callable[[int], None]) -> Work:
    """Runs an inspection's rows as a lease of rows, and gives the inspection without them; what they gave is dropped.

    Rows that kill their program one by one fail alone, as everywhere. Raises WorkFailed, with cause PROGRAM when the
    program is to blame as it would be in a volunteer's hands.
    """
    runtime_ms = max(work.runtime_max_ms // 2, work.runtime_max_ms - INSPECTION_MS)
    try:
        outcome = await executor.run(replace(work, kind=TaskKind.MAP, runtime_max_ms=runtime_ms), progress)
    except WorkFailed as failed:
        reason = clipped(f"on {work.rows} rows of a job: {failed.reason}")
        _log.info("inspection.rows_failed lease=%s cause=%s reason=%s", work.lease_id, failed.cause.value, reason)
        raise WorkFailed(failed.cause, reason) from None
    _log.info("inspection.rows_ran lease=%s rows=%d failed=%d", work.lease_id, work.rows, len(outcome.failures))
    return replace(work, input_block=b"", rows=0)
