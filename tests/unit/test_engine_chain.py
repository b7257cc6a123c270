"""A bundle's chain over row blocks: batches, failures, slots, limits, and refusals that name what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from engine_models import (
    FEATURES,
    INPUT_DIGEST,
    LABELS_FILE,
    NONCE,
    OUTPUT_DIGEST,
    PROGRAM_FILE,
    dense_model,
    encoded,
    gather_model,
    onnx_model,
    tensor_manifest,
    text_bundle,
)
from fallow.bundle import Binding, BundleManifest, ProgramFormat, ProgramStage, SoftmaxHead
from fallow.errors import FallowError, Reason
from fallow.row_block import RowBlock, pack
from fallow.row_values import ColumnValues
from fallow.rows import DecodedRows, RowCodec
from fallow.schema import DType, RaggedColumn, Schema, SizeFeature, StringColumn, TensorColumn
from fallow.session import Cause
from fallow_worker.engine.chain import Chain, ChainResult
from fallow_worker.engine.protocol import Setting
from fallow_worker.engine.tuning import settings_to_try

GATHER_COLUMNS: dict[str, Any] = {
    "input_columns": (TensorColumn("x", DType.INT64, (1,)),),
    "output_columns": (TensorColumn("y", DType.FLOAT32, (2,)),),
}


def loaded(manifest: BundleManifest, files: Mapping[str, bytes], **options: Any) -> Chain:
    chain = Chain(
        manifest,
        files,
        input_schema_digest=INPUT_DIGEST,
        output_schema_digest=OUTPUT_DIGEST,
        **({"batch_rows": 4} | options),
    )
    chain.warm_up()
    return chain


def run(chain: Chain, columns: Mapping[str, ColumnValues], **options: Any) -> tuple[ChainResult, DecodedRows]:
    result = chain.run(RowBlock.parse(encoded(chain.manifest, columns)), nonce=NONCE, **options)
    block = RowBlock.parse(result.block)
    assert block.nonce == NONCE
    assert len(block) == result.rows
    return result, RowCodec(chain.manifest.output_schema, OUTPUT_DIGEST).decode(block)


def dense(**options: Any) -> Chain:
    model = dense_model(batch=options.pop("batch", "rows"))
    return loaded(tensor_manifest(model), {PROGRAM_FILE: model}, **options)


def some_rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, FEATURES), dtype=np.float32)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 23])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_run_in_zero_padded_batches_of_exactly_b(count: int, threads: int) -> None:
    rows = some_rows(count)
    result, decoded = run(dense(threads=threads, lanes=threads), {"x": rows})
    padded = np.zeros((-(-count // 4) * 4, FEATURES), np.float32)
    padded[:count] = rows
    session = ort.InferenceSession(dense_model(), providers=["CPUExecutionProvider"])
    plain = np.concatenate(
        [session.run(["y"], {"x": padded[start : start + 4]})[0] for start in range(0, len(padded), 4)]
    )
    assert result.failed_rows == 0
    assert np.asarray(decoded.columns["y"]).tobytes() == plain[:count].tobytes()


def test_the_same_block_gives_the_same_bytes_in_any_number_of_lanes() -> None:
    rows = {"x": some_rows(5000)}
    blocks = {run(dense(threads=threads, lanes=lanes), rows)[0].block for threads, lanes in ((1, 1), (2, 2), (4, 2))}
    assert len(blocks) == 1


@pytest.mark.parametrize("setting", settings_to_try(threads=4, lanes=4, wide=True))
def test_no_bit_and_no_class_depends_on_the_tuned_setting(setting: Setting) -> None:
    rows = {"x": some_rows(20_000)}
    fixed = run(dense(), rows)[0].block
    tuned = dense(threads=4, lanes=4)
    tuned.tune(setting, measures=True)
    assert run(tuned, rows)[0].block == fixed


def test_no_bit_changes_while_settings_are_measured() -> None:
    rows = {"x": some_rows(20_000)}
    fixed = run(dense(), rows)[0].block
    measuring = dense(threads=2, lanes=2)
    measuring.tune(None, measures=True)
    for _ in range(40):
        assert run(measuring, rows)[0].block == fixed
        tuned = measuring.newly_tuned()
        if tuned is not None:
            assert tuned.setting in settings_to_try(threads=2, lanes=2, wide=True)
            break
    else:
        raise AssertionError("nothing was decided")
    assert run(measuring, rows)[0].block == fixed


def test_progress_tells_the_rows_done() -> None:
    heard: list[int] = []
    run(dense(), {"x": some_rows(10)}, progress=heard.append)
    assert heard == [4, 8, 10]


def test_a_row_that_fails_its_batch_fails_alone() -> None:
    model = gather_model()
    chain = loaded(tensor_manifest(model, **GATHER_COLUMNS), {PROGRAM_FILE: model})
    rows = np.array([0, 1, 99, 3, 2, -77, 1], np.int64).reshape(-1, 1)
    result, decoded = run(chain, {"x": rows})
    assert [(failure.row, failure.cause) for failure in result.failures] == [(2, Cause.ROW), (5, Cause.ROW)]
    assert all("Gather" in failure.reason and len(failure.reason.encode()) <= 256 for failure in result.failures)
    assert decoded.positions.tolist() == [0, 1, 3, 4, 6]
    assert np.asarray(decoded.columns["y"]).tolist() == [[0, 1], [2, 3], [6, 7], [4, 5], [2, 3]]


def test_a_block_of_failing_rows_has_no_values_but_is_an_answer() -> None:
    model = gather_model()
    chain = loaded(tensor_manifest(model, **GATHER_COLUMNS), {PROGRAM_FILE: model})
    result, decoded = run(chain, {"x": np.full((40, 1), 9, np.int64)})
    assert result.failed_rows == 40
    assert {failure.cause for failure in result.failures} == {Cause.ROW}
    assert len(decoded.positions) == 0


def test_a_program_that_fails_on_zeros_too_is_given_up() -> None:
    model = onnx_model(
        [
            helper.make_node("Add", ["x", "far"], ["a"]),
            helper.make_node("Gather", ["table", "a"], ["y"], axis=0),
        ],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.FLOAT, ["rows"])],
        {"far": np.array(1000, np.int64), "table": np.zeros(4, np.float32)},
    )
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.INT64, ()),),
        output_columns=(TensorColumn("y", DType.FLOAT32, ()),),
    )
    chain = loaded(manifest, {PROGRAM_FILE: model})
    few, _ = run(chain, {"x": np.zeros(3, np.int64)})
    assert {failure.cause for failure in few.failures} == {Cause.PROGRAM}
    with pytest.raises(FallowError) as refused:
        run(chain, {"x": np.zeros(1000, np.int64)})
    assert refused.value.reason is Reason.PROGRAM_REFUSED


def test_rows_that_do_not_follow_the_schema_fail_and_spare_the_rest() -> None:
    chain = dense()
    good = some_rows(2)
    block = pack(INPUT_DIGEST, [good[0].tobytes(), b"", b"abc", good[1].tobytes()], [], bytes(16))
    result = chain.run(RowBlock.parse(block), nonce=NONCE)
    assert [(failure.row, failure.reason) for failure in result.failures] == [
        (1, "row has no bytes"),
        (2, "row is 3 bytes long where its schema takes 24"),
    ]
    _, alone = run(chain, {"x": good})
    decoded = RowCodec(chain.manifest.output_schema, OUTPUT_DIGEST).decode(RowBlock.parse(result.block))
    assert decoded.positions.tolist() == [0, 3]
    np.testing.assert_allclose(np.asarray(decoded.columns["y"]), np.asarray(alone.columns["y"]), rtol=1e-5)


def test_contents_that_disagree_with_their_size_or_their_windows_fail() -> None:
    manifest, files = text_bundle()
    chain = loaded(manifest, files)
    rows = [b"\x02\0\0\0hi", b"\x02\0\0\0hi", b"\x21\0\0\0" + b"x" * 33]
    block = pack(INPUT_DIGEST, rows, [[2], [3], [33]], bytes(16))
    result = chain.run(RowBlock.parse(block), nonce=NONCE)
    assert [failure.row for failure in result.failures] == [1, 2]
    assert "size feature" in result.failures[0].reason
    assert "33 bytes where 32 travel" in result.failures[1].reason


@pytest.mark.parametrize("slot_dependent", [False, True])
def test_short_rows_get_their_label_without_the_program(slot_dependent: bool) -> None:
    manifest, files = text_bundle(short_label="short", short_bytes_max=3)
    chain = loaded(manifest, files, slot_dependent=slot_dependent)
    contents = [b"abc", b"a longer one", b"", b"another one", b"abcd"]
    _, decoded = run(chain, {"content": contents})
    labels = list(decoded.columns["label"])
    scores = np.asarray(decoded.columns["label_score"])
    assert [label == "short" for label in labels] == [True, False, True, False, False]
    assert scores[[0, 2]].tolist() == [1.0, 1.0]
    _, without = run(loaded(manifest, files), {"content": [contents[1], contents[3], contents[4]]})
    assert labels[1::2] + labels[4:] == list(without.columns["label"])


def slot_teller(batch: Any = "rows") -> bytes:
    """y = x + the row's place in its batch."""
    return onnx_model(
        [
            helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
            helper.make_node("Squeeze", ["count"], ["n"]),
            helper.make_node("Range", ["zero", "n", "one"], ["places"]),
            helper.make_node("Cast", ["places"], ["slots"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "slots"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [batch])],
        [("y", TensorProto.FLOAT, [batch])],
        {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)},
    )


