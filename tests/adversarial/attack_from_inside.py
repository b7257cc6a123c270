"""Run as a script: locks itself in as an engine child does, then asks the kernel for what it must not get.

Prints one JSON object: what was asked for → the errno of the refusal, 0 when it was granted.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import threading

from fallow_worker.engine import sandbox, syscalls

COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
NUMBERS = {name: numbers[COLUMN] for table in (syscalls.DENIED, syscalls.CHECKED) for name, numbers in table.items()}
LIBC = ctypes.CDLL(None, use_errno=True)
PATH = ctypes.create_string_buffer(b"/etc/passwd")
SCRATCH = ctypes.create_string_buffer(4096)
PARENT = os.getppid()

ATTACKS: dict[str, tuple[int, ...]] = {
    "openat": (-100, ctypes.addressof(PATH), 0, 0),
    "openat2": (-100, ctypes.addressof(PATH), ctypes.addressof(SCRATCH), 24),
    "newfstatat": (-100, ctypes.addressof(PATH), ctypes.addressof(SCRATCH), 0),
    "statx": (-100, ctypes.addressof(PATH), 0, 0x7FF, ctypes.addressof(SCRATCH)),
    "readlinkat": (-100, ctypes.addressof(PATH), ctypes.addressof(SCRATCH), 100),
    "memfd_create": (ctypes.addressof(PATH), 0),
    "ftruncate": (3, 1 << 40),
    "socket": (2, 1, 0),
    "socketpair": (1, 1, 0, ctypes.addressof(SCRATCH)),
    "sendmsg": (0, ctypes.addressof(SCRATCH), 0),
    "clone": (17, 0, 0, 0, 0),
    "clone3": (ctypes.addressof(SCRATCH), 64),
    "execveat": (-100, ctypes.addressof(PATH), 0, 0, 0),
    "ptrace": (16, PARENT, 0, 0),
    "process_vm_readv": (PARENT, ctypes.addressof(SCRATCH), 1, ctypes.addressof(SCRATCH), 1, 0),
    "pidfd_open": (PARENT, 0),
    "kill": (PARENT, 0),
    "tkill": (PARENT, 0),
    "tgkill": (PARENT, PARENT, 0),
    "prlimit64": (PARENT, 7, 0, ctypes.addressof(SCRATCH)),
    "setpriority": (0, PARENT, 19),
    "sched_setaffinity": (PARENT, 8, ctypes.addressof(SCRATCH)),
    "bpf": (0, ctypes.addressof(SCRATCH), 64),
    "io_uring_setup": (8, ctypes.addressof(SCRATCH)),
    "userfaultfd": (0,),
    "perf_event_open": (ctypes.addressof(SCRATCH), 0, -1, -1, 0),
    "keyctl": (0, -3, 0),
    "unshare": (0x10000000,),
    "mount": (0, ctypes.addressof(PATH), 0, 0, 0),
    "shmget": (0, 4096, 0o1600),
    "mmap": (0, 4096, 3, 0x21, -1, 0),
    "fcntl": (0, 1033, 1),
    "prctl": (4, 1, 0, 0, 0),
    "ioctl": (0, 0x5412, ctypes.addressof(SCRATCH)),
    "seccomp": (0, 0, 0),
}


LISTED = {
    numbers[COLUMN] for table in (syscalls.ALLOWED, syscalls.CHECKED, syscalls.DENIED) for numbers in table.values()
}
PASSED_BY_THE_KERNEL = {335, 336}
"""uretprobe and uprobe on x86-64: no filter is asked; who calls them from anywhere but a probe dies by SIGILL."""
CALLS_TRIED = 700
"""Numbers of system calls asked for, known to anybody or not: what a newer kernel adds is no way out."""


def ask_the_rest(answers: dict[str, int]) -> None:
    """Every refused call that has no arguments of its own above, and every number that stands in no table."""
    LIBC.syscall.argtypes = [ctypes.c_long] * 7
    LIBC.syscall.restype = ctypes.c_long
    named = {name: numbers[COLUMN] for name, numbers in syscalls.DENIED.items() if name not in ATTACKS}
    unlisted = {
        f"call {number}": number for number in range(CALLS_TRIED) if number not in LISTED | PASSED_BY_THE_KERNEL
    }
    for name, number in {**named, **unlisted}.items():
        if number is None:
            continue
        ctypes.set_errno(0)
        result = LIBC.syscall(number, 0, 0, 0, 0, 0, 0)
        if result == 0 and name in {"fork", "vfork"}:
            os._exit(0)
        answers[f"{name} from the main thread"] = ctypes.get_errno() if result < 0 else 0


def ask_all(answers: dict[str, int], thread: str) -> None:
    for name, arguments in ATTACKS.items():
        number = NUMBERS[name]
        assert number is not None, name
        LIBC.syscall.argtypes = [ctypes.c_long] * (1 + len(arguments))
        LIBC.syscall.restype = ctypes.c_long
        ctypes.set_errno(0)
        result = LIBC.syscall(number, *arguments)
        if result == 0 and name == "clone":
            os._exit(0)
        answers[f"{name} from the {thread} thread"] = ctypes.get_errno() if result < 0 else 0


def main() -> None:
    answers: dict[str, int] = {}
    go, done = threading.Event(), threading.Event()

    def early() -> None:
        go.wait()
        ask_all(answers, "early")
        done.set()

    threading.Thread(target=early, daemon=True).start()
    sandbox.limit_resources(data_bytes=1 << 30, file_bytes=1 << 20)
    sandbox.forbid_new_privileges()
    sandbox.filter_calls()
    ask_all(answers, "main")
    ask_the_rest(answers)
    go.set()
    done.wait(30)
    late = threading.Thread(target=ask_all, args=(answers, "late"))
    late.start()
    late.join()
    os.write(1, json.dumps(answers).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
