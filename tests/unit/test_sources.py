"""Rows come out of arrays, tables, files and folders as they went in, and what cannot be read is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.dataset import BLOCK_BYTES_TARGET, FAILURE_COLUMN, Block, DatasetReader
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import ROW_BYTES_MAX
from fallow.row_block import RowBlock
from fallow.rows import RowCodec
from fallow.schema import BytesColumn, DType, RaggedColumn, Schema, SizeFeature, StringColumn, TensorColumn
from fallow.sources import (
    ArraySource,
    FolderSource,
    ParquetSource,
    Rows,
    Source,
    SourceRequest,
    TableSource,
    source_of,
)
from fallow.sources.port import windowed

DIGEST = digest_of(b"schema")
X = Schema((TensorColumn("x", DType.FLOAT32, (2,)),))
ID = Schema((TensorColumn("id", DType.INT64, ()),))
BYTES = Schema((BytesColumn("bytes"),), (SizeFeature.BYTES,))


def read(
    source: Source, schema: Schema, folder: Path, *, unread_rows_max: int = 1000, **request: Any
) -> tuple[list[Block], DatasetReader, pa.Table | None]:
    """(blocks, reader, kept columns)."""
    path = folder / "kept.arrow"
    reader = DatasetReader(
        source,
        SourceRequest(schema, **request),
        RowCodec(schema, DIGEST),
        nonce_key=b"secret",
        unread_rows_max=unread_rows_max,
    )
    blocks = list(reader.blocks(path))
    kept = pa.ipc.open_file(path).read_all() if reader.kept_schema is not None else None
    return blocks, reader, kept


def column(blocks: list[Block], schema: Schema, name: str) -> list[Any]:
    codec = RowCodec(schema, DIGEST)
    values: list[Any] = []
    for block in blocks:
        decoded = codec.decode(RowBlock.parse(block.data))
        assert decoded.row_count == block.rows == len(decoded.positions)
        assert block.digest == digest_of(block.data)
        values += list(decoded.columns[name])
    return values


def refused(read_it: Callable[[], object]) -> FallowError:
    with pytest.raises(FallowError) as error:
        read_it()
    return error.value


def test_arrays_by_name_give_rows_and_kept_columns(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    source = ArraySource({"x": values, "name": ["a", "b", "c", "d", "e"], "n": np.arange(5)})
    blocks, reader, kept = read(source, X, tmp_path, keep=("name", "n"))
    np.testing.assert_array_equal(column(blocks, X, "x"), values)
    assert kept is not None
    assert kept.to_pydict() == {"name": list("abcde"), "n": [0, 1, 2, 3, 4], FAILURE_COLUMN: [None] * 5}
    assert (reader.rows, reader.unread) == (5, [])


def test_one_array_is_the_only_column(tmp_path: Path) -> None:
    blocks, _, kept = read(source_of(np.arange(3), ID), ID, tmp_path)
    assert (column(blocks, ID, "id"), kept) == ([0, 1, 2], None)
    two = Schema((*X.columns, *ID.columns))
    assert "one array cannot be the rows of several columns" in str(
        refused(lambda: read(ArraySource(np.arange(3)), two, tmp_path))
    )


def test_several_columns_stand_side_by_side_as_one_input(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1.0, 2.0], pa.float32()), "b": pa.array([3.0, 4.0], pa.float32())})
    arrays = {name: table.column(name).to_numpy() for name in ("a", "b")}
    for source in (TableSource(table), ArraySource(arrays)):
        blocks, _, _ = read(source, X, tmp_path, inputs={"x": ("a", "b")})
        np.testing.assert_array_equal(column(blocks, X, "x"), [[1, 3], [2, 4]])
        assert "3 columns (a, b, a) cannot make up 'x'" in str(
            refused(lambda source=source: read(source, X, tmp_path, inputs={"x": ("a", "b", "a")}))  # type: ignore[misc]
        )
    doubles = TableSource(table.cast(pa.schema([("a", pa.float64()), ("b", pa.float64())])))
    assert refused(lambda: read(doubles, X, tmp_path, inputs={"x": ("a", "b")})).field == "a"
    blocks, _, _ = read(doubles, X, tmp_path, inputs={"x": ("a", "b")}, cast=True)
    np.testing.assert_array_equal(column(blocks, X, "x"), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.large_list(pa.float32())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        pa.array([[9, 9], [1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)).slice(1),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1, 2], [3, 4]], np.float32)),
    ],
)
def test_lists_of_any_kind_are_tensors(tmp_path: Path, values: pa.Array) -> None:
    blocks, _, _ = read(TableSource(pa.table({"x": values})), X, tmp_path)
    np.testing.assert_array_equal(column(blocks, X, "x"), [[1, 2], [3, 4]])


def test_a_flat_list_is_a_tensor_of_any_shape(tmp_path: Path) -> None:
    schema = Schema((TensorColumn("x", DType.INT8, (2, 3)),))
    table = pa.table({"x": pa.array([list(range(6))] * 2, pa.list_(pa.int8()))})
    blocks, _, _ = read(TableSource(table), schema, tmp_path)
    np.testing.assert_array_equal(column(blocks, schema, "x"), [np.arange(6).reshape(2, 3)] * 2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), "'x' is null in row 1"),
        (pa.array([[1.0, None]], pa.list_(pa.float32())), "'x' has a null inside its list in row 0"),
        (pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32())), "'x' has a list of 1 elements in row 0"),
        (pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32())), "has shape [1, 3], the schema wants [rows, 2]"),
        (pa.array([[1.0, 2.0]], pa.list_(pa.float64())), "'x' is float64, the schema wants float32"),
        (pa.array(["1"]), "'x' is string"),
        (pa.array([1], pa.timestamp("s")), "'x' is timestamp[s]"),
    ],
)
def test_a_column_that_does_not_fit_is_named(tmp_path: Path, values: pa.Array, told: str) -> None:
    error = refused(lambda: read(TableSource(pa.table({"x": values})), X, tmp_path))
    assert error.reason is Reason.SCHEMA_MISMATCH
    assert told in str(error)


@pytest.mark.parametrize(
    ("spoiled", "told"),
    [
        (None, "'x' is null in row 150001"),
        ([1.0, None], "'x' has a null inside its list in row 150001"),
        ([1.0], "'x' has a list of 1 elements in row 150001"),
    ],
)
def test_a_row_is_counted_from_the_first_of_the_dataset(tmp_path: Path, spoiled: Any, told: str) -> None:
    rows: list[Any] = [[1.0, 2.0]] * 200_000
    rows[150_001] = spoiled
    table = pa.table({"x": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(table.slice(0, 100_000), tmp_path / "1.parquet", row_group_size=7_000)
    pq.write_table(table.slice(100_000), tmp_path / "2.parquet", row_group_size=7_000)
    for source in (TableSource(table), ParquetSource([tmp_path / "1.parquet", tmp_path / "2.parquet"])):
        error = refused(lambda source=source: read(source, X, tmp_path))  # type: ignore[misc]
        assert told in str(error)
        assert error.field == "x[150001]"


def test_a_row_of_a_list_is_counted_from_the_first_of_the_dataset(tmp_path: Path) -> None:
    contents: list[Any] = [b"x"] * 10_000
    contents[9_000] = "text"
    assert refused(lambda: read(ArraySource({"bytes": contents}), BYTES, tmp_path)).field == "bytes[9000]"


def test_masked_values_are_no_rows(tmp_path: Path) -> None:
    values = np.ma.MaskedArray(np.ones((3, 2), np.float32), mask=False)
    blocks, _, _ = read(ArraySource({"x": values}), X, tmp_path)
    assert len(column(blocks, X, "x")) == 3
    values[1, 0] = np.ma.masked
    assert "'x' has masked values" in str(refused(lambda: read(ArraySource({"x": values}), X, tmp_path)))
    sides = {"a": values[:, 0], "b": values[:, 1]}
    assert "'a' has masked values" in str(
        refused(lambda: read(ArraySource(sides), X, tmp_path, inputs={"x": ("a", "b")}))
    )


class Frame:
    """What pandas and polars give of themselves."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def test_data_frames_are_rows(tmp_path: Path) -> None:
    blocks, _, kept = read(source_of(Frame(pa.table({"id": [4, 5], "s": ["a", "b"]})), ID), ID, tmp_path, keep=("s",))
    assert column(blocks, ID, "id") == [4, 5]
    assert kept is not None
    assert kept.column("s").to_pylist() == ["a", "b"]
    error = refused(lambda: source_of(pa.chunked_array([[1]]), ID))
    assert "rows cannot be taken from ChunkedArray" in str(error)


