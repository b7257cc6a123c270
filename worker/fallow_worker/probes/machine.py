"""The port through which probes see a machine: files, folders, links, commands and questions with a deadline.

Everything a probe knows comes through here, so that a recording of a machine that is not here drives the very same
code. Nothing raises and nothing waits longer than its deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

FILE_BYTES_MAX: Final = 1024 * 1024
"""So much of a file is read at most; /proc/cpuinfo of a large server is the longest."""
OUTPUT_BYTES_MAX: Final = 64 * 1024
"""So much of what a command says is read at most."""
NAMES_MAX: Final = 4_096
"""Entries of one folder that are looked at."""
REAP_SECONDS_MAX: Final = 1.0
"""A killed process that a driver holds is left behind after this."""
FAILURE_BYTES_MAX: Final = 400
_CHILDREN: Final = Path(__file__).parent / "children"
_KEPT_VARIABLES: Final = (
    "LD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TMPDIR",
    "TEMP",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
"""What drivers need to be found, and by which an owner hides devices from all programs."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended: `status` 0 and what it said on stdout, or why there is nothing to read."""

    status: int
    output: str
    failure: str = ""
    """Why it did not start or did not end in time, or what it said on stderr; empty when all went well."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child process answered; `failure` says why when there are no facts."""

    facts: Mapping[str, Any]
    failure: str = ""


class Machine(Protocol):
    """A machine to look at. No method raises; paths are those of the machine itself."""

    @property
    def system(self) -> str:
        """`Linux`, `Darwin` or `Windows`."""
        ...

    @property
    def architecture(self) -> str:
        """`x86_64`, `aarch64`, `arm64` …"""
        ...

    @property
    def release(self) -> str:
        """The operating system's release."""
        ...

    def cores_allowed(self) -> int:
        """Cores that the scheduler lets this process use; at least 1."""
        ...

    def read(self, path: str) -> str | None:
        """The text of a file without its last line feed; None when there is none to read."""
        ...

    def names(self, folder: str) -> tuple[str, ...]:
        """The entries of a folder, sorted; none when there is no such folder."""
        ...

    def target(self, path: str) -> str | None:
        """Where a path really leads, every link followed; None when nothing is there."""
        ...

    def run(self, command: Sequence[str], *, deadline_s: float) -> Ran:
        """What a command of the operating system says."""
        ...

    def ask(self, child: str, question: Mapping[str, Any], *, deadline_s: float) -> Answer:
        """What a short-lived Python child (`children/<child>.py`) answers; it may import runtimes and load drivers."""
        ...


class LocalMachine:
    """The machine that this process runs on."""

    def __init__(self, root: str = "/") -> None:
        """`root` stands for `/` in paths: for tests over a copied tree."""
        self._root = root.rstrip("/")
        self.system = platform.system()
        self.architecture = platform.machine()
        self.release = platform.release()

    def cores_allowed(self) -> int:
        """By affinity where the platform has it."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def read(self, path: str) -> str | None:
        """At most `FILE_BYTES_MAX` of the file."""
        try:
            with Path(self._root + path).open("rb") as file:
                return file.read(FILE_BYTES_MAX).decode("utf-8", "replace").removesuffix("\n")
        except (OSError, ValueError):
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        """At most `NAMES_MAX` of them."""
        try:
            return tuple(sorted(os.listdir(self._root + folder))[:NAMES_MAX])  # noqa: PTH208 - names, not paths
        except OSError:
            return ()

    def target(self, path: str) -> str | None:
        """The real path, below the root when there is one."""
        try:
            return os.path.realpath(self._root + path, strict=True).removeprefix(self._root)
        except OSError:
            return None

    def run(self, command: Sequence[str], *, deadline_s: float) -> Ran:
        """Starts it in a session of its own, which is killed at the deadline; a process that a driver holds is left."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                return Ran(-1, "", f"{command[0]}: {error.strerror}")
            try:
                status = process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                return Ran(-1, "", f"no answer within {deadline_s:g} s")
            finally:
                if process.returncode is None:
                    _end(process)
            failure = _head(errors).strip() or f"ended with {status}" if status else ""
            return Ran(status, _head(output), failure[-FAILURE_BYTES_MAX:])

    def ask(self, child: str, question: Mapping[str, Any], *, deadline_s: float) -> Answer:
        """Runs the child with this interpreter and this process's import paths, and nothing else of it."""
        asked = json.dumps({**question, "search_paths": [path for path in sys.path if path]})
        command = [sys.executable, "-I", "-S", "-B", str(_CHILDREN / f"{child}.py"), asked]
        ran = self.run(command, deadline_s=deadline_s)
        if ran.status != 0:
            return Answer({}, _crash(ran))
        # Libraries write to stdout as they like; the answer is the last line.
        try:
            facts = json.loads(ran.output.rstrip().rpartition("\n")[2])
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            return Answer({}, "the probe's child said nothing that can be read")
        return Answer(cast("dict[str, Any]", facts))


HERE: Final = LocalMachine()
"""The machine that this process runs on."""


def _crash(ran: Ran) -> str:
    if ran.status < -1:
        with contextlib.suppress(ValueError):
            return f"a crash with {signal.Signals(-ran.status).name}"
    return ran.failure.rpartition("\n")[2] or f"ended with {ran.status}"


def _environment() -> dict[str, str]:
    """Little, and the same for everyone: programs that probes start need no secrets and speak English."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C", "LC_ALL": "C"}
    # Builds of the runtime since 1.31 report their use to their makers.
    environment |= {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # NVML counts GPUs by bus; CUDA does so only when told.
    return environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of its session, and waits for it unless a driver holds it."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_SECONDS_MAX)


def _head(file: Any) -> str:
    file.seek(0)
    return bytes(file.read(OUTPUT_BYTES_MAX)).decode("utf-8", "replace")
