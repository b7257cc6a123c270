"""Inspections in real children: what is recognised, refused, measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from engine_children import inspected
from engine_models import (
    FEATURES,
    LABELS_FILE,
    PROGRAM_FILE,
    dense_model,
    encoded,
    gather_model,
    onnx_model,
    tensor_manifest,
    text_bundle,
)
from fallow.bundle import Binding, BundleManifest, BytesCodec, InspectionReport, ProgramFormat, ProgramStage, TopKHead
from fallow.schema import BytesColumn, DType, Schema, SizeFeature, StringColumn, TensorColumn

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="children are Linux's")]

X = ("x", TensorProto.FLOAT, ["rows", FEATURES])
WIDE_OUT: dict[str, Any] = {"output_columns": (TensorColumn("y", DType.FLOAT32, (FEATURES,)),)}


def report_on(model: bytes, **columns: Any) -> InspectionReport:
    return inspected(tensor_manifest(model, **columns), {PROGRAM_FILE: model}).report


def model_of(nodes: list[Any], **initializers: Any) -> bytes:
    return onnx_model(nodes, [X], [("y", TensorProto.FLOAT, ["rows", FEATURES])], initializers)


def test_an_honest_program_is_accepted_with_batch_cost_and_class() -> None:
    manifest, files = text_bundle()
    report = inspected(manifest, files).report
    assert report.accepted, report.refusals
    assert report.refusals == ()
    assert dict(report.operators) == {"Cast": 1, "MatMul": 1}
    assert report.canonical_batch_rows in {1, 2, 4, 8, 16, 32}
    assert not report.neighbour_dependent
    assert 0 < report.unit_micros_per_row < 100_000
    assert report.memory_bytes_peak > 20 << 20
    assert report.execution_class.endswith(f"/fp32/b{report.canonical_batch_rows}")
    assert 0 < report.inspected_seconds < 60


def test_a_graph_that_adds_up_the_batch_is_recognised() -> None:
    model = model_of(
        [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"])]
    )
    report = report_on(model, **WIDE_OUT)
    assert report.accepted, report.refusals
    assert (report.neighbour_dependent, report.canonical_batch_rows) == (True, 1)


def test_a_graph_that_quantises_by_the_largest_value_of_the_batch_is_recognised() -> None:
    model = model_of(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ]
    )
    report = report_on(model, **WIDE_OUT)
    assert report.accepted, report.refusals
    assert (report.neighbour_dependent, report.canonical_batch_rows) == (True, 1)


def test_a_graph_that_knows_the_place_of_a_row_is_recognised() -> None:
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
            helper.make_node("Squeeze", ["count"], ["n"]),
            helper.make_node("Range", ["zero", "n", "one"], ["places"]),
            helper.make_node("Cast", ["places"], ["slots"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["slots", "last"], ["column"]),
            helper.make_node("Add", ["x", "column"], ["y"]),
        ],
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
        last=np.array([1], np.int64),
    )
    report = report_on(model, **WIDE_OUT)
    assert report.accepted, report.refusals
    assert report.canonical_batch_rows > 1, "so small a graph gains from larger batches"
    assert (report.slot_dependent, report.neighbour_dependent) == (True, False)


def test_dependences_that_show_in_few_rows_are_recognised() -> None:
    """Rows that begin above 1.7, about one in twenty: to these the largest of the batch, or their place, is added."""
    rare = [
        helper.make_node("Slice", ["x", "first", "second", "last"], ["begin"]),
        helper.make_node("Greater", ["begin", "bound"], ["large"]),
        helper.make_node("Where", ["large", "what", "nothing"], ["add"]),
        helper.make_node("Add", ["x", "add"], ["y"]),
    ]
    constants: dict[str, Any] = {
        "first": np.array([0], np.int64),
        "second": np.array([1], np.int64),
        "last": np.array([1], np.int64),
        "bound": np.array(1.7, np.float32),
        "nothing": np.array(0, np.float32),
    }
    neighbours = model_of([helper.make_node("ReduceMax", ["x"], ["what"], keepdims=0), *rare], **constants)
    report = report_on(neighbours, **WIDE_OUT)
    assert (report.accepted, report.neighbour_dependent, report.canonical_batch_rows) == (True, True, 1)
    places = [
        helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
        helper.make_node("Squeeze", ["count"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["places"]),
        helper.make_node("Cast", ["places"], ["slots"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["slots", "last"], ["what"]),
    ]
    slots = model_of([*places, *rare], zero=np.array(0, np.int64), one=np.array(1, np.int64), **constants)
    report = report_on(slots, **WIDE_OUT)
    assert report.accepted, report.refusals
    assert report.canonical_batch_rows == 1 or report.slot_dependent
    assert not report.neighbour_dependent


def test_a_dynamically_quantised_program_runs_alone() -> None:
    """Weights of 8 bits, activations quantised by the largest of the batch, as exporters write it."""
    weights = np.random.default_rng(5).integers(-100, 100, (FEATURES, FEATURES)).astype(np.int8)
    model = model_of(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "weights", "zero"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["y"]),
        ],
        weights=weights,
    )
    report = report_on(model, **WIDE_OUT)
    assert (report.accepted, report.neighbour_dependent, report.canonical_batch_rows) == (True, True, 1)


def test_a_batch_fixed_in_the_model_is_kept_and_must_not_mix_rows() -> None:
    report = report_on(dense_model(batch=3))
    assert report.accepted, report.refusals
    assert report.canonical_batch_rows == 3
    mixing = onnx_model(
        [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"])],
        [("x", TensorProto.FLOAT, [3, FEATURES])],
        [("y", TensorProto.FLOAT, [3, FEATURES])],
    )
    refused = report_on(mixing, **WIDE_OUT)
    assert not refused.accepted
    assert "depend on their neighbours" in refused.refusals[0]


def test_seeded_randomness_that_goes_on_from_run_to_run_is_refused() -> None:
    model = model_of(
        [helper.make_node("RandomNormalLike", ["x"], ["r"], seed=1.0), helper.make_node("Add", ["x", "r"], ["y"])]
    )
    refused = report_on(model, **WIDE_OUT)
    assert not refused.accepted


def test_programs_that_take_few_indexes_are_tried_with_tame_rows() -> None:
    report = report_on(
        gather_model(),
        input_columns=(TensorColumn("x", DType.INT64, (1,)),),
        output_columns=(TensorColumn("y", DType.FLOAT32, (2,)),),
    )
    assert report.accepted, report.refusals


def test_dependences_that_only_sample_rows_show_are_found() -> None:
    """Rows above a thousand are compared with the largest of the batch; no synthetic row is as large."""
    model = model_of(
        [
            helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            helper.make_node("Max", ["top", "thousand"], ["bound"]),
            helper.make_node("Add", ["x", "bound"], ["y"]),
        ],
        thousand=np.array(1000, np.float32),
    )
    manifest = tensor_manifest(model, **WIDE_OUT)
    unseen = inspected(manifest, {PROGRAM_FILE: model}).report
    assert not unseen.neighbour_dependent
    sample = encoded(manifest, {"x": np.linspace(1500, 9000, 5 * FEATURES, dtype=np.float32).reshape(5, FEATURES)})
    seen = inspected(manifest, {PROGRAM_FILE: model}, sample=sample).report
    assert (seen.accepted, seen.neighbour_dependent, seen.canonical_batch_rows) == (True, True, 1)


def test_sample_rows_stand_in_where_synthetic_ones_fail() -> None:
    model = onnx_model(
        [helper.make_node("Sub", ["x", "far"], ["a"]), helper.make_node("Gather", ["table", "a"], ["y"], axis=0)],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.FLOAT, ["rows"])],
        {"far": np.array(1000, np.int64), "table": np.arange(4, dtype=np.float32)},
    )
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.INT64, ()),),
        output_columns=(TensorColumn("y", DType.FLOAT32, ()),),
    )
    files = {PROGRAM_FILE: model}
    refused = inspected(manifest, files).report
    assert not refused.accepted
    assert "on every row made from its schema" in refused.refusals[0]
    sample = encoded(manifest, {"x": np.array([1000, 1001, 1003], np.int64)})
    accepted = inspected(manifest, files, sample=sample).report
    assert accepted.accepted, accepted.refusals


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"input_columns": (TensorColumn("x", DType.FLOAT64, (FEATURES,)),)}, "takes float32"),
        ({"output_columns": (TensorColumn("y", DType.FLOAT32, (9,)),)}, "is declared float32[9]"),
    ],
)
def test_a_signature_that_differs_from_the_manifest_is_refused_in_words(columns: dict[str, Any], words: str) -> None:
    refused = report_on(dense_model(), **columns)
    assert not refused.accepted
    assert words in refused.refusals[0]


def test_a_pickle_renamed_is_refused_in_words() -> None:
    manifest = tensor_manifest(dense_model())
    refused = inspected(manifest, {PROGRAM_FILE: b"\x80\x04\x95" + bytes(100)}).report
    assert not refused.accepted
    assert "Python pickle" in refused.refusals[0]


@pytest.mark.slow
def test_a_hundred_megabytes_are_inspected_in_a_minute() -> None:
    model = dense_model(hidden=4_000_000 - 1)
    manifest = tensor_manifest(model)
    report = inspected(manifest, {PROGRAM_FILE: model}).report
    assert len(model) > 100 << 20
    assert report.accepted, report.refusals
    assert report.inspected_seconds <= 60


@pytest.mark.assets
@pytest.mark.skipif(
    importlib.util.find_spec("magika") is None, reason="the package `magika` with the model is not here"
)
def test_magika_is_accepted_quickly() -> None:
    spec = importlib.util.find_spec("magika")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)), "models", "standard_v3_3")
    model = (folder / "model.onnx").read_bytes()
    labels = "\n".join(json.loads((folder / "config.min.json").read_text())["target_labels_space"]).encode()
    codec = BytesCodec("content", "tokens", 4096, 4096, 1024, 1024, 256, strip_whitespace=True)
    manifest = BundleManifest(
        name="magika",
        files=(),
        stages=(
            codec,
            ProgramStage(
                ProgramFormat.ONNX, PROGRAM_FILE, (Binding("bytes", "tokens"),), (Binding("target_label", "chances"),)
            ),
            TopKHead("chances", "label", 1, LABELS_FILE, "unknown", 7),
        ),
        input_schema=Schema((BytesColumn("content"),), (SizeFeature.BYTES,)),
        output_schema=Schema((StringColumn("label"), TensorColumn("label_score", DType.FLOAT32, ()))),
    )
    report = inspected(manifest, {PROGRAM_FILE: model, LABELS_FILE: labels}).report
    assert report.accepted, report.refusals
    assert report.canonical_batch_rows <= 8
    assert report.inspected_seconds < 30
