"""The single writer: takes what is queued, decides, makes the events durable in one transaction, then answers and acts.

Everything from the first decision of a batch to its answers happens in one step of the event loop, the commit included.
So nothing outside ever sees a state that is ahead of the disk, and `read` answers at once. The commit is not moved to a
thread on purpose: SQLite gives up the interpreter lock at each row, and a thread must win it back from a busy loop each
time (measured on two cores: 0.2 ms inline against 25 ms in a thread for three rows, 0.5 against 150 ms for a hundred).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.row_block import NONCE_BYTES
from fallow.session import BlobReference
from fallow_coordinator.config import EXIT_BROKEN, EXIT_STORAGE_FAILED, EXIT_WRITER_FENCED, EngineSettings
from fallow_coordinator.core import events as ev
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.commands import (
    ArchiveJobs,
    Command,
    ComparisonFailed,
    PackFailed,
    RecordComparison,
    Restart,
    TaskPacked,
    Tick,
)
from fallow_coordinator.core.effects import CompareRows, Effect, PackTask
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.invariants import check_ledger
from fallow_coordinator.core.ledger import LedgerError
from fallow_coordinator.core.questions import live_payloads
from fallow_coordinator.core.row_plans import ComparePlan, PackPlan, compare_plan, pack_plan
from fallow_coordinator.core.sound import InvariantError
from fallow_coordinator.core.state import State
from fallow_coordinator.core.turn import Turn, take_turn
from fallow_coordinator.inline_packing import InlinePacker
from fallow_coordinator.latency import Latencies
from fallow_coordinator.payload_cache import PayloadCache
from fallow_coordinator.ports import (
    EffectSink,
    LedgerUnsound,
    Packer,
    SingleRows,
    Snapshots,
    StorageFailed,
    Store,
    Views,
    WriterFenced,
)
from fallow_coordinator.row_work import RowWork

logger = logging.getLogger(__name__)

ENTROPY_BYTES = 32
ENTROPY_POOL_BYTES = 16 * 1024
"""Drawn from the system at once: a system call for each decision would cost more than the bytes."""
COMPARISON_WAIT_S_MIN = 0.5
COMPARISON_WAIT_S_MAX = 30.0
"""Wait before the blob service is asked again to compare rows: doubles between these two."""
_NO_PAYLOADS: Mapping[Digest, bytes] = {}
_PACKING_HOPELESS = frozenset(
    {
        Reason.BLOB_UNKNOWN,
        Reason.DIGEST_MISMATCH,
        Reason.ROW_BLOCK_MALFORMED,
        Reason.SCHEMA_MISMATCH,
        Reason.FIELD_INVALID,
        Reason.ROW_TOO_LARGE,
        Reason.BLOCK_TOO_LARGE,
        Reason.LIMIT_EXCEEDED,
        Reason.DATASET_EMPTY,
    }
)
"""Reasons that another try would only give again."""

ReadT = TypeVar("ReadT")


@dataclass(slots=True)
class EngineCounters:
    """What this writer did since it started."""

    commits: int = 0
    """Transactions that were made durable."""
    events: int = 0
    commands: int = 0
    """Commands that were decided, refused ones included, the clock's ticks not."""
    refusals: int = 0
    commitments: int = 0
    """Commitments of workers that were recorded."""
    payload_bytes: int = 0
    """Inline payloads that were written."""
    packs_inline: int = 0
    packs_called: int = 0
    """Pack calls to the blob service."""
    signatures_checked: int = 0
    """Of workers, and found good."""
    assigns: Latencies = field(default_factory=Latencies)
    """From the moment at which a batch began that found a task and room for it, until the transport had the lease."""


@dataclass(slots=True)
class _Waiting:
    """A command in the queue. `answer` is None for the engine's own."""

    command: Command
    payloads: Mapping[Digest, bytes]
    answer: asyncio.Future[Decision] | None


@dataclass(slots=True)
class _Batch:
    """What a batch brought about, before it is durable."""

    now_ms: int
    began_s: float
    """When deciding began, on `time.monotonic`."""
    events: list[tuple[int, ev.Event]] = field(default_factory=list[tuple[int, ev.Event]])
    payloads: dict[Digest, bytes] = field(default_factory=dict[Digest, bytes])
    effects: list[Effect] = field(default_factory=list[Effect])
    plans: list[PackPlan | ComparePlan] = field(default_factory=list[PackPlan | ComparePlan])
    """For the blob service."""
    answers: list[tuple[asyncio.Future[Decision], Decision | FallowError]] = field(
        default_factory=list[tuple[asyncio.Future[Decision], Decision | FallowError]]
    )


