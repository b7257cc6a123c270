"""The executor on Ray, seen from the daemon: it never imports Ray but talks to a driver that it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, assert_never

from fallow.errors import FallowError, Reason
from fallow.limits import MIB
from fallow.session import Capability, Cause
from fallow_worker.engine.frames import FrameError, to_json
from fallow_worker.engine.protocol import clipped_reason
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.capability import NodeFacts, capability_of, node_facts
from fallow_worker.executor.choice import ExecutorKind
from fallow_worker.executor.leftovers import end_leftovers
from fallow_worker.executor.ray_head import check_head
from fallow_worker.executor.ray_messages import (
    STREAM_BYTES,
    CancelWork,
    Down,
    DriverArguments,
    FromDriver,
    RowsDone,
    ToDriver,
    Up,
    WorkDone,
    WorkEnded,
    body_of,
    encode,
    read_frame,
    start_of,
)
from fallow_worker.executor.ray_settings import RaySettings, cluster_token_path, ray_environment
from fallow_worker.executor.supervisor import LEASES_AT_ONCE_MAX, Supervisor
from fallow_worker.ports import Outcome, Work

log = logging.getLogger(__name__)

STOP_SECONDS_MAX: Final = 10.0
"""A driver that has not ended by then is killed."""
BACKOFF_SECONDS_MIN: Final = 0.5
BACKOFF_SECONDS_MAX: Final = 30.0
LOG_TAIL_BYTES: Final = 2000
FOLDER_BYTES_FREE_MIN: Final = 64 * MIB
"""Room for Ray's sockets and logs; with less it would only time out, saying nothing of the disk."""