SCALARS: dict[str, Any] = {
    "input_columns": (TensorColumn("x", DType.FLOAT32, ()),),
    "output_columns": (TensorColumn("y", DType.FLOAT32, ()),),
}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
@settings(max_examples=40)
def test_rows_run_in_the_slots_that_they_are_given(slots: list[int]) -> None:
    model = slot_teller()
    chain = loaded(tensor_manifest(model, **SCALARS), {PROGRAM_FILE: model}, slot_dependent=True)
    _, decoded = run(chain, {"x": np.zeros(len(slots), np.float32)}, slots=slots)
    assert np.asarray(decoded.columns["y"]).tolist() == slots


def test_rows_of_slot_dependent_programs_keep_their_slot_beside_failed_ones() -> None:
    model = slot_teller()
    chain = loaded(tensor_manifest(model, **SCALARS), {PROGRAM_FILE: model}, slot_dependent=True)
    row = np.float32(0).tobytes()
    result = chain.run(RowBlock.parse(pack(INPUT_DIGEST, [row, b"x", row, row, row], [], bytes(16))), nonce=NONCE)
    decoded = RowCodec(chain.manifest.output_schema, OUTPUT_DIGEST).decode(RowBlock.parse(result.block))
    assert np.asarray(decoded.columns["y"]).tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize("slots", [[0], [0, 4], [-1, 0]])
