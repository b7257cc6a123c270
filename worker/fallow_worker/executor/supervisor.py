"""The engine children of one node: spawned, fed, watched, shared among leases, and none left behind.

A lease's block is cut into shards at canonical batches; shards wait in one queue, strictly in order, and go to children
that have the bundle loaded, or to new ones while cores are free. A child has one shard at work and one ahead, so it
never waits for us; leases may overlap for the same reason, and `run` may be called for as many as the caller likes, up
to `LEASES_AT_ONCE_MAX`. Everything happens in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fallow.bundle import InspectionReport
from fallow.challenge import MANIFEST, ChallengePlan, fault_of_plan
from fallow.comparison import fault_of_findings
from fallow.errors import FallowError
from fallow.ids import digest_of
from fallow.limits import LEASES_PER_WORKER_MAX, REPORT_BYTES_MAX
from fallow.row_block import RowBlock
from fallow.session import Cause, TaskKind
from fallow.wire.bundle import decode_manifest, report_to_message
from fallow.wire.schema import encode_schema
from fallow_worker.engine.protocol import (
    READY_SECONDS_MAX,
    ChildKind,
    Failed,
    Inspected,
    Ready,
    SpawnOptions,
    clipped_reason,
)
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.engine_child import (
    TASKS_AHEAD_MAX,
    ChildDeath,
    ChildDiedError,
    ChildTask,
    EngineChild,
    TaskAnswer,
)
from fallow_worker.executor.layout import SHARED_BYTES_MAX, Layout, MemoryCap, memory_cap, node_layout
from fallow_worker.executor.lease_run import LeaseRun, Seat, Shard
from fallow_worker.executor.loading import inspect_bundle, load_bundle, measure, referee
from fallow_worker.executor.poison import STILL_SHARE, Isolation, ran_out_of_memory
from fallow_worker.executor.shards import RowRange, cut, join, join_failures, join_usage, shard_ranges
from fallow_worker.executor.tunings import Tunings, identity_of
from fallow_worker.ports import Outcome, RefereeWork, Work
from fallow_worker.probes.cpu import cores_usable
from fallow_worker.probes.memory import memory_bytes_free, memory_bytes_total

log = logging.getLogger(__name__)

LEASES_AT_ONCE_MAX: Final = LEASES_PER_WORKER_MAX
SHARD_ATTEMPTS_MAX: Final = 2
"""Tries of a shard whose child died through no fault of the program."""
IDLE_CHILDREN_MAX: Final = 4
"""Loaded children kept warm beside those at work, for leases of other bundles."""
SPARE_AFTER_SECONDS: Final = 0.5
"""A spare child is spawned when nothing has been at work for so long."""
MEMORY_WATCH_SECONDS: Final = 0.1
MEMORY_SPARED_FACTOR: Final = 2
"""A challenge fills no more than one part in so many of what is free when it begins."""
ALONE_KINDS: Final = frozenset({TaskKind.INSPECT, TaskKind.CHALLENGE, TaskKind.CHECK, TaskKind.REFEREE})
"""Kinds that get a child of their own."""
MEASURING_KINDS: Final = frozenset({TaskKind.CHALLENGE, TaskKind.CHECK})
"""Kinds without a bundle."""
_Chore = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """What the owner may decide about the children of a node. Zeros: as the machine allows."""

    cores: int = 0
    memory_bytes: int = 0
    children: int = 0
    """Children at work at once."""
    niceness: int = 0
    allow_spinning: bool = False
    spares: int = 1
    """Children kept ready for the next bundle while nothing is at work; 0 or 1."""
    tuning_path: str = ""
    """A file that remembers how bundles run best here; empty: nothing is remembered for longer than this process."""
    still_share: float = STILL_SHARE
    """Part of a lease's time after which a batch that does not end is taken for stuck."""


