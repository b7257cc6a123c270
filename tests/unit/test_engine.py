"""The single writer: acknowledged means durable, one commit for what queued, nothing said of what failed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, JobId, digest_of
from fallow.job import JobState, JobStatus, TaskResult, WorkerShare
from fallow_coordinator import engine as engine_module
from fallow_coordinator.config import EXIT_BROKEN, EXIT_STORAGE_FAILED, EXIT_WRITER_FENCED, EngineSettings
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as ev
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.state import State, TaskPhase
from fallow_coordinator.core.turn import Turn, take_turn
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore
from fallow_coordinator.store.sqlite import SqliteStore
from journal_world import QUIET, START_MS, BlobShelf, Clock, Ended, RecordingSink, World, until

ROWS = [f"row {number}".encode() for number in range(8)]


class CountingStore(MemoryStore):
    """Notes each append, and what else was to be seen at that moment."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        super().__init__(disk)
        self.appends: list[list[ev.Event]] = []
        self.during_append: list[bool] = []
        self.pending: list[asyncio.Future[object]] = []

    def append(
        self, *, expected_sequence: int, events: Sequence[tuple[int, ev.Event]], payloads: Mapping[Digest, bytes]
    ) -> None:
        self.during_append.append(any(future.done() for future in self.pending))
        super().append(expected_sequence=expected_sequence, events=events, payloads=payloads)
        self.appends.append([event for _, event in events])


def process(world: World, waiting: engine_module._Waiting) -> None:
    """Decides one command here and now."""
    world.engine._enqueue(waiting)
    world.engine._process()


async def packers_done() -> None:
    """Lets packers that wait for nothing, and the writer after them, run to their end."""
    for _ in range(50):
        await asyncio.sleep(0)


async def world_with_bundle(**options: object) -> World:
    world = World(**options)  # type: ignore[arg-type]  # handed on
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    return world


async def test_submitted_command_is_on_disk_when_its_answer_comes() -> None:
    world = World(store=(store := CountingStore()))
    await world.begin()
    made = await world.ask(AccountMade, c.CreateAccount("lab"))
    assert store.appends[-1] == [ev.AccountCreated(made.account_id, "lab")]
    assert store.read(after_sequence=store.last_sequence - 1, limit=1)[0].at_ms == START_MS
    await world.engine.stop()


async def test_commands_that_queue_together_share_one_commit_and_no_answer_comes_before_it() -> None:
    world = World(store=(store := CountingStore()))
    await world.begin()
    commits = len(store.appends)
    answers = [asyncio.ensure_future(world.ask(AccountMade, c.CreateAccount(f"lab {number}"))) for number in range(20)]
    store.pending = list(answers)  # type: ignore[arg-type]  # only asked whether they are done
    made = await asyncio.gather(*answers)
    assert len(store.appends) == commits + 1
    assert [event.account_id for event in store.appends[-1] if isinstance(event, ev.AccountCreated)] == [
        one.account_id for one in made
    ]
    assert not any(store.during_append), "an answer was given before its commit"
    await world.engine.stop()


async def test_refused_command_changes_nothing_and_does_not_disturb_its_batch() -> None:
    world = World(store=(store := CountingStore()))
    await world.begin()
    commits = len(store.appends)
    good, bad, other = await asyncio.gather(
        world.engine.submit(c.CreateAccount("a")),
        world.engine.submit(c.CancelJob(AccountId("account-x"), JobId("job-unknown"))),
        world.engine.submit(c.CreateAccount("b")),
        return_exceptions=True,
    )
    assert isinstance(bad, FallowError) and bad.reason is Reason.JOB_UNKNOWN
    assert not isinstance(good, BaseException) and not isinstance(other, BaseException)
    assert [type(event) for event in store.appends[-1]] == [ev.AccountCreated, ev.AccountCreated]
    assert len(store.appends) == commits + 1
    assert world.engine.counters.refusals == 1
    await world.engine.stop()


async def test_command_that_changes_nothing_writes_nothing() -> None:
    world = World(store=(store := CountingStore()))
    await world.begin()
    commits, sequence = len(store.appends), store.last_sequence
    for _ in range(10):
        await world.tell(c.Tick())
    assert (len(store.appends), store.last_sequence) == (commits, sequence)
    await world.engine.stop()


