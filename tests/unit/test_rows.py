"""Columns become row blocks and come back; what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.row_block import RowBlock, pack
from fallow.row_values import ColumnValues, numpy_dtype
from fallow.rows import RowCodec
from fallow.schema import (
    BytesColumn,
    Column,
    DType,
    RaggedColumn,
    Schema,
    SizeFeature,
    StringColumn,
    TensorColumn,
)

DIGEST = digest_of(b"schema")
NONCE = bytes(16)

dtypes = st.sampled_from(DType)
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def values_of(dtype: DType, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    return arrays.arrays(numpy_dtype(dtype), shape)


@st.composite
def schemas_and_columns(draw: st.DrawFn) -> tuple[Schema, dict[str, ColumnValues], int]:
    count = draw(st.integers(1, 5))
    columns: list[Column] = []
    values: dict[str, ColumnValues] = {}
    for index in range(draw(st.integers(1, 4))):
        name = f"column {index}"
        match draw(st.sampled_from(["tensor", "ragged", "bytes", "string"])):
            case "tensor":
                tensor = TensorColumn(name, draw(dtypes), draw(shapes))
                columns.append(tensor)
                values[name] = draw(values_of(tensor.dtype, (count, *tensor.shape)))
            case "ragged":
                shape = draw(st.lists(st.one_of(st.none(), st.integers(1, 3)), max_size=2).map(lambda s: (*s, None)))
                ragged = RaggedColumn(name, draw(dtypes), shape)
                columns.append(ragged)
                values[name] = [
                    draw(values_of(ragged.dtype, tuple(draw(st.integers(0, 3)) if d is None else d for d in shape)))
                    for _ in range(count)
                ]
            case "bytes":
                columns.append(BytesColumn(name))
                values[name] = draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
            case _:
                columns.append(StringColumn(name))
                values[name] = draw(st.lists(st.text(max_size=9), min_size=count, max_size=count))
    features = draw(st.sampled_from([(), (SizeFeature.BYTES,)]))
    return Schema(tuple(columns), features), values, count


def same(left: ColumnValues, right: ColumnValues) -> bool:
    """Equal values of equal types, NaN included, bit by bit."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return len(left) == len(right) and all(
        same(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b
        for a, b in zip(left, right, strict=True)
    )


@given(schemas_and_columns())
def test_columns_come_back(given_columns: tuple[Schema, dict[str, ColumnValues], int]) -> None:
    schema, values, count = given_columns
    codec = RowCodec(schema, DIGEST)
    block = RowBlock.parse(codec.encode(values, nonce=NONCE))
    decoded = codec.decode(block)
    assert (len(block), decoded.row_count, decoded.malformed) == (count, count, {})
    assert decoded.positions.tolist() == list(range(count))
    for name, column in values.items():
        assert same(decoded.columns[name], column)


@given(schemas_and_columns(), st.data())
def test_rows_without_a_value_take_no_bytes(
    given_columns: tuple[Schema, dict[str, ColumnValues], int], data: st.DataObject
) -> None:
    schema, values, count = given_columns
    total = count + data.draw(st.integers(1, 4))
    positions = sorted(data.draw(st.permutations(range(total)))[:count])
    codec = RowCodec(schema, DIGEST)
    block = RowBlock.parse(
        codec.encode(values, nonce=NONCE, positions=np.asarray(positions, dtype=np.int64), row_count=total)
    )
    assert [row for row in range(total) if len(block[row])] == positions
    decoded = codec.decode(block)
    assert (decoded.row_count, decoded.positions.tolist(), decoded.malformed) == (total, positions, {})
    for name, column in values.items():
        assert same(decoded.columns[name], column)


@given(schemas_and_columns(), st.data())
def test_a_damaged_row_is_listed_or_still_a_row(
    given_columns: tuple[Schema, dict[str, ColumnValues], int], data: st.DataObject
) -> None:
    schema, values, count = given_columns
    codec = RowCodec(schema, DIGEST)
    block = RowBlock.parse(codec.encode(values, nonce=NONCE))
    rows = [bytearray(row) for row in block]
    hit = rows[data.draw(st.integers(0, count - 1))]
    change = data.draw(st.integers(0, 2))
    if change == 0:
        hit[data.draw(st.integers(0, len(hit) - 1))] ^= data.draw(st.integers(1, 255))
    elif change == 1:
        del hit[-1]
    else:
        hit += b"\x00"
    features = [block.row_size_features(row) for row in range(count)]
    damaged = RowBlock.parse(pack(DIGEST, rows, features if schema.size_features else [], NONCE))
    decoded = codec.decode(damaged)
    emptied = {row for row in range(count) if not len(damaged[row])}
    assert set(decoded.positions.tolist()) | set(decoded.malformed) | emptied == set(range(count))
    assert not set(decoded.positions.tolist()) & set(decoded.malformed)
    for column in schema.columns:
        assert len(decoded.columns[column.name]) == len(decoded.positions)
    if change:
        assert len(decoded.malformed) + len(emptied) == 1