def test_slots_that_do_not_fit_are_refused(slots: Sequence[int]) -> None:
    model = slot_teller()
    chain = loaded(tensor_manifest(model, **SCALARS), {PROGRAM_FILE: model}, slot_dependent=True)
    with pytest.raises(FallowError) as refused:
        run(chain, {"x": np.zeros(2, np.float32)}, slots=slots)
    assert refused.value.field == "slots"


def test_a_fixed_batch_in_the_model_is_the_canonical_batch() -> None:
    chain = dense(batch=3, batch_rows=0)
    assert chain.batch_rows == 3
    result, _ = run(chain, {"x": some_rows(7)})
    assert result.failed_rows == 0
    with pytest.raises(FallowError) as refused:
        dense(batch=3, batch_rows=4)
    assert refused.value.field == "canonical_batch_rows"


def test_neighbour_dependent_programs_run_alone() -> None:
    assert dense(batch_rows=1, neighbour_dependent=True).batch_rows == 1
    with pytest.raises(FallowError):
        dense(batch_rows=4, neighbour_dependent=True)


def test_an_output_block_beyond_its_room_fails_the_task_before_it_runs() -> None:
    with pytest.raises(FallowError) as refused:
        run(dense(), {"x": some_rows(100)}, output_bytes_max=1000)
    assert refused.value.reason is Reason.BLOCK_TOO_LARGE
    manifest, files = text_bundle()
    with pytest.raises(FallowError) as refused:
        run(loaded(manifest, files), {"content": [b"x"] * 100}, output_bytes_max=1000)
    assert refused.value.reason is Reason.BLOCK_TOO_LARGE