def test_a_list_of_names_is_files_unless_text_is_wanted(tmp_path: Path) -> None:
    for name, value in (("a.parquet", 1), ("B.PARQUET", 2)):
        pq.write_table(pa.table({"id": [value]}), tmp_path / name)
    names = [str(tmp_path / "a.parquet"), str(tmp_path / "B.PARQUET")]
    for rows in (names, [Path(name) for name in names], tmp_path):
        blocks, _, _ = read(source_of(rows, ID), ID, tmp_path)
        assert sorted(column(blocks, ID, "id")) == [1, 2]
    assert column(read(source_of(names[1], ID), ID, tmp_path)[0], ID, "id") == [2]
    text = Schema((StringColumn("text"),))
    assert column(read(source_of(names, text), text, tmp_path)[0], text, "text") == names


def halves(values: list[Any], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)] * 2)


ENCODED = [pa.array(part).dictionary_encode() for part in (["a", "b"], ["c", "d"])]
"""Two parts with a dictionary each."""


@pytest.mark.parametrize(
    ("values", "kept_type"),
    [
        (halves(["a", None], pa.string_view()), pa.large_string()),
        (halves([b"a", None], pa.binary_view()), pa.large_binary()),
        (halves([["a"], None], pa.list_(pa.string_view())), pa.list_(pa.large_string())),
        (pa.chunked_array([pa.RunEndEncodedArray.from_arrays([1, 4], ["a", "b"])]), pa.string()),
        (
            pa.chunked_array(
                [pa.StructArray.from_arrays([encoded], ["k"]) for encoded in ENCODED]
            ),
            pa.struct([("k", pa.string())]),
        ),
        (
            pa.chunked_array(
                [pa.ListArray.from_arrays([0, 1, 2], encoded) for encoded in ENCODED]
            ),
            pa.list_(pa.string()),
        ),
        (halves([{"at": 1}, None], pa.struct([("at", pa.timestamp("ns", "UTC"))])), None),
    ],
)  # fmt: skip
def test_columns_of_any_type_are_kept(tmp_path: Path, values: pa.ChunkedArray, kept_type: pa.DataType | None) -> None:
    _, _, kept = read(TableSource(pa.table({"id": range(4), "k": values})), ID, tmp_path, keep=("k",))
    assert kept is not None
    assert kept.schema.field("k").type == (kept_type or values.type)
    assert kept.filter(pa.array([True, False, True, False])).num_rows == 2
    if kept_type is not None:
        assert kept.column("k").to_pylist() == values.to_pylist()


