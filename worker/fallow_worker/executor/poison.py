"""Poison rows: which rows bring a program's child down, found by halving, each try in a child that nothing spoilt.

A canonical batch that crashed a child is halved until single rows are left; whatever a child survives keeps its
values. One such row costs at most ⌈log₂ b⌉ + 2 children: one for the shard's batches one by one, one for each halving,
and one for the rows after it. Bits stay as they are: a batch is always filled up with zeros, and rows whose bits depend
on their slot keep it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fallow.errors import FallowError
from fallow.ids import digest_of
from fallow.row_block import RowBlock, pack, pack_selection
from fallow.session import Cause, RowFailure, Usage
from fallow.wire.schema import encode_schema
from fallow_worker.engine.protocol import ROW_FAILURES_LISTED_PER_TASK_MAX, Failed, clipped_reason
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.engine_child import ChildDeath, ChildDiedError, ChildTask, EngineChild, TaskAnswer
from fallow_worker.executor.lease_run import Seat, Shard
from fallow_worker.executor.loading import load_bundle
from fallow_worker.executor.shards import RowRange, cut, join_usage

log = logging.getLogger(__name__)

POISON_ROWS_MAX: Final = 8
"""Rows of one shard that may fail so, before the program is to blame."""
POISON_ROWS_ALONE_MAX: Final = 4
"""The same while no row has had a value: a program that dies on every row is no matter of rows."""
STILL_SHARE: Final = 0.5
"""Part of a lease's time after which a batch that does not end is taken for stuck, unless the owner says otherwise."""
_DEATHS_OF_OTHERS_MAX: Final = 2
"""Children that may end through no fault of the program before the worker is to blame."""


def halvings(batch_rows: int) -> int:
    """How often a batch can be halved until single rows are left: ⌈log₂ b⌉."""
    return (batch_rows - 1).bit_length()


class Bisection:
    """Which rows to try next, and which are poison: plain arithmetic over one shard's rows."""

    def __init__(self, rows: RowRange, *, batch_rows: int) -> None:
        """Begins with the batches one by one."""
        starts = range(rows.start, rows.end, batch_rows)
        self._left = deque(RowRange(start, min(rows.end, start + batch_rows)) for start in starts)
        self.poison: list[int] = []
        """Rows that brought a child down all alone, rising."""

    def next_rows(self) -> RowRange | None:
        """What to run now; None when every row is settled."""
        return self._left[0] if self._left else None

    def survived(self) -> None:
        """The child lived through those rows."""
        self._left.popleft()

    def died(self) -> int | None:
        """The child died of those rows: the row, if it was one; else its halves come next."""
        rows = self._left.popleft()
        if len(rows) == 1:
            self.poison.append(rows.start)
            return rows.start
        middle = (rows.start + rows.end) // 2
        self._left.extendleft((RowRange(middle, rows.end), RowRange(rows.start, middle)))
        return None


@dataclass(slots=True)
class _Found:
    """What is known of the shard's rows so far."""

    blocks: list[tuple[RowRange, bytes]] = field(default_factory=list[tuple[RowRange, bytes]])
    failures: list[RowFailure] = field(default_factory=list[RowFailure])
    """By place in the shard."""
    usages: list[Usage] = field(default_factory=list[Usage])
    rows_done: int = 0
    stuck: bool = False


