"""The system call filter, interpreted as the kernel would, for both machines it is written for."""

from __future__ import annotations

import errno

import pytest

from fallow.session import SandboxLevel
from fallow_worker.engine import sandbox, syscalls
from fallow_worker.engine.sandbox import Instruction

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
UNKNOWN = 0x00050000 | errno.ENOSYS
KILL = 0x80000000
MACHINES = [pytest.param(0, 0xC000003E, id="x86-64"), pytest.param(1, 0xC00000B7, id="aarch64")]
PROCESS = 4321


def verdict(program: list[Instruction], architecture: int, number: int, *arguments: int) -> int:
    """What the filter answers to a system call."""
    words = {0: number, 4: architecture}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        words[16 + 8 * index] = value & 0xFFFFFFFF
        words[20 + 8 * index] = value >> 32
    accumulator = 0
    position = 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        match code:
            case 0x20:
                accumulator = words[constant]
            case 0x54:
                accumulator &= constant
            case 0x15:
                position += if_true if accumulator == constant else if_false
            case 0x35:
                position += if_true if accumulator >= constant else if_false
            case 0x06:
                return constant
            case _:
                raise AssertionError(f"code {code:#x}")


@pytest.mark.parametrize(("column", "architecture"), MACHINES)
def test_every_listed_call_gets_the_verdict_of_its_list(column: int, architecture: int) -> None:
    program = sandbox.filter_program(column, architecture, PROCESS)
    assert len(program) <= 4096
    for names, expected in ((syscalls.ALLOWED, ALLOW), (syscalls.DENIED, REFUSE)):
        for name, numbers in names.items():
            number = numbers[column]
            if number is not None:
                assert verdict(program, architecture, number) == expected, name


@pytest.mark.parametrize(("column", "architecture"), MACHINES)
def test_calls_that_no_list_names_are_answered_as_by_an_older_kernel(column: int, architecture: int) -> None:
    program = sandbox.filter_program(column, architecture, PROCESS)
    listed = {
        numbers[column] for names in (syscalls.ALLOWED, syscalls.CHECKED, syscalls.DENIED) for numbers in names.values()
    }
    for number in range(600):
        if number not in listed:
            assert verdict(program, architecture, number) == UNKNOWN


@pytest.mark.parametrize(("column", "architecture"), MACHINES)
def test_another_architecture_is_killed(column: int, architecture: int) -> None:
    program = sandbox.filter_program(column, architecture, PROCESS)
    assert verdict(program, 0x40000003, 1) == KILL
    if column == 0:
        assert verdict(program, architecture, 0x40000000 | 2) == KILL


@pytest.mark.parametrize(("column", "architecture"), MACHINES)
def test_arguments_decide_where_a_call_has_two_faces(column: int, architecture: int) -> None:
    program = sandbox.filter_program(column, architecture, PROCESS)

    def ask(name: str, *arguments: int) -> int:
        number = syscalls.CHECKED[name][column]
        assert number is not None
        return verdict(program, architecture, number, *arguments)

    thread = 0x3D0F00
    assert ask("clone", thread) == ALLOW
    assert ask("clone", 17) == REFUSE
    assert ask("clone", thread | 0x10000000) == REFUSE
    assert ask("clone3", 0) == UNKNOWN
    assert ask("mmap", 0, 4096, 3, 0x22) == ALLOW
    assert ask("mmap", 0, 4096, 1, 0x01) == ALLOW
    assert ask("mmap", 0, 4096, 3, 0x21) == REFUSE
    assert ask("mmap", 0, 4096, 3, 0x23) == REFUSE
    assert ask("fcntl", 3, 1030) == ALLOW
    assert ask("fcntl", 3, 1033) == REFUSE
    assert ask("fcntl", 3, 4) == REFUSE
    assert ask("prlimit64", 0, 3, 0) == ALLOW
    assert ask("prlimit64", 0, 3, 0x7FFF00000000) == REFUSE
    assert ask("prlimit64", 1, 3, 0) == REFUSE
    assert ask("tgkill", PROCESS, 5, 6) == ALLOW
    assert ask("tgkill", 1, 1, 9) == REFUSE
    assert ask("prctl", 15) == ALLOW
    assert ask("prctl", 38) == REFUSE


def test_no_call_stands_in_two_lists() -> None:
    names = [*syscalls.ALLOWED, *syscalls.CHECKED, *syscalls.DENIED]
    assert len(names) == len(set(names))
    assert set(syscalls.CHECKED) == {"clone", "clone3", "fcntl", "mmap", "prlimit64", "tgkill", "prctl"}
    for essential in (
        "open",
        "openat",
        "openat2",
        "socket",
        "execve",
        "fork",
        "ptrace",
        "bpf",
        "io_uring_setup",
        "kill",
    ):
        assert essential in syscalls.DENIED


def test_the_level_is_what_was_tried() -> None:
    refused = dict.fromkeys(("open", "write", "socket", "fork"), True)
    assert sandbox.level_of(refused, limited=True) is SandboxLevel.FULL
    assert sandbox.level_of(refused | {"socket": False}, limited=True) is SandboxLevel.NO_FILES
    assert sandbox.level_of(refused | {"open": False}, limited=True) is SandboxLevel.LIMITS
    assert sandbox.level_of(refused | {"open": False}, limited=False) is SandboxLevel.NONE
    assert sandbox.is_at_least(SandboxLevel.FULL, SandboxLevel.NO_FILES)
    assert not sandbox.is_at_least(SandboxLevel.LIMITS, SandboxLevel.NO_FILES)