def test_strings_bytes_and_ragged_columns_come_from_tables(tmp_path: Path) -> None:
    schema = Schema(
        (
            StringColumn("s"),
            BytesColumn("b"),
            RaggedColumn("r", DType.INT16, (None,)),
            RaggedColumn("q", DType.FLOAT32, (None, 2)),
        )
    )
    table = pa.table(
        {
            "s": pa.array(["ä", "", "ä"]).dictionary_encode(),
            "b": pa.array([b"\x00", b"", b"xyz"], pa.large_binary()),
            "r": pa.array([[1, 2], [], [3]], pa.list_(pa.int16())),
            "q": pa.array([[], [[1, 2]], [[3, 4], [5, 6]]], pa.list_(pa.list_(pa.float32(), 2))),
        }
    )
    blocks, _, _ = read(TableSource(table), schema, tmp_path)
    assert column(blocks, schema, "s") == ["ä", "", "ä"]
    assert column(blocks, schema, "b") == [b"\x00", b"", b"xyz"]
    assert [list(value) for value in column(blocks, schema, "r")] == [[1, 2], [], [3]]
    assert [value.tolist() for value in column(blocks, schema, "q")] == [[], [[1, 2]], [[3, 4], [5, 6]]]


def test_parquet_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "rows" / "deep"
    folder.mkdir(parents=True)
    for index in range(3):
        table = pa.table({"id": pa.array([index * 10, index * 10 + 1]), "tag": [f"t{index}"] * 2, "unused": [None] * 2})
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=1)
    for paths in (tmp_path / "rows", [folder / f"part-{index}.parquet" for index in range(3)]):
        blocks, _, kept = read(ParquetSource(paths), ID, tmp_path, keep=("tag",))
        assert column(blocks, ID, "id") == [0, 1, 10, 11, 20, 21]
        assert len(blocks) == 1
        assert kept is not None
        assert kept.column("tag").to_pylist() == ["t0", "t0", "t1", "t1", "t2", "t2"]


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    schema = Schema((TensorColumn("x", DType.FLOAT32, (100,)),))
    path = tmp_path / "large.parquet"
    chance = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema([("x", pa.list_(pa.float32(), 100))])) as writer:
        for _ in range(4):
            values = pa.array(chance.random(40_000 * 100, dtype=np.float32))
            writer.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(values, 100)}, schema=writer.schema))
    source, before, held = ParquetSource(path), pa.total_allocated_bytes(), 0
    for batch in source.batches(SourceRequest(schema)):
        assert batch.row_count
        held = max(held, pa.total_allocated_bytes() - before)
    assert held < path.stat().st_size / 2


