"""Cost as inspections in real children find it: it follows size, and it is the same again beside other load."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import pytest
from onnx import TensorProto, helper

from engine_children import inspected
from engine_models import LABELS_FILE, PROGRAM_FILE, dense_model, onnx_model, tensor_manifest
from fallow.bundle import (
    Binding,
    BundleFile,
    BundleManifest,
    BytesCodec,
    InspectionReport,
    ProgramFormat,
    ProgramStage,
    TopKHead,
)
from fallow.cost import UNIT_NANOS
from fallow.ids import digest_of
from fallow.schema import BytesColumn, DType, Schema, SizeFeature, StringColumn, TensorColumn
from fallow_worker.engine.cost_fit import FLOPS_FLOOR_SPEEDUP, REFERENCE_FLOPS

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="children are Linux's")]

TOKENS_MAX = 2048
PADDING = 256
APART_MAX = 0.10
TRIES = 3
"""A shared machine may be disturbed for longer than an inspection takes."""


def attention_bundle() -> tuple[BundleManifest, dict[str, bytes]]:
    """Each byte that is no padding looks at every other one: cost grows with the square of the content's length."""
    generator = np.random.default_rng(1)
    program = onnx_model(
        [
            helper.make_node("Equal", ["tokens", "padding"], ["empty"]),
            helper.make_node("Not", ["empty"], ["real"]),
            helper.make_node("NonZero", ["real"], ["places"]),
            helper.make_node("Transpose", ["places"], ["where"]),
            helper.make_node("GatherND", ["tokens", "where"], ["kept"]),
            helper.make_node("Gather", ["table", "kept"], ["x"]),
            helper.make_node("Transpose", ["x"], ["turned"]),
            helper.make_node("MatMul", ["x", "turned"], ["looks"]),
            helper.make_node("Softmax", ["looks"], ["shares"], axis=-1),
            helper.make_node("MatMul", ["shares", "x"], ["seen"]),
            helper.make_node("ReduceSum", ["seen", "axis"], ["sum"], keepdims=1),
            helper.make_node("MatMul", ["sum", "weights"], ["scores"]),
        ],
        [("tokens", TensorProto.INT32, [1, TOKENS_MAX])],
        [("scores", TensorProto.FLOAT, [1, 3])],
        {
            "padding": np.array(PADDING, np.int32),
            "table": generator.standard_normal((PADDING + 1, 64)).astype(np.float32) * np.float32(0.1),
            "axis": np.array([0], np.int64),
            "weights": generator.standard_normal((64, 3)).astype(np.float32),
        },
    )
    files = {PROGRAM_FILE: program, LABELS_FILE: b"alpha\nbeta\ngamma\n"}
    manifest = BundleManifest(
        name="attention",
        files=tuple(BundleFile(name, digest_of(content), len(content)) for name, content in files.items()),
        stages=(
            BytesCodec("content", "tokens", TOKENS_MAX, 0, TOKENS_MAX, 0, PADDING, strip_whitespace=False),
            ProgramStage(
                ProgramFormat.ONNX, PROGRAM_FILE, (Binding("tokens", "tokens"),), (Binding("scores", "scores"),)
            ),
            TopKHead("scores", "label", 1, LABELS_FILE),
        ),
        input_schema=Schema((BytesColumn("content"),), (SizeFeature.BYTES,)),
        output_schema=Schema((StringColumn("label"), TensorColumn("label_score", DType.FLOAT32, ()))),
    )
    return manifest, files


@contextmanager
def busy_machine() -> Iterator[None]:
    """A process that never rests for each core of the machine."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


def report_of(manifest: BundleManifest, files: dict[str, bytes]) -> InspectionReport:
    report = inspected(manifest, files).report
    assert report.accepted, report.refusals
    assert report.cost is not None
    return report


@dataclass
class Costs:
    """What inspections found, of a program whose rows vary and of one whose rows do not."""

    sized: list[int] = field(default_factory=list[int])
    fixed: list[int] = field(default_factory=list[int])

    def add(self, *, sized: InspectionReport, fixed: InspectionReport) -> None:
        assert sized.cost is not None and fixed.cost is not None
        self.sized.append(sized.cost.unit_nanos(TOKENS_MAX))
        self.fixed.append(fixed.cost.unit_nanos(0))

    def apart_from(self, other: Costs) -> float:
        """How far the medians lie from the other's, at most."""
        pairs = ((self.sized, other.sized), (self.fixed, other.fixed))
        return max(abs(median(mine) / median(others) - 1) for mine, others in pairs)


@pytest.fixture(scope="module")
def quiet_report() -> InspectionReport:
    return report_of(*attention_bundle())


def test_cost_that_grows_with_the_square_of_size_is_found_so(quiet_report: InspectionReport) -> None:
    curve = quiet_report.cost
    assert curve is not None
    assert curve.feature_number == 1
    assert curve.size_max == TOKENS_MAX
    assert len(curve.knots) > 3, "a line would not do"
    assert 2.8 < curve.unit_nanos(2048) / curve.unit_nanos(1024) < 6
    assert 1.8 < curve.unit_nanos(512) / curve.unit_nanos(256) < 6
    assert curve.unit_nanos(10 * TOKENS_MAX) == curve.unit_nanos(TOKENS_MAX), "no row is larger than the codec takes"


@pytest.mark.slow
def test_cost_is_within_ten_percent_beside_other_load(quiet_report: InspectionReport) -> None:
    model = dense_model(features=1024, hidden=8192)
    manifest = tensor_manifest(model, input_columns=(TensorColumn("x", DType.FLOAT32, (1024,)),))
    files = {PROGRAM_FILE: model}
    quiet, busy = Costs(), Costs()
    fixed = report_of(manifest, files)
    quiet.add(sized=quiet_report, fixed=fixed)
    for turn in range(TRIES):
        with busy_machine():
            busy.add(sized=report_of(*attention_bundle()), fixed=report_of(manifest, files))
        if turn:
            quiet.add(sized=report_of(*attention_bundle()), fixed=report_of(manifest, files))
        if busy.apart_from(quiet) <= APART_MAX:
            break
    else:
        pytest.fail(f"costs beside load lie apart from those without: {busy} {quiet}")
    assert fixed.cost is not None
    assert fixed.flops_per_row == 2 * 1024 * 8192 + 2 * 8192 * 3
    floor = fixed.flops_per_row * UNIT_NANOS / REFERENCE_FLOPS / FLOPS_FLOOR_SPEEDUP
    assert fixed.cost.unit_nanos(0) >= int(floor)
