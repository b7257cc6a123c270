"""The signature of an ONNX model, read from its protobuf bytes without any ONNX package and without running anything.

Only names, types and shapes of the graph's inputs and outputs, and whether weights lie outside the file, are read;
weights are skipped. The field numbers are those of `onnx.proto` (the ONNX IR specification).
What a program really does is found by inspection on an operator's machine.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.limits import PROGRAM_BYTES_MAX
from fallow.schema import DType

Dim = int | str | None
"""A dimension: its size, its symbol, or None when nothing is said."""

ELEMENT_TYPES: Final[dict[int, DType]] = {
    1: DType.FLOAT32,
    2: DType.UINT8,
    3: DType.INT8,
    4: DType.UINT16,
    5: DType.INT16,
    6: DType.INT32,
    7: DType.INT64,
    9: DType.BOOL,
    10: DType.FLOAT16,
    11: DType.FLOAT64,
    12: DType.UINT32,
    13: DType.UINT64,
}
"""`TensorProto.DataType` of the element types that rows can carry."""

_OTHER_ELEMENT_TYPES: Final = {8: "string", 14: "complex64", 15: "complex128", 16: "bfloat16"}

_FOREIGN: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"PK\x03\x04", "a zip archive, perhaps a PyTorch or Keras checkpoint"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x80\x03", "a Python pickle"),
    (0, b"\x80\x04", "a Python pickle"),
    (0, b"\x80\x05", "a Python pickle"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, perhaps a Keras model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a Git LFS pointer; the model itself was not downloaded"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"\x7fELF", "an executable"),
    (0, b"PAR1", "a Parquet file"),
    (8, b'{"', "a safetensors file: weights without a program"),
)


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """One input or output of a graph."""

    name: str
    dtype: DType | None
    """None when it is no tensor that rows can carry."""
    shape: tuple[Dim, ...] | None
    """With the row axis; None when the rank is not declared."""
    kind: str
    """What it is, in words: `float32`, `string`, `a sequence`, `a map`."""


@dataclass(frozen=True, slots=True)
class OnnxSignature:
    """What a model takes and gives."""

    inputs: tuple[OnnxValue, ...]
    """Graph inputs that are not weights, in order."""
    outputs: tuple[OnnxValue, ...]
    opsets: tuple[tuple[str, int], ...]
    """(domain, version); the standard domain is empty."""
    external_data: tuple[str, ...]
    """Names of weights that lie outside the file."""


def read_onnx_signature(path: Path) -> OnnxSignature:
    """The signature of the model in the file at `path`.

    Raises BUNDLE_INVALID saying what the file is instead, when it is no ONNX model, cannot be read or is too large.
    """
    try:
        size = path.stat().st_size
        if size > PROGRAM_BYTES_MAX:
            raise FallowError(
                Reason.BUNDLE_INVALID,
                f"{path} is {size} bytes long",
                field=str(path),
                limit=f"{PROGRAM_BYTES_MAX} bytes a program",
            )
        if size == 0:
            raise _not_onnx(path, "an empty file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                return _signature_of(view, path)
            finally:
                view.release()
    except OSError as error:
        raise FallowError(
            Reason.BUNDLE_INVALID, f"cannot read {path}: {error.strerror or error}", field=str(path)
        ) from error


def _signature_of(data: memoryview, path: Path) -> OnnxSignature:
    head = bytes(data[:64])
    for offset, magic, kind in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise _not_onnx(path, kind)
    try:
        return _read_model(data, path)
    except _MalformedError as error:
        raise _not_onnx(path, f"not a protobuf message of that kind ({error})") from None


def _read_model(data: memoryview, path: Path) -> OnnxSignature:
    graph: tuple[int, int] | None = None
    opsets: list[tuple[str, int]] = []
    for number, value in _fields(data, 0, len(data)):
        if number == 7 and isinstance(value, tuple):
            graph = value
        elif number == 8 and isinstance(value, tuple):
            opsets.append(_opset(data, value))
    if graph is None or not opsets:
        raise _not_onnx(path, "without a graph or an operator set")
    inputs: list[OnnxValue] = []
    outputs: list[OnnxValue] = []
    weights: set[str] = set()
    external: list[str] = []
    for number, value in _fields(data, *graph):
        if not isinstance(value, tuple):
            continue
        if number == 5:
            name, outside = _weight(data, value)
            weights.add(name)
            if outside:
                external.append(name)
        elif number == 11:
            inputs.append(_value(data, value))
        elif number == 12:
            outputs.append(_value(data, value))
    if not outputs:
        raise _not_onnx(path, "a graph without outputs")
    return OnnxSignature(
        inputs=tuple(value for value in inputs if value.name not in weights),
        outputs=tuple(outputs),
        opsets=tuple(opsets),
        external_data=tuple(external),
    )


def _opset(data: memoryview, span: tuple[int, int]) -> tuple[str, int]:
    domain, version = "", 0
    for number, value in _fields(data, *span):
        if number == 1 and isinstance(value, tuple):
            domain = _text(data, value)
        elif number == 2 and isinstance(value, int):
            version = value
    return domain, version


def _weight(data: memoryview, span: tuple[int, int]) -> tuple[str, bool]:
    """(name, whether its data lies outside the file) of a TensorProto."""
    name, outside = "", False
    for number, value in _fields(data, *span):
        if number == 8 and isinstance(value, tuple):
            name = _text(data, value)
        elif (number == 14 and value == 1) or number == 13:
            outside = True
    return name, outside


def _value(data: memoryview, span: tuple[int, int]) -> OnnxValue:
    """A ValueInfoProto."""
    name, dtype, shape, kind = "", None, None, "of no declared type"
    for number, value in _fields(data, *span):
        if not isinstance(value, tuple):
            continue
        if number == 1:
            name = _text(data, value)
        elif number == 2:
            dtype, shape, kind = _type(data, value)
    return OnnxValue(name, dtype, shape, kind)


def _type(data: memoryview, span: tuple[int, int]) -> tuple[DType | None, tuple[Dim, ...] | None, str]:
    """A TypeProto: (element type, shape, kind in words)."""
    others = {4: "a sequence", 5: "a map", 8: "a sparse tensor", 9: "an optional value"}
    for number, value in _fields(data, *span):
        if number in others:
            return None, None, others[number]
        if number != 1 or not isinstance(value, tuple):
            continue
        element, shape = 0, None
        for inner, content in _fields(data, *value):
            if inner == 1 and isinstance(content, int):
                element = content
            elif inner == 2 and isinstance(content, tuple):
                shape = tuple(
                    _dim(data, dim) for axis, dim in _fields(data, *content) if axis == 1 and isinstance(dim, tuple)
                )
        dtype = ELEMENT_TYPES.get(element)
        told = dtype.value if dtype else _OTHER_ELEMENT_TYPES.get(element, f"element type {element}")
        return dtype, shape, told
    return None, None, "of no declared type"


def _dim(data: memoryview, span: tuple[int, int]) -> Dim:
    for number, value in _fields(data, *span):
        if number == 1 and isinstance(value, int):
            # Some exporters write -1 or 0 for "any".
            return value if 0 < value < 1 << 63 else None
        if number == 2 and isinstance(value, tuple):
            return _text(data, value) or None
    return None


class _MalformedError(Exception):
    """Bytes that are no protobuf message."""


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """The fields of a protobuf message: (number, integer, or the span of its bytes)."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise _MalformedError(f"field number 0 at byte {position}")
        if wire_type == 0:
            value, position = _varint(data, position, end)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position, end)
        elif wire_type in {1, 5}:
            length = 8 if wire_type == 1 else 4
        else:
            raise _MalformedError(f"wire type {wire_type} at byte {position}")
        if length > end - position:
            raise _MalformedError(f"a field runs over the end at byte {position}")
        yield number, (position, position + length)
        position += length


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _MalformedError(f"cut off at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError(f"a number without end at byte {position}")


def _text(data: memoryview, span: tuple[int, int]) -> str:
    try:
        return bytes(data[span[0] : span[1]]).decode()
    except UnicodeDecodeError:
        raise _MalformedError(f"a name that is not UTF-8 at byte {span[0]}") from None


def _not_onnx(path: Path, what: str) -> FallowError:
    return FallowError(
        Reason.BUNDLE_INVALID,
        f"{path} is no ONNX model: it is {what}",
        field=str(path),
        limit="an ONNX model in one file",
        hint="export the model to ONNX, for instance with torch.onnx.export or skl2onnx; pickles are never run here",
    )
