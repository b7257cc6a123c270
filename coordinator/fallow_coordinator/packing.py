"""Which rows of which blocks make up a task's input, and the packing of inline ones on the spot."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from fallow.ids import Digest, TaskId
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack_selection
from fallow.session import BlobReference
from fallow_coordinator.core.state import State, TaskPhase


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What to pack for a task."""

    task_id: TaskId
    pack_number: int
    sources: tuple[BlobReference, ...]
    """The dataset blocks that hold the task's rows, each once."""
    spans: tuple[tuple[int, int, int], ...]
    """(source, first row, rows), in packing order."""
    inline: bool
    """True when every source is an inline payload."""


def plan_of(state: State, task_id: TaskId, pack_number: int) -> PackPlan | None:
    """The plan of a task's packing; None when the task is gone or has moved on."""
    task = state.tasks.get(task_id)
    if task is None or task.phase is not TaskPhase.PACKING or task.pack_number != pack_number or task.job_id is None:
        return None
    job = state.jobs[task.job_id]
    places: dict[int, int] = {}
    spans: list[tuple[int, int, int]] = []
    for start, end in task.spans:
        position = start
        while position < end:
            block = bisect_right(job.row_starts, position) - 1
            until = min(end, job.row_starts[block + 1])
            source = places.setdefault(block, len(places))
            spans.append((source, position - job.row_starts[block], until - position))
            position = until
    return PackPlan(
        task_id=task_id,
        pack_number=pack_number,
        sources=tuple(job.blocks[block].blob for block in places),
        spans=tuple(spans),
        inline=all(job.blocks[block].inline for block in places),
    )


def pack_inline(plan: PackPlan, payload: Callable[[Digest], bytes | None], nonce: bytes) -> bytes | None:
    """The packed block of an inline plan; None when the result is too large to be inline.

    Raises what `pack_selection` raises, and KeyError when a source's payload is gone.
    """
    sources: list[RowBlock] = []
    for reference in plan.sources:
        data = payload(reference.digest)
        if data is None:
            raise KeyError(reference.digest.hex())
        sources.append(RowBlock.parse(data))
    block = pack_selection(sources, [(source, first, first + rows) for source, first, rows in plan.spans], nonce)
    return block if len(block) <= INLINE_PAYLOAD_BYTES_MAX else None