async def test_one_row_job_takes_one_commit_up_to_its_lease() -> None:
    world = await world_with_bundle(store=(store := CountingStore()))
    worker = await world.volunteer()
    commits = len(store.appends)
    job_id = await world.submit_job([b"one row"])
    assert len(store.appends) == commits + 1
    assert [type(event) for event in store.appends[-1]] == [
        ev.JobSubmitted,
        ev.JobStateChanged,
        ev.TaskCreated,
        ev.PackRequested,
        ev.TaskInputPacked,
        ev.LeaseGranted,
        ev.JobStateChanged,
    ]
    lease = world.leases_of(worker)[0]
    assert [bytes(row) for row in world.input_of(lease.lease_id)] == [b"one row"]
    await world.commit(worker, lease)
    assert len(store.appends) == commits + 2
    assert world.engine.state.jobs[job_id].state is JobState.SUCCEEDED
    assert world.engine.counters.packs_inline == 1
    await world.engine.stop()


async def test_effects_come_in_order_and_only_after_the_commit() -> None:
    store = CountingStore()
    world = await world_with_bundle(store=store)
    worker = await world.volunteer()
    world.sink.effects.clear()
    job_id = await world.submit_job([b"one row"])
    lease = world.leases_of(worker)[0]
    kinds = [type(effect) for effect in world.sink.effects]
    assert f.PackTask not in kinds, "packing is the engine's own business"
    assert kinds.index(f.WakeWatchers) < kinds.index(f.SendLease)
    assert f.SendLease(worker.session_id, lease.lease_id) in world.sink.effects
    world.sink.effects.clear()
    store.disk.failure = "the disk is full"
    with pytest.raises(Ended):
        process(world, engine_module._Waiting(world.commit_command(worker, lease)[0], {}, None))
    assert world.sink.effects == []
    assert world.engine.state.jobs[job_id].job_id == job_id


async def test_only_payloads_that_an_event_names_are_kept() -> None:
    world = await world_with_bundle()
    named, stray = b"manifest 0", b"a stray"
    assert world.engine.payload(digest_of(named)) == named
    await world.tell(c.CreateAccount("x"), {digest_of(stray): stray})
    assert world.engine.payload(digest_of(stray)) is None
    await world.engine.stop()


async def test_repeated_submission_gives_the_same_job_and_keeps_one_payload() -> None:
    world = await world_with_bundle()
    first = await world.submit_job(ROWS, key=b"k" * 16)
    events = world.engine.counters.events
    assert await world.submit_job(ROWS, key=b"k" * 16) == first
    assert world.engine.counters.events == events
    await world.engine.stop()


async def test_rows_in_the_blob_service_are_packed_there_and_leased() -> None:
    world = await world_with_bundle()
    worker = await world.volunteer()
    await world.submit_job(ROWS, inline=False)
    await packers_done()
    rows = [bytes(row) for lease in world.leases_of(worker) for row in world.input_of(lease.lease_id)]
    assert rows == ROWS
    assert world.engine.counters.packs_called >= 1
    await world.engine.stop()


async def test_packing_that_fails_for_a_while_is_asked_for_again_later() -> None:
    world = await world_with_bundle()
    worker = await world.volunteer()
    world.packer.failures = [FallowError(Reason.COORDINATOR_UNREACHABLE, "the blob service is away")]
    await world.submit_job([b"one row"], inline=False)
    await packers_done()
    assert world.leases_of(worker) == []
    world.clock.now_ms += 60_000
    await world.tell(c.Tick())
    await packers_done()
    assert world.leases_of(worker)
    await world.engine.stop()


async def test_packing_without_its_source_fails_the_job_with_a_reason() -> None:
    world = await world_with_bundle()
    await world.volunteer()
    world.packer.failures = [FallowError(Reason.BLOB_UNKNOWN, "no such blob")]
    job_id = await world.submit_job(ROWS, inline=False)
    await packers_done()
    job = world.engine.state.jobs[job_id]
    assert job.state is JobState.FAILED and "no such blob" in job.reason
    await world.engine.stop()


async def test_restart_replays_the_same_state_and_goes_on() -> None:
    disk = MemoryDisk()
    world = await world_with_bundle(store=MemoryStore(disk))
    worker = await world.volunteer()
    job_id = await world.submit_job(ROWS)
    before = world.engine.state
    again = World(store=MemoryStore(disk), packer=world.packer, clock=world.clock, entropy=world.entropy)
    again.bundle_digest, again.operator_account_id = world.bundle_digest, world.operator_account_id
    replayed = await again.engine.start()
    assert replayed == before.sequence
    assert again.engine.state.jobs[job_id] == before.jobs[job_id]
    assert again.engine.state.epoch == 2
    assert again.engine.state.sessions == {}
    await again.reconnect(worker)
    await again.work_until_idle(worker)
    assert again.engine.state.jobs[job_id].state is JobState.SUCCEEDED
    await again.engine.stop()
    await world.engine.stop()


