"""A referee's lease: the rows are run as any others are, then put beside what others say of them."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from fallow.comparison import Spread
from fallow.ids import Digest
from fallow.limits import BLOCK_BYTES_MAX, REFEREE_FINDINGS_MAX
from fallow.session import Cause, Lease, TaskKind, Usage
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.shards import join_usage
from fallow_worker.ports import CandidateRows, Executor, Outcome, RefereeWork, Work

_log = logging.getLogger(__name__)

SPREADS_KEPT_MAX: Final = 64
COMPARING_MS_MIN: Final = 5_000
"""Left for comparing, however long running took."""


class Spreads:
    """Spreads that this worker has measured, by bundle and class, the latest used ones."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Digest, str], Spread] = OrderedDict()

    def get(self, bundle: Digest, execution_class: str) -> Spread | None:
        """The spread, or None when it is not known."""
        key = (bundle, execution_class)
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def keep(self, bundle: Digest, execution_class: str, spread: Spread) -> None:
        """Remembers a spread that was measured."""
        self._known[bundle, execution_class] = spread
        self._known.move_to_end((bundle, execution_class))
        if len(self._known) > SPREADS_KEPT_MAX:
            self._known.popitem(last=False)


async def refereed(
    executor: Executor,
    work: Work,
    lease: Lease,
    candidates: Sequence[bytes],
    progress: Callable[[int], None],
    spreads: Spreads,
) -> Outcome:
    """Our own rows and the findings. Raises WorkFailed.

    Crashes, hangs and poison rows of the program are met as in any map: such a row has no value of ours. Should the
    program not survive other forms of itself, rows are compared without them.
    """
    compared = sum(len(candidate.rows) or lease.rows for candidate in lease.candidates)
    if not lease.candidates or compared > REFEREE_FINDINGS_MAX:
        raise WorkFailed(Cause.PLATFORM, f"{compared} rows to compare; allowed: 1 to {REFEREE_FINDINGS_MAX}")
    began = time.monotonic()
    own = await executor.run(
        replace(work, kind=TaskKind.MAP, output_bytes_max=work.output_bytes_max or BLOCK_BYTES_MAX), progress
    )
    task = RefereeWork(
        own_block=own.output_block,
        own_class=own.execution_class,
        candidates=tuple(
            CandidateRows(block, candidate.rows or tuple(range(lease.rows)), candidate.class_numbers)
            for block, candidate in zip(candidates, lease.candidates, strict=True)
        ),
        execution_classes=lease.execution_classes,
        profiles=lease.profiles,
        spread=spreads.get(lease.bundle_digest, own.execution_class),
    )

    def left_ms() -> int:
        return max(COMPARING_MS_MIN, work.runtime_max_ms - int((time.monotonic() - began) * 1_000))

    compare = replace(work, kind=TaskKind.REFEREE, runtime_max_ms=left_ms(), referee=task)
    try:
        found = await executor.run(compare, _nothing)
    except WorkFailed as failed:
        if failed.cause is Cause.OWNER_PREEMPT:
            raise
        _log.warning("referee.without_forms lease=%s cause=%s %s", lease.lease_id, failed.cause.value, failed.reason)
        plain = replace(task, runs_program=False)
        found = await executor.run(replace(compare, runtime_max_ms=left_ms(), referee=plain), _nothing)
    if found.spread is not None:
        spreads.keep(lease.bundle_digest, own.execution_class, found.spread)
    wall = int((time.monotonic() - began) * 1_000_000)
    usage: Usage = join_usage([own.usage, found.usage], wall_microseconds=wall)
    return replace(found, usage=usage, output_block=own.output_block, execution_class=own.execution_class)


def _nothing(_: int) -> None:
    """Comparing has no rows to count."""