def refused(columns: tuple[Column, ...], values: dict[str, Any], *, cast: bool = False) -> FallowError:
    with pytest.raises(FallowError) as error:
        RowCodec(Schema(columns), DIGEST).encode(values, nonce=NONCE, cast=cast)
    assert error.value.reason is Reason.SCHEMA_MISMATCH
    return error.value


X = TensorColumn("x", DType.FLOAT32, (2,))


def test_a_missing_column_is_named_with_those_there() -> None:
    error = refused((X,), {"y": np.zeros((1, 2), np.float32)})
    assert error.field == "x"
    assert "'x' (float32[2]) is missing; there is: y" in str(error)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 2, 1), ()])
def test_a_wrong_shape_names_both(shape: tuple[int, ...]) -> None:
    error = refused((X,), {"x": np.zeros(shape, np.float32)})
    assert error.field == "x"
    assert f"shape {list(shape)}, the schema wants [rows, 2]" in str(error)


def test_columns_of_different_length_are_told() -> None:
    columns = (X, TensorColumn("y", DType.INT8, ()))
    error = refused(columns, {"x": np.zeros((3, 2), np.float32), "y": np.zeros(2, np.int8)})
    assert "x: 3, y: 2" in str(error)


@pytest.mark.parametrize(
    ("have", "want", "free", "with_cast"),
    [
        ("float64", DType.FLOAT32, False, True),
        ("float32", DType.FLOAT16, False, True),
        ("float32", DType.FLOAT64, True, True),
        ("int64", DType.INT32, False, True),
        ("int32", DType.INT64, True, True),
        ("uint8", DType.INT16, True, True),
        ("int8", DType.UINT8, False, True),
        ("int64", DType.FLOAT64, False, True),
        ("int64", DType.FLOAT32, False, True),
        ("bool", DType.FLOAT32, False, True),
        ("bool", DType.UINT8, False, True),
        ("float32", DType.INT64, False, False),
        ("int8", DType.BOOL, False, False),
        ("float32", DType.BOOL, False, False),
        ("complex64", DType.FLOAT32, False, False),
        ("datetime64[s]", DType.INT64, False, False),
        ("<U3", DType.INT64, False, False),
    ],
)
def test_only_lossless_widening_is_silent(have: str, want: DType, free: bool, with_cast: bool) -> None:
    column = TensorColumn("x", want, ())
    codec = RowCodec(Schema((column,)), DIGEST)
    values = np.zeros(2, dtype=have)
    for cast, allowed in ((False, free), (True, with_cast)):
        if allowed:
            decoded = codec.decode(RowBlock.parse(codec.encode({"x": values}, nonce=NONCE, cast=cast)))
            assert same(decoded.columns["x"], np.zeros(2, dtype=numpy_dtype(want)))
        else:
            error = refused((column,), {"x": values}, cast=cast)
            assert error.field == "x"
            assert bool(error.hint) == (with_cast and not free)


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (np.array([300]), DType.UINT8),
        (np.array([-1]), DType.UINT64),
        (np.array([2**63], np.uint64), DType.INT64),
        (np.array([1e39]), DType.FLOAT32),
        (np.array([70000], np.float32), DType.FLOAT16),
    ],
)
def test_a_cast_never_leaves_the_range(have: np.ndarray[Any, Any], want: DType) -> None:
    assert want.value in refused((TensorColumn("x", want, ()),), {"x": have}, cast=True).message


def test_not_a_number_and_infinity_are_values() -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, -0.0]])
    codec = RowCodec(Schema((X,)), DIGEST)
    decoded = codec.decode(RowBlock.parse(codec.encode({"x": values}, nonce=NONCE, cast=True)))
    assert same(decoded.columns["x"], values.astype(np.float32))