class Isolation:
    """Runs a shard that killed a child again, so carefully that only the rows at fault fail."""

    def __init__(
        self,
        shard: Shard,
        seat: Seat,
        *,
        spawn: Callable[[], EngineChild],
        seconds_left: float,
        on_rows: Callable[[int], None],
    ) -> None:
        """`spawn` gives a fresh child; `seconds_left` is how long the lease may still take."""
        lease = shard.lease
        self._shard = shard
        self._seat = seat
        self._spawn = spawn
        self._on_rows = on_rows
        self._batch_rows = max(1, lease.work.bundle.canonical_batch_rows)
        tries = halvings(self._batch_rows) + 1
        self._patience_s = max(0.05, seconds_left / (tries + 2))
        """How long one try may take: all that get stuck over one row leave time for the others."""
        self._bisection = Bisection(shard.rows, batch_rows=self._batch_rows)
        self._found = _Found()
        self.spawns = 0
        """Children that it took."""

    async def run(self) -> None:
        """Fills in the shard's output, failures and usage. Raises WorkFailed, OSError."""
        others = 0
        try:
            while (rows := self._bisection.next_rows()) is not None and not self._shard.lease.over:
                try:
                    answer = await self._attempt(rows)
                except ChildDiedError as error:
                    self._seat.child = None
                    if error.death.contract_broken or self._shard.lease.over:
                        raise WorkFailed(error.death.cause, error.death.reason) from None
                    if error.death.cause is not Cause.PROGRAM:
                        others += 1
                        if others >= _DEATHS_OF_OTHERS_MAX:
                            raise WorkFailed(error.death.cause, error.death.reason) from None
                        continue
                    self._on_death(error.death)
                else:
                    self._on_answer(rows, answer)
        finally:
            if self._seat.child is not None:
                await self._seat.child.close()
        self._finish()

    async def _attempt(self, rows: RowRange) -> TaskAnswer | Failed:
        child = self._seat.child
        if child is None:
            child = await self._fresh()
        lease = self._shard.lease
        work, block = lease.work, lease.block
        assert block is not None, "only rows are isolated"
        task = ChildTask(
            task=f"{work.lease_id}/{rows.start}+{len(rows)}",
            block=cut(block, rows, work.nonce),
            rows=len(rows),
            nonce=work.nonce,
            output_bytes_max=work.output_bytes_max,
            slots=self._slots(rows),
        )
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def begin() -> None:
            nonlocal timer
            reason = f"it did not end within {self._patience_s:.3g} s"
            timer = loop.call_later(self._patience_s, self._kill_stuck, child, reason)

        try:
            return await child.submit(task, lambda _: None, begin)
        finally:
            if timer is not None:
                timer.cancel()

    def _kill_stuck(self, child: EngineChild, reason: str) -> None:
        self._found.stuck = True
        child.kill(Cause.PROGRAM, reason)

    def _slots(self, rows: RowRange) -> tuple[int, ...]:
        work = self._shard.lease.work
        if work.slots:
            return work.slots[rows.start : rows.end]
        if not work.bundle.slot_dependent:
            return ()
        return tuple((row - self._shard.rows.start) % self._batch_rows for row in range(rows.start, rows.end))

    async def _fresh(self) -> EngineChild:
        lease = self._shard.lease
        child = self._spawn()
        self.spawns += 1
        self._seat.child = child
        try:
            _, loaded = await load_bundle(child, lease.work.bundle, lease.manifest)
        except ChildDiedError as error:
            if error.death.cause is Cause.PROGRAM:
                # It had no row yet.
                raise WorkFailed(error.death.cause, error.death.reason) from None
            raise
        if isinstance(loaded, Failed):
            raise WorkFailed(loaded.cause, clipped_reason(loaded.message))
        lease.execution_class = lease.execution_class or child.execution_class
        return child

    # --------------------------------------------------------------------------------------------------- findings

    def _on_answer(self, rows: RowRange, answer: TaskAnswer | Failed) -> None:
        if isinstance(answer, Failed):
            if not ran_out_of_memory(answer):
                raise WorkFailed(answer.cause, clipped_reason(answer.message))
            self._on_death(ChildDeath(answer.cause, answer.message, by_us=False))
            return
        lease = self._shard.lease
        try:
            block = RowBlock.parse(answer.output)
        except FallowError as error:
            raise WorkFailed(Cause.PROGRAM, clipped_reason(f"its output is no row block: {error}")) from None
        if block.schema_digest != digest_of(encode_schema(lease.manifest.output_schema)) or len(block) != len(rows):
            raise WorkFailed(Cause.PROGRAM, "its output is not of the declared schema")
        self._bisection.survived()
        start = rows.start - self._shard.rows.start
        self._found.blocks.append((rows, answer.output))
        self._found.usages.append(answer.done.usage)
        self._found.failures += [RowFailure(start + f.row, f.cause, f.reason) for f in answer.done.failures]
        self._found.rows_done += len(rows)
        lease.rows_survived += len(rows)
        if self._seat.child is not None:
            lease.memory_bytes_peak = max(lease.memory_bytes_peak, self._seat.child.memory_bytes_peak)
        self._on_rows(self._found.rows_done)

    def _on_death(self, death: ChildDeath) -> None:
        row = self._bisection.died()
        if row is None:
            return
        reason = clipped_reason(f"the program does not survive this row: {death.reason}")
        log.warning("engine.poison_row lease=%s row=%s reason=%s", self._shard.lease.work.lease_id, row, death.reason)
        self._found.failures.append(RowFailure(row - self._shard.rows.start, Cause.ROW, reason))
        self._found.rows_done += 1
        poison = len(self._bisection.poison)
        alone = not self._shard.lease.rows_survived
        if poison > POISON_ROWS_MAX or (alone and poison >= POISON_ROWS_ALONE_MAX):
            raise WorkFailed(
                Cause.PROGRAM,
                clipped_reason(f"{poison} rows brought the program down one by one, last: {death.reason}"),
            )

    def _finish(self) -> None:
        if self._shard.lease.over:
            return
        found, shard = self._found, self._shard
        if found.stuck and not shard.lease.rows_survived:
            # Nothing ended in time: this machine may just be slow.
            limit = shard.lease.work.runtime_max_ms
            raise WorkFailed(
                Cause.PROGRAM, f"the program ran longer than the {limit} ms allowed leave, on every row that was tried"
            )
        shard.output = self._joined()
        failures = sorted(found.failures, key=lambda failure: failure.row)
        shard.failures = tuple(failures[:ROW_FAILURES_LISTED_PER_TASK_MAX])
        shard.usage = join_usage(found.usages, wall_microseconds=sum(usage.wall_microseconds for usage in found.usages))
        log.info(
            "engine.isolated rows=%s poison=%s spawns=%s", len(shard.rows), len(self._bisection.poison), self.spawns
        )

    def _joined(self) -> bytes:
        """The output rows in order, those without a value empty."""
        lease, rows = self._shard.lease, self._shard.rows
        schema = lease.manifest.output_schema
        blank = pack(digest_of(encode_schema(schema)), [b""], [(0,) * len(schema.size_features)], lease.work.nonce)
        parts = [*self._found.blocks, *((RowRange(row, row + 1), blank) for row in self._bisection.poison)]
        parts.sort(key=lambda part: part[0].start)
        assert sum(len(part) for part, _ in parts) == len(rows), "every row is in one part"
        blocks = [RowBlock.parse(block) for _, block in parts]
        return pack_selection(blocks, [(index, 0, len(block)) for index, block in enumerate(blocks)], lease.work.nonce)


def ran_out_of_memory(failed: Failed) -> bool:
    """Whether the child survived, but these rows were too much for its memory."""
    return failed.cause is Cause.PROGRAM and failed.field == "memory"
