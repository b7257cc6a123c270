"""What a child says whose program has taken it over: strictly read, and never able to hurt who listens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.errors import Reason
from fallow.session import Cause, RowFailure, Usage
from fallow.wire.session import usage_to_message
from fallow_worker.engine.frames import FrameError, FrameReader, decode_from_child, to_json
from fallow_worker.engine.protocol import CONTROL_FRAME_BYTES_MAX, Done, Failed

DONE = Done(
    task="task", output_bytes=10, rows=2, failed_rows=1, failures=(RowFailure(1, Cause.ROW, "why"),), usage=Usage()
)
FAILED = Failed(task="task", cause=Cause.PROGRAM, reason=Reason.BUNDLE_INVALID, message="it broke")


def said(message: Done | Failed, **changes: Any) -> bytes:
    facts = json.loads(to_json(message))
    for path, value in changes.items():
        target = facts
        *outer, last = path.split("__")
        for name in outer:
            target = target[int(name)] if isinstance(target, list) else target[name]
        target[last] = value
    return json.dumps(facts).encode()


def test_what_an_honest_child_says_is_heard() -> None:
    assert decode_from_child(said(DONE)) == DONE
    assert decode_from_child(said(FAILED, field="Größe ≠ 3 🦆")) != FAILED


@pytest.mark.parametrize(
    "changes",
    [
        {"output_bytes": -1},
        {"rows": -(2**62)},
        {"rows": 2**80},
        {"failures__0__row": -5},
        {"failures__0__reason": "\ud800"},
        {"failures__0__cause": "nobody"},
        {"usage__wall_microseconds": -1},
        {"usage__energy_joules": float("nan")},
        {"usage__energy_joules": float("inf")},
        {"usage__energy_joules": "many"},
        {"task": None},
        {"task": "half of a pair \udfff"},
        {"rows": True},
        {"extra": 1},
        {"is": "Ready"},
        {"is": ["Done"]},
    ],
)
def test_what_no_message_can_hold_is_no_frame(changes: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        decode_from_child(said(DONE, **changes))


def test_numbers_that_are_too_large_as_decimals_are_no_frame() -> None:
    with pytest.raises(FrameError):
        decode_from_child(said(DONE).replace(b'"energy_joules": 0.0', b'"energy_joules": 1e999'))


def test_nesting_and_length_are_bounded() -> None:
    with pytest.raises(FrameError):
        decode_from_child(b"[" * 200_000)
    reader = FrameReader()
    with pytest.raises(FrameError):
        list(reader.feed((CONTROL_FRAME_BYTES_MAX + 1).to_bytes(4, "little")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["is", "task", "rows"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from([DONE, FAILED]), st.data())
def test_whatever_is_heard_can_be_passed_on(message: Done | Failed, data: st.DataObject) -> None:
    facts = json.loads(to_json(message))
    for name in data.draw(st.lists(st.sampled_from(sorted(facts)), max_size=2)):
        facts[name] = data.draw(JSON)
    try:
        heard = decode_from_child(json.dumps(facts).encode())
    except FrameError:
        return
    assert isinstance(heard, Done | Failed)
    if isinstance(heard, Done):
        usage_to_message(heard.usage)
    else:
        heard.message.encode()


@given(st.binary(max_size=300))
def test_noise_is_no_frame(noise: bytes) -> None:
    with pytest.raises(FrameError):
        decode_from_child(noise)
