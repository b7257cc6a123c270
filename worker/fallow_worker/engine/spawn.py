"""Spawning an engine child as `protocol` tells, and talking to it frame by frame."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from functools import cache
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason
from fallow_worker.engine.frames import FrameError, FrameReader, encode_frame, to_json
from fallow_worker.engine.memory import SharedMemory
from fallow_worker.engine.protocol import (
    LOG_BYTES_MAX,
    OUTPUT_MEMORY_BYTES,
    READY_SECONDS_MAX,
    ChildArguments,
    FromChild,
    Ready,
    SandboxLevel,
    SpawnOptions,
    ToChild,
    clipped_reason,
)

_PACKAGES: Final = ("fallow", "fallow_worker", "numpy", "onnxruntime", "onnx")
_SYSTEM_PATHS: Final = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/vm",
    "/proc/self",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/kernel/mm/transparent_hugepage",
    "/dev/null",
    "/dev/urandom",
)
_RECEIVE_BYTES: Final = 65536
LOG_SHOWN_BYTES: Final = 200


class ChildGoneError(Exception):
    """The child closed its side of the control socket: it has ended or is about to."""


class SpawnedChild:
    """A running child with its control socket and memory. Use it from one thread at a time."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        control: socket.socket,
        life_fd: int,
        input_memory: SharedMemory,
        output_memory: SharedMemory,
        log: SharedMemory,
    ) -> None:
        """Takes what `spawn_child` made; call that."""
        self.process = process
        self.control = control
        """A blocking stream socket; set it non-blocking to drive it from an event loop with a `FrameReader`."""
        self.input = input_memory
        self.output = output_memory
        self._log = log
        self._life_fd = life_fd
        self._reader = FrameReader()
        self._received: deque[FromChild] = deque()

    def send(self, message: ToChild) -> None:
        """Sends one message. Raises ChildGoneError when nobody reads any more."""
        try:
            self.control.sendall(encode_frame(message))
        except (BrokenPipeError, ConnectionResetError):
            raise ChildGoneError from None

    def receive(self, *, timeout_s: float) -> FromChild | None:
        """The next message, or None when none came in time. Raises ChildGoneError, and FrameError for what is no
        message."""
        deadline = time.monotonic() + timeout_s
        while not self._received:
            readable, _, _ = select.select([self.control], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return None
            try:
                data = self.control.recv(_RECEIVE_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                raise ChildGoneError
            self._received.extend(self._reader.feed(data))
        return self._received.popleft()

    def log_text(self) -> str:
        """What the child wrote to stdout and stderr so far, at most `LOG_BYTES_MAX`."""
        return self._log.read(0, LOG_BYTES_MAX).rstrip(b"\0").decode("utf-8", "replace")

    def kill(self) -> None:
        """Ends the child at once, with everything in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def let_go(self) -> None:
        """Closes the life pipe, as the supervisor's own death would: the child ends by itself."""
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1

    def close(self) -> int:
        """Kills the child if it lives, reaps it, frees socket and memory; gives the return code."""
        if self.process.poll() is None:
            self.kill()
        code = self.process.wait()
        self.control.close()
        self.let_go()
        for memory in (self.input, self.output, self._log):
            memory.close()
        return code


def spawn_child(
    options: SpawnOptions,
    *,
    output_bytes: int = OUTPUT_MEMORY_BYTES,
    level_max: SandboxLevel = SandboxLevel.FULL,
) -> SpawnedChild:
    """A child that was just started; wait for its `Ready`. May be called from any thread."""
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        life_read, life_write = os.pipe()
        undo.callback(os.close, life_write)
        input_memory = SharedMemory.readable_by_child("input")
        undo.callback(input_memory.close)
        output_memory = SharedMemory.writable_by_child("output", output_bytes)
        undo.callback(output_memory.close)
        log = SharedMemory.writable_by_child("log", LOG_BYTES_MAX)
        undo.callback(log.close)
        arguments = ChildArguments(
            options=options,
            control_fd=theirs.fileno(),
            input_fd=input_memory.child_fd,
            output_fd=output_memory.child_fd,
            life_fd=life_read,
            output_bytes=output_bytes,
            search_paths=import_roots(),
            readable_paths=readable_paths(),
            level_max=level_max,
        )
        try:
            process = _start(arguments, log.child_fd)
        finally:
            theirs.close()
            os.close(life_read)
        for memory in (input_memory, output_memory, log):
            memory.passed()
        undo.pop_all()
    return SpawnedChild(
        process, control=ours, life_fd=life_write, input_memory=input_memory, output_memory=output_memory, log=log
    )


def probe_level() -> Ready:
    """What a trial child says of itself: the level really reached here, and how.

    Raises FallowError(EXECUTOR_UNAVAILABLE) when no child comes up. Takes about 0.3 s; the answer holds until the
    kernel, the runtime or the way this process is confined changes.
    """
    child = spawn_child(SpawnOptions())
    try:
        message = child.receive(timeout_s=READY_SECONDS_MAX)
    except (ChildGoneError, FrameError):
        message = None
    finally:
        child.kill()
        log = child.log_text()
        child.close()
    if isinstance(message, Ready):
        return message
    raise FallowError(
        Reason.EXECUTOR_UNAVAILABLE,
        f"no engine child comes up on this machine: {clipped_reason(log[-LOG_SHOWN_BYTES:]) or 'it said nothing'}",
        hint="install the extra `fallow[cpu]`; see the log",
    )


def _start(arguments: ChildArguments, log_fd: int) -> subprocess.Popen[bytes]:
    empty_folder = tempfile.mkdtemp(prefix="fallow-engine-")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("child.py")), to_json(arguments).decode()],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=(arguments.control_fd, arguments.input_fd, arguments.output_fd, arguments.life_fd),
            env=child_environment(),
            cwd=empty_folder,
            start_new_session=True,
        )
    finally:
        Path(empty_folder).rmdir()


def child_environment() -> dict[str, str]:
    """The whole environment of a child: no secret, no HOME, nothing that depends on who runs it."""
    environment = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PATH": "", "TZ": "UTC"}
    # Builds of the runtime since 1.31 report their use to their makers and keep an identifier of the machine.
    environment |= {"ORT_DISABLE_TELEMETRY": "1"}
    # The linear algebra library under NumPy would start a thread for each core; the engine's own steps need none.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    library_path = os.environ.get("LD_LIBRARY_PATH")
    if library_path:
        environment["LD_LIBRARY_PATH"] = library_path
    return environment


@cache
def import_roots() -> tuple[str, ...]:
    """The folders from which a child may import besides the standard library: our packages and the runtimes."""
    roots: list[str] = []
    for package in _PACKAGES:
        folder = _package_folder(package)
        if folder is not None:
            roots.append(str(folder.parent))
    roots += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return tuple(dict.fromkeys(root for root in roots if Path(root).is_dir()))


@cache
def readable_paths() -> tuple[str, ...]:
    """What a child may read until it is locked down: the Python tree, the runtimes, system libraries, CPU facts."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    paths += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    paths += [str(folder) for package in _PACKAGES if (folder := _package_folder(package)) is not None]
    # Packages beside ours, such as what the runtimes need, stand in the same installation folder.
    paths += [root for root in import_roots() if Path(root).name in {"site-packages", "dist-packages"}]
    paths += [f"{sys.base_prefix}/lib"] if sys.base_prefix not in {"", "/"} else []
    paths += [*_SYSTEM_PATHS, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    return tuple(dict.fromkeys(path for path in paths if Path(path).exists()))


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve()
