"""How many streams run at once."""

from __future__ import annotations

import asyncio

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint
from fallow_coordinator.blobs.admission import Gate, Turns

A, B = KeyFingerprint(b"a" * 32), KeyFingerprint(b"b" * 32)


def test_a_gate_counts_all_and_each_peer() -> None:
    gate = Gate("uploads", streams_max=3, per_peer_max=2)
    with gate.entered(A), gate.entered(A):
        with pytest.raises(FallowError) as caught, gate.entered(A):
            pass
        assert caught.value.reason is Reason.OVERLOADED
        assert "2" in caught.value.limit
        with gate.entered(B), pytest.raises(FallowError) as caught, gate.entered(B):
            pass
        assert "3" in caught.value.limit
    with gate.entered(A), gate.entered(A):
        pass


async def test_one_stream_at_a_time_writes_an_upload() -> None:
    turns = Turns(patience_s=60, takeover_patience_s=60)
    order: list[str] = []
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def first() -> None:
        async with turns.taken("upload"):
            inside.set()
            await leave.wait()
            order.append("first")

    async def second() -> None:
        async with turns.taken("upload"):
            order.append("second")

    running = asyncio.create_task(first())
    await inside.wait()
    waiting = asyncio.create_task(second())
    async with turns.taken("another upload"):
        pass
    assert order == []
    leave.set()
    await asyncio.gather(running, waiting)
    assert order == ["first", "second"]


async def test_a_stream_that_stands_still_loses_its_turn_to_the_next() -> None:
    turns = Turns(patience_s=60, takeover_patience_s=0.01)
    inside = asyncio.Event()
    pushed: list[bool] = []

    async def half_open() -> None:
        async with turns.taken("upload") as turn:
            try:
                async with turn.deadline:
                    inside.set()
                    await asyncio.Event().wait()
            except TimeoutError:
                pushed.append(turn.taken_over)

    running = asyncio.create_task(half_open())
    await inside.wait()
    async with turns.taken("upload") as turn:
        assert pushed == [True]
        assert not turn.taken_over
    await running


async def test_a_stream_that_stands_still_alone_is_cut_off_in_the_end() -> None:
    turns = Turns(patience_s=0.01, takeover_patience_s=60)
    with pytest.raises(TimeoutError):
        async with turns.taken("upload") as turn, turn.deadline:
            await asyncio.Event().wait()
    assert not turn.taken_over
