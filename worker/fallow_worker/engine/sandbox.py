"""Locking an engine child in, and finding out how far that really went. Standard library and ctypes only.

The order matters and is kept by `child.py`: `limit_resources`, `forbid_new_privileges` and `restrict_files` bind the
calling thread and every thread that it starts later, so they come before imports that start threads; `filter_calls`
binds every thread of the process at once, and comes when nothing needs opening any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Final

from fallow.session import SANDBOX_ORDER, SandboxLevel
from fallow_worker.engine import syscalls
from fallow_worker.engine.protocol import OPEN_FILES_MAX, data_limit_class

IS_LINUX: Final = sys.platform == "linux"

# <linux/prctl.h>
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39

# <linux/landlock.h>
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_VERSION_FLAG: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_FILE_RIGHTS_BY_ABI: Final = ((1, 13), (2, 14), (3, 15), (5, 16))
"""(ABI, how many file rights it knows): bits from EXECUTE to MAKE_SYM, then REFER, TRUNCATE, IOCTL_DEV."""
_TCP_RIGHTS: Final = 0b11
"""BIND and CONNECT, since ABI 4."""
_SCOPES: Final = 0b11
"""Abstract UNIX sockets and signals, since ABI 6."""

# <linux/seccomp.h>, <linux/audit.h>, <linux/filter.h>
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_RETURN_ALLOW: Final = 0x7FFF0000
_RETURN_ERRNO: Final = 0x00050000
_RETURN_KILL_PROCESS: Final = 0x80000000
_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Machine → (column of the tables in `syscalls`, AUDIT_ARCH, number of seccomp(2))."""
_X32_BIT: Final = 0x40000000
_LOAD: Final = 0x20
_AND: Final = 0x54
_JUMP_EQUAL: Final = 0x15
_JUMP_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_NUMBER_OFFSET: Final = 0
_ARCHITECTURE_OFFSET: Final = 4
_ARGUMENTS_OFFSET: Final = 16

# <linux/sched.h>: a thread of this process, and no new namespace.
_CLONE_THREAD: Final = 0x00010000
_CLONE_NEW_ANY: Final = 0x7E020080
_MAP_SHARED_ANONYMOUS: Final = 0x21
_FCNTL_ALLOWED: Final = (1, 2, 3, 1030)
"""F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC."""

Instruction = tuple[int, int, int, int]
"""A classic BPF instruction: code, jump if true, jump if false, constant."""


class LockDownError(Exception):
    """A step of the lock-down that this machine should have taken was refused by it."""


def limit_resources(*, data_bytes: int, file_bytes: int) -> None:
    """Sets the limits that `protocol` lists. Raises LockDownError."""
    import resource  # not on every platform

    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_DATA, data_limit_class(data_bytes)),
    ]
    for what, limit in wanted:
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # noqa: PLW2901 - an owner's tighter limit stays
        try:
            resource.setrlimit(what, (limit, limit))
        except (OSError, ValueError) as error:
            raise LockDownError(f"resource limit {what} of {limit}: {error}") from error


def forbid_new_privileges() -> None:
    """No later exec gains rights, for this thread and its later ones. Raises LockDownError."""
    if not IS_LINUX:
        return
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise LockDownError(f"no_new_privs: {_last_error()}")


def landlock_abi() -> int:
    """The Landlock ABI of this kernel; 0 when it has none or does not let us use it."""
    if not IS_LINUX or platform.machine() not in _ARCHITECTURES:
        return 0
    version = _syscall(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_VERSION_FLAG)
    return max(version, 0)


