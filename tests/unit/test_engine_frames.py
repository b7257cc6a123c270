"""Frames of the control socket: what is encoded comes back, and nothing else is taken."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_models import BUNDLE_DIGEST, INPUT_DIGEST, OUTPUT_DIGEST, text_bundle
from fallow.errors import Reason
from fallow.session import Cause, RowFailure, SandboxLevel, Usage
from fallow_worker.engine import frames
from fallow_worker.engine.protocol import (
    CONTROL_FRAME_BYTES_MAX,
    Done,
    Failed,
    FilePlacement,
    FromChild,
    Load,
    Placement,
    Progress,
    Ready,
    Run,
)

_texts = st.text(max_size=40)
_counts = st.integers(0, 2**62)
_failures = st.builds(RowFailure, row=_counts, cause=st.sampled_from(Cause), reason=_texts)
_usages = st.builds(
    Usage,
    wall_microseconds=_counts,
    cpu_microseconds=_counts,
    memory_bytes_peak=_counts,
    energy_joules=st.just(0.0),
    tokens=_counts,
    node=_counts,
)
_messages: st.SearchStrategy[FromChild] = st.one_of(
    st.builds(Progress, task=_texts, rows_done=_counts),
    st.builds(
        Done,
        task=_texts,
        output_bytes=_counts,
        rows=_counts,
        failed_rows=_counts,
        failures=st.lists(_failures, max_size=4).map(tuple),
        usage=_usages,
    ),
    st.builds(
        Failed,
        task=_texts,
        cause=st.sampled_from(Cause),
        reason=st.sampled_from(Reason),
        message=_texts,
        field=_texts,
        limit=_texts,
        hint=_texts,
    ),
    st.builds(
        Ready,
        level=st.sampled_from(SandboxLevel),
        denied=st.lists(_texts, max_size=3).map(tuple),
        permitted=st.lists(_texts, max_size=3).map(tuple),
        landlock_abi=_counts,
        runtime=_texts,
        execution_class=_texts,
        start_ms=_counts,
        memory_bytes=_counts,
    ),
)


@given(st.lists(_messages, max_size=4), st.integers(1, 50))
def test_messages_come_back_however_the_stream_is_cut(messages: list[FromChild], piece: int) -> None:
    stream = b"".join(frames.encode_frame(message) for message in messages)
    reader = frames.FrameReader()
    received: list[FromChild] = []
    for start in range(0, len(stream), piece):
        received += reader.feed(stream[start : start + piece])
    assert received == messages


def test_a_load_with_its_whole_manifest_comes_back() -> None:
    manifest, files = text_bundle(short_label="short", short_bytes_max=3)
    load = Load(
        BUNDLE_DIGEST,
        manifest,
        INPUT_DIGEST,
        OUTPUT_DIGEST,
        tuple(FilePlacement(name, Placement(0, len(content))) for name, content in files.items()),
        canonical_batch_rows=4,
        slot_dependent=True,
    )
    run = Run("task", Placement(0, 1), Placement(0, 1), b"n" * 16, slots=None)
    for message in (load, run):
        assert frames.decode_to_child(frames.encode_frame(message)[frames.LENGTH_BYTES :]) == message


def test_a_child_cannot_send_what_only_supervisors_say() -> None:
    body = frames.to_json(Run("task", Placement(0, 1), Placement(0, 1), b"n" * 16))
    with pytest.raises(frames.FrameError):
        frames.decode_from_child(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"is":"Progress"}',
        b'{"is":"Progress","task":"t","rows_done":true}',
        b'{"is":"Progress","task":"t","rows_done":1.5}',
        b'{"is":"Progress","task":"t","rows_done":1e999}',
        b'{"is":"Progress","task":"t","rows_done":%d}' % 2**70,
        b'{"is":"Progress","task":1,"rows_done":1}',
        b'{"is":"Progress","task":"t","rows_done":1,"more":1}',
        b'{"is":"ChildArguments"}',
        b'{"is":["Progress"],"task":"t","rows_done":1}',
        b'{"is":"Failed","task":"","cause":"nobody","reason":"INTERNAL","message":"","field":"","limit":"","hint":""}',
    ],
)
def test_what_is_no_message_of_a_child_is_refused(body: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.decode_from_child(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_a_message_or_a_frame_error(value: object) -> None:
    try:
        frames.decode_from_child(json.dumps(value).encode())
    except frames.FrameError:
        return
    raise AssertionError("no JSON without a class name is a message")


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(frames.FrameError):
        list(frames.FrameReader().feed(struct.pack("<I", CONTROL_FRAME_BYTES_MAX + 1)))
    with pytest.raises(frames.FrameError):
        frames.encode_frame(Progress("t" * CONTROL_FRAME_BYTES_MAX, 1))