def test_big_endian_and_strided_arrays_are_encoded_as_their_values() -> None:
    values = np.arange(12, dtype=">f4").reshape(2, 6)[:, ::3]
    codec = RowCodec(Schema((X,)), DIGEST)
    decoded = codec.decode(RowBlock.parse(codec.encode({"x": values}, nonce=NONCE)))
    assert same(decoded.columns["x"], np.array([[0, 3], [6, 9]], np.dtype("<f4")))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        (BytesColumn("c"), ["text"], "c[0]"),
        (BytesColumn("c"), [b"", None], "c[1]"),
        (StringColumn("c"), [b"bytes"], "c[0]"),
        (StringColumn("c"), ["fine", "\ud800"], "c[1]"),
        (RaggedColumn("c", DType.INT8, (None, 2)), [np.zeros((1, 3), np.int8)], "c[0]"),
        (RaggedColumn("c", DType.INT8, (None,)), [np.zeros(1, np.int8), np.zeros(1, np.int16)], "c"),
        (RaggedColumn("c", DType.INT8, (None,)), [np.int8(1)], "c[0]"),
        (TensorColumn("c", DType.INT8, ()), ["a"], "c"),
        (TensorColumn("c", DType.INT8, (2,)), [[1, 2], [3]], "c"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_row(column: Column, value: Any, told: str) -> None:
    assert refused((column,), {"c": value}).field == told


def test_a_block_of_another_schema_is_refused() -> None:
    codec = RowCodec(Schema((X,)), DIGEST)
    block = RowBlock.parse(pack(digest_of(b"other"), [bytes(8)], [], NONCE))
    with pytest.raises(FallowError) as error:
        codec.decode(block)
    assert error.value.reason is Reason.SCHEMA_MISMATCH


def test_a_row_that_disagrees_with_its_size_feature_is_listed() -> None:
    codec = RowCodec(Schema((BytesColumn("b"),), (SizeFeature.BYTES,)), DIGEST)
    rows = [b"\x02\x00\x00\x00ab", b"\x02\x00\x00\x00ab"]
    decoded = codec.decode(RowBlock.parse(pack(DIGEST, rows, [(2,), (3,)], NONCE)))
    assert decoded.columns["b"] == [b"ab"]
    assert list(decoded.malformed) == [1]


def test_ragged_dimensions_whose_product_overflows_are_listed() -> None:
    codec = RowCodec(Schema((RaggedColumn("r", DType.INT64, (None,) * 8),)), DIGEST)
    row = np.full(8, 2**32 - 1, dtype="<u4").tobytes()
    zero = np.array([0, *[2**32 - 1] * 7], dtype="<u4").tobytes()
    decoded = codec.decode(RowBlock.parse(pack(DIGEST, [row, zero], [], NONCE)))
    assert set(decoded.malformed) == {0, 1}


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("varying", [False, True])
def test_a_block_in_which_every_row_failed_has_empty_columns(
    dtype: DType, shape: tuple[int, ...], varying: bool
) -> None:
    columns: tuple[Column, ...] = (TensorColumn("t", dtype, shape),)
    values: dict[str, ColumnValues] = {"t": np.zeros((0, *shape), numpy_dtype(dtype))}
    if varying:
        columns += (StringColumn("s"), BytesColumn("b"), RaggedColumn("r", dtype, (None,)))
        values |= {"s": [], "b": [], "r": []}
    codec = RowCodec(Schema(columns), DIGEST)
    none = np.zeros(0, dtype=np.int64)
    block = RowBlock.parse(codec.encode(values, nonce=NONCE, positions=none, row_count=3))
    decoded = codec.decode(block)
    assert (decoded.row_count, decoded.positions.tolist(), decoded.malformed) == (3, [], {})
    assert same(decoded.columns["t"], values["t"])


@settings(max_examples=20)
@given(st.integers(1, 2000), st.integers(1, 300))
def test_long_and_short_rows_are_gathered_alike(count: int, width: int) -> None:
    columns = (BytesColumn("b"), TensorColumn("t", DType.UINT8, (width,)))
    codec = RowCodec(Schema(columns), DIGEST)
    matrix = np.arange(count * width, dtype=np.uint64).astype(np.uint8).reshape(count, width)
    values: dict[str, ColumnValues] = {"b": [b"x" * (row % 3) for row in range(count)], "t": matrix}
    decoded = codec.decode(RowBlock.parse(codec.encode(values, nonce=NONCE)))
    assert same(decoded.columns["t"], matrix)