def restrict_files(readable: Iterable[str]) -> int:
    """Leaves this thread and its later ones only reading beneath `readable`, no TCP, no signals to others.

    Gives the Landlock ABI in force, 0 when the kernel has none. Raises LockDownError when it has one and refuses.
    """
    abi = landlock_abi()
    if abi == 0:
        return 0
    file_rights = (1 << max(count for since, count in _FILE_RIGHTS_BY_ABI if since <= abi)) - 1
    attributes = struct.pack("<Q", file_rights)
    if abi >= 4:
        attributes += struct.pack("<Q", _TCP_RIGHTS)
    if abi >= 6:
        attributes += struct.pack("<Q", _SCOPES)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, ctypes.addressof(buffer), len(attributes), 0)
    if ruleset < 0:
        raise LockDownError(f"landlock ruleset: {_last_error()}")
    try:
        for path in readable:
            _allow_reading(ruleset, path)
        if _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            raise LockDownError(f"landlock restrict: {_last_error()}")
    finally:
        os.close(ruleset)
    return abi


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        is_folder = os.path.isdir(path)  # noqa: PTH112 - pathlib is not imported yet
        rule = struct.pack("<Qi", _READ_FILE | (_READ_DIR if is_folder else 0), descriptor)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        if _syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.addressof(buffer), 0) != 0:
            raise LockDownError(f"landlock rule for {path}: {_last_error()}")
    finally:
        os.close(descriptor)


def can_filter_calls() -> bool:
    """Whether there is a system call filter for this machine."""
    return IS_LINUX and platform.machine() in _ARCHITECTURES and sys.maxsize > 2**32


def filter_calls() -> None:
    """Binds every thread of this process to `filter_program`. Raises LockDownError."""
    column, architecture, number = _ARCHITECTURES[platform.machine()]
    instructions = filter_program(column, architecture, os.getpid())
    packed = b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("<HxxxxxxQ", len(instructions), ctypes.addressof(code))
    header = ctypes.create_string_buffer(program, len(program))
    result = _syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.addressof(header))
    if result != 0:
        detail = _last_error() if result < 0 else f"thread {result} could not be bound"
        raise LockDownError(f"system call filter: {detail}")


def filter_program(column: int, architecture: int, process: int) -> list[Instruction]:
    """The filter: everything is refused that `syscalls` does not allow for that machine.

    `column` picks the machine in the tables of `syscalls`; `process` is the only one that may be signalled.
    """
    refuse = (_RETURN, 0, 0, _RETURN_ERRNO | errno.EPERM)
    allow = (_RETURN, 0, 0, _RETURN_ALLOW)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _RETURN_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    if column == 0:
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _RETURN_KILL_PROCESS)]
    for name, numbers in syscalls.ALLOWED.items():
        number = numbers[column]
        if number is not None:
            assert name not in syscalls.CHECKED, name
            program += [(_JUMP_EQUAL, 0, 1, number), allow]
    for name, body in _argument_checks(process, allow, refuse).items():
        number = syscalls.CHECKED[name][column]
        assert number is not None, name
        program += [(_JUMP_EQUAL, 0, len(body), number), *body]
    for numbers in syscalls.DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), refuse]
    program.append((_RETURN, 0, 0, _RETURN_ERRNO | errno.ENOSYS))
    return program


def _argument_checks(process: int, allow: Instruction, refuse: Instruction) -> dict[str, list[Instruction]]:
    def low(argument: int) -> Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument)

    def high(argument: int) -> Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument + 4)

    commands: list[Instruction] = []
    for command in _FCNTL_ALLOWED:
        commands += [(_JUMP_EQUAL, 0, 1, command), allow]
    return {
        "clone": [
            low(0),
            (_AND, 0, 0, _CLONE_THREAD | _CLONE_NEW_ANY),
            (_JUMP_EQUAL, 0, 1, _CLONE_THREAD),
            allow,
            refuse,
        ],
        # Its arguments lie in memory, where a filter cannot look; libraries fall back to clone.
        "clone3": [(_RETURN, 0, 0, _RETURN_ERRNO | errno.ENOSYS)],
        "fcntl": [low(1), *commands, refuse],
        # Shared anonymous memory would escape RLIMIT_DATA.
        "mmap": [
            low(3),
            (_AND, 0, 0, _MAP_SHARED_ANONYMOUS),
            (_JUMP_EQUAL, 0, 1, _MAP_SHARED_ANONYMOUS),
            refuse,
            allow,
        ],
        # Own limits may be read, none set: process 0, new limits at address 0.
        "prlimit64": [
            low(0),
            (_JUMP_EQUAL, 0, 5, 0),
            low(2),
            (_JUMP_EQUAL, 0, 3, 0),
            high(2),
            (_JUMP_EQUAL, 0, 1, 0),
            allow,
            refuse,
        ],
        "tgkill": [low(0), (_JUMP_EQUAL, 0, 1, process), allow, refuse],
        "prctl": [low(0), (_JUMP_EQUAL, 0, 1, _PR_SET_NAME), allow, refuse],
    }


