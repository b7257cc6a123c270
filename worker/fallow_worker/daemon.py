"""The worker daemon: carries out what the plan says, and tells the plan what came of it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Final, Protocol, assert_never

from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.ids import LeaseId
from fallow.row_block import NONCE_BYTES
from fallow.session import (
    BundleOffer,
    Capability,
    Cause,
    Commitment,
    CoordinatorMessage,
    DeviceStanding,
    Goodbye,
    Heartbeat,
    Lease,
    LeaseProgress,
    LeaseSeen,
    Refused,
    Settled,
    SignedBytes,
    TaskKind,
    UploadOffer,
    Welcome,
    WorkerMessage,
)
from fallow_worker.claimed_rows import run_claimed_rows
from fallow_worker.core.actions import (
    Action,
    Cancel,
    Connect,
    Fetch,
    Forget,
    Leave,
    ReleaseExecutor,
    Run,
    Say,
    SayHeartbeat,
    Upload,
)
from fallow_worker.core.happenings import (
    CapabilitySeen,
    DrainAsked,
    Fetched,
    FetchFailed,
    Happening,
    Ran,
    Received,
    RunFailed,
    SessionEnded,
    SessionOpened,
    SlotFreed,
    TimePassed,
    Uploaded,
    UploadFailed,
)
from fallow_worker.core.observe import observe
from fallow_worker.core.plan import begun, next_wake_ms, plan, window_wanted
from fallow_worker.core.world import Offline, Online, Running, Terms, World
from fallow_worker.executor import WorkFailed
from fallow_worker.heap import give_back
from fallow_worker.link import After, Greeting, after, goodbye_error
from fallow_worker.output import clipped, told
from fallow_worker.ports import Executor, Outcome, Work
from fallow_worker.refereeing import Spreads, refereed
from fallow_worker.renewal import Renewal
from fallow_worker.transfers import Blobs, Inputs, Transfers, trouble_of, with_blob_endpoint

_log = logging.getLogger(__name__)

SLOW_RECONNECT_MS: Final = 30_000
"""Before looking again when somebody has to do something first."""
ENTROPY: Final = random.SystemRandom()
STOP_WAIT_S: Final = 15.0
"""For the executor to end its children."""
PLAN_ROUNDS_MAX: Final = 8
"""Rounds of planning in which every action must have begun; more would be a mistake of the plan."""


class OpenSession(Protocol):
    """A stream after its Welcome: `fallow_worker.link.Session`, or a fake."""

    def say(self, message: WorkerMessage) -> None: ...

    async def hear(self) -> CoordinatorMessage: ...

    async def close(self) -> None: ...

    async def abandon(self) -> None: ...


Looks = Callable[[Capability], AsyncIterator[Capability]]
"""What the worker can do, again and again; begins with what it could do."""
Dial = Callable[[Credentials, Greeting], Awaitable[tuple[OpenSession, Welcome]]]
"""Opens a session. Raises FallowError."""


@dataclass(slots=True)
class Counts:
    """What a daemon has done since it started, for `status` and benchmarks."""

    sessions: int = 0
    leases: int = 0
    commitments: int = 0
    roots: int = 0
    settled: int = 0
    rows: int = 0
    failures: int = 0
    refusals: int = 0


class Daemon:
    """One worker. `run` lasts until the owner or the coordinator ends it; all state changes in one event loop."""

    def __init__(
        self,
        *,
        terms: Terms,
        capability: Capability,
        credentials: Credentials,
        executor: Executor,
        transfers: Transfers,
        blobs_of: Callable[[Credentials], Blobs],
        dial: Dial,
        renewal: Renewal,
        changed: Callable[[], None] = lambda: None,
        looks: Looks | None = None,
    ) -> None:
        """`dial` opens sessions, `blobs_of` reaches the blob service, `changed` hears that the world has changed.

        `looks` gives what the worker can do each time somebody has looked, starting from `capability`.
        """
        self.counts = Counts()
        self.last_error: FallowError | None = None
        """How the last session, or the last try to open one, ended."""
        self.standings: dict[str, DeviceStanding] = {}
        """What the coordinator last said of each device."""
        self._looks = looks
        self._credentials = credentials
        self._executor = executor
        self._transfers = transfers
        self._blobs_of = blobs_of
        self._dial = dial
        self._renewal = renewal
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._world = World(terms, Offline(0, 0), capability, busy_at_ms=self._now_ms())
        self._awake = asyncio.Event()
        self._ended_by: FallowError | None = None
        self._over = False
        self._session: OpenSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[LeaseId, asyncio.Task[None]] = {}
        self._moves: dict[LeaseId, asyncio.Task[None]] = {}
        """Fetches and uploads under way."""
        self._inputs: dict[LeaseId, Inputs] = {}
        self._outputs: dict[LeaseId, bytes] = {}
        self._rows_done: dict[LeaseId, int] = {}
        self._spreads = Spreads()
        self._committed_at: dict[LeaseId, float] = {}
        """When a commitment that nobody has answered yet was said last."""
        self._release: asyncio.Task[None] | None = None

    @property
    def world(self) -> World:
        """What the worker holds now."""
        return self._world

    @property
    def transfers(self) -> Transfers:
        """What went over the wire."""
        return self._transfers

    async def run(self) -> FallowError | None:
        """Works until told to stop; the error when the coordinator will not have this worker."""
        self._start(self._keep_certificate(), "certificate")
        if self._looks is not None:
            self._start(self._keep_looking(self._looks(self._world.capability)), "looks")
        try:
            while not self._over:
                self._act()
                if not self._over:
                    await self._sleep()
        finally:
            await self._shut_down()
        return self._ended_by

    def drain(self, reason: str, run_grace_ms: int) -> None:
        """Takes nothing more, finishes what runs within the grace, gives the rest back, then leaves."""
        _log.info("worker.draining reason=%r grace_s=%g", reason, run_grace_ms / 1000)
        self._happened(DrainAsked(clipped(reason), run_grace_ms))

    # ------------------------------------------------------------------------------------------- looking and acting

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def _happened(self, happening: Happening) -> None:
        self._world = observe(self._world, happening, self._now_ms())
        self._awake.set()

    def _end(self, error: FallowError) -> None:
        self._ended_by = error
        self._over = True
        self._awake.set()

    def _act(self) -> None:
        for _ in range(PLAN_ROUNDS_MAX):
            now_ms = self._now_ms()
            actions = plan(self._world, now_ms)
            if not actions:
                break
            for action in actions:
                self._world = begun(self._world, action, now_ms)
                self._carry_out(action)
        else:
            raise AssertionError(f"the plan does not come to rest: {plan(self._world, self._now_ms())}")
        self._changed()

    async def _sleep(self) -> None:
        now_ms = self._now_ms()
        wake_ms = next_wake_ms(self._world, now_ms)
        timer = None
        if wake_ms is not None:
            timer = self._loop.call_at(wake_ms / 1000, self._happened, TimePassed())
        await self._awake.wait()
        self._awake.clear()
        if timer is not None:
            timer.cancel()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Connect():
                window = window_wanted(self._world, self._now_ms())
                greeting = Greeting(self._world.capability, window, self._world.held_leases())
                self._start(self._converse(greeting), "session")
            case Say(message=message):
                self._say(message)
            case SayHeartbeat():
                self._say(Heartbeat(self._progress()))
            case Fetch(lease=lease, offer=offer):
                self._move(lease.lease_id, self._fetch(lease, offer))
            case Upload(lease_id=lease_id, grant=grant):
                self._move(lease_id, self._upload(lease_id, grant))
            case Run(lease=lease, offer=offer):
                self._runs[lease.lease_id] = self._start(self._work(lease, offer), f"run-{lease.lease_id}")
            case Cancel(lease_id=lease_id):
                _log.info("run.cancelled lease=%s", lease_id)
                self._runs[lease_id].cancel()
            case Forget(lease_id=lease_id):
                self._forget(lease_id)
            case ReleaseExecutor():
                self._release = self._start(self._release_executor(), "release")
            case Leave():
                _log.info("worker.leaving")
                self._over = True
            case _:
                assert_never(action)

    def _start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A mistake of ours: to go on would be to guess.
            _log.critical("worker.mistake task=%s", task.get_name(), exc_info=error)
            self._end(FallowError(Reason.INTERNAL, f"{task.get_name()}: {error!r}", hint="report this: it is a defect"))

    def _move(self, lease_id: LeaseId, work: Coroutine[None, None, None]) -> None:
        self._moves[lease_id] = self._start(work, f"move-{lease_id}")

    def _forget(self, lease_id: LeaseId) -> None:
        move = self._moves.pop(lease_id, None)
        if move is not None:
            move.cancel()
        self._inputs.pop(lease_id, None)
        self._outputs.pop(lease_id, None)
        self._rows_done.pop(lease_id, None)
        self._committed_at.pop(lease_id, None)
        self._transfers.forget(lease_id)

    # ------------------------------------------------------------------------------------------- the session

    def _say(self, message: WorkerMessage) -> None:
        if isinstance(message, Commitment):
            self.counts.commitments += 1
            self._committed_at[message.lease_id] = self._loop.time()
        _log.debug("session.say kind=%s lease=%s", type(message).__name__, getattr(message, "lease_id", ""))
        if self._session is not None:
            self._session.say(message)

    def _progress(self) -> tuple[LeaseProgress, ...]:
        return tuple(
            LeaseProgress(held.lease_id, held.fence, self._rows_done.get(held.lease_id, 0))
            for held in self._world.leases.values()
            if isinstance(held.phase, Running)
        )

    async def _converse(self, greeting: Greeting) -> None:
        """One session from dialling to its end."""
        session: OpenSession | None = None
        try:
            if self._credentials.not_after_ms <= time.time() * 1000:
                await self._renewed()
            session, welcome = await self._dial(self._credentials, greeting)
            await self._welcomed(session, welcome)
            while True:
                self._heard(await session.hear())
        except FallowError as error:
            self._session = None
            if session is not None:
                await session.abandon()
            await self._session_over(error)

    async def _welcomed(self, session: OpenSession, welcome: Welcome) -> None:
        reachable = with_blob_endpoint(self._credentials, welcome.blob_endpoint)
        if reachable.blob_endpoint != self._credentials.blob_endpoint:
            self._credentials = reachable
            await self._transfers.use(self._blobs_of(reachable))
        self.counts.sessions += 1
        self.last_error = None
        self._session = session
        _log.info(
            "session.opened session=%s coordinator=%s kept=%d heartbeat_s=%g",
            welcome.session_id, self._credentials.control_endpoint, len(welcome.keep_lease_ids),
            welcome.heartbeat_interval_ms / 1000,
        )  # fmt: skip
        keep = frozenset(welcome.keep_lease_ids)
        self._happened(SessionOpened(welcome.session_id, max(1_000, welcome.heartbeat_interval_ms), keep))

    def _heard(self, message: CoordinatorMessage) -> None:
        _log.debug("session.heard kind=%s lease=%s", type(message).__name__, getattr(message, "lease_id", ""))
        if isinstance(message, UploadOffer | Settled):
            self._answered(message.lease_id)
        match message:
            case Goodbye():
                raise _SaidGoodbyeError(goodbye_error(message), message.reconnect_after_ms)
            case Welcome():
                raise FallowError(Reason.MALFORMED_MESSAGE, "the coordinator welcomed this worker twice")
            case Refused():
                self.counts.refusals += 1
                _log.warning(
                    "session.refused lease=%s reason=%s message=%s", message.lease_id, message.reason, message.message
                )
                self._happened(Received(message))
            case Settled():
                held = self._world.leases.get(message.lease_id)
                if held is not None and held.fence == message.fence:
                    self.counts.settled += 1
                    self.counts.rows += held.lease.rows
                self._happened(Received(message))
            case DeviceStanding():
                self.standings[message.device_id] = message
                self._changed()
            case Lease():
                self.counts.leases += 1
                if message.kind is TaskKind.CHALLENGE:
                    self._say(LeaseSeen(message.lease_id, message.fence))
                self._happened(Received(message))
            case _:
                self._happened(Received(message))

    def _answered(self, lease_id: LeaseId) -> None:
        """The coordinator answered a commitment: one round trip, and what its disk took."""
        said_at = self._committed_at.pop(lease_id, None)
        if said_at is not None:
            self._transfers.network.answered(self._loop.time() - said_at)

    async def _session_over(self, error: FallowError) -> None:
        self.last_error = error
        verdict = after(error)
        draining = self._world.drain is not None
        not_before_ms = error.reconnect_after_ms if isinstance(error, _SaidGoodbyeError) else 0
        match verdict:
            case After.END:
                self._end(error)
                return
            case After.RECONNECT_SLOWLY if not self.counts.sessions and not draining and _is_for_a_person(error):
                # On the first try a person is watching: words now are better than tries for ever.
                self._end(error)
                return
            case After.RECONNECT_SLOWLY:
                _log.error("session.ended reason=%s %s", error.reason.value, error)
                not_before_ms = max(not_before_ms, SLOW_RECONNECT_MS)
            case After.RENEW:
                _log.warning("session.ended reason=%s %s", error.reason.value, error)
                try:
                    await self._renewed()
                except FallowError as failure:
                    if after(failure) is not After.RECONNECT:
                        self._end(failure)
                        return
                    _log.warning("certificate.not_renewed reason=%s %s", failure.reason.value, failure)
            case After.RECONNECT:
                _log.warning("session.ended reason=%s %s", error.reason.value, error)
            case _:
                assert_never(verdict)
        self._happened(SessionEnded(ENTROPY.random(), not_before_ms))

    async def _keep_looking(self, looks: AsyncIterator[Capability]) -> None:
        """Runs for ever: tells the plan what every look has found; the plan decides what is worth saying."""
        async for capability in looks:
            self._happened(CapabilitySeen(self._transfers.network.into(capability)))

    # ------------------------------------------------------------------------------------------- certificates

    async def _keep_certificate(self) -> None:
        """Runs for ever: renews at half life. The open session goes on; the coordinator learns of it by itself."""
        while True:
            await self._renewal.due(self._credentials)
            try:
                await self._renewed()
            except FallowError as error:
                _log.warning("certificate.not_renewed reason=%s %s", error.reason.value, error)
                if after(error) is After.END:
                    self._end(error)
                    return
                await self._renewal.pause()

    async def _renewed(self) -> None:
        fresh = await self._renewal.renew(self._credentials)
        self._credentials = replace(fresh, blob_endpoint=self._credentials.blob_endpoint)
        await self._transfers.use(self._blobs_of(self._credentials))
        _log.info("certificate.renewed not_after_ms=%d", fresh.not_after_ms)

    # ------------------------------------------------------------------------------------------- leases

    async def _fetch(self, lease: Lease, offer: BundleOffer) -> None:
        try:
            inputs = await self._transfers.fetch(lease, offer)
        except (FallowError, OSError) as error:
            _log.warning("fetch.failed lease=%s %s", lease.lease_id, error)
            self._moved(
                lease.lease_id, FetchFailed(lease.lease_id, trouble_of(error), clipped(str(error)), ENTROPY.random())
            )
            return
        self._inputs[lease.lease_id] = inputs
        self._moved(lease.lease_id, Fetched(lease.lease_id))

    async def _upload(self, lease_id: LeaseId, grant: SignedBytes) -> None:
        try:
            receipt = await self._transfers.upload(grant, self._outputs[lease_id])
        except (FallowError, OSError) as error:
            _log.warning("upload.failed lease=%s %s", lease_id, error)
            trouble = trouble_of(error, uploading=True)
            self._moved(lease_id, UploadFailed(lease_id, trouble, clipped(str(error)), ENTROPY.random()))
            return
        self._moved(lease_id, Uploaded(lease_id, receipt))

    def _moved(self, lease_id: LeaseId, happening: Happening) -> None:
        self._moves.pop(lease_id, None)
        self._happened(happening)

    async def _work(self, lease: Lease, offer: BundleOffer) -> None:
        """One run, from the executor's slot to words for the coordinator; every end is told to the plan."""
        lease_id = lease.lease_id
        try:
            outcome = await self._outcome(lease, offer)
            self._happened(SlotFreed(lease_id))
            message = await told(lease, outcome)
            if isinstance(message, Commitment):
                self.counts.roots += 1
                if not message.inline_output and lease_id in self._world.leases:
                    self._outputs[lease_id] = outcome.output_block
            happening: Happening = Ran(lease_id, message)
        except WorkFailed as failed:
            happening = self._run_failed(lease_id, failed.cause, failed.reason)
        except asyncio.CancelledError:
            if self._over:
                raise
            happening = RunFailed(lease_id, Cause.OWNER_PREEMPT, "cancelled", ENTROPY.random())
        except Exception as error:
            _log.exception("run.mistake lease=%s", lease_id)
            happening = self._run_failed(lease_id, Cause.PLATFORM, f"the executor made a mistake: {error!r}")
        self._runs.pop(lease_id, None)
        self._rows_done.pop(lease_id, None)
        self._happened(happening)

    async def _outcome(self, lease: Lease, offer: BundleOffer) -> Outcome:
        inputs = self._inputs.pop(lease.lease_id)
        bundle = replace(
            inputs.bundle,
            canonical_batch_rows=offer.canonical_batch_rows,
            slot_dependent=offer.slot_dependent,
            memory_bytes_peak=offer.memory_bytes_peak,
        )
        work = Work(
            lease_id=lease.lease_id,
            kind=lease.kind,
            bundle=bundle,
            input_block=inputs.block,
            rows=lease.rows,
            nonce=ENTROPY.randbytes(NONCE_BYTES),
            output_bytes_max=lease.output_bytes_max,
            runtime_max_ms=lease.runtime_max_ms,
            buckets=lease.buckets,
            slots=lease.slots,
            challenge=lease.challenge,
        )
        candidates = inputs.candidates
        del inputs
        if self._release is not None:
            await self._release
            self._release = None

        def progress(rows_done: int) -> None:
            self._rows_done[lease.lease_id] = rows_done

        if work.kind is TaskKind.INSPECT and work.input_block:
            work = await run_claimed_rows(self._executor, work, progress)
        if lease.kind is TaskKind.REFEREE:
            return await refereed(self._executor, work, lease, candidates, progress, self._spreads)
        return await self._executor.run(work, progress)

    def _run_failed(self, lease_id: LeaseId, cause: Cause, reason: str) -> RunFailed:
        self.counts.failures += 1
        _log.warning("run.failed lease=%s cause=%s %s", lease_id, cause.value, reason)
        return RunFailed(lease_id, cause, clipped(reason), ENTROPY.random())

    async def _release_executor(self) -> None:
        _log.info("executor.released after_s=%g", self._world.terms.idle_release_ms / 1000)
        await self._executor.release()
        give_back()

    # ------------------------------------------------------------------------------------------- the end

    async def _shut_down(self) -> None:
        self._over = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transfers.close()
        try:
            async with asyncio.timeout(STOP_WAIT_S):
                await self._executor.stop()
        except TimeoutError:
            _log.error("executor.not_stopped after_s=%g", STOP_WAIT_S)


class _SaidGoodbyeError(FallowError):
    """The coordinator ended the session with a Goodbye."""

    def __init__(self, error: FallowError, reconnect_after_ms: int) -> None:
        super().__init__(error.reason, error.message, field=error.field, limit=error.limit, hint=error.hint)
        self.reconnect_after_ms = reconnect_after_ms


def _is_for_a_person(error: FallowError) -> bool:
    """Whether somebody has to act; a key in use may be this worker's own old session, which will be given up."""
    return error.reason is not Reason.KEY_IN_USE


def is_online(world: World) -> bool:
    """Whether a session is open."""
    return isinstance(world.session, Online)
