"""The coordinator in virtual time: the real core, an engine that batches, a disk that forgets what was not synced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from fallow.errors import FallowError
from fallow.ids import Digest, SessionId, TaskId
from fallow.session import BlobReference
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import evolve as evolving
from fallow_coordinator.core import invariants, questions, row_plans
from fallow_coordinator.core import turn as turns
from fallow_coordinator.core.answers import Answer
from fallow_coordinator.core.events import Event, JobArchived
from fallow_coordinator.core.state import State
from fallow_coordinator.store.snapshots import decode_state, encode_state
from simulation.oracle import Oracle
from simulation.virtual_time import Faults, Schedule, SimulationError

Reply = Callable[[Answer | FallowError], None]
Rows = tuple[int, ...]
TICK_MS = 1_000


@dataclass
class Disk:
    """What survives: records, the oracle that watches them, the wall clock's error."""

    records: list[tuple[int, Event]] = field(default_factory=list[tuple[int, Event]])
    oracle: Oracle = field(default_factory=lambda: Oracle(ticks=True))

    def sync(self, records: list[tuple[int, Event]]) -> None:
        """Makes records durable, all at once."""
        self.records.extend(records)
        for at_ms, event in records:
            self.oracle.see(at_ms, event)


@dataclass
class Blobs:
    """The blob service's shelf: rows by digest. Survives everything."""

    rows: dict[Digest, Rows] = field(default_factory=dict[Digest, Rows])
    dropped: set[Digest] = field(default_factory=set[Digest])
    """Inputs that nobody needs any more, as the coordinator says."""

    def put(self, rows: Rows, nonce: bytes = b"") -> BlobReference:
        """Stores rows; the nonce makes equal rows differ."""
        digest = Digest(hashlib.sha256(nonce + repr(rows).encode()).digest())
        self.rows[digest] = rows
        return BlobReference(digest, 16 + 4 * len(rows))


@dataclass
class EngineBugs:
    """Bugs of the engine that a simulation can plant."""

    reply_before_commit: bool = False
    clock_goes_back: bool = False
    restart_is_silent: bool = False


class Link:
    """One stream between a worker and one life of the coordinator."""

    def __init__(self, life: CoordinatorLife, receive: Callable[[str, object], None], lost: Callable[[], None]) -> None:
        self.life = life
        self.open = True
        self.session_id: SessionId | None = None
        self.receive = receive
        self.lost = lost


