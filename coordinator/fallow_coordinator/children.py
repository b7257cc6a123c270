"""Child processes of the coordinator: started, watched, restarted with back-off, and surely stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from fallow_coordinator.attended import PARENT_VARIABLE

_log = logging.getLogger(__name__)

RESTART_DELAY_S_MIN: Final = 0.2
RESTART_DELAY_S_MAX: Final = 15.0
STEADY_AFTER_S: Final = 60.0
"""A child that lived this long begins again with the shortest delay."""
STOP_GRACE_S: Final = 12.0
"""From SIGTERM to SIGKILL."""


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """How to start one child."""

    name: str
    """For logs: `blobs`, `follower`, `operator-worker`."""
    module: str
    arguments: Sequence[str] = ()
    log_path: Path | None = None
    """Where its output goes; None: to this process's standard error."""
    environment: dict[str, str] = field(default_factory=dict)


class Children:
    """Keeps children alive while it runs, each in a session of its own."""

    def __init__(self, ready: Callable[[str, int], None] = lambda _name, _pid: None) -> None:
        """`ready` hears of every start, with the child's process id."""
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()

    def start(self, command: ChildCommand) -> None:
        """Starts a child and keeps it alive until `stop`."""
        task = asyncio.create_task(self._keep(command), name=f"child-{command.name}")
        self._tasks.append(task)

    def pid_of(self, name: str) -> int | None:
        """The process id of a child that runs now."""
        process = self._processes.get(name)
        return process.pid if process is not None and process.returncode is None else None

    async def stop(self) -> None:
        """Ends all children: SIGTERM, then SIGKILL to whatever of their sessions is left after the grace."""
        self._stopping.set()
        for process in self._running():
            process.terminate()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
        for process in self._running():
            _log.warning("child.killed pid=%d after_s=%g", process.pid, STOP_GRACE_S)
            _kill_session(process.pid)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _running(self) -> list[asyncio.subprocess.Process]:
        return [process for process in self._processes.values() if process.returncode is None]

    async def _keep(self, command: ChildCommand) -> None:
        delay_s = RESTART_DELAY_S_MIN
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            returncode = await self._run_once(command)
            if self._stopping.is_set():
                return
            lived_s = loop.time() - began
            delay_s = RESTART_DELAY_S_MIN if lived_s >= STEADY_AFTER_S else min(delay_s * 2, RESTART_DELAY_S_MAX)
            _log.warning(
                "child.ended name=%s returncode=%s lived_s=%.1f restart_in_s=%.1f",
                command.name, returncode, lived_s, delay_s,
            )  # fmt: skip
            jittered_s = delay_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), jittered_s)

    async def _run_once(self, command: ChildCommand) -> int | None:
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if command.log_path is not None:
                output = stack.enter_context(command.log_path.open("ab"))
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "fallow_coordinator.attended", command.module, *command.arguments,
                    stdin=asyncio.subprocess.DEVNULL, stdout=output or sys.stderr, stderr=output or sys.stderr,
                    env={**os.environ, **command.environment, PARENT_VARIABLE: str(os.getpid())},
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                _log.error("child.not_started name=%s error=%s", command.name, error)
                return None
        self._processes[command.name] = process
        _log.info("child.started name=%s pid=%d", command.name, process.pid)
        self._ready(command.name, process.pid)
        returncode = await process.wait()
        _kill_session(process.pid)
        return returncode


def _kill_session(pid: int) -> None:
    """Ends whatever a child left behind in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