def end_process(words: str, exit_code: int) -> NoReturn:
    """Ends this process at once, without a reply to anybody: the disk holds the truth, the state in memory may not."""
    logger.critical("engine.ended exit_code=%d reason=%s", exit_code, words)
    logging.shutdown()
    os._exit(exit_code)


def _unsound(what: str) -> LedgerUnsound:
    return LedgerUnsound(
        f"the ledger does not add up ({what}); no work is paid from it: `fallow-coordinator check` says more, "
        "restore the state folder from a backup"
    )


class PooledEntropy:
    """Fresh bytes of the system's, drawn many at a time; none are given out twice."""

    __slots__ = ("_at", "_pool")

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def __call__(self, count: int) -> bytes:
        """So many bytes."""
        assert count <= ENTROPY_POOL_BYTES, "a draw is small"
        start, self._at = self._at, self._at + count
        if self._at > len(self._pool):
            self._pool = os.urandom(ENTROPY_POOL_BYTES)
            start, self._at = 0, count
        return self._pool[start : self._at]


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Engine:
    """Owns the state. One for each journal; all calls on one event loop."""

    def __init__(
        self,
        *,
        store: Store,
        sink: EffectSink,
        packer: Packer,
        single_rows: SingleRows | None = None,
        views: Views | None = None,
        snapshots: Snapshots | None = None,
        clock: Callable[[], int] = wall_clock_ms,
        entropy: Callable[[int], bytes] | None = None,
        settings: EngineSettings | None = None,
        end: Callable[[str, int], NoReturn] = end_process,
    ) -> None:
        """`store` stays the caller's to close. `end` is called with words and an exit code and must not return."""
        self._store = store
        self._sink = sink
        self._packer = packer
        self._views = views
        self._snapshots = snapshots
        self._clock = clock
        self._entropy = entropy or PooledEntropy()
        self._settings = settings or EngineSettings()
        self._end = end
        self._state = State()
        self._last_at_ms = 0
        self._queue: deque[_Waiting] = deque()
        self._queued = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._row_work = RowWork(single_rows)
        self._packs: asyncio.Queue[PackPlan | ComparePlan] = asyncio.Queue()
        self._named: set[Digest] | None = None
        """Payloads that events named since a round of collecting began; None between rounds."""
        self._cache = PayloadCache(self._settings.payload_cache_bytes_max)
        self._inline_packer = InlinePacker()
        self._effects_since_s = 0.0
        self._counters = EngineCounters()
        self._last_append_s = 0.0
        self._last_batch = 0

    # --------------------------------------------------------------------------------------------- for everybody

    @property
    def counters(self) -> EngineCounters:
        """What this writer did since it started."""
        return self._counters

    @property
    def epoch(self) -> int:
        """Epoch of this writer."""
        return self._store.epoch

    @property
    def state(self) -> State:
        """The committed state, to look at and never to change, for code that does not await in between."""
        return self._state

    async def read(self, question: Callable[[State], ReadT]) -> ReadT:
        """What `question` finds in the committed state. It must not change it, nor keep a reference to its insides."""
        return question(self._state)

    @property
    def effects_since_s(self) -> float:
        """For the sink while `apply` runs: when deciding began that led to the effects, on `time.monotonic`."""
        return self._effects_since_s

    async def submit(self, command: Command, payloads: Mapping[Digest, bytes] = _NO_PAYLOADS) -> Decision:
        """Decides a command; when this returns, its events are on disk.

        `payloads` are inline bytes under their digests, which the caller has computed; only those that an event names
        are kept. Raises the FallowError of a refusal, OVERLOADED when too many commands wait, COORDINATOR_STOPPING.
        """
        return await self.submit_soon(command, payloads)

    def submit_soon(
        self, command: Command, payloads: Mapping[Digest, bytes] = _NO_PAYLOADS
    ) -> asyncio.Future[Decision]:
        """As `submit`, for callers that do not wait: the future has the decision, or the refusal, once it is durable.

        Raises OVERLOADED and COORDINATOR_STOPPING at once.
        """
        if self._stopping:
            raise FallowError(
                Reason.COORDINATOR_STOPPING, "the coordinator is stopping", hint="try again in a few seconds"
            )
        if len(self._queue) >= self._settings.queue_max:
            raise FallowError(
                Reason.OVERLOADED,
                "the coordinator has too much to do",
                limit=f"{self._settings.queue_max} waiting commands",
                hint="try again in a few seconds",
            )
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._enqueue(_Waiting(command, payloads, answer))
        return answer

    def payload(self, digest: Digest) -> bytes | None:
        """An inline payload that is on disk, from memory when it was written lately."""
        data = self._cache.get(digest)
        if data is None:
            data = self._store.payload(digest)
            if data is not None:
                self._cache.put(digest, data)
        return data

    # --------------------------------------------------------------------------------------------- life

    async def start(self) -> int:
        """Takes up the newest snapshot and folds what came after it, tells the core of the restart, takes up what was
        left undone; gives how many records the journal has.

        Raises StorageFailed when the journal is damaged.
        """
        replayed = await self._replay()
        if replayed:
            # Time since the last record, in which the writer may have been up and idle: leases end later, never sooner.
            down_time_ms = max(0, self._clock() - self._last_at_ms)
            self._enqueue(_Waiting(Restart(self._store.epoch, down_time_ms), _NO_PAYLOADS, None))
            self._process()
        self._spawn("run", self._run())
        self._spawn("tick", self._tick())
        for number in range(self._settings.packs_at_once):
            self._spawn(f"pack-{number}", self._pack())
        self._spawn("let-go", self._let_go())
        if self._views is not None:
            self._spawn("archive", self._archive(self._views))
            self._spawn("collect", self._collect(self._views))
        logger.info("engine.started epoch=%d records=%d", self._store.epoch, replayed)
        return replayed

    async def stop(self) -> None:
        """Takes no further commands, decides those that wait, and ends."""
        self._stopping = True
        if self._tasks:
            await self._idle.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        logger.info("engine.stopped commits=%d events=%d", self._counters.commits, self._counters.events)

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"engine.{name}")
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """None of them ends by itself: a coordinator that no longer ticks or writes must not look alive."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("engine.task_broken task=%s", task.get_name(), exc_info=error)
            self._end(f"{task.get_name()} ended: {error!r}", EXIT_BROKEN)

    async def _replay(self) -> int:
        sequence = began = self._take_up_snapshot()
        while records := self._store.read(after_sequence=sequence, limit=self._settings.replay_chunk_records):
            for record in records:
                try:
                    evolve(self._state, record.event, record.at_ms)
                except LedgerError as error:
                    raise _unsound(f"record {record.sequence}: {error}") from error
            sequence, self._last_at_ms = records[-1].sequence, records[-1].at_ms
            await asyncio.sleep(0)
        if sequence != self._store.last_sequence:
            raise StorageFailed(
                f"the journal ends at record {sequence}, not at {self._store.last_sequence}; restore it from a backup"
            )
        try:
            check_ledger(self._state)
        except (InvariantError, LedgerError) as error:
            raise _unsound(f"after record {sequence}: {error}") from error
        logger.info("engine.replayed from_snapshot=%d folded=%d", began, sequence - began)
        return sequence

    def _take_up_snapshot(self) -> int:
        """The sequence at which the state stands after it; 0: there is none to use."""
        state = self._snapshots.newest() if self._snapshots is not None else None
        if state is not None:
            self._state, self._last_at_ms = state, state.clock_ms
        return self._state.sequence

    # --------------------------------------------------------------------------------------------- the loop

    def _enqueue(self, waiting: _Waiting) -> None:
        self._queue.append(waiting)
        self._idle.clear()
        self._queued.set()

    async def _run(self) -> None:
        while True:
            await self._queued.wait()
            await self._gather()
            self._last_batch = self._process()
            if self._queue:
                await asyncio.sleep(0)
            else:
                self._queued.clear()
                self._idle.set()

    async def _gather(self) -> None:
        """Under load, lets commands gather for as long as the last commit took, while more keep coming.

        So commits take at most about half of the time, however slow the disk; a lone command never waits.
        """
        if len(self._queue) < 2 and self._last_batch < 2:
            return
        limit_s = min(self._last_append_s, self._settings.collect_ms_max / 1_000)
        began = time.monotonic()
        seen, quiet = len(self._queue), 0
        while quiet < 2 and len(self._queue) < self._settings.batch_max and time.monotonic() - began < limit_s:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == seen else 0
            seen = len(self._queue)

    def _process(self) -> int:
        """Decides a batch, makes it durable, answers and acts: one step, nothing in between. Gives how many it took.

        Whoever was decided first waits for the last: a batch takes no more commands once it took `batch_ms_max`.
        """
        batch = _Batch(self._now_ms(), time.monotonic())
        until_s = batch.began_s + self._settings.batch_ms_max / 1_000
        taken = 0
        while self._queue and taken < self._settings.batch_max:
            self._decide(self._queue.popleft(), batch)
            taken += 1
            if time.monotonic() > until_s:
                break
        self._commit(batch)
        return taken

    def _now_ms(self) -> int:
        """The journal's clock: the wall clock, but never back."""
        return max(self._last_at_ms, self._clock())

    def _decide(self, waiting: _Waiting, batch: _Batch) -> None:
        """Takes the command's turn, and the turns of packings that it made possible on the spot."""
        if not isinstance(waiting.command, Tick):
            self._counters.commands += 1
        outcome = self._turn(waiting.command, waiting.payloads, batch)
        if isinstance(outcome, FallowError):
            self._counters.refusals += 1
            if waiting.answer is None:
                logger.warning("engine.refused command=%s error=%s", type(waiting.command).__name__, outcome)
            else:
                batch.answers.append((waiting.answer, outcome))
            return
        if waiting.answer is not None:
            batch.answers.append((waiting.answer, Decision(outcome.events, outcome.answer)))
        follow_ups = deque(outcome.effects)
        while follow_ups:
            effect = follow_ups.popleft()
            if isinstance(effect, PackTask):
                self._start_pack(effect, batch, follow_ups)
            elif isinstance(effect, CompareRows):
                self._start_comparison(effect, batch, follow_ups)
            else:
                batch.effects.append(effect)

    def _turn(self, command: Command, payloads: Mapping[Digest, bytes], batch: _Batch) -> Turn | FallowError:
        before = self._state.sequence
        try:
            turn = take_turn(self._state, command, batch.now_ms, self._entropy(ENTROPY_BYTES))
        except Exception as error:
            if self._state.sequence != before:
                logger.exception("engine.broken command=%s", type(command).__name__)
                self._end(f"the state is in doubt after {type(command).__name__}: {error!r}", EXIT_BROKEN)
            if isinstance(error, FallowError):
                return error
            logger.exception("engine.undecided command=%s", type(command).__name__)
            return FallowError(Reason.INTERNAL, "the coordinator could not decide this; its log says why")
        batch.events.extend([(batch.now_ms, event) for event in turn.events])
        if self._named is not None:
            self._named.update(digest for event in turn.events for digest in payload_digests(event))
        if payloads:
            for event in turn.events:
                for digest in payload_digests(event):
                    if digest in payloads:
                        batch.payloads[digest] = payloads[digest]
        return turn

    def _commit(self, batch: _Batch) -> None:
        if batch.events:
            self._append(batch)
        for future, outcome in batch.answers:
            if future.done():
                continue
            if isinstance(outcome, Decision):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        if batch.effects:
            self._effects_since_s = batch.began_s
            try:
                self._sink.apply(batch.effects)
            except Exception:
                # The events stand; whoever missed a message asks again, or its lease runs out.
                logger.exception("engine.effects_failed count=%d", len(batch.effects))
        for plan in batch.plans:
            self._packs.put_nowait(plan)

    def _append(self, batch: _Batch) -> None:
        began = time.monotonic()
        try:
            self._store.append(
                expected_sequence=self._store.last_sequence, events=batch.events, payloads=batch.payloads
            )
        except WriterFenced as error:
            self._end(str(error), EXIT_WRITER_FENCED)
        except StorageFailed as error:
            self._end(str(error), EXIT_STORAGE_FAILED)
        except Exception as error:
            logger.exception("engine.append_broken")
            self._end(f"the journal could not be written: {error!r}", EXIT_BROKEN)
        self._last_append_s = time.monotonic() - began
        self._last_at_ms = batch.now_ms
        counters = self._counters
        counters.commits += 1
        counters.events += len(batch.events)
        counters.commitments += [type(event) for _, event in batch.events].count(ev.CommitmentRecorded)
        for digest, data in batch.payloads.items():
            counters.payload_bytes += len(data)
            self._cache.put(digest, data)

    # --------------------------------------------------------------------------------------------- packing

    def _start_pack(self, effect: PackTask, batch: _Batch, follow_ups: deque[Effect]) -> None:
        """Packs inline rows at once, in the same batch; leaves the others to the packer."""
        plan = pack_plan(self._state, effect.task_id)
        if plan is None or plan.pack_number != effect.pack_number:
            return
        if not plan.inline:
            batch.plans.append(plan)
            return
        command: Command
        payloads = _NO_PAYLOADS
        try:
            command, payloads = self._packed_inline(plan, self._payloads_of(batch))
        except FallowError as error:
            command = PackFailed(plan.task_id, plan.pack_number, str(error), retryable=False)
        else:
            self._counters.packs_inline += 1
        self._follow(command, payloads, batch, follow_ups)

    def _start_comparison(self, effect: CompareRows, batch: _Batch, follow_ups: deque[Effect]) -> None:
        """Compares inline rows at once, in the same batch; leaves the others to the blob service."""
        plan = compare_plan(self._state, effect.job_id, effect.task_id)
        if plan is None:
            return
        if not plan.inline:
            batch.plans.append(plan)
            return
        command: Command
        try:
            equal = self._row_work.compared_inline(plan, self._payloads_of(batch))
            command = RecordComparison(plan.job_id, plan.task_id, equal)
        except FallowError as error:
            command = ComparisonFailed(plan.job_id, plan.task_id, str(error))
        self._follow(command, _NO_PAYLOADS, batch, follow_ups)

    def _follow(
        self, command: Command, payloads: Mapping[Digest, bytes], batch: _Batch, follow_ups: deque[Effect]
    ) -> None:
        """Takes the turn of a command that another one brought about, in the same batch."""
        outcome = self._turn(command, payloads, batch)
        if isinstance(outcome, FallowError):
            logger.warning("engine.refused command=%s error=%s", type(command).__name__, outcome)
        else:
            follow_ups.extend(outcome.effects)

    def _payloads_of(self, batch: _Batch) -> Callable[[Digest], bytes | None]:
        """Inline payloads, those of the batch among them."""
        return lambda digest: batch.payloads.get(digest) or self.payload(digest)

    def _packed_inline(
        self, plan: PackPlan, payload: Callable[[Digest], bytes | None]
    ) -> tuple[Command, Mapping[Digest, bytes]]:
        block = self._inline_packer.pack(plan, payload, self._entropy(NONCE_BYTES))
        candidates, payloads = self._row_work.packed_inline(plan.candidates, payload, self._nonce)
        digest = digest_of(block)
        packed = BlobReference(digest, len(block))
        command = TaskPacked(
            plan.task_id, plan.pack_number, packed, True, candidates, plan.execution_classes if candidates else ()
        )
        return command, {digest: block, **payloads}

    def _nonce(self) -> bytes:
        return self._entropy(NONCE_BYTES)

    async def _pack(self) -> None:
        """One of a few that call the packer."""
        while True:
            plan = await self._packs.get()
            if isinstance(plan, PackPlan):
                command, payloads = await self._packed(plan)
            else:
                command, payloads = await self._compared(plan), _NO_PAYLOADS
            self._enqueue(_Waiting(command, payloads, None))

    async def _packed(self, plan: PackPlan) -> tuple[Command, Mapping[Digest, bytes]]:
        self._counters.packs_called += 1
        payloads: Mapping[Digest, bytes] = _NO_PAYLOADS
        try:
            if plan.rows_inline:
                block = self._inline_packer.pack(plan, self.payload, self._nonce())
                packed = BlobReference(digest_of(block), len(block))
                payloads = {packed.digest: block}
            else:
                digest, length_bytes = await self._packer.pack(
                    sources=[(source.digest, source.length_bytes) for source in plan.sources],
                    spans=plan.spans,
                    nonce=self._nonce(),
                )
                packed = BlobReference(digest, length_bytes)
            candidates = await self._row_work.packed(plan.candidates, self.payload, self._nonce)
        except FallowError as error:
            logger.warning("engine.pack_failed task=%s reason=%s error=%s", plan.task_id, error.reason, error)
            retryable = error.reason not in _PACKING_HOPELESS
            return PackFailed(plan.task_id, plan.pack_number, str(error), retryable=retryable), _NO_PAYLOADS
        except Exception as error:
            logger.exception("engine.pack_broken task=%s", plan.task_id)
            reason = f"packing broke off: {error!r}"
            return PackFailed(plan.task_id, plan.pack_number, reason, retryable=True), _NO_PAYLOADS
        command = TaskPacked(
            plan.task_id, plan.pack_number, packed, plan.rows_inline, candidates, plan.execution_classes
        )
        return command, payloads

    async def _compared(self, plan: ComparePlan) -> Command:
        """The blob service's answer, however long it stays away: an audit that was done shall count."""
        wait_s = COMPARISON_WAIT_S_MIN
        while True:
            try:
                equal = await self._row_work.compared(plan, self.payload)
                return RecordComparison(plan.job_id, plan.task_id, equal)
            except FallowError as error:
                logger.warning("engine.comparison_failed task=%s error=%s", plan.task_id, error)
                if error.reason in _PACKING_HOPELESS:
                    return ComparisonFailed(plan.job_id, plan.task_id, str(error))
            except Exception:
                logger.exception("engine.comparison_broken task=%s", plan.task_id)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, COMPARISON_WAIT_S_MAX)

    # --------------------------------------------------------------------------------------------- clocks

    async def _tick(self) -> None:
        """Lets what is due fall due. A tick that changes nothing writes nothing."""
        loop = asyncio.get_running_loop()
        looked_at = loop.time()
        while True:
            await asyncio.sleep(self._settings.tick_ms / 1_000)
            if self._queue:
                continue
            looks = loop.time() - looked_at >= self._settings.measure_ms / 1_000
            looked_at = loop.time() if looks else looked_at
            self._enqueue(_Waiting(Tick(self._settings.measuring if looks else None), _NO_PAYLOADS, None))

    async def _archive(self, views: Views) -> None:
        """Lets finished jobs go that were in the views one round ago, so that nobody who asks at once misses them."""
        in_views = 0
        while True:
            await asyncio.sleep(self._settings.archive_ms / 1_000)
            if in_views and any(sequence <= in_views for sequence in self._state.finished.values()):
                self._enqueue(_Waiting(ArchiveJobs(in_views), _NO_PAYLOADS, None))
            try:
                in_views = await asyncio.to_thread(views.view_sequence)
            except StorageFailed as error:
                logger.warning("engine.views_unreadable error=%s", error)

    async def _let_go(self) -> None:
        """Takes records that were sealed out of the database, a few at a time."""
        while True:
            await asyncio.sleep(self._settings.let_go_idle_ms / 1_000)
            try:
                while self._store.let_go_of_sealed(self._settings.let_go_records):  # noqa: ASYNC110 - no event tells it
                    await asyncio.sleep(self._settings.let_go_ms / 1_000)
            except WriterFenced as error:
                self._end(str(error), EXIT_WRITER_FENCED)
            except StorageFailed as error:
                self._end(str(error), EXIT_STORAGE_FAILED)

    async def _collect(self, views: Views) -> None:
        """Drops inline payloads that neither the state nor a job in the views refers to, page by page."""
        while True:
            await asyncio.sleep(self._settings.collect_ms / 1_000)
            try:
                dropped = await self._collect_round(views)
            except StorageFailed as error:
                logger.warning("engine.payloads_kept error=%s", error)
            else:
                logger.info("engine.payloads_collected dropped=%d", dropped)
            finally:
                self._named = None

    async def _collect_round(self, views: Views) -> int:
        """One look at every payload; gives how many were dropped.

        What is referred to when the round begins stays through it, and so does whatever an event names meanwhile; jobs
        that had left the state before are in the views, or the round ends. So nothing is held but what is live.
        """
        live, archived_through = live_payloads(self._state), self._state.archived_through
        named = self._named = set()
        dropped, after = 0, Digest(b"")
        while page := self._store.payload_digests(after=after, limit=self._settings.collect_page):
            after = page[-1]
            sequence, retained = await asyncio.to_thread(views.references, page)
            if sequence < archived_through:
                # Views that are being made anew do not know all results yet.
                logger.info("engine.payloads_kept reason=views_behind")
                break
            if gone := [digest for digest in page if not (digest in retained or digest in live or digest in named)]:
                dropped += self._store.drop_payloads(gone)
        return dropped


# A table of functions has another event in each row, which no type can say.
_PAYLOADS_NAMED: dict[type, Callable[[Any], tuple[Digest, ...]]] = {
    ev.JobSubmitted: lambda event: tuple(block.blob.digest for block in event.blocks if block.inline),
    ev.TaskInputPacked: lambda event: (
        *((event.input.digest,) if event.inline else ()),
        *(one.block.digest for one in event.candidates if one.inline),
    ),
    ev.InspectionRowsGiven: lambda event: (event.input.digest,) if event.inline else (),
    ev.CommitmentRecorded: lambda event: (event.output.digest,) if event.inline else (),
    ev.BundleRegistered: lambda event: (event.bundle_digest,),
}


def payload_digests(event: ev.Event) -> tuple[Digest, ...]:
    """Digests of the inline payloads that an event names."""
    named = _PAYLOADS_NAMED.get(type(event))
    return named(event) if named is not None else ()