async def test_down_time_lengthens_leases() -> None:
    disk = MemoryDisk()
    world = await world_with_bundle(store=MemoryStore(disk))
    worker = await world.volunteer()
    await world.submit_job([b"one row"])
    lease = world.leases_of(worker)[0]
    deadline_ms = lease.deadline_ms
    clock = Clock(world.clock.now_ms + 7_000)
    again = World(store=MemoryStore(disk), clock=clock, entropy=world.entropy)
    await again.engine.start()
    assert again.engine.state.leases[lease.lease_id].deadline_ms == deadline_ms + 7_000
    await again.engine.stop()
    await world.engine.stop()


async def test_packing_under_way_at_a_crash_is_asked_for_again() -> None:
    disk = MemoryDisk()
    world = await world_with_bundle(store=MemoryStore(disk))
    worker = await world.volunteer()

    class Hanging(BlobShelf):
        async def pack(self, **_: object) -> tuple[Digest, int]:
            await asyncio.Event().wait()
            raise AssertionError("never")

    shelf = world.packer
    world.engine._packer = Hanging()
    await world.submit_job(ROWS, inline=False)
    await packers_done()
    assert any(task.phase is TaskPhase.PACKING for task in world.engine.state.tasks.values())
    again = World(store=MemoryStore(disk), packer=shelf, clock=world.clock, entropy=world.entropy)
    await again.engine.start()
    await packers_done()
    assert again.engine.counters.packs_called >= 1
    await again.reconnect(worker)
    assert again.leases_of(worker)
    await again.engine.stop()
    await world.engine.stop()


async def test_clock_of_the_journal_never_goes_back() -> None:
    world = World(store=(store := CountingStore()))
    await world.begin()
    world.clock.now_ms = START_MS + 5_000
    await world.tell(c.CreateAccount("later"))
    world.clock.now_ms = START_MS - 5_000
    await world.tell(c.CreateAccount("after a step back"))
    assert store.last_at_ms == START_MS + 5_000
    await world.engine.stop()


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [("full", EXIT_STORAGE_FAILED, "the disk is full"), ("fenced", EXIT_WRITER_FENCED, "taken over")],
)
async def test_append_that_fails_ends_the_process_without_an_answer(fault: str, exit_code: int, words: str) -> None:
    store = MemoryStore()
    world = World(store=store)
    await world.begin()
    sequence = store.last_sequence
    if fault == "full":
        store.disk.failure = "the disk is full; free space there"
    else:
        MemoryStore(store.disk)
    answer = asyncio.get_running_loop().create_future()
    with pytest.raises(Ended, match=words) as ended:
        process(world, engine_module._Waiting(c.CreateAccount("lost"), {}, answer))
    assert ended.value.exit_code == exit_code
    assert not answer.done()
    assert store.last_sequence == sequence


async def test_mistake_in_a_decision_is_told_as_internal_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    await world.begin()

    def broken(state: State, command: c.Command, now_ms: int, entropy: bytes) -> Turn:
        if command == c.CreateAccount("boom"):
            raise ZeroDivisionError("our mistake")
        return take_turn(state, command, now_ms, entropy)

    monkeypatch.setattr(engine_module, "take_turn", broken)
    with pytest.raises(FallowError) as told:
        await world.engine.submit(c.CreateAccount("boom"))
    assert told.value.reason is Reason.INTERNAL and "mistake" not in str(told.value)
    await world.ask(AccountMade, c.CreateAccount("fine"))
    await world.engine.stop()


async def test_mistake_after_the_state_moved_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    await world.begin()

    def broken(state: State, command: c.Command, now_ms: int, entropy: bytes) -> Turn:
        take_turn(state, command, now_ms, entropy)
        raise ZeroDivisionError("our mistake")

    monkeypatch.setattr(engine_module, "take_turn", broken)
    with pytest.raises(Ended) as ended:
        process(world, engine_module._Waiting(c.CreateAccount("boom"), {}, None))
    assert ended.value.exit_code == EXIT_BROKEN


async def test_full_queue_refuses_with_its_limit() -> None:
    world = World(settings=EngineSettings(queue_max=3, tick_ms=QUIET.tick_ms, archive_ms=QUIET.archive_ms))
    await world.begin()
    answers = await asyncio.gather(
        *(world.engine.submit(c.CreateAccount(f"lab {number}")) for number in range(5)), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, FallowError)]
    assert [error.reason for error in refused] == [Reason.OVERLOADED] * 2
    assert refused[0].limit == "3 waiting commands"
    await world.engine.stop()


