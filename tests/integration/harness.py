"""Real processes for tests: a coordinator (with its children) and workers on free loopback ports, surely cleaned up.

Start processes from the main thread: the kernel ends them when the thread that started them ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fallow.credentials import Credentials
from fallow_coordinator.attended import PARENT_VARIABLE

START_PATIENCE_S = 45.0
STOP_PATIENCE_S = 25.0
POLL_S = 0.02


@dataclass
class Service:
    """One process of ours and what it left in its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """It and all processes below it that live now."""
        try:
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def tail(self, characters: int = 4_000) -> str:
        """The end of its log, for messages of failed tests."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def kill(self) -> None:
        """`kill -9` of the process alone, not of what is below it."""
        self.process.kill()
        self.process.wait(STOP_PATIENCE_S)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Asks it to stop; its exit status. Fails the test when it or something below it does not end in time."""
        family = self.family()
        if self.running():
            self.process.send_signal(number)
        try:
            returncode = self.process.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            _end(family)
            raise AssertionError(f"{self.name} did not stop within {STOP_PATIENCE_S} s\n{self.tail()}") from None
        left = [process for process in family if _lives(process)]
        _, left = psutil.wait_procs(left, timeout=STOP_PATIENCE_S)
        names = [_name(process) for process in left]
        _end(left)
        assert not left, f"{self.name} left processes behind: {names}\n{self.tail()}"
        return returncode

    def discard(self) -> None:
        """Ends it and everything below it, whatever state they are in."""
        family = self.family()
        if self.running():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_PATIENCE_S)
        _end(family)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)


@dataclass
class CoordinatorService(Service):
    """A coordinator that is ready."""

    state: Path = Path()
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """What `start --json` prints: endpoints, join lines, folders."""

    @property
    def worker_join_line(self) -> str:
        """For volunteers of the default pool."""
        return self.facts["worker_join_line"]

    @property
    def client_join_line(self) -> str:
        """For clients of the operator's account."""
        return self.facts["client_join_line"]

    @property
    def operator(self) -> Credentials:
        """The operator's client credentials in the state folder."""
        return Credentials.load(Path(self.facts["client_credentials"]))

    def cli(self, *arguments: str) -> dict[str, Any]:
        """What `fallow-coordinator ARGUMENTS --json` says. Fails the test when it fails."""
        done = self.cli_raw(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.stderr.decode()}\n{self.tail()}"
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def cli_raw(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """`fallow-coordinator ARGUMENTS` on this state folder, whatever it answers."""
        command = [sys.executable, "-m", "fallow_coordinator", *arguments, "--state", str(self.state)]
        return subprocess.run(command, capture_output=True, timeout=60, check=False)

    def new_token(self, *arguments: str) -> str:
        """A fresh join line."""
        line: str = self.cli("token", "new", *arguments)["join_line"]
        return line


def start_coordinator(
    state: Path, *arguments: str, operator_worker: bool = False, environment: dict[str, str] | None = None
) -> CoordinatorService:
    """Starts a coordinator on `state` (on the ports of its last start, else on free ones); it is ready on return."""
    state.mkdir(parents=True, exist_ok=True)
    ready, log = state / f"ready-{time.monotonic_ns()}.json", state / "coordinator.log"
    ports = () if (state / "ports.json").exists() else ("--port", "0")
    worker = "--operator-worker" if operator_worker else "--no-operator-worker"
    process = spawn(
        ["-m", "fallow_coordinator.attended", "fallow_coordinator", "start", "--state", str(state), *ports, worker,
         "--ready-file", str(ready), "--json", *arguments],
        log, environment,
    )  # fmt: skip
    service = CoordinatorService("coordinator", process, log, state)
    try:
        wait_for(lambda: ready.exists() or not service.running(), START_PATIENCE_S, "the coordinator to be ready")
        assert service.running(), f"the coordinator ended at once\n{service.tail()}"
        service.facts = json.loads(ready.read_text())
    except BaseException:
        service.discard()
        raise
    finally:
        ready.unlink(missing_ok=True)
    return service


@contextlib.contextmanager
def coordinator(
    state: Path, *arguments: str, operator_worker: bool = False, environment: dict[str, str] | None = None
) -> Iterator[CoordinatorService]:
    """A coordinator while the block runs; nothing of it is left afterwards."""
    service = start_coordinator(state, *arguments, operator_worker=operator_worker, environment=environment)
    try:
        yield service
    finally:
        service.discard()


@contextlib.contextmanager
def worker(
    coordinator: CoordinatorService,
    folder: Path,
    *arguments: str,
    join_line: str | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Service]:
    """A worker daemon that has joined, while the block runs. `arguments` go to `fallow-worker start`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "worker.log"
    line = join_line or coordinator.worker_join_line
    joined = subprocess.run(
        [sys.executable, "-m", "fallow_worker", "join", line, "--state", str(folder)],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert joined.returncode == 0, f"the worker could not join: {joined.stderr.decode()}"
    process = spawn(
        ["-m", "fallow_coordinator.attended", "fallow_worker", "start", "--state", str(folder), *arguments],
        log, environment,
    )  # fmt: skip
    service = Service("worker", process, log)
    try:
        yield service
    finally:
        service.discard()


def spawn(arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A Python process in a session of its own whose output goes to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {}), PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )


def wait_for(condition: Any, patience_s: float, what: str) -> Any:
    """The first true value of `condition()`. Fails the test when it takes longer than `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {patience_s} s for {what}"
        time.sleep(POLL_S)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return str(process.pid)


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
