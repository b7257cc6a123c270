"""The whole system on loopback: coordinator with blob service and operator worker, one worker, one client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from scripts.benches.report import say

from fallow.client import AsyncClient, connect_async
from fallow.v1 import admin_service_pb2
from fallow_coordinator.admin_client import CALL_TIME_MAX_S, admin_stub

START_PATIENCE_S = 120.0
STOP_PATIENCE_S = 40.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Counts:
    """What the system did so far, by its own account."""

    bytes_fetched: int
    """By the worker, inputs of leases only."""
    roots_hashed: int
    """By the worker, over output rows."""
    commits: int
    """Of the journal to disk."""
    commitments: int
    """Recorded by the coordinator."""
    rows_settled: int

    def since(self, before: Counts) -> dict[str, int]:
        """What came in between."""
        return {
            name: getattr(self, name) - getattr(before, name)
            for name in ("bytes_fetched", "roots_hashed", "commits", "commitments")
        }


class System:
    """Running processes; made by `running_system`."""

    def __init__(self, state: Path, coordinator: psutil.Process, worker: psutil.Process, client: AsyncClient) -> None:
        self._state = state
        self.coordinator = coordinator
        """The coordinator's own process; blob service, follower and operator worker are its children."""
        self.worker = worker
        """The worker's daemon; Ray and engines are below it."""
        self.client = client

    def worker_status(self) -> dict[str, Any]:
        """What the worker's daemon wrote last, at most a second ago."""
        try:
            status: dict[str, Any] = json.loads((self._state / "worker" / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return status

    async def counts(self, *, rows_settled_min: int = 0) -> Counts:
        """Everything so far, once the worker has told of that many settled rows."""
        await until(lambda: self._rows_settled() >= rows_settled_min, "the worker to tell of all its rows", 30.0)
        async with admin_stub(self._state / "coordinator") as stub:
            now = await stub.GetStatus(admin_service_pb2.GetStatusRequest(), timeout=CALL_TIME_MAX_S)
        counts = self.worker_status().get("counts", {})
        return Counts(
            bytes_fetched=counts.get("blob_bytes_fetched", 0) + counts.get("inline_bytes_fetched", 0),
            roots_hashed=counts.get("roots", 0),
            commits=now.commits,
            commitments=now.commitments,
            rows_settled=counts.get("rows", 0),
        )

    def processes(self) -> list[psutil.Process]:
        """All processes of the system, not this one."""
        return [*family(self.coordinator), *family(self.worker)]

    def _rows_settled(self) -> int:
        settled: int = self.worker_status().get("counts", {}).get("rows", 0)
        return settled


@contextlib.asynccontextmanager
async def running_system(*worker_arguments: str) -> AsyncGenerator[System, None]:
    """The system while the block runs; nothing of it is left afterwards. The arguments go to `fallow-worker start`."""
    with contextlib.ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fallow-bench-")))
        say("starting a coordinator, its operator worker and a worker …")
        coordinator = stack.enter_context(
            running_process(
                state / "coordinator.log",
                "fallow-coordinator", "start", "--state", state / "coordinator", "--port", "0", "--json",
            )
        )  # fmt: skip
        assert coordinator.stdout is not None
        line = coordinator.stdout.readline()
        assert line, f"the coordinator did not start:\n{process_tail(state / 'coordinator.log')}"
        facts = json.loads(line)
        folder = state / "worker"
        _run("fallow-worker", "join", facts["worker_join_line"], "--state", folder)
        worker = stack.enter_context(
            running_process(state / "worker.log", "fallow-worker", "start", "--state", folder, *worker_arguments)
        )
        async with await connect_async(state / "coordinator" / "client") as client:
            system = System(state, psutil.Process(coordinator.pid), psutil.Process(worker.pid), client)
            await until(
                lambda: system.worker_status().get("session") == "online", "the worker to be online", START_PATIENCE_S
            )
            try:
                yield system
            except BaseException:
                for name in ("coordinator", "worker"):
                    say(f"{name}: {process_tail(state / f'{name}.log')}")
                raise


async def until(holds: Callable[[], bool], what: str, patience_s: float) -> None:
    """Waits until `holds()`."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:g} s for {what}")
        await asyncio.sleep(POLL_S)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time that these have used so far, those that have ended since not counted."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def resident_mb(process: psutil.Process) -> float:
    """Resident memory of one process, in MB (10^6 bytes)."""
    return round(process.memory_info().rss / 1e6, 1)


@contextlib.contextmanager
def running_process(log: Path, name: str, *arguments: object) -> Generator[subprocess.Popen[str], None, None]:
    """One of our commands while the block runs, in a session of its own; `log` takes its stderr."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [tool(name), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _run(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=START_PATIENCE_S, check=False
    )
    assert not done.returncode, f"{name} failed:\n{done.stderr}"


def _end(process: subprocess.Popen[str]) -> None:
    below = family(psutil.Process(process.pid)) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        say(f"{process.args!r} did not stop within {STOP_PATIENCE_S:g} s and was killed")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    _, left = psutil.wait_procs(below, timeout=STOP_PATIENCE_S)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def tool(name: str) -> str:
    """Path of one of our commands."""
    return str(Path(sys.executable).parent / name)


def process_tail(log: Path) -> str:
    """The end of a log, for messages."""
    return log.read_text(errors="replace")[-4_000:] if log.exists() else ""