def test_a_block_of_another_schema_is_refused() -> None:
    block = pack(OUTPUT_DIGEST, [bytes(24)], [], bytes(16))
    with pytest.raises(FallowError) as refused:
        dense().run(RowBlock.parse(block), nonce=NONCE)
    assert refused.value.reason is Reason.SCHEMA_MISMATCH


def program(inputs: Mapping[str, str], outputs: Mapping[str, str], file: str = PROGRAM_FILE) -> ProgramStage:
    return ProgramStage(
        ProgramFormat.ONNX,
        file,
        tuple(Binding(*pair) for pair in inputs.items()),
        tuple(Binding(*pair) for pair in outputs.items()),
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input_columns": (TensorColumn("x", DType.FLOAT64, (FEATURES,)),)}, "inputs[x]"),
        ({"input_columns": (TensorColumn("x", DType.FLOAT32, (FEATURES + 1,)),)}, "inputs[x]"),
        ({"input_columns": (TensorColumn("x", DType.FLOAT32, ()),)}, "inputs[x]"),
        ({"output_columns": (TensorColumn("y", DType.FLOAT32, (4,)),)}, "output_schema.columns[0]"),
        ({"output_columns": (TensorColumn("y", DType.INT32, (3,)),)}, "output_schema.columns[0]"),
        ({"output_columns": (RaggedColumn("y", DType.FLOAT32, (None,)),)}, "output_schema.columns[0]"),
        ({"output_columns": (StringColumn("y"),)}, "output_schema.columns[0]"),
        ({"stages": (program({"z": "x"}, {"y": "y"}),)}, "inputs[z]"),
        ({"stages": (program({"x": "x"}, {"z": "y"}),)}, "outputs[z]"),
        ({"stages": (program({"x": "nothing"}, {"y": "y"}),)}, "inputs[x]"),
        ({"stages": (program({}, {"y": "y"}),)}, "inputs[x]"),
        ({"stages": (program({"x": "x"}, {"y": "x"}),)}, "stages[0]"),
        ({"stages": (program({"x": "x"}, {"y": "y"}, "other.onnx"),)}, "stages[0].file"),
        ({"stages": (program({"x": "x"}, {"y": "y"}), SoftmaxHead("nothing", "z"))}, "stages[1].value"),
    ],
)
def test_a_bundle_that_contradicts_its_program_is_refused_naming_the_place(changes: dict[str, Any], named: str) -> None:
    model = dense_model()
    with pytest.raises(FallowError) as refused:
        loaded(tensor_manifest(model, **changes), {PROGRAM_FILE: model})
    assert refused.value.reason is Reason.BUNDLE_INVALID
    assert refused.value.field == named


def test_size_features_that_no_stage_counts_are_refused() -> None:
    model = dense_model()
    manifest = tensor_manifest(model)
    schema = Schema(manifest.input_schema.columns, (SizeFeature.TOKENS,))
    changed = BundleManifest(
        manifest.name, manifest.files, manifest.stages, input_schema=schema, output_schema=manifest.output_schema
    )
    with pytest.raises(FallowError) as refused:
        loaded(changed, {PROGRAM_FILE: model})
    assert refused.value.field == "input_schema.size_features"


def test_labels_that_do_not_match_the_scores_are_refused() -> None:
    manifest, files = text_bundle()
    with pytest.raises(FallowError) as refused:
        loaded(manifest, files | {LABELS_FILE: b"only\ntwo\n"})
    assert refused.value.field == "stages[2].labels_file"


def test_bytes_that_are_no_model_are_refused_by_the_runtime_in_words() -> None:
    model = dense_model()
    with pytest.raises(FallowError) as refused:
        loaded(tensor_manifest(model), {PROGRAM_FILE: b"nothing"})
    assert refused.value.reason is Reason.PROGRAM_REFUSED


def test_outputs_without_a_row_axis_are_refused() -> None:
    model = onnx_model(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [("x", TensorProto.FLOAT, ["rows", FEATURES])],
        [("y", TensorProto.FLOAT, None)],
        check=False,
    )
    manifest = tensor_manifest(model, output_columns=(TensorColumn("y", DType.FLOAT32, ()),))
    with pytest.raises(FallowError) as refused:
        loaded(manifest, {PROGRAM_FILE: model})
    assert "row axis" in refused.value.message
