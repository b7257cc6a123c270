"""Row blocks: what is packed comes back; what is malformed is refused with its place."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow import row_block
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import BLOCK_BYTES_MAX, BLOCK_ROWS_MAX, ROW_BYTES_MAX, SIZE_FEATURES_MAX
from fallow.merkle import leaf_digest, root_of
from fallow.row_block import HEADER_BYTES, RowBlock, RowBlockWriter, Span, pack, pack_body, pack_selection

SCHEMA = digest_of(b"schema")
NONCE = bytes(range(16))


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[bytes], list[list[int]]]:
    """Rows and their size features."""
    rows = draw(st.lists(st.binary(max_size=30), min_size=1, max_size=12))
    feature_count = draw(st.integers(0, 3))
    feature = st.lists(st.integers(0, 2**32 - 1), min_size=feature_count, max_size=feature_count)
    return rows, [draw(feature) for _ in rows]


def block_of(rows: list[bytes], features: list[list[int]] | None = None) -> RowBlock:
    return RowBlock.parse(pack(SCHEMA, rows, features or [], NONCE))


@given(contents())
def test_what_is_packed_comes_back(content: tuple[list[bytes], list[list[int]]]) -> None:
    rows, features = content
    block = block_of(rows, features)
    assert [bytes(row) for row in block] == rows
    assert [bytes(block[index]) for index in range(len(block))] == rows
    assert [list(block.row_size_features(index)) for index in range(len(block))] == features
    assert list(block.size_feature_sums) == [sum(column) for column in zip(*features, strict=True)]
    assert (block.schema_digest, block.nonce) == (SCHEMA, NONCE)
    assert block.root() == root_of([leaf_digest(index, row) for index, row in enumerate(rows)])
    assert block.digest == digest_of(bytes(block.data))
    assert block.nbytes == len(block.data)


@given(contents())
def test_a_body_packed_at_once_gives_the_same_bytes(content: tuple[list[bytes], list[list[int]]]) -> None:
    rows, features = content
    flat = [value for row in features for value in row]
    packed = pack_body(
        SCHEMA,
        body=b"".join(rows),
        lengths=map(len, rows),
        row_count=len(rows),
        features=struct.pack(f"<{len(flat)}I", *flat),
        feature_count=len(features[0]),
        nonce=NONCE,
    )
    assert packed == pack(SCHEMA, rows, features, NONCE)


@given(st.lists(contents(), min_size=1, max_size=4), st.data())
def test_a_selection_is_those_rows_in_that_order(
    content: list[tuple[list[bytes], list[list[int]]]], data: st.DataObject
) -> None:
    feature_count = len(content[0][1][0])
    usable = [(rows, features) for rows, features in content if len(features[0]) == feature_count]
    blocks = [block_of(rows, features) for rows, features in usable]
    spans: list[Span] = []
    for _ in range(data.draw(st.integers(1, 6))):
        block = data.draw(st.integers(0, len(blocks) - 1))
        start = data.draw(st.integers(0, len(blocks[block]) - 1))
        spans.append(Span(block, start, data.draw(st.integers(start + 1, len(blocks[block])))))
    rows = [row for block, start, end in spans for row in usable[block][0][start:end]]
    features = [feature for block, start, end in spans for feature in usable[block][1][start:end]]
    assert pack_selection(blocks, spans, NONCE) == pack(SCHEMA, rows, features, NONCE)


@given(st.binary(max_size=200))
def test_random_bytes_never_do_worse_than_be_refused(data: bytes) -> None:
    with pytest.raises(FallowError) as refused:
        RowBlock.parse(data)
    assert refused.value.reason in {Reason.ROW_BLOCK_MALFORMED, Reason.ROW_TOO_LARGE}


@given(contents(), st.data())
def test_a_damaged_block_is_refused_or_still_consistent(
    content: tuple[list[bytes], list[list[int]]], data: st.DataObject
) -> None:
    packed = bytearray(pack(SCHEMA, *content, NONCE))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        block = RowBlock.parse(packed)
    except FallowError as refused:
        assert refused.reason in {Reason.ROW_BLOCK_MALFORMED, Reason.ROW_TOO_LARGE}
        assert refused.field
    else:
        assert sum(len(row) for row in block) == len(block.body)


def header(
    *,
    magic: bytes = row_block.MAGIC,
    rows: int = 1,
    flags: int = 0,
    features: int = 0,
    body_length: int = 0,
    offsets: tuple[int, ...] = (0, 0),
) -> bytes:
    fixed = struct.pack("<4sIII32s16sQ", magic, rows, flags, features, SCHEMA, NONCE, body_length)
    return fixed + struct.pack(f"<{len(offsets)}I", *offsets)


def test_the_header_that_the_refusals_vary_is_itself_accepted() -> None:
    assert len(RowBlock.parse(header())) == 1


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", 0),
        (header()[: HEADER_BYTES - 1], 0),
        (header(magic=b"FRB\x02"), 0),
        (header(rows=0, offsets=(0,)), 4),
        (header(rows=BLOCK_ROWS_MAX + 1), 4),
        (header(flags=1), 8),
        (header(features=SIZE_FEATURES_MAX + 1), 12),
        (header(features=1), 64),
        (header(body_length=1), 64),
        (header() + b"x", 64),
        (header(offsets=(1, 0)), 72),
        (header(offsets=(0, 5)), 76),
        (header(rows=2, offsets=(0, 3, 2), body_length=2) + b"ab", 80),
        (header(rows=2, offsets=(0, 2**32 - 1, 2), body_length=2) + b"ab", None),
    ],
)
def test_a_malformed_block_is_refused_at_its_place(data: bytes, place: int | None) -> None:
    with pytest.raises(FallowError) as refused:
        RowBlock.parse(data)
    if place is None:
        assert refused.value.reason is Reason.ROW_TOO_LARGE
    else:
        assert refused.value.reason is Reason.ROW_BLOCK_MALFORMED
        assert refused.value.field == f"row_block[{place}]"
    assert refused.value.limit


def test_a_row_over_its_limit_is_refused_both_ways() -> None:
    too_long = bytes(ROW_BYTES_MAX + 1)
    with pytest.raises(FallowError) as refused:
        pack(SCHEMA, [b"", too_long], [], NONCE)
    assert (refused.value.reason, refused.value.field) == (Reason.ROW_TOO_LARGE, "rows[1]")
    with pytest.raises(FallowError) as refused:
        pack_body(SCHEMA, body=too_long, lengths=[len(too_long)], row_count=1, nonce=NONCE)
    assert refused.value.reason is Reason.ROW_TOO_LARGE
    with pytest.raises(FallowError) as refused:
        RowBlock.parse(header(offsets=(0, len(too_long)), body_length=len(too_long)) + too_long)
    assert refused.value.reason is Reason.ROW_TOO_LARGE
    assert len(RowBlock.parse(pack(SCHEMA, [too_long[:-1]], [], NONCE))[0]) == ROW_BYTES_MAX


def test_a_block_over_its_limit_is_refused_both_ways() -> None:
    row = bytes(ROW_BYTES_MAX)
    with pytest.raises(FallowError) as refused:
        pack(SCHEMA, [row] * 4, [], NONCE)
    assert refused.value.reason is Reason.BLOCK_TOO_LARGE
    with pytest.raises(FallowError) as refused:
        RowBlock.parse(bytes(BLOCK_BYTES_MAX + 1))
    assert refused.value.reason is Reason.BLOCK_TOO_LARGE


def test_a_writer_that_refuses_a_row_stays_as_it_was() -> None:
    writer = RowBlockWriter(SCHEMA, 1)
    writer.add(b"one", (3,))
    for row, features in ((b"two", ()), (b"two", (-1,)), (b"two", (2**32,)), (bytes(ROW_BYTES_MAX + 1), (1,))):
        with pytest.raises(FallowError):
            writer.add(row, features)
    packed = writer.pack(NONCE)
    assert packed == pack(SCHEMA, [b"one"], [(3,)], NONCE)
    assert len(packed) == writer.nbytes
    assert len(writer) == 1


@pytest.mark.parametrize("selection", [[(0, 0, 0)], [(0, 1, 3)], [(0, -1, 1)], [(1, 0, 1)], [(-1, 0, 1)], [(0, 2, 1)]])
def test_a_selection_outside_its_blocks_is_refused(selection: list[tuple[int, int, int]]) -> None:
    with pytest.raises(FallowError) as refused:
        pack_selection([block_of([b"a", b"b"])], selection, NONCE)
    assert refused.value.reason is Reason.FIELD_INVALID
    assert refused.value.field == "selection[0]"


def test_nothing_cannot_be_packed() -> None:
    def refused(make: Callable[[], bytes]) -> Reason:
        with pytest.raises(FallowError) as error:
            make()
        return error.value.reason

    assert refused(lambda: pack(SCHEMA, [], [], NONCE)) is Reason.DATASET_EMPTY
    assert refused(lambda: RowBlockWriter(SCHEMA, 0).pack(NONCE)) is Reason.DATASET_EMPTY
    assert refused(lambda: pack_selection([block_of([b"a"])], [], NONCE)) is Reason.DATASET_EMPTY
    assert refused(lambda: pack_selection([], [], NONCE)) is Reason.DATASET_EMPTY


def test_blocks_of_different_schemas_are_not_packed_together() -> None:
    other = RowBlock.parse(pack(digest_of(b"other"), [b"x"], [], NONCE))
    with pytest.raises(FallowError) as refused:
        pack_selection([block_of([b"a"]), other], [(0, 0, 1), (1, 0, 1)], NONCE)
    assert refused.value.reason is Reason.SCHEMA_MISMATCH


def test_size_features_must_match_the_rows() -> None:
    with pytest.raises(FallowError) as refused:
        pack(SCHEMA, [b"a", b"b"], [(1,)], NONCE)
    assert refused.value.reason is Reason.FIELD_INVALID


def test_a_row_outside_the_block_is_an_index_error() -> None:
    block = block_of([b"a"])
    for index in (-1, 1):
        with pytest.raises(IndexError):
            block[index]