def test_parquet_files_that_differ_or_are_none_are_refused(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("1.parquet", "2.parquet", "3.parquet"))
    pq.write_table(pa.table({"id": [1]}), first)
    pq.write_table(pa.table({"id": ["1"]}), second)
    third.write_bytes(b"PAR1 and then nothing")
    assert "'id' is string in" in str(refused(lambda: read(ParquetSource([first, second]), ID, tmp_path)))
    error = refused(lambda: read(ParquetSource(third), ID, tmp_path))
    assert (error.reason, error.field) == (Reason.FIELD_INVALID, str(third))
    assert "No such file" in str(refused(lambda: read(ParquetSource(tmp_path / "no.parquet"), ID, tmp_path)))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no Parquet files" in str(refused(lambda: ParquetSource(empty)))


@pytest.mark.parametrize("kept", [False, True])
def test_a_missing_column_is_named_before_anything_is_read(tmp_path: Path, kept: bool) -> None:
    request: dict[str, Any] = {"keep": ("y",)} if kept else {}
    for source in (
        ArraySource({"z": np.zeros(1), "x": np.zeros((1, 2), np.float32)}),
        TableSource(pa.table({"z": [1]})),
    ):
        schema = X if kept and isinstance(source, ArraySource) else Schema((TensorColumn("y", DType.INT64, ()),))
        error = refused(lambda source=source, schema=schema: read(source, schema, tmp_path, **request))  # type: ignore[misc]
        assert (error.reason, error.field) == (Reason.SCHEMA_MISMATCH, "y")
        assert "there is: z" in str(error)


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, schema in (
        (ArraySource({"id": np.zeros(0, np.int64)}), ID),
        (TableSource(pa.table({"id": pa.array([], pa.int64())})), ID),
        (FolderSource(empty), BYTES),
    ):
        assert refused(lambda s=source, c=schema: read(s, c, tmp_path)).reason is Reason.DATASET_EMPTY  # type: ignore[misc]


