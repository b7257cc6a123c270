"""What a referee finds of stand-in classes and of cheaters, running real programs in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine_models import PROGRAM_FILE, onnx_model, tensor_manifest, text_bundle
from fallow.bundle import Precision
from fallow.comparison import CEILING_PPM, PROFILE_SAMPLES_MIN, CandidateFinding, Finding, ToleranceProfile
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.schema import DType, TensorColumn
from fallow_worker.engine import onnx_program
from fallow_worker.engine.jitter import jittered
from referee_rig import OTHER_CLASS, OWN_CLASS, Machine, found, halved, quantised, rewritten

FEATURES = 64
ROWS = 12
COLUMNS: Mapping[str, ColumnValues] = {
    "x": np.random.default_rng(1).standard_normal((ROWS, FEATURES), dtype=np.float32)
}


def layers(*sizes: int) -> bytes:
    """x → (MatMul → Tanh)* → MatMul → y, of those widths."""
    generator = np.random.default_rng(7)
    nodes: list[Any] = []
    weights: dict[str, Any] = {}
    value = "x"
    for index, (inner, outer) in enumerate(pairwise(sizes)):
        weights[f"w{index}"] = (generator.standard_normal((inner, outer)) / np.sqrt(inner)).astype(np.float32)
        last = index == len(sizes) - 2
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], ["y" if last else f"m{index}"]))
        if not last:
            nodes.append(helper.make_node("Tanh", [f"m{index}"], [value := f"t{index}"]))
    outputs = [("y", TensorProto.FLOAT, ["rows", sizes[-1]])]
    return onnx_model(nodes, [("x", TensorProto.FLOAT, ["rows", sizes[0]])], outputs, weights)


def shuffled(model: bytes) -> bytes:
    """The same function, whose hidden sums are added up in another order: an honest machine of another make."""
    parsed = onnx.load_from_string(model)
    weights = [numpy_helper.to_array(tensor).copy() for tensor in parsed.graph.initializer]
    generator = np.random.default_rng(3)
    for index in range(len(weights) - 1):
        order = generator.permutation(weights[index].shape[1])
        weights[index], weights[index + 1] = weights[index][:, order], weights[index + 1][order]
    for tensor, changed in zip(parsed.graph.initializer, weights, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))
    return bytes(parsed.SerializeToString())


@pytest.fixture(scope="module")
def machine() -> Machine:
    model = layers(FEATURES, 128, 64, 8)
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.FLOAT32, (FEATURES,)),),
        output_columns=(TensorColumn("y", DType.FLOAT32, (8,)),),
    )
    return Machine(manifest, {PROGRAM_FILE: model})


def kinds(findings: list[CandidateFinding]) -> set[Finding | None]:
    return {one.finding for one in findings}


def profile_of(findings: list[CandidateFinding]) -> ToleranceProfile:
    """As if these rows, again and again, had taught it."""
    seen = sorted(one.deviation_ppm for one in findings)
    return ToleranceProfile(
        OWN_CLASS, OTHER_CLASS, PROFILE_SAMPLES_MIN, seen[len(seen) // 2], seen[len(seen) * 19 // 20], seen[-1]
    )


def test_honest_machines_of_other_classes_are_ties_and_with_a_profile_within_tolerance(machine: Machine) -> None:
    stand_ins = [
        machine.unoptimised().outputs(COLUMNS),
        machine.in_batches_of(1).outputs(COLUMNS),
        machine.in_batches_of(32).outputs(COLUMNS),
        replace(machine, files={PROGRAM_FILE: shuffled(machine.files[PROGRAM_FILE])}).outputs(COLUMNS),
    ]
    candidates = [(block, OTHER_CLASS) for block in stand_ins]
    without = found(machine, COLUMNS, candidates)
    assert kinds(without[-1]) == {Finding.TIE}
    assert set().union(*map(kinds, without)) <= {Finding.EQUAL, Finding.TIE}
    assert max(one.deviation_ppm for findings in without for one in findings) < CEILING_PPM // 4
    taught = profile_of(without[-1])
    judged = found(machine, COLUMNS, candidates, profiles=(taught,))
    assert set().union(*map(kinds, judged)) <= {Finding.EQUAL, Finding.WITHIN_TOLERANCE}


def test_coarser_arithmetic_and_junk_are_unexplained_and_with_a_profile_wrong(machine: Machine) -> None:
    own = machine.outputs(COLUMNS)
    other_rows = machine.outputs({"x": np.asarray(COLUMNS["x"])[::-1]})
    cheats: dict[str, RowBlock] = {
        "fp16 weights": machine.with_weights(halved).outputs(COLUMNS),
        "int8 weights": machine.with_weights(quantised).outputs(COLUMNS),
        "fp16 outputs": rewritten(machine, own, lambda c: {"y": c["y"].astype(np.float16).astype(np.float32)}),
        "constant": rewritten(machine, own, lambda c: {"y": np.zeros_like(c["y"])}),
        "another row's": other_rows,
        "sign flipped": rewritten(machine, own, lambda c: {"y": -c["y"]}),
        "nan": rewritten(machine, own, lambda c: {"y": np.full_like(c["y"], np.nan)}),
    }
    honest = replace(machine, files={PROGRAM_FILE: shuffled(machine.files[PROGRAM_FILE])}).outputs(COLUMNS)
    taught = profile_of(found(machine, COLUMNS, [(honest, OTHER_CLASS)])[0])
    candidates = [(block, OTHER_CLASS) for block in cheats.values()]
    for name, findings in zip(cheats, found(machine, COLUMNS, candidates), strict=True):
        assert kinds(findings) == {Finding.UNEXPLAINED}, name
    for name, findings in zip(cheats, found(machine, COLUMNS, candidates, profiles=(taught,)), strict=True):
        assert kinds(findings) == {Finding.UNEXPLAINED if name == "nan" else Finding.WRONG}, name
    in_class = found(machine, COLUMNS, [(block, OWN_CLASS) for block in cheats.values()])
    assert set().union(*map(kinds, in_class)) == {Finding.WRONG}


@pytest.mark.parametrize(
    ("times", "finding"), [(0.5, Finding.WITHIN_TOLERANCE), (2, Finding.WRONG), (5, Finding.WRONG)]
)
def test_noise_is_found_from_twice_what_is_allowed(machine: Machine, times: float, finding: Finding) -> None:
    own = machine.outputs(COLUMNS)
    plain = found(machine, COLUMNS, [(rewritten(machine, own, lambda c: {"y": c["y"] * (1 + 1e-6)}), OTHER_CLASS)])[0]
    taught = profile_of(plain)
    # 1e-6 of an element is this many spreads at most: noise of the allowed size is 1.5 times that.
    noise = 1e-6 * 1.5 * times * max(1.0, 500_000 / taught.max_ppm)
    noisy = rewritten(machine, own, lambda c: {"y": c["y"] * np.float32(1 + noise)})
    findings = found(machine, COLUMNS, [(noisy, OTHER_CLASS)], profiles=(taught,))[0]
    assert finding in kinds(findings)
    assert kinds(findings) <= {finding, Finding.UNEXPLAINED, Finding.WITHIN_TOLERANCE}


def test_only_rows_that_differ_are_judged(machine: Machine) -> None:
    own = machine.outputs(COLUMNS)

    def one_changed(columns: dict[str, Any]) -> dict[str, Any]:
        columns["y"][5] += 1
        return columns

    findings = found(machine, COLUMNS, [(rewritten(machine, own, one_changed), OTHER_CLASS)])[0]
    assert [row for row, one in enumerate(findings) if one.finding is not Finding.EQUAL] == [5]
    assert findings[5].finding is Finding.UNEXPLAINED


@pytest.mark.parametrize("changes", [{"runs_program": False}, {"seconds_max": 0.0}])
def test_without_other_forms_the_spread_follows_from_the_precision(machine: Machine, changes: dict[str, Any]) -> None:
    own = machine.outputs(COLUMNS)
    near = rewritten(machine, own, lambda c: {"y": c["y"] * np.float32(1 + 2**-21)})
    far = machine.with_weights(halved).outputs(COLUMNS)
    findings = found(machine, COLUMNS, [(near, OTHER_CLASS), (far, OTHER_CLASS)], own=own, **changes)
    assert [kinds(one) for one in findings] == [{Finding.TIE}, {Finding.UNEXPLAINED}]


def test_a_label_that_nearly_ties_is_a_tie_and_another_one_is_not() -> None:
    manifest, files = text_bundle()
    machine = Machine(manifest, files)
    columns: Mapping[str, ColumnValues] = {"content": [b"some text here", b"and another", b"third one of them"]}
    own = machine.outputs(columns)

    def wrong(columns: dict[str, Any]) -> dict[str, Any]:
        columns["label"] = [{"alpha": "beta", "beta": "gamma", "gamma": "alpha"}[name] for name in columns["label"]]
        return columns

    lied = rewritten(machine, own, wrong)
    taught = ToleranceProfile(OWN_CLASS, OTHER_CLASS, PROFILE_SAMPLES_MIN, 0, 0, 0)
    assert kinds(found(machine, columns, [(lied, OTHER_CLASS)])[0]) == {Finding.UNEXPLAINED}
    assert kinds(found(machine, columns, [(lied, OTHER_CLASS)], profiles=(taught,))[0]) == {Finding.WRONG}


def test_weights_are_moved_by_the_length_of_their_sums() -> None:
    model = layers(64, 16, 4)
    moved = jittered(model, precision=Precision.FP32, seed=1)
    assert moved is not None and moved != jittered(model, precision=Precision.FP32, seed=2)
    assert moved == jittered(model, precision=Precision.FP32, seed=1)
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(model).graph.initializer}
    after = {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(moved).graph.initializer}
    for name, terms in (("w0", 64), ("w1", 16)):
        relative = np.abs(after[name].astype(np.float64) / before[name] - 1)
        assert np.median(relative) == pytest.approx(np.sqrt(terms) * 2**-24, rel=0.3)
    assert jittered(b"no model", precision=Precision.FP32, seed=1) is None


def test_a_row_that_depends_on_its_neighbours_after_all_proves_nothing() -> None:
    """The largest of a batch is added to rows that begin above 1: inspection may miss what so few rows show."""
    model = onnx_model(
        [
            helper.make_node("ReduceMax", ["x"], ["top"], axes=[0], keepdims=1),
            helper.make_node("Greater", ["x", "one"], ["large"]),
            helper.make_node("Where", ["large", "top", "zero"], ["add"]),
            helper.make_node("Add", ["x", "add"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["rows", 2])],
        [("y", TensorProto.FLOAT, ["rows", 2])],
        {"one": np.array(1, np.float32), "zero": np.array(0, np.float32)},
    )
    two = TensorColumn("x", DType.FLOAT32, (2,)), TensorColumn("y", DType.FLOAT32, (2,))
    manifest = tensor_manifest(model, input_columns=two[:1], output_columns=two[1:])
    machine = Machine(manifest, {PROGRAM_FILE: model})
    columns = {"x": np.array([[1.5, 0.1], [0.2, 0.3], [9.0, 9.0], [0.1, 0.2]], np.float32)}
    own = machine.outputs(columns)
    honest = rewritten(machine, own, lambda c: {"y": np.where([[1, 0], [0, 0], [0, 0], [0, 0]], 3.0, c["y"])})
    lied = rewritten(machine, own, lambda c: {"y": c["y"] + np.array([[0], [1], [0], [0]], np.float32)})
    first, second = found(machine, columns, [(honest, OWN_CLASS), (lied, OWN_CLASS)])
    assert [one.finding for one in first] == [Finding.UNEXPLAINED, Finding.EQUAL, Finding.EQUAL, Finding.EQUAL]
    assert [one.finding for one in second] == [Finding.EQUAL, Finding.WRONG, Finding.EQUAL, Finding.EQUAL]


def test_rows_of_slot_dependent_programs_are_run_in_their_slots() -> None:
    model = onnx_model(
        [
            helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
            helper.make_node("Squeeze", ["count"], ["n"]),
            helper.make_node("Range", ["zero", "n", "one"], ["places"]),
            helper.make_node("Cast", ["places"], ["slots"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["slots", "last"], ["column"]),
            helper.make_node("Add", ["x", "column"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["rows", 2])],
        [("y", TensorProto.FLOAT, ["rows", 2])],
        {"zero": np.array(0, np.int64), "one": np.array(1, np.int64), "last": np.array([1], np.int64)},
    )
    two = TensorColumn("x", DType.FLOAT32, (2,)), TensorColumn("y", DType.FLOAT32, (2,))
    machine = Machine(
        tensor_manifest(model, input_columns=two[:1], output_columns=two[1:]),
        {PROGRAM_FILE: model},
        slot_dependent=True,
    )
    columns = {"x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    own = machine.outputs(columns)
    lied = rewritten(machine, own, lambda c: {"y": c["y"] + np.float32(1)})
    [findings] = found(machine, columns, [(lied, OWN_CLASS)], slots=(0, 1, 2, 3))
    assert kinds(findings) == {Finding.WRONG}


def test_a_class_names_everything_that_decides_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and its build, provider, optimisation, threads, instruction sets, data limit, codecs, precision, batch."""

    def of(**changes: int) -> str:
        onnx_program.machine_class.cache_clear()
        return onnx_program.machine_class(**{"data_limit_bytes": 1 << 30, **changes})

    plain = of()
    seen = {plain, of(data_limit_bytes=1 << 31), of(threads_per_batch=2)}
    changes: tuple[tuple[Any, str, Any], ...] = (
        (onnx_program.ort, "get_build_info", lambda: "another build"),
        (onnx_program.ort, "__version__", "0.0.1"),
        (onnx_program, "_cpu_flags", lambda: {"sse4_2"}),
        (onnx_program, "CODEC_VERSION", 99),
    )
    for where, name, value in changes:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, value)
            seen.add(of())
    assert len(seen) == 7 and of() == plain
    classes = {
        onnx_program.execution_class(plain, precision=precision, batch_rows=batch)
        for precision, batch in (("fp32", 4), ("fp32", 8), ("fp16", 4))
    }
    assert len(classes) == 3