async def test_stopping_decides_what_waits_and_refuses_what_comes() -> None:
    world = World()
    await world.begin()
    waiting = [asyncio.ensure_future(world.engine.submit(c.CreateAccount(f"lab {number}"))) for number in range(3)]
    await asyncio.sleep(0)
    stopping = asyncio.ensure_future(world.engine.stop())
    await asyncio.sleep(0)
    with pytest.raises(FallowError) as refused:
        await world.engine.submit(c.CreateAccount("too late"))
    assert refused.value.reason is Reason.COORDINATOR_STOPPING
    await stopping
    assert len(await asyncio.gather(*waiting)) == 3


async def test_submitter_that_gave_up_disturbs_nobody() -> None:
    world = World()
    await world.begin()
    gone = asyncio.ensure_future(world.engine.submit(c.CreateAccount("gone")))
    await asyncio.sleep(0)
    gone.cancel()
    made = await world.ask(AccountMade, c.CreateAccount("stays"))
    assert made.account_id in world.engine.state.accounts
    await world.engine.stop()


async def test_sink_that_fails_does_not_stop_the_writer() -> None:
    class Broken(RecordingSink):
        def apply(self, effects: Sequence[f.Effect]) -> None:
            raise ConnectionError("a stream is gone")

    world = await world_with_bundle(sink=Broken())
    await world.submit_job(ROWS)
    assert await world.ask(AccountMade, c.CreateAccount("goes on"))
    await world.engine.stop()


class ViewsAt:
    """Views that stand at a sequence and retain what they are told to."""

    def __init__(self) -> None:
        self.sequence = 0
        self.asked = 0
        self.collected = 0
        self.retained: frozenset[Digest] = frozenset()

    def view_sequence(self) -> int:
        self.asked += 1
        return self.sequence

    def submission(self, job_id: JobId) -> ev.JobSubmitted | None:
        return None

    def references(self, digests: Sequence[Digest]) -> tuple[int, frozenset[Digest]]:
        self.collected += 1
        return self.sequence, self.retained & frozenset(digests)

    def expired_jobs(self, now_ms: int, limit: int) -> list[tuple[AccountId, JobId]]:
        return []

    def job_status(self, job_id: JobId) -> None:
        return None

    def jobs(self, account_id: AccountId, *, before: tuple[int, str] | None, limit: int) -> list[JobStatus]:
        return []

    def results(self, job_id: JobId, *, after_cursor: int, limit: int) -> list[TaskResult]:
        return []

    def shares(self, job_id: JobId, *, limit: int) -> Sequence[WorkerShare]:
        return ()

    def output(self, account_id: AccountId, digest: Digest) -> None:
        return None


async def test_finished_jobs_leave_the_state_once_the_views_have_them() -> None:
    views = ViewsAt()
    world = await world_with_bundle(views=views, settings=EngineSettings(tick_ms=3_600_000, archive_ms=1))
    worker = await world.volunteer()
    job_id = await world.submit_job([b"one row"])
    await world.work_until_idle(worker)
    await until(lambda: views.asked >= 5)
    assert job_id in world.engine.state.jobs, "it is not in the views yet"
    views.sequence = world.engine.state.sequence
    await until(lambda: job_id not in world.engine.state.jobs)
    await world.engine.stop()


async def test_payloads_go_when_neither_the_state_nor_a_retained_result_needs_them() -> None:
    views = ViewsAt()
    store = CountingStore()
    world = await world_with_bundle(
        store=store, views=views, settings=EngineSettings(tick_ms=3_600_000, archive_ms=3_600_000, collect_ms=1)
    )
    worker = await world.volunteer()
    outputs: list[Digest] = []
    for number in range(2):
        job_id = await world.submit_job([b"row %d" % number])
        await world.work_until_idle(worker)
        output = world.engine.state.jobs[job_id].results[0].output
        assert output is not None
        outputs.append(output.digest)
    running = await world.submit_job([b"running"])
    await until(lambda: views.collected >= 3)
    assert all(store.payload(digest) for digest in outputs), "the jobs are still in the state"
    views.retained = frozenset(outputs[1:])
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    collected = views.collected
    await until(lambda: views.collected >= collected + 3)
    assert store.payload(outputs[0]), "views that are behind are not believed"
    views.sequence = world.engine.state.sequence
    await until(lambda: store.payload(outputs[0]) is None)
    assert store.payload(outputs[1]) is not None
    assert store.payload(world.bundle_digest) is not None
    assert world.engine.state.jobs[running]
    assert [bytes(row) for row in world.input_of(world.leases_of(worker)[0].lease_id)] == [b"running"]
    await world.engine.stop()


