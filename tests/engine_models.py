"""Small ONNX models and bundles for tests of the engine, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fallow.bundle import Binding, BundleFile, BundleManifest, BytesCodec, ProgramFormat, ProgramStage, Stage, TopKHead
from fallow.ids import Digest, digest_of
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import BytesColumn, Column, DType, Schema, SizeFeature, StringColumn, TensorColumn

INPUT_DIGEST = Digest(b"i" * 32)
OUTPUT_DIGEST = Digest(b"o" * 32)
BUNDLE_DIGEST = Digest(b"b" * 32)
NONCE = bytes(range(16))
PROGRAM_FILE = "program.onnx"
LABELS_FILE = "labels.txt"
FEATURES = 6


def onnx_model(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[str, int, Sequence[Any] | None]],
    outputs: Sequence[tuple[str, int, Sequence[Any] | None]],
    initializers: Mapping[str, NDArray[Any]] | None = None,
    *,
    opset: int = 17,
    extra_domains: Sequence[str] = (),
    check: bool = True,
) -> bytes:
    """The bytes of a model with one graph."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in extra_domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if check:
        onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def dense_model(*, batch: Any = "rows", features: int = FEATURES, outputs: int = 3, hidden: int = 8) -> bytes:
    """x float32[rows, features] → MatMul → Relu → MatMul → y float32[rows, outputs]."""
    generator = np.random.default_rng(7)
    return onnx_model(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "second"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [batch, features])],
        [("y", TensorProto.FLOAT, [batch, outputs])],
        {
            "first": generator.standard_normal((features, hidden), dtype=np.float32),
            "second": generator.standard_normal((hidden, outputs), dtype=np.float32),
        },
    )


def gather_model(*, batch: Any = "rows") -> bytes:
    """x int64[rows, 1] → Gather from a table of four → y float32[rows, 2]; other indexes fail the whole batch."""
    return onnx_model(
        [
            helper.make_node("Gather", ["table", "x"], ["a"], axis=0),
            helper.make_node("Squeeze", ["a", "axes"], ["y"]),
        ],
        [("x", TensorProto.INT64, [batch, 1])],
        [("y", TensorProto.FLOAT, [batch, 2])],
        {"table": np.arange(8, dtype=np.float32).reshape(4, 2), "axes": np.array([1], np.int64)},
    )


def tensor_manifest(
    model: bytes,
    *,
    input_columns: Sequence[Column] = (TensorColumn("x", DType.FLOAT32, (FEATURES,)),),
    output_columns: Sequence[Column] = (TensorColumn("y", DType.FLOAT32, (3,)),),
    stages: Sequence[Stage] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> BundleManifest:
    """A bundle whose columns are the program's inputs and outputs by name, unless `stages` says otherwise."""
    if stages is None:
        stages = (
            ProgramStage(
                ProgramFormat.ONNX,
                PROGRAM_FILE,
                tuple(Binding(column.name, column.name) for column in input_columns),
                tuple(Binding(column.name, column.name) for column in output_columns),
            ),
        )
    contents = {PROGRAM_FILE: model} | dict(files or {})
    return BundleManifest(
        name="test",
        files=tuple(BundleFile(name, digest_of(content), len(content)) for name, content in contents.items()),
        stages=tuple(stages),
        input_schema=Schema(tuple(input_columns)),
        output_schema=Schema(tuple(output_columns)),
    )


def text_bundle(
    *, short_label: str = "", short_bytes_max: int = 0, tokens: int = 8
) -> tuple[BundleManifest, dict[str, bytes]]:
    """Contents of up to 16 + 16 bytes → tokens → dense program → best label of three and its score."""
    model = onnx_model(
        [
            helper.make_node("Cast", ["tokens"], ["a"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["a", "weights"], ["scores"]),
        ],
        [("tokens", TensorProto.INT32, ["rows", tokens])],
        [("scores", TensorProto.FLOAT, ["rows", 3])],
        {"weights": np.random.default_rng(3).standard_normal((tokens, 3), dtype=np.float32)},
    )
    labels = b"alpha\nbeta\ngamma\n"
    codec = BytesCodec(
        column="content",
        output="tokens",
        head_window_bytes=16,
        tail_window_bytes=16,
        head_tokens=tokens // 2,
        tail_tokens=tokens // 2,
        padding_token=256,
        strip_whitespace=True,
    )
    program = ProgramStage(
        ProgramFormat.ONNX, PROGRAM_FILE, (Binding("tokens", "tokens"),), (Binding("scores", "scores"),)
    )
    head = TopKHead("scores", "label", 1, LABELS_FILE, short_label=short_label, short_bytes_max=short_bytes_max)
    manifest = BundleManifest(
        name="text",
        files=(
            BundleFile(PROGRAM_FILE, digest_of(model), len(model)),
            BundleFile(LABELS_FILE, digest_of(labels), len(labels)),
        ),
        stages=(codec, program, head),
        input_schema=Schema((BytesColumn("content"),), (SizeFeature.BYTES,)),
        output_schema=Schema((StringColumn("label"), TensorColumn("label_score", DType.FLOAT32, ()))),
    )
    return manifest, {PROGRAM_FILE: model, LABELS_FILE: labels}


def encoded(manifest: BundleManifest, columns: Mapping[str, ColumnValues]) -> bytes:
    """The input block of those columns."""
    return RowCodec(manifest.input_schema, INPUT_DIGEST).encode(columns, nonce=bytes(16))
