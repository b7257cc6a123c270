"""Small promises of the contract between supervisor and child."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.limits import GIB, ROW_FAILURE_REASON_BYTES_MAX
from fallow.session import Cause
from fallow_worker.engine.memory import SharedMemory
from fallow_worker.engine.protocol import (
    DATA_BYTES_MIN,
    EXIT_INTERNAL,
    EXIT_MEMORY,
    EXIT_START_FAILED,
    SpawnOptions,
    cause_of_exit,
    clipped_reason,
    data_limit_class,
    lanes_of,
)


@given(st.integers(0, 2**50))
def test_data_limits_are_powers_of_two_at_or_below_the_wish(wish: int) -> None:
    limit = data_limit_class(wish)
    assert limit.bit_count() == 1
    assert limit >= DATA_BYTES_MIN
    assert limit <= max(wish, DATA_BYTES_MIN) < 2 * limit


def test_machines_with_nearly_equal_memory_share_a_class() -> None:
    assert data_limit_class(4 * GIB) == data_limit_class(5 * GIB + 123) == 4 * GIB


@given(st.text(max_size=600))
def test_reasons_fit_their_field_on_one_line(text: str) -> None:
    reason = clipped_reason(text)
    assert len(reason.encode()) <= ROW_FAILURE_REASON_BYTES_MAX
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("code", "loaded", "cause"),
    [
        (-signal.SIGSEGV, True, Cause.PROGRAM),
        (-signal.SIGSEGV, False, Cause.PLATFORM),
        (-signal.SIGSYS, True, Cause.PROGRAM),
        (EXIT_MEMORY, True, Cause.PROGRAM),
        (EXIT_START_FAILED, False, Cause.PLATFORM),
        (EXIT_INTERNAL, True, Cause.PLATFORM),
        (-signal.SIGKILL, True, Cause.WORKER),
    ],
)
def test_a_death_is_somebodys_fault(code: int, loaded: bool, cause: Cause) -> None:
    assert cause_of_exit(code, program_loaded=loaded) is cause


@pytest.mark.parametrize(("threads", "lanes", "expected"), [(1, 0, 1), (4, 0, 4), (4, 2, 2), (2, 8, 2), (0, 0, 1)])
def test_lanes_never_outnumber_threads(threads: int, lanes: int, expected: int) -> None:
    assert lanes_of(SpawnOptions(threads=threads, lanes=lanes)) == expected


def test_shared_memory_gives_back_what_was_written_and_its_pages() -> None:
    memory = SharedMemory.readable_by_child("test")
    try:
        memory.write(100, b"words")
        assert memory.read(98, 7) == b"\0\0words"
        assert memory.read(103, 100) == b"ds"
        memory.give_back()
        assert memory.read(0, 10) == b""
    finally:
        memory.close()