class RayExecutor:
    """Runs leases in engine children of supervisor actors on Ray. Use it inside one event loop.

    Ray starts with the first lease and is gone after `release`.
    """

    def __init__(self, settings: RaySettings | None = None) -> None:
        self._settings = settings or RaySettings()
        self._driver: _Driver | None = None
        self._starting = asyncio.Lock()
        self._failures = 0
        self._capability: Capability | None = None

    @property
    def driver_pid(self) -> int | None:
        """The driver's process while there is one."""
        return self._driver.pid if self._driver is not None else None

    async def start(self) -> None:
        """Checks that Ray is installed and the owner's cluster answers. Raises EXECUTOR_UNAVAILABLE."""
        if importlib.util.find_spec("ray") is None:
            raise FallowError(
                Reason.EXECUTOR_UNAVAILABLE,
                "Ray is not installed for this Python",
                field="executor",
                hint="install it with `pip install 'fallow[ray]'`, or start the worker with `--executor process`",
            )
        if not self._settings.is_local:
            await check_head(self._settings.address, cluster_token_path(self._settings))

    async def capability(self) -> Capability:
        """The nodes' processors and the sandbox level reached on all of them. Raises WorkFailed(platform).

        A local Ray is not started for this: a child of the daemon tells the same.
        """
        if self._capability is None:
            if self._settings.is_local:
                supervisor = Supervisor(self._settings.supervisor)
                nodes: tuple[NodeFacts, ...] = (node_facts(supervisor, await supervisor.probe()),)
            else:
                nodes = (await self._driver_up()).nodes
            self._capability = capability_of(nodes, ExecutorKind.RAY)
        return self._capability

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Runs one lease. Raises WorkFailed; cancelling stops the work."""
        driver = await self._driver_up()
        try:
            outcome = await driver.run(work, progress)
        except WorkFailed as failed:
            if failed.cause is not Cause.PLATFORM:  # Ray did its part
                self._failures = 0
            raise
        self._failures = 0
        return outcome

    async def release(self) -> None:
        """Stops Ray with everything that belongs to it; leases at work fail as preempted by the owner."""
        async with self._starting:
            driver, self._driver = self._driver, None
            if driver is not None:
                await driver.stop()

    async def stop(self) -> None:
        """Stops Ray for good."""
        await self.release()

    async def _driver_up(self) -> _Driver:
        async with self._starting:
            if self._driver is not None and self._driver.alive:
                return self._driver
            if self._driver is not None:
                await self._driver.stop()
                self._driver = None
            if self._failures:
                await asyncio.sleep(min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** (self._failures - 1)))
            self._failures += 1
            if not self._settings.is_local:  # Ray would take minutes to say less
                try:
                    await check_head(self._settings.address, cluster_token_path(self._settings))
                except FallowError as error:
                    raise WorkFailed(Cause.PLATFORM, clipped_reason(str(error))) from None
            driver = _Driver(self._settings)
            try:
                await driver.up()
            except BaseException:
                await asyncio.shield(driver.stop())
                raise
            self._driver = driver
            return driver


class _Driver:
    """One driver process and what it still owes."""

    def __init__(self, settings: RaySettings) -> None:
        """Spawns it. Raises WorkFailed(platform) when the machine cannot."""
        self.nodes: tuple[NodeFacts, ...] = ()
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, tuple[asyncio.Future[Outcome], Callable[[int], None]]] = {}
        self._numbers = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._writing = asyncio.Lock()
        self._gone = ""
        self._up: asyncio.Future[None] = self._loop.create_future()
        self._receiving: asyncio.Task[None] | None = None
        self._folder = ""
        try:
            self._folder = _private_folder()
            self._process, self._control = _spawn(settings, self._folder)
        except OSError as error:
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise WorkFailed(Cause.PLATFORM, clipped_reason(f"the Ray driver cannot be started: {error}")) from None

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It has not said or shown that it is gone."""
        return not self._gone

    async def up(self) -> None:
        """Waits until Ray runs. Raises WorkFailed(platform) with what it said instead."""
        reader, self._writer = await asyncio.open_connection(sock=self._control, limit=STREAM_BYTES)
        self._receiving = asyncio.create_task(self._receive(reader))
        try:
            async with asyncio.timeout(self._settings.up_seconds_max):
                await asyncio.shield(self._up)
        except TimeoutError:
            where = "" if self._settings.is_local else f" at {self._settings.address}"
            raise WorkFailed(
                Cause.PLATFORM, f"no Ray{where} within {self._settings.up_seconds_max:g} s: check that it runs"
            ) from None

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Sends a lease and waits for its end. Raises WorkFailed."""
        if len(self._calls) >= LEASES_AT_ONCE_MAX:
            raise WorkFailed(Cause.PLATFORM, f"more than {LEASES_AT_ONCE_MAX} leases at once")
        if self._gone:
            raise WorkFailed(Cause.PLATFORM, self._gone)
        call = next(self._numbers)
        answer: asyncio.Future[Outcome] = self._loop.create_future()
        self._calls[call] = (answer, progress)
        try:
            await self._say(start_of(call, work), body_of(work))
            return await answer
        except asyncio.CancelledError:
            if not answer.done() or answer.cancelled():
                await asyncio.shield(self._say(CancelWork(call)))
            raise
        finally:
            self._calls.pop(call, None)

    async def stop(self) -> None:
        """Ends it and everything that it started."""
        is_starting = not self._up.done()
        self._lose("Ray was stopped", Cause.OWNER_PREEMPT)
        if is_starting:  # Ray's start does not listen; what it has begun is found below
            self._process.kill()
        if self._writer is not None:
            self._writer.close()
        else:
            self._control.close()
        await self._ended()
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        await end_leftovers(folder=self._folder, session=self._process.pid)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _ended(self) -> None:
        deadline = self._loop.time() + STOP_SECONDS_MAX
        while self._process.poll() is None:
            if self._loop.time() > deadline:
                log.warning("ray.driver_killed pid=%s", self._process.pid)
                self._process.kill()
                deadline = float("inf")
            await asyncio.sleep(0.02)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while (frame := await read_frame(reader, FromDriver)) is not None:
                self._on_message(frame[0], frame[1])
        except FrameError as error:
            self._lose(f"the Ray driver broke its contract: {error}")
        self._lose(self._gone or f"the Ray driver died. {_log_tail(self._folder)}")

    def _on_message(self, message: FromDriver, body: bytes) -> None:
        match message:
            case Up():
                self.nodes = message.nodes
                if not self._up.done():
                    self._up.set_result(None)
            case Down():
                self._lose(message.reason)
            case RowsDone():
                if message.call in self._calls:
                    self._calls[message.call][1](message.rows_done)
            case WorkDone():
                outcome = Outcome(
                    body,
                    message.failures,
                    message.usage,
                    message.execution_class,
                    message.report,
                    message.verdict,
                    message.findings,
                    message.spread,
                )
                answer = self._answer(message.call)
                if answer is not None:
                    answer.set_result(outcome)
            case WorkEnded():
                answer = self._answer(message.call)
                if answer is not None:
                    answer.set_exception(WorkFailed(message.cause, message.reason))
            case _:
                assert_never(message)

    def _answer(self, call: int) -> asyncio.Future[Outcome] | None:
        entry = self._calls.get(call)
        return entry[0] if entry is not None and not entry[0].done() else None

    async def _say(self, message: ToDriver, body: bytes = b"") -> None:
        assert self._writer is not None
        header, body = encode(message, body)
        async with self._writing:
            with contextlib.suppress(ConnectionError):
                self._writer.write(header)
                if body:
                    self._writer.write(body)
                await self._writer.drain()

    def _lose(self, reason: str, cause: Cause = Cause.PLATFORM) -> None:
        """The driver is of no use any more: everything that waits for it fails."""
        reason = clipped_reason(reason)
        if not self._gone:
            self._gone = reason
            if cause is Cause.PLATFORM:
                log.warning("ray.lost reason=%s", reason)
        if not self._up.done():
            self._up.set_exception(WorkFailed(Cause.PLATFORM, reason))
            self._up.exception()
        for answer, _ in self._calls.values():
            if not answer.done():
                answer.set_exception(WorkFailed(cause, reason))


def _spawn(settings: RaySettings, folder: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    if settings.is_local:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        token_path = str(token)
    else:
        token_path = cluster_token_path(settings)
        if not token_path:
            log.warning("ray.no_token address=%s hint=%s", settings.address, "switch on Ray's token authentication")
    ours, theirs = socket.socketpair()
    try:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BYTES)
        arguments = DriverArguments(settings=settings, control_fd=theirs.fileno(), folder=folder)
        with (Path(folder) / "driver.log").open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "fallow_worker.executor.ray_driver", to_json(arguments).decode()],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                pass_fds=(theirs.fileno(),),
                env=ray_environment(settings, folder, token_path),
                cwd=folder,
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return process, ours


def _private_folder() -> str:
    """A folder of our own with a short name: Ray puts Unix sockets deep below it, whose paths end at 107 bytes.

    Raises WorkFailed(platform) when its disk is full.
    """
    base = tempfile.gettempdir()
    base = base if len(base) <= 20 else "/tmp"  # noqa: S108 - the folder is made with mode 0700
    disk = os.statvfs(base)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < FOLDER_BYTES_FREE_MIN:
        raise WorkFailed(
            Cause.PLATFORM,
            f"Ray needs {FOLDER_BYTES_FREE_MIN // MIB} MiB in {base} and {free_bytes // MIB} MiB are free: "
            "free some space there, or name another folder with TMPDIR",
        )
    return tempfile.mkdtemp(prefix="fr-", dir=base)


def _log_tail(folder: str) -> str:
    try:
        lines = (Path(folder) / "driver.log").read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