def test_large_datasets_are_cut_into_blocks_near_the_target(tmp_path: Path) -> None:
    schema = Schema((TensorColumn("x", DType.UINT8, (1000,)),))
    blocks, reader, _ = read(ArraySource({"x": np.zeros((30_000, 1000), np.uint8)}), schema, tmp_path)
    assert reader.rows == sum(block.rows for block in blocks) == 30_000
    assert [len(block.data) > BLOCK_BYTES_TARGET // 2 for block in blocks[:-1]] == [True] * (len(blocks) - 1)
    assert max(len(block.data) for block in blocks) < BLOCK_BYTES_TARGET + 2**20


def test_rows_of_very_different_length_are_cut_too(tmp_path: Path) -> None:
    lengths = [1, 6 << 20, 6 << 20, 0, 15 << 20, 5, 9 << 20]
    blocks, _, _ = read(ArraySource({"bytes": [bytes(n) for n in lengths]}), BYTES, tmp_path)
    assert [len(value) for value in column(blocks, BYTES, "bytes")] == lengths
    assert max(len(block.data) for block in blocks) < (16 << 20)


def test_a_row_over_its_limit_is_named_by_its_place(tmp_path: Path) -> None:
    error = refused(lambda: read(ArraySource({"bytes": [b"", b"", bytes(ROW_BYTES_MAX)]}), BYTES, tmp_path))
    assert (error.reason, error.field) == (Reason.ROW_TOO_LARGE, "rows[2]")


def test_equal_content_gives_equal_blocks_under_one_key_only(tmp_path: Path) -> None:
    source = ArraySource({"id": np.arange(4)})
    first, _, _ = read(source, ID, tmp_path)
    again, _, _ = read(source, ID, tmp_path)
    assert first == again
    codec, request = RowCodec(ID, DIGEST), SourceRequest(ID)
    other = DatasetReader(source, request, codec, nonce_key=b"another", unread_rows_max=0)
    (block,) = other.blocks()
    assert block.digest != first[0].digest
    assert RowBlock.parse(block.data).root() == RowBlock.parse(first[0].data).root()


@given(st.binary(max_size=40), st.integers(0, 12), st.integers(0, 12))
def test_windows_take_head_and_tail(content: bytes, head: int, tail: int) -> None:
    travelling = windowed(content, (head, tail))
    if len(content) <= head + tail:
        assert travelling == content
    else:
        assert travelling == content[:head] + content[len(content) - tail :]


def test_a_folder_gives_its_files_in_path_order(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"first")
    (folder / "b" / "long").write_bytes(bytes(range(100)))
    (folder / "b" / "empty").write_bytes(b"")
    (folder / "c").write_bytes(b"last")
    (folder / "link").symlink_to(folder / "c")
    (folder / "linked").symlink_to(folder / "b")
    os.mkfifo(folder / "pipe")
    blocks, reader, kept = read(FolderSource(folder), BYTES, tmp_path, keep=("size_bytes",), windows={"bytes": (4, 3)})
    contents = [b"first", b"", bytes([0, 1, 2, 3, 97, 98, 99]), b"last"]
    assert column(blocks, BYTES, "bytes") == contents
    assert kept is not None
    assert kept.column("path").to_pylist() == ["a.txt", "b/empty", "b/long", "c"]
    assert kept.column("size_bytes").to_pylist() == [5, 0, 100, 4]
    assert reader.unread == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission_are_unread_rows(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "open").write_bytes(b"x")
    (folder / "shut").write_bytes(b"x")
    (folder / "shut").chmod(0)
    _, reader, _ = read(FolderSource(folder), BYTES, tmp_path)
    assert [row.reason for row in reader.unread] == ["Permission denied"]


def test_files_that_cannot_be_rows_are_unread_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "fine").write_bytes(b"x")
    with (folder / "huge").open("wb") as huge:
        huge.truncate(ROW_BYTES_MAX)
    blocks, reader, kept = read(FolderSource(folder), BYTES, tmp_path, unread_rows_max=1)
    assert column(blocks, BYTES, "bytes") == [b"x"]
    assert [dict(row.kept) for row in reader.unread] == [{"path": "huge"}]
    assert kept is not None
    assert kept.column("path").to_pylist() == ["fine", "huge"]
    assert kept.column(FAILURE_COLUMN)[0].as_py() is None
    assert "more than the" in kept.column(FAILURE_COLUMN)[1].as_py()
    error = refused(lambda: read(FolderSource(folder), BYTES, tmp_path, unread_rows_max=0))
    assert (error.reason, error.field) == (Reason.LIMIT_EXCEEDED, "failed_rows_max")
    assert "huge" in str(error)


def test_a_folder_is_no_source_for_tensors(tmp_path: Path) -> None:
    assert "gives one column of bytes" in str(refused(lambda: read(FolderSource(tmp_path), X, tmp_path)))
    assert "is no folder" in str(refused(lambda: FolderSource(tmp_path / "absent")))


def test_paths_find_their_source(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    np.savez(tmp_path / "x.npz", x=np.ones((3, 2), np.float32))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "id.parquet")
    for name in ("x.npy", "x.npz"):
        blocks, _, _ = read(source_of(tmp_path / name, X), X, tmp_path)
        np.testing.assert_array_equal(column(blocks, X, "x"), np.ones((3, 2)))
    assert isinstance(source_of(str(tmp_path / "id.parquet"), ID), ParquetSource)
    assert isinstance(source_of(tmp_path, ID), ParquetSource)
    assert isinstance(source_of(tmp_path, BYTES), FolderSource)
    assert isinstance(source_of([b"a"], BYTES), ArraySource)


def bad_rows(tmp_path: Path) -> list[tuple[Rows, str]]:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "rows.csv").write_text("id\n1\n", encoding="ascii")
    number: Any = 7
    return [
        (tmp_path / "absent.parquet", "does not exist"),
        (tmp_path / "rows.csv", "no input that fallow reads"),
        (tmp_path / "objects.npy", "cannot read"),
        (number, "rows cannot be taken from int"),
    ]


def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    for rows, told in bad_rows(tmp_path):
        error = refused(lambda rows=rows: source_of(rows, ID))  # type: ignore[misc]
        assert error.reason is Reason.FIELD_INVALID
        assert told in str(error)