# --------------------------------------------------------------------------------------------- what was really reached


class Probes:
    """Tries what must not work, from the main thread and from one that was started before lock-down."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, bool]] = queue.SimpleQueue()
        self._early_thread = threading.Thread(target=self._answer, name="probe", daemon=True)

    def start_early_thread(self) -> None:
        """Starts the thread that stands for all those that imports start; call it before imports."""
        self._early_thread.start()

    def tried(self) -> dict[str, bool]:
        """What was tried, and whether every thread that tried was refused."""
        mine = self._try_all()
        self._asked.put(True)
        early = self._answers.get()
        return {name: mine[name] and early[name] for name in mine}

    def _answer(self) -> None:
        self._asked.get()
        self._answers.put(self._try_all())

    def _try_all(self) -> dict[str, bool]:
        attempts: dict[str, Callable[[], object]] = {
            "open": lambda: os.close(os.open("/", os.O_RDONLY)),
            "open-runtime": lambda: os.close(os.open(os.__file__, os.O_RDONLY)),
            "write": self._try_write,
            "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
            "local-socket": _try_local_socket,
            "fork": _try_fork,
            "exec": _try_exec,
            "signal": lambda: os.kill(self._parent, 0),
        }
        return {name: _refused(attempt) for name, attempt in attempts.items()}

    @staticmethod
    def _try_write() -> None:
        path = f"/tmp/fallow-probe-{os.getpid()}"  # noqa: S108 - it must not come into being
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(path)  # noqa: PTH108 - paired with os.open


_FILE_PROBES: Final = frozenset({"open", "write"})


def level_of(tried: dict[str, bool], *, limited: bool) -> SandboxLevel:
    """The level that what was tried amounts to; `limited`: limits and no_new_privs are in force."""
    if all(tried.values()):
        return SandboxLevel.FULL
    if all(tried[name] for name in _FILE_PROBES):
        return SandboxLevel.NO_FILES
    return SandboxLevel.LIMITS if limited else SandboxLevel.NONE


def is_at_least(level: SandboxLevel, wanted: SandboxLevel) -> bool:
    """Whether `level` holds what `wanted` holds."""
    return SANDBOX_ORDER.index(level) >= SANDBOX_ORDER.index(wanted)


def has_no_new_privileges() -> bool:
    """Whether this thread is bound so; true where the platform knows no such thing."""
    return not IS_LINUX or _libc().prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno in {errno.EPERM, errno.EACCES, errno.ENOSYS}
    return False


def _try_fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    with contextlib.suppress(OSError):
        os.waitpid(child, 0)


def _try_local_socket() -> None:
    for end in socket.socketpair():
        end.close()


def _try_exec() -> None:
    """Asks to run a program that does not exist: not found means that it would have been let."""
    os.execve("/nonexistent/fallow-probe", ["fallow-probe"], {})  # noqa: S606 - it must be refused


# -------------------------------------------------------------------------------------------------------------- libc


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    library.prctl.restype = ctypes.c_int
    return library


def _syscall(number: int, *arguments: int) -> int:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.argtypes = [ctypes.c_long] * (1 + len(arguments))
    function.restype = ctypes.c_long
    return int(function(number, *arguments))


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())
