"""One engine child driven from an event loop: what is sent, what comes back, and why it died."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar, assert_never

from fallow.ids import Digest
from fallow.limits import BLOCK_BYTES_MAX
from fallow.session import Cause
from fallow_worker.engine.frames import FrameError, FrameReader, encode_frame
from fallow_worker.engine.protocol import (
    PLACEMENT_ALIGNMENT_BYTES,
    Answered,
    Challenge,
    Check,
    Checked,
    Done,
    Failed,
    FromChild,
    Inspect,
    Inspected,
    Load,
    Loaded,
    Placement,
    Progress,
    Ready,
    Referee,
    Refereed,
    Run,
    SpawnOptions,
    ToChild,
    cause_of_exit,
    clipped_reason,
)
from fallow_worker.engine.spawn import spawn_child
from fallow_worker.executor.layout import MemoryCap
from fallow_worker.executor.resident import resident_bytes

_T = TypeVar("_T")
_Answer = Loaded | Inspected | Answered | Checked | Refereed | Failed
"""What a child says to a message that is no task."""

TASKS_AHEAD_MAX: Final = 2
"""Tasks sent and not yet answered: one at work, and the next so that the child never waits for us."""
FRAMES_BURST_MAX: Final = 64
FRAMES_PER_SECOND_MAX: Final = 32
"""A child that talks more than this was taken over by its program: it would keep us busy."""
EXIT_SECONDS_MAX: Final = 2.0
"""Between the end of the control socket and the end of the process."""
_RECEIVE_BYTES: Final = 65536
_INPUT_AREA_BYTES: Final = 2 * BLOCK_BYTES_MAX
_GIVE_BACK_BYTES: Final = 16 * 1024 * 1024
"""Input memory above this is freed when the child has nothing to do."""


@dataclass(frozen=True, slots=True)
class ChildDeath:
    """Why a child is no more."""

    cause: Cause
    reason: str
    by_us: bool
    """The supervisor killed it, for that cause."""
    contract_broken: bool = False
    """It said what no child of ours says: its program may have taken it over."""


class ChildDiedError(Exception):
    """A child died before it answered."""

    def __init__(self, death: ChildDeath, *, at_work: bool) -> None:
        super().__init__(death.reason)
        self.death = death
        self.at_work = at_work
        """It was working on just this task; otherwise the task only stood next in line and is innocent."""


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What a child made of a task: the output is a copy, to be parsed and believed no further than that."""

    done: Done
    output: bytes


@dataclass(slots=True)
class _Sent:
    task: str
    rows: int
    area: int
    output_bytes_max: int
    answer: asyncio.Future[TaskAnswer | Failed]
    progress: Callable[[int], None]
    on_begin: Callable[[], None]
    begun: bool = False


@dataclass(slots=True)
class _Verdict:
    cause: Cause
    reason: str
    contract_broken: bool = False


@dataclass(frozen=True, slots=True)
class ChildTask:
    """One block for a child."""

    task: str
    block: bytes
    rows: int
    nonce: bytes
    output_bytes_max: int
    slots: tuple[int, ...] = ()


@dataclass(slots=True)
class _Frames:
    """Messages of a child so far, and how many it may have sent."""

    started: float
    count: int = 0
    earned: int = FRAMES_BURST_MAX
    """A burst, and what messages of ours may be answered with."""


