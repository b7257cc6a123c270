"""The bytes of row blocks are frozen: a change here breaks every stored dataset and every commitment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fallow.ids import digest_of
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import BytesColumn, DType, RaggedColumn, Schema, SizeFeature, StringColumn, TensorColumn

GOLDEN = Path(__file__).parent / "golden"
NONCE = bytes(range(16))
DIGEST = digest_of(b"a schema")

TENSOR = Schema((TensorColumn("x", DType.FLOAT32, (2, 2)), TensorColumn("y", DType.INT64, ())))
TENSOR_VALUES: dict[str, ColumnValues] = {
    "x": np.array([[[1, -1], [0.5, np.nan]], [[np.inf, 0], [-0.0, 2]]], dtype=np.float32),
    "y": np.array([1, -2], dtype=np.int64),
}
STRING = Schema((StringColumn("s"),), (SizeFeature.BYTES,))
STRING_VALUES: dict[str, ColumnValues] = {"s": ["", "fallow", "Brachland ist frei: ü €"]}
BYTES = Schema((BytesColumn("b"), TensorColumn("flag", DType.BOOL, ())), (SizeFeature.BYTES,))
BYTES_VALUES: dict[str, ColumnValues] = {
    "b": [b"", b"\x00\xff", bytes(range(20))],
    "flag": np.array([True, False, True]),
}
RAGGED = Schema((RaggedColumn("r", DType.INT16, (None, 2)), RaggedColumn("q", DType.FLOAT64, (None,))))
RAGGED_VALUES: dict[str, ColumnValues] = {
    "r": [np.zeros((0, 2), np.int16), np.array([[1, 2], [3, -4]], np.int16)],
    "q": [np.array([0.25]), np.zeros(0)],
}

CASES = {
    "tensor": (TENSOR, TENSOR_VALUES),
    "string": (STRING, STRING_VALUES),
    "bytes": (BYTES, BYTES_VALUES),
    "ragged": (RAGGED, RAGGED_VALUES),
}


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"row_block_{name}.hex").read_text(encoding="ascii"))


@pytest.mark.parametrize("name", CASES)
def test_encoding_gives_the_golden_bytes(name: str) -> None:
    schema, values = CASES[name]
    assert RowCodec(schema, DIGEST).encode(values, nonce=NONCE).hex() == golden_bytes(name).hex()


@pytest.mark.parametrize("name", CASES)
def test_the_golden_bytes_decode(name: str) -> None:
    schema, values = CASES[name]
    decoded = RowCodec(schema, DIGEST).decode(RowBlock.parse(golden_bytes(name)))
    assert decoded.malformed == {}
    for column, wanted in values.items():
        for row, value in enumerate(wanted):
            np.testing.assert_array_equal(decoded.columns[column][row], value)


def test_a_failed_row_of_an_output_takes_no_bytes() -> None:
    schema, values = CASES["tensor"]
    encoded = RowCodec(schema, DIGEST).encode(values, nonce=NONCE, positions=np.array([0, 2]), row_count=3)
    assert encoded.hex() == golden_bytes("failed_row").hex()


def test_the_root_of_the_golden_tensor_block_is_frozen() -> None:
    roots = {name: RowBlock.parse(golden_bytes(name)).root().hex() for name in (*CASES, "failed_row")}
    told = dict(line.split() for line in (GOLDEN / "row_block_roots.txt").read_text(encoding="ascii").splitlines())
    assert roots == told