async def test_payload_that_is_needed_again_while_a_round_looks_at_it_stays() -> None:
    class HeldUp(ViewsAt):
        """Its first answer takes until the test says so."""

        def __init__(self) -> None:
            super().__init__()
            self.begun, self.go_on = threading.Event(), threading.Event()

        def references(self, digests: Sequence[Digest]) -> tuple[int, frozenset[Digest]]:
            self.begun.set()
            self.go_on.wait(10)
            return super().references(digests)

    views, store = HeldUp(), CountingStore()
    world = await world_with_bundle(store=store, views=views, settings=EngineSettings(collect_ms=50))
    worker = await world.volunteer()
    first = await world.submit_job([b"the same row"], key=b"k" * 16)
    (block,) = world.engine.state.jobs[first].blocks
    await world.work_until_idle(worker)
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    views.sequence = world.engine.state.sequence
    views.begun.clear()
    await until(views.begun.is_set)
    again = await world.submit_job([b"the same row"], key=b"l" * 16)
    assert world.engine.state.jobs[again].blocks[0].blob == block.blob
    collected = views.collected
    views.go_on.set()
    await until(lambda: views.collected >= collected + 2)
    assert store.payload(block.blob.digest) is not None
    await world.work_until_idle(worker)
    await world.engine.stop()


async def test_engine_makes_its_own_ticks() -> None:
    world = await world_with_bundle(settings=EngineSettings(tick_ms=1, archive_ms=3_600_000))
    worker = await world.volunteer()
    await world.submit_job([b"one row"])
    lease = world.leases_of(worker)[0]
    world.clock.now_ms = lease.deadline_ms + 1
    await until(lambda: lease.lease_id not in world.engine.state.leases)
    await world.engine.stop()


async def test_counters_tell_what_was_done() -> None:
    world = await world_with_bundle()
    worker = await world.volunteer()
    await world.submit_job([b"one row"])
    commits = world.engine.counters.commits
    await world.work_until_idle(worker)
    counters = world.engine.counters
    assert (counters.commits, counters.commitments) == (commits + 1, 1)
    assert counters.events == world.engine.state.sequence
    assert counters.payload_bytes > 0
    await world.engine.stop()


async def test_background_task_that_breaks_ends_the_process() -> None:
    class BrokenViews(ViewsAt):
        def view_sequence(self) -> int:
            raise ZeroDivisionError("our mistake")

    world = World(views=BrokenViews(), settings=EngineSettings(tick_ms=3_600_000, archive_ms=1))
    ended: list[int] = []

    def note_end(words: str, exit_code: int) -> NoReturn:
        ended.append(exit_code)
        raise Ended(words, exit_code)

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    world.engine._end = note_end
    await world.engine.start()
    await until(lambda: ended == [EXIT_BROKEN])


DISK_FULL_PROGRAM = """
import asyncio, pathlib, sys
sys.path.insert(0, sys.argv[2])
from journal_world import BlobShelf, RecordingSink
from fallow_coordinator.core import commands as c
from fallow_coordinator.engine import Engine
from fallow_coordinator.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(pathlib.Path(sys.argv[1]))
    engine = Engine(store=store, sink=RecordingSink(), packer=BlobShelf())
    await engine.start()
    await engine.submit(c.StartJournal("operator", "default"))
    print("acknowledged", store.last_sequence, flush=True)
    store._writer.execute(f"PRAGMA max_page_count = {store._writer.execute('PRAGMA page_count').fetchone()[0]}")
    for number in range(1000):
        await engine.submit(c.CreateAccount(f"{number:0100}"))
        print("acknowledged", store.last_sequence, flush=True)

asyncio.run(main())
"""


@pytest.mark.processes
def test_full_disk_ends_the_real_process_with_words_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DISK_FULL_PROGRAM, str(tmp_path), str(Path(__file__).parent.parent)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == EXIT_STORAGE_FAILED, ended.stderr
    assert "the disk is full; free space there and start again" in ended.stderr
    acknowledged = int(ended.stdout.split()[-1])
    store = SqliteStore(tmp_path)
    assert store.last_sequence == acknowledged, "what was not acknowledged is not there either"
    assert len(store.read(after_sequence=0, limit=10_000)) == acknowledged
    store.close()