class EngineChild:
    """A child process with its memory, from spawning to reaping. Used from one event loop."""

    def __init__(self, options: SpawnOptions, cap: MemoryCap) -> None:
        """Spawns. Raises OSError when the machine cannot."""
        self._loop = asyncio.get_running_loop()
        self.options = options
        self.cap = cap
        self.bundle_digest: Digest | None = None
        """The bundle that it was given; a child never runs a second one."""
        self.canonical_batch_rows = 0
        self.execution_class = ""
        self.idle_since = self._loop.time()
        self.memory_bytes_peak = 0
        self._spawned = spawn_child(options)
        self._spawned.control.setblocking(False)
        self._reader = FrameReader()
        self._outgoing = bytearray()
        self._sent: deque[_Sent] = deque()
        self._verdict: _Verdict | None = None
        self._foreign = False
        self._input_bytes = 0
        self._frames = _Frames(started=self._loop.time())
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._answer: asyncio.Future[_Answer] | None = None
        self._answer_progress: Callable[[int], None] = _nothing
        self.dead: asyncio.Future[ChildDeath] = self._loop.create_future()
        """Done when the process is reaped and its memory closed."""
        self._loop.add_reader(self._spawned.control, self._on_readable)
        self._watch_exit()

    @property
    def pid(self) -> int:
        """The process."""
        return self._spawned.process.pid

    @property
    def alive(self) -> bool:
        """Neither dead nor condemned."""
        return self._verdict is None and not self.dead.done()

    @property
    def tasks(self) -> int:
        """Tasks sent and not yet answered."""
        return len(self._sent)

    # ------------------------------------------------------------------------------------------------ conversation

    async def ready(self, *, timeout_s: float) -> Ready:
        """Waits until it is locked down. Raises ChildDiedError."""
        return await self._within(self._ready, timeout_s, Cause.PLATFORM, "the engine child did not get ready")

    async def load(self, message: Load, *, timeout_s: float) -> Loaded | Failed:
        """Gives it its bundle, whose files stand in the input memory (`place`). Raises ChildDiedError."""
        assert self.bundle_digest is None
        self.bundle_digest = message.bundle_digest
        answer = await self._ask(message, _nothing, timeout_s, "loading the program")
        match answer:
            case Loaded():
                self.canonical_batch_rows = answer.canonical_batch_rows
                self.execution_class = answer.execution_class
                self._give_back()
                return answer
            case Failed():
                return answer
            case Inspected() | Answered() | Checked() | Refereed():
                raise self._broke(f"{type(answer).__name__} where a load was asked for")
            case _:
                assert_never(answer)

    async def inspect(
        self, message: Inspect, progress: Callable[[int], None], *, timeout_s: float
    ) -> Inspected | Failed:
        """Lets it take a bundle apart. Raises ChildDiedError."""
        self.bundle_digest = message.bundle_digest
        answer = await self._ask(message, progress, timeout_s, "the inspection")
        if isinstance(answer, Loaded | Answered | Checked | Refereed):
            raise self._broke(f"{type(answer).__name__} where an inspection was asked for")
        return answer

    async def measure(
        self, message: Challenge | Check, progress: Callable[[int], None], *, timeout_s: float
    ) -> tuple[Answered | Checked | Failed, bytes]:
        """Lets it work out a challenge, whose block is given too, or check an answer. Raises ChildDiedError."""
        answer = await self._ask(message, progress, timeout_s, "the measurement")
        match answer, message:
            case (Failed(), _) | (Checked(), Check()):
                assert isinstance(answer, Failed | Checked)
                return answer, b""
            case Answered(), Challenge():
                if not 0 < answer.output_bytes <= BLOCK_BYTES_MAX:
                    raise self._broke(f"an answer of {answer.output_bytes} bytes")
                return answer, self._spawned.output.read(0, answer.output_bytes)
            case _:
                raise self._broke(f"{type(answer).__name__} where a measurement was asked for")

    async def referee(
        self, message: Referee, progress: Callable[[int], None], *, timeout_s: float
    ) -> Refereed | Failed:
        """Lets it put others' rows beside ours. Raises ChildDiedError."""
        answer = await self._ask(message, progress, timeout_s, "the comparison")
        if not isinstance(answer, Refereed | Failed):
            raise self._broke(f"{type(answer).__name__} where a comparison was asked for")
        return answer

    def place(self, offset_bytes: int, data: bytes) -> Placement:
        """Puts `data` into the input memory, for `Load` or `Inspect`. Raises OSError when memory runs out."""
        self._spawned.input.write(offset_bytes, data)
        self._input_bytes = max(self._input_bytes, offset_bytes + len(data))
        return Placement(offset_bytes, len(data))

    def submit(
        self, task: ChildTask, progress: Callable[[int], None], on_begin: Callable[[], None]
    ) -> asyncio.Future[TaskAnswer | Failed]:
        """Sends a task, to be answered by Done with a copy of its output, by Failed, or by ChildDiedError.

        `on_begin` is called when the child can have begun with it. Raises OSError when memory runs out.
        """
        assert len(self._sent) < TASKS_AHEAD_MAX and self.alive
        area = 1 - self._sent[-1].area if self._sent else 0
        start = area * _INPUT_AREA_BYTES
        block = self.place(start, task.block)
        slots: Placement | None = None
        if task.slots:
            table = b"".join(slot.to_bytes(4, "little") for slot in task.slots)
            slots = self.place(start + aligned(len(task.block)), table)
        room = min(task.output_bytes_max, BLOCK_BYTES_MAX)
        answer: asyncio.Future[TaskAnswer | Failed] = self._loop.create_future()
        self._sent.append(_Sent(task.task, task.rows, area, room, answer, progress, on_begin))
        output = Placement(area * BLOCK_BYTES_MAX, room)
        self._send(Run(task=task.task, input=block, output=output, nonce=task.nonce, slots=slots))
        self._begin_next()
        return answer

    def task_at_work(self) -> str | None:
        """The task that it is working on now."""
        return self._sent[0].task if self._sent else None

    def kill(self, cause: Cause, reason: str, *, contract_broken: bool = False) -> None:
        """Ends it at once; `dead` and every answer still due tell that cause. The first verdict stands."""
        if self.dead.done():
            return
        if self._verdict is None:
            self._verdict = _Verdict(cause, reason, contract_broken)
        self._spawned.kill()

    async def close(self) -> None:
        """Kills and reaps it."""
        self.kill(Cause.OWNER_PREEMPT, "the engine child was stopped")
        await asyncio.shield(self.dead)

    def watch_memory(self) -> None:
        """Looks at its resident size and kills it above the cap."""
        if not self.alive:
            return
        resident = resident_bytes(self.pid)
        self.memory_bytes_peak = max(self.memory_bytes_peak, resident)
        if resident > self.cap.resident_bytes:
            limit = self.cap.resident_bytes // 2**20
            self.kill(
                Cause.PROGRAM, f"the program took {resident // 2**20} MiB of memory, more than the {limit} allowed"
            )

    # --------------------------------------------------------------------------------------------------- receiving

    def _on_readable(self) -> None:
        try:
            data = self._spawned.control.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._spawned.control)
            self._loop.call_later(EXIT_SECONDS_MAX, self.kill, Cause.PROGRAM, "the engine child fell silent")
            return
        try:
            for message in self._reader.feed(data):
                self._count_frame()
                self._on_message(message)
        except FrameError as error:
            self.kill(Cause.PROGRAM, f"the engine child broke its contract: {error}", contract_broken=True)

    def _on_message(self, message: FromChild) -> None:
        match message:
            case Ready():
                if self._ready.done():
                    raise FrameError("ready twice")
                self._ready.set_result(message)
            case Loaded() | Inspected() | Answered() | Checked() | Refereed():
                self._settle(message)
            case Progress():
                self._on_progress(message)
            case Failed():
                if message.task:
                    self._answered(message.task).set_result(message)
                    self._begin_next()
                else:
                    self._settle(message)
            case Done():
                self._on_done(message)
            case _:
                assert_never(message)

    def _on_progress(self, message: Progress) -> None:
        if self._answer is not None:
            self._answer_progress(message.rows_done)
        elif self._sent and message.task == self._sent[0].task and 0 <= message.rows_done <= self._sent[0].rows:
            self._sent[0].progress(message.rows_done)
        else:
            raise FrameError("progress of no task at work")

    def _on_done(self, message: Done) -> None:
        if not self._sent or message.task != self._sent[0].task:
            raise FrameError("the end of a task that is not at work")
        sent = self._sent[0]
        if message.rows != sent.rows or not 0 < message.output_bytes <= sent.output_bytes_max:
            raise FrameError(f"{message.rows} rows in {message.output_bytes} bytes for {sent.rows} rows")
        if any(not 0 <= failure.row < sent.rows for failure in message.failures):
            raise FrameError("a failure of a row that is not there")
        output = self._spawned.output.read(sent.area * BLOCK_BYTES_MAX, message.output_bytes)
        self._answered(message.task).set_result(TaskAnswer(message, output))
        self._begin_next()

    def _answered(self, task: str) -> asyncio.Future[TaskAnswer | Failed]:
        if not self._sent or self._sent[0].task != task:
            raise FrameError("an answer to a task that is not at work")
        answer = self._sent.popleft().answer
        if answer.done():  # cancelled: nobody listens; the child goes on unharmed
            answer = self._loop.create_future()
        if not self._sent:
            self.idle_since = self._loop.time()
            self._give_back()
        return answer

    def _begin_next(self) -> None:
        if self._sent and not self._sent[0].begun:
            self._sent[0].begun = True
            self._sent[0].on_begin()

    def _settle(self, message: _Answer) -> None:
        if self._answer is None or self._answer.done():
            raise FrameError(f"{type(message).__name__} that nobody asked for")
        self._answer.set_result(message)

    def _count_frame(self) -> None:
        self._frames.count += 1
        allowed = self._frames.earned + FRAMES_PER_SECOND_MAX * (self._loop.time() - self._frames.started)
        if self._frames.count > allowed:
            raise FrameError("far too many messages")

    # ----------------------------------------------------------------------------------------------------- sending

    def _send(self, message: ToChild) -> None:
        self._frames.earned += 2
        was_empty = not self._outgoing
        self._outgoing += encode_frame(message)
        if was_empty:
            self._on_writable()

    def _on_writable(self) -> None:
        try:
            sent = self._spawned.control.send(self._outgoing)
        except BlockingIOError:
            sent = 0
        except OSError:  # it died; its exit tells
            self._outgoing.clear()
            sent = 0
        del self._outgoing[:sent]
        if self._outgoing:
            self._loop.add_writer(self._spawned.control, self._on_writable)
        else:
            self._loop.remove_writer(self._spawned.control)

    async def _ask(
        self,
        message: Load | Inspect | Challenge | Check | Referee,
        progress: Callable[[int], None],
        timeout_s: float,
        what: str,
    ) -> _Answer:
        if not self.alive:
            raise ChildDiedError(await asyncio.shield(self.dead), at_work=False)
        self._foreign = True
        self._answer = self._loop.create_future()
        self._answer_progress = progress
        self._send(message)
        try:
            return await self._within(self._answer, timeout_s, Cause.PROGRAM, f"{what} took too long")
        finally:
            self._answer = None

    async def _within(self, future: asyncio.Future[_T], timeout_s: float, cause: Cause, why: str) -> _T:
        timer = self._loop.call_later(timeout_s, self.kill, cause, f"{why} within {timeout_s:g} s")
        try:
            return await future
        finally:
            timer.cancel()

    def _give_back(self) -> None:
        if self._input_bytes > _GIVE_BACK_BYTES and not self._sent and self.alive:
            self._spawned.input.give_back()
            self._input_bytes = 0

    def _broke(self, what: str) -> ChildDiedError:
        reason = f"the engine child broke its contract: {what}"
        death = ChildDeath(Cause.PROGRAM, reason, by_us=True, contract_broken=True)
        self.kill(death.cause, death.reason, contract_broken=True)
        return ChildDiedError(death, at_work=True)

    # ------------------------------------------------------------------------------------------------------- dying

    def _watch_exit(self) -> None:
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(self.pid)
                self._loop.add_reader(descriptor, self._on_exit, descriptor)
                return
        waiting = self._loop.run_in_executor(None, self._spawned.process.wait)
        waiting.add_done_callback(lambda _: self._bury())

    def _on_exit(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        self._bury()

    def _bury(self) -> None:
        """Hears its last words, reaps it, closes everything, and tells whoever waits."""
        with contextlib.suppress(OSError):
            while self._spawned.control.fileno() >= 0 and self._last_words():
                pass
        self._loop.remove_reader(self._spawned.control)
        self._loop.remove_writer(self._spawned.control)
        log = self._spawned.log_text()
        code = self._spawned.close()
        death = self._death_of(code, log)
        self.dead.set_result(death)
        if not self._ready.done():
            self._ready.set_exception(ChildDiedError(death, at_work=True))
            self._ready.exception()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ChildDiedError(death, at_work=True))
        for position, sent in enumerate(self._sent):
            if not sent.answer.done():
                sent.answer.set_exception(ChildDiedError(death, at_work=position == 0))
        self._sent.clear()

    def _last_words(self) -> bool:
        if self._verdict is not None:
            return False
        data = self._spawned.control.recv(_RECEIVE_BYTES)
        try:
            for message in self._reader.feed(data):
                self._on_message(message)
        except FrameError:
            return False
        return bool(data)

    def _death_of(self, code: int, log: str) -> ChildDeath:
        if self._verdict is not None:
            verdict = self._verdict
            return ChildDeath(verdict.cause, verdict.reason, by_us=True, contract_broken=verdict.contract_broken)
        cause = cause_of_exit(code, program_loaded=self._foreign)
        how = f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        when = "with the program" if self._foreign else "before it was ready"
        return ChildDeath(cause, clipped_reason(f"the engine child ended {when}: {how}. {_tail(log)}"), by_us=False)


def aligned(length: int) -> int:
    """The next place at or after `length` where a placement may begin."""
    return -(-length // PLACEMENT_ALIGNMENT_BYTES) * PLACEMENT_ALIGNMENT_BYTES


def _tail(log: str) -> str:
    """The last line of a log without control characters: a program may have written anything there."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "".join(character if character.isprintable() else "?" for character in lines[-1]) if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _nothing(_: int) -> None:
    """Nobody listens."""