class Supervisor:
    """Owns the engine children of this node. Use it inside one running event loop."""

    def __init__(self, settings: SupervisorSettings | None = None) -> None:
        self._settings = settings or SupervisorSettings()
        self.cores = self._settings.cores or cores_usable()
        """Cores that children may keep busy."""
        self.memory_bytes = self._settings.memory_bytes or memory_bytes_total()
        self._tunings = Tunings(Path(self._settings.tuning_path) if self._settings.tuning_path else None)
        self._queue: deque[Shard] = deque()
        self._leases: set[LeaseRun] = set()
        self._seats: list[Seat] = []
        self._spare: EngineChild | None = None
        self._spare_timer: asyncio.TimerHandle | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._dying: set[asyncio.Future[ChildDeath]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._ready: Ready | None = None
        self._stopped = False
        self.isolation_spawns = 0
        """Children spent so far on finding rows that a program does not survive."""

    # ------------------------------------------------------------------------------------------------------ callers

    async def probe(self, *, keep: bool = False) -> Ready:
        """What a child says of itself when it is locked down; spawned for this unless one was seen before.

        `keep`: the child stays as the spare for the first lease. Raises WorkFailed(platform) when none can be had.
        """
        if self._ready is None:
            cap = memory_cap(0)
            child = await self._ready_child(self._options(ChildKind.RUN, self._default_layout(), cap), cap)
            if keep and self._spare is None and not self._stopped:
                self._spare = child
            else:
                await child.close()
        assert self._ready is not None
        return self._ready

    def pids(self) -> list[int]:
        """The children's processes."""
        children = [seat.child for seat in self._seats] + [self._spare]
        return [child.pid for child in children if child is not None and not child.dead.done()]

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Runs one lease. Raises WorkFailed. Cancelling stops the work at once."""
        if len(self._leases) >= LEASES_AT_ONCE_MAX:
            raise WorkFailed(Cause.PLATFORM, f"more than {LEASES_AT_ONCE_MAX} leases at once")
        if work.kind is not TaskKind.CHALLENGE:
            self._give_way()
        elif self._leases:
            raise WorkFailed(Cause.OWNER_PREEMPT, "busy with other work: a challenge wants a machine of its own")
        self._stopped = False
        lease = self._admit(work, progress)
        self._leases.add(lease)
        self._queue.extend(lease.shards)
        try:
            self._dispatch()
            return await lease.outcome
        finally:
            self._leases.discard(lease)
            self._abandon(lease)
            self._dispatch()
            self._rest_if_idle()

    def _give_way(self) -> None:
        """Ends challenges under way: nobody's rows wait for a measurement."""
        for lease in list(self._leases):
            if lease.work.kind is TaskKind.CHALLENGE:
                self._fail(lease, Cause.OWNER_PREEMPT, "the challenge gave way to other work")

    async def release(self) -> None:
        """Ends every child to give memory back; leases at work fail as preempted by the owner."""
        self._stopped = True
        for lease in list(self._leases):
            self._fail(lease, Cause.OWNER_PREEMPT, "the engine children were stopped")
        self._cancel_timers()
        self._queue.clear()
        for seat in list(self._seats):
            self._close_seat(seat)
        if self._spare is not None:
            self._kill(self._spare)
            self._spare = None
        for chore in list(self._chores):
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await asyncio.gather(*self._dying)

    # -------------------------------------------------------------------------------------------------- admission

    def _admit(self, work: Work, progress: Callable[[int], None]) -> LeaseRun:
        if work.kind in MEASURING_KINDS:
            return self._admit_measurement(work, progress)
        try:
            manifest = decode_manifest(work.bundle.manifest)
            block = RowBlock.parse(work.input_block) if work.input_block else None
        except FallowError as error:
            raise WorkFailed(Cause.PLATFORM, clipped_reason(f"the lease cannot be read: {error}")) from None
        cap = memory_cap(work.bundle.memory_bytes_peak, program_bytes=sum(file.length_bytes for file in manifest.files))
        layout = node_layout(
            cores=self.cores, memory_bytes=self.memory_bytes, cap=cap, children_wanted=self._settings.children
        )
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        lease = LeaseRun(work, manifest, block, layout, cap, progress, outcome)
        if work.kind is TaskKind.INSPECT or (work.kind is TaskKind.REFEREE and block and work.referee):
            lease.shards.append(Shard(lease, RowRange(0, 0)))
            return lease
        if work.kind is not TaskKind.MAP:
            raise WorkFailed(Cause.PLATFORM, f"this worker has no engine for tasks of kind {work.kind.value}")
        if block is None or len(block) != work.rows or (work.slots and len(work.slots) != work.rows):
            raise WorkFailed(Cause.PLATFORM, f"the lease's block is not the {work.rows} rows that it announces")
        ranges = shard_ranges(
            work.rows,
            batch_rows=max(1, work.bundle.canonical_batch_rows),
            seats=layout.children,
        )
        lease.shards.extend(Shard(lease, rows) for rows in ranges)
        return lease

    def _admit_measurement(self, work: Work, progress: Callable[[int], None]) -> LeaseRun:
        """A challenge or a check: the plan is all that there is. Raises WorkFailed."""
        plan = work.challenge
        fault = "none" if plan is None else fault_of_plan(plan)
        if plan is None or fault:
            raise WorkFailed(Cause.PLATFORM, f"the lease has no plan that can be carried out: {fault}")
        fills = plan.fill_bytes if work.kind is TaskKind.CHALLENGE else 0
        if MEMORY_SPARED_FACTOR * fills > memory_bytes_free():
            raise WorkFailed(Cause.OWNER_PREEMPT, f"a fill of {fills} bytes would take too much of what is free now")
        cap = memory_cap(fills)
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        lease = LeaseRun(work, MANIFEST, None, self._default_layout(), cap, progress, outcome)
        lease.shards.append(Shard(lease, RowRange(0, 0)))
        return lease

    def _default_layout(self) -> Layout:
        return node_layout(
            cores=self.cores,
            memory_bytes=self.memory_bytes,
            cap=memory_cap(0),
            children_wanted=self._settings.children,
        )

    def _options(self, kind: ChildKind, layout: Layout, cap: MemoryCap) -> SpawnOptions:
        return SpawnOptions(
            kind=kind,
            threads=layout.threads,
            data_bytes_max=cap.data_bytes,
            allow_spinning=self._settings.allow_spinning,
            niceness=self._settings.niceness,
        )

    # --------------------------------------------------------------------------------------------------- dispatching

    def _dispatch(self) -> None:
        """Gives waiting shards to children, in order, until one must wait."""
        while self._queue and self._place(self._queue[0]):
            self._queue.popleft()
        if self._seats and self._watch is None and any(seat.given for seat in self._seats):
            self._watch = asyncio.get_running_loop().call_later(MEMORY_WATCH_SECONDS, self._watch_memory)

    def _place(self, shard: Shard) -> bool:
        lease = shard.lease
        if lease.over:
            return True
        if lease.work.kind in ALONE_KINDS or shard.suspect:
            return self._free_cores() >= min(lease.layout.threads, self.cores) and self._open_seat(shard)
        mine = [
            seat
            for seat in self._seats
            if not seat.alone
            and seat.bundle_digest == lease.work.bundle.bundle_digest
            and len(seat.given) < TASKS_AHEAD_MAX
            and (seat.child is None or seat.child.alive)
        ]
        best = min(mine, key=lambda seat: (len(seat.given), seat.loading), default=None)
        needs_core = best is None or best.given
        if needs_core and self._free_cores() >= lease.layout.threads and self._open_seat(shard):
            return True
        if best is None or (not best.given and self._free_cores() < best.threads):
            return False
        self._give(best, shard)
        return True

    def _free_cores(self) -> int:
        return self.cores - sum(seat.threads for seat in self._seats if seat.given)

    def _open_seat(self, shard: Shard) -> bool:
        """A new child for the shard's bundle, the oldest idle ones making room for it."""
        lease = shard.lease
        idle = sorted((seat for seat in self._seats if not seat.given), key=lambda seat: seat.idle_since)
        needed = lease.cap.resident_bytes - SHARED_BYTES_MAX
        while idle and (len(idle) > IDLE_CHILDREN_MAX or memory_bytes_free() < needed):
            self._close_seat(idle.pop(0))
        seat = Seat(None, lease.work.bundle.bundle_digest, lease.layout.threads, given=[shard])
        seat.alone = shard.suspect or lease.work.kind in ALONE_KINDS
        self._seats.append(seat)
        if shard.suspect:
            self._chore(self._isolate(seat, shard))
        elif lease.work.challenge is not None:
            self._chore(self._measure(seat, lease, lease.work.challenge))
        elif lease.work.referee is not None:
            self._chore(self._referee(seat, lease, lease.work.referee))
        else:
            inspects = lease.work.kind is TaskKind.INSPECT
            self._chore(self._inspect(seat, shard) if inspects else self._bring_up(seat, lease))
        return True

    def _give(self, seat: Seat, shard: Shard) -> None:
        seat.given.append(shard)
        if not seat.loading:
            self._submit(seat, shard)

    def _submit(self, seat: Seat, shard: Shard) -> None:
        lease, child = shard.lease, seat.child
        assert child is not None and lease.block is not None
        work = lease.work
        shard.attempts += 1
        task = ChildTask(
            task=f"{work.lease_id}/{shard.rows.start}",
            block=cut(lease.block, shard.rows, work.nonce),
            rows=len(shard.rows),
            nonce=work.nonce,
            output_bytes_max=work.output_bytes_max,
            slots=work.slots[shard.rows.start : shard.rows.end],
        )

        def progress(rows_done: int) -> None:
            shard.rows_done = rows_done
            self._report(lease)
            self._expect_a_batch(shard, child)

        def begin() -> None:
            self._begin(lease)
            if lease.over:  # cancelled while it stood next in line
                child.kill(Cause.OWNER_PREEMPT, "its lease was cancelled")
            else:
                self._expect_a_batch(shard, child)

        try:
            answer = child.submit(task, progress, begin)
        except OSError as error:
            child.kill(Cause.PLATFORM, clipped_reason(f"no memory for the rows: {error}"))
            self._chore(self._after_death(seat, child))
            return
        lease.execution_class = lease.execution_class or child.execution_class
        answer.add_done_callback(lambda done: self._on_answer(seat, shard, done))

    def _expect_a_batch(self, shard: Shard, child: EngineChild) -> None:
        """Gives a shard's next batch its time: a row that hangs is found while the others can be redone."""
        shard.settle()
        if len(shard.lease.shards) == 1 and len(shard.rows) == 1:
            return  # a lone row may take all there is
        seconds = shard.lease.work.runtime_max_ms / 1000 * self._settings.still_share
        reason = f"no batch ended within {seconds:.3g} s"
        shard.still = asyncio.get_running_loop().call_later(seconds, child.kill, Cause.PROGRAM, reason)

    # ------------------------------------------------------------------------------------------------------- answers

    def _on_answer(self, seat: Seat, shard: Shard, answer: asyncio.Future[TaskAnswer | Failed]) -> None:
        error = answer.exception()
        shard.settle()
        if isinstance(error, ChildDiedError):
            self._drop_seat(seat)
            self._retry_or_fail(shard, error)
        else:
            assert error is None, error
            seat.given.remove(shard)
            result = answer.result()
            if not isinstance(result, Failed):
                self._accept(seat, shard, result)
            elif ran_out_of_memory(result):
                self._suspect(shard, result.message)
            else:
                self._fail(shard.lease, result.cause, _failed_text(result))
        self._dispatch()
        self._rest_if_idle()

    def _accept(self, seat: Seat, shard: Shard, answer: TaskAnswer) -> None:
        lease = shard.lease
        if lease.over:
            return
        try:
            block = RowBlock.parse(answer.output)
        except FallowError as error:
            self._distrust(seat, lease, f"its output is no row block: {error}")
            return
        schema_digest = digest_of(encode_schema(lease.manifest.output_schema))
        features = len(lease.manifest.output_schema.size_features)
        if block.schema_digest != schema_digest or len(block) != len(shard.rows) or block.feature_count != features:
            self._distrust(seat, lease, "its output is not of the declared schema")
            return
        if answer.done.tuned is not None and seat.child is not None and self._ready is not None:
            options = seat.child.options
            self._tunings.keep(seat.bundle_digest, identity_of(self._ready, options), options, answer.done.tuned)
        shard.output, shard.failures, shard.usage = answer.output, answer.done.failures, answer.done.usage
        lease.rows_survived += len(shard.rows)
        if seat.child is not None:
            lease.memory_bytes_peak = max(lease.memory_bytes_peak, seat.child.memory_bytes_peak)
        self._done(shard)

    def _done(self, shard: Shard) -> None:
        lease = shard.lease
        shard.done = True
        shard.rows_done = len(shard.rows)
        self._report(lease)
        if not lease.over and all(other.done for other in lease.shards):
            self._finish(lease)

    def _finish(self, lease: LeaseRun) -> None:
        work = lease.work
        loop = asyncio.get_running_loop()
        try:
            output = join([shard.output for shard in lease.shards], work.nonce)
        except FallowError as error:
            self._fail(lease, Cause.PROGRAM, clipped_reason(str(error)))
            return
        if len(output) > work.output_bytes_max:
            self._fail(
                lease,
                Cause.PROGRAM,
                f"the output takes {len(output)} bytes, more than the {work.output_bytes_max} allowed",
            )
            return
        usage = join_usage(
            [shard.usage for shard in lease.shards], wall_microseconds=int((loop.time() - lease.started) * 1e6)
        )
        self._end(lease)
        if not lease.outcome.done():
            lease.outcome.set_result(
                Outcome(
                    output_block=output,
                    failures=join_failures([(shard.rows.start, shard.failures) for shard in lease.shards]),
                    usage=usage,
                    execution_class=lease.execution_class,
                )
            )

    def _retry_or_fail(self, shard: Shard, error: ChildDiedError) -> None:
        lease, death = shard.lease, error.death
        if lease.over:
            return
        if error.at_work and death.cause is Cause.PROGRAM and not death.contract_broken and not self._stopped:
            self._suspect(shard, death.reason)
            return
        if error.at_work and (death.cause is Cause.PROGRAM or shard.attempts >= SHARD_ATTEMPTS_MAX):
            self._fail(lease, death.cause, death.reason)
            return
        if not error.at_work:
            shard.attempts -= 1
        log.warning("engine.shard_again lease=%s row=%s reason=%s", lease.work.lease_id, shard.rows.start, death.reason)
        shard.rows_done = 0
        self._queue.appendleft(shard)

    def _suspect(self, shard: Shard, reason: str) -> None:
        """The program did not survive this shard: which rows are at fault is found in fresh children."""
        if shard.lease.over:
            return
        log.warning("engine.suspect lease=%s row=%s reason=%s", shard.lease.work.lease_id, shard.rows.start, reason)
        shard.suspect = True
        shard.rows_done = 0
        self._queue.appendleft(shard)

    async def _isolate(self, seat: Seat, shard: Shard) -> None:
        lease = shard.lease

        def rows_done(count: int) -> None:
            shard.rows_done = count
            self._report(lease)

        now = asyncio.get_running_loop().time()
        isolation = Isolation(
            shard,
            seat,
            spawn=lambda: self._spawn(self._options(ChildKind.RUN, lease.layout, lease.cap), lease.cap),
            seconds_left=max(0.0, lease.started + lease.work.runtime_max_ms / 1000 - now),
            on_rows=rows_done,
        )
        try:
            await isolation.run()
        except WorkFailed as failed:
            self._fail(lease, failed.cause, failed.reason)
        except OSError as error:
            self._fail(lease, Cause.PLATFORM, f"no engine child can be had: {error}")
        else:
            if not lease.over:
                self._done(shard)
        finally:
            self.isolation_spawns += isolation.spawns
            self._drop_seat(seat)
            self._dispatch()
            self._rest_if_idle()

    def _distrust(self, seat: Seat, lease: LeaseRun, why: str) -> None:
        """The program may have taken its child over: nothing that it says counts any more."""
        if seat.child is not None:
            seat.child.kill(Cause.PROGRAM, why, contract_broken=True)
        self._fail(lease, Cause.PROGRAM, clipped_reason(f"the engine child broke its contract: {why}"))

    # -------------------------------------------------------------------------------------------------------- leases

    def _begin(self, lease: LeaseRun) -> None:
        if lease.started or lease.over:
            return
        loop = asyncio.get_running_loop()
        lease.started = loop.time()
        lease.timer = loop.call_later(
            lease.work.runtime_max_ms / 1000,
            self._fail,
            lease,
            Cause.PROGRAM,
            f"the program ran longer than the {lease.work.runtime_max_ms} ms allowed",
        )

    def _report(self, lease: LeaseRun) -> None:
        if not lease.over:
            lease.progress(sum(shard.rows_done for shard in lease.shards))

    def _fail(self, lease: LeaseRun, cause: Cause, reason: str) -> None:
        if not lease.outcome.done():
            lease.outcome.set_exception(WorkFailed(cause, clipped_reason(reason)))
        self._abandon(lease)

    def _end(self, lease: LeaseRun) -> None:
        lease.over = True
        for shard in lease.shards:
            shard.settle()
        if lease.timer is not None:
            lease.timer.cancel()
            lease.timer = None

    def _abandon(self, lease: LeaseRun) -> None:
        """Takes a lease's waiting shards away and kills the children that work on one of them."""
        if lease.over:
            return
        self._end(lease)
        self._queue = deque(shard for shard in self._queue if shard.lease is not lease)
        for seat in list(self._seats):
            if not seat.given or seat.given[0].lease is not lease:
                continue
            if seat.child is not None and not seat.loading:
                seat.child.kill(Cause.OWNER_PREEMPT, "its lease was cancelled")
            elif all(shard.lease is lease for shard in seat.given):
                # Nobody else waits for this load.
                self._close_seat(seat)

    # ------------------------------------------------------------------------------------------------------ children

    async def _bring_up(self, seat: Seat, lease: LeaseRun) -> None:
        """Spawns a child or takes the spare, loads the bundle, and sends what waits for it."""
        if seat not in self._seats:
            return
        try:
            options = self._options(ChildKind.RUN, lease.layout, lease.cap)
            child = self._take_spare(options) or self._spawn(options, lease.cap)
            child.cap = lease.cap
            seat.child = child
            self._ready, loaded = await load_bundle(child, lease.work.bundle, lease.manifest, self._tunings)
        except ChildDiedError as error:
            self._seat_failed(seat, error.death.cause, error.death.reason)
        except WorkFailed as failed:
            self._seat_failed(seat, failed.cause, failed.reason)
        except OSError as error:
            self._seat_failed(seat, Cause.PLATFORM, f"no engine child can be had: {error}")
        else:
            if isinstance(loaded, Failed):
                self._seat_failed(seat, loaded.cause, _failed_text(loaded))
                return
            log.debug("engine.loaded pid=%s ms=%s memory=%s", child.pid, loaded.load_ms, loaded.memory_bytes)
            seat.loading = False
            child.dead.add_done_callback(lambda _: self._drop_seat(seat))
            seat.given = [shard for shard in seat.given if not shard.lease.over]
            for shard in list(seat.given):
                self._submit(seat, shard)
            self._dispatch()

    async def _inspect(self, seat: Seat, shard: Shard) -> None:
        lease = shard.lease
        if seat not in self._seats:
            return
        with self._ending(seat, lease):
            child = self._spawn(self._options(ChildKind.INSPECT, lease.layout, lease.cap), lease.cap)
            seat.child = child
            self._begin(lease)
            answer = await inspect_bundle(child, lease.work, lease.manifest, lease.progress)
            if isinstance(answer, Failed):
                self._fail(lease, answer.cause, _failed_text(answer))
            else:
                self._inspected(lease, answer)

    async def _measure(self, seat: Seat, lease: LeaseRun, plan: ChallengePlan) -> None:
        """A challenge or a check."""
        if seat not in self._seats:
            return
        with self._ending(seat, lease):
            options = self._options(ChildKind.RUN, lease.layout, lease.cap)
            child = self._take_spare(options) or self._spawn(options, lease.cap)
            child.cap = lease.cap
            seat.child = child
            self._begin(lease)
            outcome = await measure(child, lease.work, plan, threads=self.cores, progress=lease.progress)
            self._end(lease)
            if not lease.outcome.done():
                lease.outcome.set_result(outcome)

    async def _referee(self, seat: Seat, lease: LeaseRun, task: RefereeWork) -> None:
        """Others' rows beside our own, decoded in a child that strangers' bytes may take over and nobody uses again."""
        if seat not in self._seats:
            return
        with self._ending(seat, lease):
            child = self._spawn(self._options(ChildKind.INSPECT, lease.layout, lease.cap), lease.cap)
            seat.child = child
            self._begin(lease)
            answer = await referee(child, lease.work, task, lease.manifest, lease.progress)
            if isinstance(answer, Failed):
                self._fail(lease, answer.cause, _failed_text(answer))
                return
            wrong = fault_of_findings(answer.rows, rows=lease.work.rows, candidates=len(task.candidates))
            if wrong:
                self._fail(lease, Cause.PROGRAM, f"the comparison is not what was asked for: {wrong}")
                return
            usage = join_usage([answer.usage], wall_microseconds=answer.usage.wall_microseconds)
            self._end(lease)
            if not lease.outcome.done():
                lease.outcome.set_result(
                    Outcome(task.own_block, (), usage, task.own_class, findings=answer.rows, spread=answer.spread)
                )

    @contextlib.contextmanager
    def _ending(self, seat: Seat, lease: LeaseRun) -> Generator[None]:
        """For work that has a child of its own: what goes wrong fails the lease, and the child ends either way."""
        try:
            yield
        except ChildDiedError as error:
            self._fail(lease, error.death.cause, error.death.reason)
        except WorkFailed as failed:
            self._fail(lease, failed.cause, failed.reason)
        except OSError as error:
            self._fail(lease, Cause.PLATFORM, f"no engine child can be had: {error}")
        finally:
            self._close_seat(seat)
            self._dispatch()
            self._rest_if_idle()

    def _inspected(self, lease: LeaseRun, answer: Inspected) -> None:
        report: InspectionReport = answer.report
        if report.bundle_digest != lease.work.bundle.bundle_digest:
            self._fail(lease, Cause.PROGRAM, "the inspection answered for another bundle")
            return
        try:
            size = report_to_message(report).ByteSize()
        except ValueError:
            self._fail(lease, Cause.PROGRAM, "the inspection's report has numbers out of range")
            return
        if size > REPORT_BYTES_MAX:
            self._fail(lease, Cause.PROGRAM, f"the inspection's report has more than {REPORT_BYTES_MAX} bytes")
            return
        usage = join_usage([answer.usage], wall_microseconds=answer.usage.wall_microseconds)
        self._end(lease)
        if not lease.outcome.done():
            lease.outcome.set_result(Outcome(b"", (), usage, report.execution_class, report))

    def _spawn(self, options: SpawnOptions, cap: MemoryCap) -> EngineChild:
        return EngineChild(options, cap)

    async def _ready_child(self, options: SpawnOptions, cap: MemoryCap) -> EngineChild:
        try:
            child = self._spawn(options, cap)
            self._ready = await child.ready(timeout_s=READY_SECONDS_MAX)
        except ChildDiedError as error:
            raise WorkFailed(error.death.cause, error.death.reason) from None
        except OSError as error:
            raise WorkFailed(Cause.PLATFORM, clipped_reason(f"no engine child can be spawned: {error}")) from None
        return child

    def _take_spare(self, options: SpawnOptions) -> EngineChild | None:
        spare = self._spare
        if spare is None or not spare.alive or spare.options != options:
            return None
        self._spare = None
        return spare

    def _seat_failed(self, seat: Seat, cause: Cause, reason: str) -> None:
        """The child of a seat never got to work: its shards try again elsewhere, or fail with it."""
        self._close_seat(seat)
        given, seat.given = seat.given, []
        for shard in reversed(given):
            if shard.lease.over:
                continue
            shard.attempts += 1
            if cause is Cause.PROGRAM or shard.attempts >= SHARD_ATTEMPTS_MAX or self._stopped:
                self._fail(shard.lease, cause, reason)
            else:
                self._queue.appendleft(shard)
        self._dispatch()

    async def _after_death(self, seat: Seat, child: EngineChild) -> None:
        death = await asyncio.shield(child.dead)
        self._seat_failed(seat, death.cause, death.reason)

    def _drop_seat(self, seat: Seat) -> None:
        if seat in self._seats:
            self._seats.remove(seat)

    def _close_seat(self, seat: Seat) -> None:
        self._drop_seat(seat)
        if seat.child is not None:
            self._kill(seat.child)

    def _kill(self, child: EngineChild) -> None:
        child.kill(Cause.OWNER_PREEMPT, "the engine child was stopped")
        if not child.dead.done():
            self._dying.add(child.dead)
            child.dead.add_done_callback(self._dying.discard)

    # --------------------------------------------------------------------------------------------------- housekeeping

    def _watch_memory(self) -> None:
        self._watch = None
        busy = [seat for seat in self._seats if seat.given]
        for seat in busy:
            if seat.child is not None:
                seat.child.watch_memory()
        if busy:
            self._watch = asyncio.get_running_loop().call_later(MEMORY_WATCH_SECONDS, self._watch_memory)

    def _rest_if_idle(self) -> None:
        """Spawns a spare a moment after the last lease, so that the next bundle or a crash costs no start."""
        idle = not self._leases and not self._queue
        if not idle or self._stopped or not self._settings.spares or self._spare_timer is not None:
            return
        loop = asyncio.get_running_loop()
        self._spare_timer = loop.call_later(SPARE_AFTER_SECONDS, self._spawn_spare)

    def _spawn_spare(self) -> None:
        self._spare_timer = None
        if self._spare is not None and not self._spare.alive:
            self._spare = None
        if self._leases or self._stopped or self._spare is not None:
            return
        cap = memory_cap(0)
        try:
            self._spare = self._spawn(self._options(ChildKind.RUN, self._default_layout(), cap), cap)
        except OSError as error:
            log.warning("engine.no_spare reason=%s", error)

    def _cancel_timers(self) -> None:
        for timer in (self._watch, self._spare_timer):
            if timer is not None:
                timer.cancel()
        self._watch = self._spare_timer = None

    def _chore(self, coroutine: _Chore) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._chores.add(task)
        task.add_done_callback(self._chore_done)

    def _chore_done(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("engine.chore_failed", exc_info=error)


def _failed_text(failed: Failed) -> str:
    error = FallowError(failed.reason, failed.message, field=failed.field, limit=failed.limit, hint=failed.hint)
    return clipped_reason(str(error))
