"""The life of an engine child: lock-down in the one order that holds, then messages until the socket closes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from fallow.session import SandboxLevel
from fallow_worker.engine import frames, sandbox
from fallow_worker.engine.protocol import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_MEMORY,
    EXIT_PARENT_GONE,
    EXIT_PROTOCOL,
    EXIT_START_FAILED,
    ChildArguments,
    ChildKind,
    Ready,
    data_limit_class,
    lanes_of,
)

if TYPE_CHECKING:
    from fallow_worker.engine.work import Worker


def live(arguments_json: str, *, started: float) -> NoReturn:
    """Locks down, answers `Ready`, works, and ends the process with one of the protocol's exit codes."""
    try:
        arguments: ChildArguments = frames.from_json(arguments_json, ChildArguments)
        probes, abi = _lock_first(arguments)
        _watch_parent(arguments.life_fd)
        ready, worker = _prepare(arguments, probes, abi, started)
    except BaseException:  # nothing can be answered yet; the log is read by whoever waits for Ready
        traceback.print_exc()
        _end(EXIT_START_FAILED)
    try:
        worker.send(ready)
        worker.serve()
    except frames.FrameError:
        traceback.print_exc()
        _end(EXIT_PROTOCOL)
    except MemoryError:
        _end(EXIT_MEMORY)
    except BrokenPipeError:
        _end(EXIT_PARENT_GONE)
    except BaseException:  # a mistake of ours: say where
        traceback.print_exc()
        _end(EXIT_INTERNAL)
    _end(EXIT_DONE)


def _lock_first(arguments: ChildArguments) -> tuple[sandbox.Probes, int]:
    """What must come before imports: limits, no new privileges, Landlock; and a thread that stands for later ones."""
    os.nice(arguments.options.niceness)
    if arguments.level_max is not SandboxLevel.NONE:
        sandbox.limit_resources(data_bytes=arguments.options.data_bytes_max, file_bytes=arguments.output_bytes)
        sandbox.forbid_new_privileges()
    abi = 0
    if sandbox.is_at_least(arguments.level_max, SandboxLevel.NO_FILES):
        abi = sandbox.restrict_files(arguments.readable_paths)
    probes = sandbox.Probes()
    probes.start_early_thread()
    return probes, abi


def _prepare(arguments: ChildArguments, probes: sandbox.Probes, abi: int, started: float) -> tuple[Ready, Worker]:
    from fallow_worker.engine import canary, onnx_program, work

    options = arguments.options
    if options.kind is ChildKind.INSPECT:
        importlib.import_module("fallow_worker.engine.inspection").prepare()
        importlib.import_module("fallow_worker.engine.referee")
    onnx_program.prepare_runtime()
    machine_class = onnx_program.machine_class(
        data_limit_bytes=data_limit_class(options.data_bytes_max),
        threads_per_batch=max(1, options.threads // lanes_of(options)),
    )
    before = canary.sing(threads=options.threads, lanes=lanes_of(options), allow_spinning=options.allow_spinning)
    gc.collect()
    gc.freeze()
    if arguments.level_max is SandboxLevel.FULL and sandbox.can_filter_calls():
        sandbox.filter_calls()
    if canary.sing(threads=options.threads, lanes=lanes_of(options), allow_spinning=options.allow_spinning) != before:
        raise sandbox.LockDownError("the canary sings differently behind the filter")
    tried = probes.tried()
    limited = arguments.level_max is not SandboxLevel.NONE and sandbox.has_no_new_privileges()
    ready = Ready(
        level=sandbox.level_of(tried, limited=limited),
        denied=tuple(name for name, refused in tried.items() if refused),
        permitted=tuple(name for name, refused in tried.items() if not refused),
        landlock_abi=abi,
        runtime=onnx_program.runtime_name(),
        execution_class=machine_class,
        start_ms=int((time.monotonic() - started) * 1000),
        memory_bytes=work.memory_bytes_peak(),
    )
    return ready, work.Worker(arguments, machine_class)


def _watch_parent(life_fd: int) -> None:
    """Ends this process when the supervisor is gone: by a signal of the kernel, and by a thread where there is none."""
    if sys.platform == "linux":
        import fcntl

        # The kernel sends SIGIO, whose default is the end, when the last writer closes the pipe: no lock of the
        # interpreter can hold that up.
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(life_fd, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(life_fd, fcntl.F_GETFL)
        fcntl.fcntl(life_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    threading.Thread(target=_end_with_parent, args=(life_fd,), name="life", daemon=True).start()


def _end_with_parent(life_fd: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(life_fd, 1):
            pass
    os._exit(EXIT_PARENT_GONE)


def _end(code: int) -> NoReturn:
    """Leaves at once: destructors of a foreign program's runtime have nothing to do here."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
