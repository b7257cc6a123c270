"""The engine's own stages against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fallow.bundle import BytesCodec, TopKHead
from fallow.errors import FallowError, Reason
from fallow_worker.engine import stages

_contents = st.lists(st.binary(max_size=60) | st.text(" \t\n\x0b\x0cab", max_size=60).map(str.encode), max_size=8)
_codecs = st.builds(
    BytesCodec,
    column=st.just("content"),
    output=st.just("tokens"),
    head_window_bytes=st.integers(1, 30),
    tail_window_bytes=st.integers(0, 30),
    head_tokens=st.integers(1, 20),
    tail_tokens=st.integers(0, 20),
    padding_token=st.integers(-1, 300),
    strip_whitespace=st.booleans(),
)
_matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]),
)


def _tokens_by_definition(codec: BytesCodec, content: bytes) -> list[int]:
    head = list(content[: codec.head_window_bytes])
    tail = list(content[max(0, len(content) - codec.tail_window_bytes) :]) if codec.tail_window_bytes else []
    blank = set(b" \t\n\r\x0b\x0c")
    while codec.strip_whitespace and head and head[0] in blank:
        head.pop(0)
    while codec.strip_whitespace and tail and tail[-1] in blank:
        tail.pop()
    head = head[: codec.head_tokens]
    tail = tail[max(0, len(tail) - codec.tail_tokens) :] if codec.tail_tokens else []
    padding = [codec.padding_token]
    return head + padding * (codec.head_tokens - len(head)) + padding * (codec.tail_tokens - len(tail)) + tail


@given(_codecs, _contents)
def test_tokens_are_the_stripped_and_padded_windows(codec: BytesCodec, contents: list[bytes]) -> None:
    tokens = stages.bytes_tokens(codec, contents)
    assert tokens.dtype == np.int32
    assert tokens.shape == (len(contents), codec.head_tokens + codec.tail_tokens)
    assert tokens.tolist() == [_tokens_by_definition(codec, content) for content in contents]


@given(_matrices, st.sampled_from([np.float16, np.float32, np.float64]))
def test_softmax_gives_a_row_the_same_bits_alone_and_among_others(values: np.ndarray, dtype: type) -> None:
    values = values.astype(dtype)
    together = stages.softmax(values)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    for row in range(len(values)):
        assert stages.softmax(values[row : row + 1]).tobytes() == together[row : row + 1].tobytes()


@given(_matrices, st.data())
def test_top_k_orders_by_value_then_by_lower_index(values: np.ndarray, data: st.DataObject) -> None:
    values = np.round(values)
    k = data.draw(st.integers(1, values.shape[1]))
    best = stages.top_k(values, k)
    for row, indexes, scores in zip(values.tolist(), best.indexes.tolist(), best.scores.tolist(), strict=True):
        wanted = sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]
        assert indexes == wanted
        assert scores == [row[index] for index in wanted]


def test_not_a_number_ranks_below_everything() -> None:
    values = np.array([[np.nan, -np.inf, 2.0], [np.nan, np.nan, np.nan]], np.float32)
    assert stages.top_k(values, 1).indexes.tolist() == [[2], [0]]
    assert stages.top_k(values, 3).indexes.tolist()[0][0] == 2


def test_labels_keep_empty_lines_and_refuse_what_is_no_text() -> None:
    assert stages.labels_of(b"a\n\nb", name="l") == ["a", "", "b"]
    assert stages.labels_of(b"a\r\nb\r\n", name="l") == ["a", "b"]
    for wrong in (b"", b"\n", b"\xff"):
        with pytest.raises(FallowError) as refused:
            stages.labels_of(wrong, name="l")
        assert refused.value.reason is Reason.BUNDLE_INVALID


def test_columns_of_a_head_are_numbered_from_two_on() -> None:
    assert stages.head_columns(TopKHead("v", "label", 1, "l")) == (("label", "label_score"),)
    assert stages.head_columns(TopKHead("v", "label", 2, "l")) == (
        ("label_0", "label_0_score"),
        ("label_1", "label_1_score"),
    )