class CoordinatorLife:
    """One process, from its start to its crash."""

    def __init__(
        self, schedule: Schedule, disk: Disk, blobs: Blobs, faults: Callable[[], Faults], bugs: EngineBugs, wall_ms: int
    ) -> None:
        self.schedule = schedule
        self.disk = disk
        self.blobs = blobs
        self.faults = faults
        self.bugs = bugs
        self.alive = True
        self.measuring: c.MeasuringRules | None = None
        """None: no device is challenged."""
        self.state = State()
        self.links: dict[SessionId, Link] = {}
        self.turns = 0
        self._queue: list[tuple[c.Command, Reply]] = []
        self._reads: list[Callable[[State], None]] = []
        self._in_flight: list[tuple[int, Event]] | None = None
        disk.oracle.new_life()
        for number, (at_ms, event) in enumerate(disk.records, 1):
            evolving.evolve(self.state, event, at_ms)
            if number == len(disk.records) * 3 // 5:
                # As a start from a snapshot and the journal's tail.
                self.state = decode_state(encode_state(self.state))
        invariants.check(self.state)
        last_ms = self.state.clock_ms
        self._base_ms = wall_ms if bugs.clock_goes_back else max(wall_ms, last_ms)
        self._started_ms = schedule.now_ms
        if not self.state.journal_id:
            self.submit(c.StartJournal("operator", "default"), _ignore)
        if not bugs.restart_is_silent:
            self.submit(c.Restart(self.state.epoch + 1, max(0, wall_ms - last_ms) if last_ms else 0), _ignore)
        schedule.after(TICK_MS, self._tick)

    @property
    def now_ms(self) -> int:
        """The journal's clock: goes with the monotonic clock, from where it stood."""
        return self._base_ms + self.schedule.now_ms - self._started_ms

    # ---------------------------------------------------------------------------------------------- engine

    def submit(self, command: c.Command, reply: Reply) -> None:
        """Queues a command; `reply` hears of it when its events are durable, or never."""
        if self.alive:
            self._queue.append((command, reply))
            self.schedule.after(0, self._pump)

    def read(self, question: Callable[[State], None]) -> None:
        """Asks the state when nothing in it waits for the disk."""
        if self.alive:
            self._reads.append(question)
            self.schedule.after(0, self._pump)

    def crash(self, *, synced: bool) -> None:
        """The process is gone; what was on its way to the disk may have arrived, whole."""
        self.alive = False
        if synced and self._in_flight:
            self.disk.sync(self._in_flight)
        for link in self.links.values():
            self._break(link)

    def _pump(self) -> None:
        if not self.alive or self._in_flight is not None:
            return
        for question in self._reads:
            question(self.state)
        self._reads.clear()
        if not self._queue:
            return
        batch, self._queue = self._queue, []
        records: list[tuple[int, Event]] = []
        effects: list[f.Effect] = []
        replies: list[tuple[Reply, Answer | FallowError]] = []
        for command, reply in batch:
            replies.append((reply, self._turn(command, records, effects)))
        self._in_flight = records
        if self.bugs.reply_before_commit:
            _answer(replies)
            replies = []
        self.schedule.after(
            self.schedule.between(1, 8) if records else 0, lambda: self._commit(records, effects, replies)
        )

    def _turn(
        self, command: c.Command, records: list[tuple[int, Event]], effects: list[f.Effect]
    ) -> Answer | FallowError:
        self.turns += 1
        now_ms = self.now_ms
        try:
            turn = turns.take_turn(self.state, command, now_ms, self.schedule.dice.randbytes(32))
        except FallowError as error:
            return error
        records.extend((now_ms, event) for event in turn.events)
        if turn.events:
            invariants.check(self.state)
        if isinstance(command, c.ArchiveJobs):
            self._check_archive(command, turn.events)
        for effect in turn.effects:
            if isinstance(effect, f.PackTask) and self._packs_inline(effect, records, effects):
                continue
            effects.append(effect)
        return turn.answer

    def _check_archive(self, command: c.ArchiveJobs, events: tuple[Event, ...]) -> None:
        for event in events:
            if isinstance(event, JobArchived):
                ended_at = self.disk.oracle.ended_at.get(event.job_id)
                if ended_at is None or ended_at > command.view_sequence:
                    raise SimulationError("a job left the state before the views had its end")

    def _packs_inline(self, effect: f.PackTask, records: list[tuple[int, Event]], effects: list[f.Effect]) -> bool:
        plan = row_plans.pack_plan(self.state, effect.task_id)
        if plan is None or not plan.inline or plan.pack_number != effect.pack_number:
            return False
        packed = self._pack(plan)
        self._turn(c.TaskPacked(effect.task_id, effect.pack_number, packed, inline=True), records, effects)
        return True

    def _commit(
        self,
        records: list[tuple[int, Event]],
        effects: list[f.Effect],
        replies: list[tuple[Reply, Answer | FallowError]],
    ) -> None:
        if not self.alive:
            return
        self.disk.sync(records)
        self._in_flight = None
        _answer(replies)
        for effect in effects:
            self._act(effect)
        self.schedule.after(0, self._pump)

    def _tick(self) -> None:
        if self.alive:
            self.submit(c.Tick(self.measuring), _ignore)
            if self.schedule.chance(0.2):
                self.submit(c.ArchiveJobs(self.disk.oracle.sequence - self.schedule.between(0, 50)), _ignore)
            self.schedule.after(TICK_MS, self._tick)

    # ---------------------------------------------------------------------------------------------- effects

    def _act(self, effect: f.Effect) -> None:
        match effect:
            case f.SendLease():
                lease = questions.lease_to_send(self.state, effect.lease_id)
                if lease is not None:
                    self.send(effect.session_id, "lease", lease)
            case f.SendUploadOffer():
                offer = questions.upload_to_offer(self.state, effect.lease_id)
                if offer is not None:
                    self.send(effect.session_id, "offer", offer)
            case f.SendSettled():
                if effect.lease_id not in self.disk.oracle.settled:
                    raise SimulationError("a worker was told of a settlement that is not durable")
                self.send(effect.session_id, "settled", effect)
            case f.SendRevoked():
                self.send(effect.session_id, "revoked", effect)
            case f.EndSession():
                link = self.links.pop(effect.session_id, None)
                if link is not None:
                    self._break(link)
            case f.PackTask():
                self._start_packing(effect.task_id, effect.pack_number)
            case f.DropInput():
                self.blobs.dropped.add(effect.input)
            case f.WakeWatchers() | f.WakeBundleWatchers() | f.EndParty():
                pass

    def send(self, session_id: SessionId, kind: str, message: object) -> None:
        """Sends a worker something, as the network pleases."""
        link = self.links.get(session_id)
        if link is not None:
            carry(self.schedule, self.faults(), lambda: link.receive(kind, message) if link.open else None)

    def _break(self, link: Link) -> None:
        if link.open:
            link.open = False
            self.schedule.after(self.schedule.between(10, 3_000), link.lost)

    def link_broken(self, link: Link) -> None:
        """The service notices after a while that a stream is gone."""
        if link.session_id is not None:
            session_id = link.session_id
            self.schedule.after(
                self.schedule.between(500, 10_000), lambda: self.submit(c.CloseSession(session_id, "lost"), _ignore)
            )

    # ---------------------------------------------------------------------------------------------- packing

    def _start_packing(self, task_id: TaskId, pack_number: int) -> None:
        plan = row_plans.pack_plan(self.state, task_id)
        if plan is None or plan.pack_number != pack_number:
            return
        faults = self.faults()
        command: c.Command = c.TaskPacked(task_id, pack_number, self._pack(plan), inline=False)
        if self.schedule.chance(faults.pack_trouble):
            late, late_ms = command, self.schedule.dice.choice((300, 2_000, 130_000))
            self.schedule.after(late_ms, lambda: self.submit(late, _ignore))
            if self.schedule.chance(0.3):
                return  # nobody says that it will be late
            command = c.PackFailed(task_id, pack_number, "the blob service is away", retryable=True)
        carry(
            self.schedule,
            Faults(duplication=faults.duplication, delay_ms_max=400),
            lambda: self.submit(command, _ignore),
        )

    def _pack(self, plan: row_plans.PackPlan) -> BlobReference:
        rows: list[int] = []
        for source, first, count in plan.spans:
            block = self.blobs.rows[plan.sources[source].digest]
            piece = block[first : first + count]
            if len(piece) != count:
                raise SimulationError("a packing asks for rows that its block does not have")
            rows.extend(piece)
        return self.blobs.put(tuple(rows), nonce=self.schedule.dice.randbytes(16))


def carry(schedule: Schedule, faults: Faults, deliver: Callable[[], None]) -> None:
    """Brings a message over the network, or not, or twice, sooner or later."""
    if schedule.chance(faults.loss):
        return
    copies = 2 if schedule.chance(faults.duplication) else 1
    for _ in range(copies):
        schedule.after(schedule.between(0, faults.delay_ms_max), deliver)


def _answer(replies: list[tuple[Reply, Answer | FallowError]]) -> None:
    for reply, answer in replies:
        reply(answer)


def _ignore(_: Answer | FallowError) -> None:
    return
