"""Bundles are made from real ONNX files, saved, loaded, and refused with what is wrong."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fallow.bundle import Binding, BytesCodec, Precision, ProgramStage, TopKHead
from fallow.bundle_file import Bundle
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.onnx_signature import read_onnx_signature
from fallow.schema import BytesColumn, DType, Schema, SizeFeature, StringColumn, TensorColumn
from fallow.wire.bundle import decode_manifest

Value = tuple[str, int, Sequence[int | str | None] | None]


def save_model(path: Path, inputs: list[Value], outputs: list[Value], **extra: Any) -> Path:
    """A model whose graph copies its first input to each output: enough to be read, not meant to be run."""
    nodes = [helper.make_node("Identity", [inputs[0][0] if inputs else "w"], [name]) for name, _, _ in outputs]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        **extra,
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return path


def refused(path: Path, **options: Any) -> FallowError:
    with pytest.raises(FallowError) as error:
        Bundle.from_onnx(path, **options)
    assert error.value.reason is Reason.BUNDLE_INVALID
    return error.value


F, INT64 = TensorProto.FLOAT, TensorProto.INT64


def test_a_tensor_model_becomes_a_bundle(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [("x", F, ["n", 3, 2]), ("k", INT64, [None])], [("y", F, ["n", 3, 2])])
    bundle = Bundle.from_onnx(path, title="A title", precision=Precision.INT8)
    manifest = bundle.manifest
    assert (manifest.name, manifest.title, manifest.precision) == ("m", "A title", Precision.INT8)
    assert manifest.input_schema == Schema(
        (TensorColumn("x", DType.FLOAT32, (3, 2)), TensorColumn("k", DType.INT64, ()))
    )
    assert manifest.output_schema == Schema((TensorColumn("y", DType.FLOAT32, (3, 2)),))
    (stage,) = manifest.stages
    assert isinstance(stage, ProgramStage)
    assert (stage.inputs, stage.outputs) == ((Binding("x", "x"), Binding("k", "k")), (Binding("y", "y"),))
    (file,) = manifest.files
    assert (file.digest, file.length_bytes) == (digest_of(path.read_bytes()), path.stat().st_size)
    assert decode_manifest(bundle.manifest_bytes) == manifest
    assert bundle.digest == digest_of(bundle.manifest_bytes)


def test_initialisers_listed_as_inputs_are_weights(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    inputs: list[Value] = [("x", F, ["n", 2]), ("w", F, [2, 2])]
    path = save_model(tmp_path / "m.onnx", inputs, [("y", F, ["n", 2])], initializer=[weight])
    assert [value.name for value in read_onnx_signature(path).inputs] == ["x"]


def test_a_fixed_batch_is_taken_as_the_row_axis(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [("x", F, [8, 2])], [("y", F, [8, 5])])
    assert Bundle.from_onnx(path).manifest.output_schema.columns == (TensorColumn("y", DType.FLOAT32, (5,)),)


@pytest.mark.parametrize(
    ("inputs", "outputs", "told"),
    [
        ([("x", F, [8, 2])], [("y", F, [1, 5])], "'y' begins with 1 where another value begins with 8"),
        ([("x", F, ["n", 2])], [("y", F, [])], "'y' is one number for the whole batch"),
        ([("x", TensorProto.STRING, ["n"])], [("y", F, ["n"])], "'x' is string"),
        ([("x", TensorProto.BFLOAT16, ["n"])], [("y", F, ["n"])], "'x' is bfloat16"),
        ([("x", F, ["n", "width"])], [("y", F, ["n"])], "row shape of input 'x' open: [width]"),
        ([("x", F, ["n", None])], [("y", F, ["n"])], "row shape of input 'x' open: [?]"),
        ([("x", F, None)], [("y", F, ["n"])], "row shape of input 'x' open"),
        ([("x", F, ["n"])], [("y", F, ["n", "m"])], "row shape of output 'y' open: [m]"),
        ([], [("y", F, ["n"])], "takes no input"),
        ([("x", F, ["n"])], [("x", F, ["n"])], "output 'x' has the name of an input"),
        ([("x", F, ["n"])], [("fallow.row", F, ["n"])], "output 'fallow.row' begins with 'fallow.'"),
    ],
)
def test_a_signature_that_is_no_row_function_is_refused(
    tmp_path: Path, inputs: list[Value], outputs: list[Value], told: str
) -> None:
    assert told in str(refused(save_model(tmp_path / "m.onnx", inputs, outputs)))


def test_open_dimensions_can_be_said(tmp_path: Path) -> None:
    inputs: list[Value] = [("x", F, ["n", "width", 3]), ("z", F, None)]
    path = save_model(tmp_path / "m.onnx", inputs, [("y", F, ["n", "width"])])
    bundle = Bundle.from_onnx(path, dims={"width": 7}, shapes={"z": (2,)})
    shapes = [column.shape for column in bundle.manifest.input_schema.columns if isinstance(column, TensorColumn)]
    assert shapes == [(7, 3), (2,)]
    assert bundle.manifest.output_schema.columns == (TensorColumn("y", DType.FLOAT32, (7,)),)
    assert "no dimension called 'depth'" in str(refused(path, dims={"depth": 1, "width": 7}, shapes={"z": (2,)}))
    assert "no input or output 'q'" in str(refused(path, shapes={"q": (2,)}))
    assert "cannot have row shape [7, 4]" in str(refused(path, shapes={"x": (7, 4), "z": (2,)}))


def test_an_open_dimension_comes_with_the_words_that_close_it(tmp_path: Path) -> None:
    named = save_model(tmp_path / "named.onnx", [("x", F, ["n", "width", 3])], [("y", F, ["n"])])
    hint = refused(named).hint
    assert all(words in hint for words in ('dims={"width": N}', "--dim width=N", "--shape x=N,3"))
    assert Bundle.from_onnx(named, dims={"width": 2}).manifest.input_schema.fixed_row_bytes == 24
    unnamed = save_model(tmp_path / "unnamed.onnx", [("x", F, ["n", None])], [("y", F, ["n"])])
    assert refused(unnamed).hint == 'say it: shapes={"x": (N,)} (`--shape x=N`)'


def test_outputs_can_be_chosen(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [("x", F, ["n"])], [("y", F, ["n"]), ("loss", F, [])])
    assert [c.name for c in Bundle.from_onnx(path, outputs=["y"]).manifest.output_schema.columns] == ["y"]
    assert Bundle.from_onnx(path, outputs="y").digest == Bundle.from_onnx(path, outputs=["y"]).digest
    assert "no output 'q'" in str(refused(path, outputs=["q"]))


def outside(path: Path, location: str, weights: bytes | None = None) -> Path:
    """A model whose weight lies at `location`, beside it."""
    weight = TensorProto(name="w", dims=[2], data_type=F, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    if weights is not None:
        (path.parent / location).write_bytes(weights)
    return save_model(path, [("x", F, ["n", 2])], [("y", F, ["n", 2])], initializer=[weight])


def test_weights_beside_the_file_are_taken_in(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], np.float32)
    bundle = Bundle.from_onnx(outside(tmp_path / "m.onnx", "m.onnx.data", values.tobytes()))
    program = bundle.files["model.onnx"]
    assert isinstance(program, bytes)
    (weight,) = onnx.load_from_string(program).graph.initializer
    assert not weight.external_data
    np.testing.assert_array_equal(numpy_helper.to_array(weight), values)


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/hostname", "C:\\secret", "a/../../secret", "", "link", "absent"]
)
def test_a_model_reads_no_other_file_of_its_users_machine(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 8)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    error = refused(outside(tmp_path / "models" / "m.onnx", location))
    assert f"{location!r} as the place of its weights" in str(error)
    assert error.hint


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    archive = tmp_path / "archive.onnx"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("data.pkl", b"x")
    told = {
        "pickle.onnx": (pickle.dumps({"weights": [1]}), "it is a Python pickle"),
        "empty.onnx": (b"", "an empty file"),
        "text.onnx": (b"just some words that nobody would take for a model", "not a protobuf message"),
        "lfs.onnx": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "numpy.onnx": (b"\x93NUMPY\x01\x00", "a NumPy array"),
        "graphless.onnx": (onnx.ModelProto(ir_version=8).SerializeToString(), "without a graph"),
    }
    for name, (content, message) in told.items():
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name)
        assert message in str(error)
        assert "export the model to ONNX" in error.hint
    assert "a zip archive" in str(refused(archive))
    assert "No such file" in str(refused(tmp_path / "absent.onnx"))
    assert "Is a directory" in str(refused(tmp_path))


@given(st.data())
def test_a_damaged_model_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    path = save_model(folder / "m.onnx", [("x", F, ["n", 2])], [("y", F, ["n", 2])])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_onnx_signature(path)
    except FallowError as error:
        assert error.reason is Reason.BUNDLE_INVALID


def test_a_saved_bundle_loads_with_the_same_digest(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [("x", F, ["n"])], [("y", F, ["n"])])
    bundle = Bundle.from_onnx(path)
    folder = bundle.save(tmp_path / "m.bundle")
    loaded = Bundle.load(folder)
    assert (loaded.digest, loaded.manifest) == (bundle.digest, bundle.manifest)
    with pytest.raises(FallowError, match="exists already"):
        bundle.save(folder)
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(FallowError, match="its content was changed"):
        Bundle.load(folder)
    with pytest.raises(FallowError, match="is no bundle"):
        Bundle.load(tmp_path)


TOKENS = 6


def bytes_model(tmp_path: Path, scores: int = 3, dtype: int = TensorProto.INT32) -> Path:
    return save_model(tmp_path / "b.onnx", [("t", dtype, ["n", TOKENS])], [("s", F, ["n", scores])])


def bytes_bundle(path: Path, **changes: Any) -> Bundle:
    options: dict[str, Any] = {
        "head_window": 8,
        "tail_window": 8,
        "head_tokens": 4,
        "tail_tokens": 2,
        "padding_token": 256,
        "labels": ["a", "b", "c"],
    }
    return Bundle.from_bytes_model(path, **(options | changes))


def test_a_bytes_model_becomes_codec_program_and_labels(tmp_path: Path) -> None:
    manifest = bytes_bundle(bytes_model(tmp_path), short_label="short", short_bytes_max=3).manifest
    assert manifest.input_schema == Schema((BytesColumn("bytes"),), (SizeFeature.BYTES,))
    assert manifest.output_schema.columns == (StringColumn("label"), TensorColumn("label_score", DType.FLOAT32, ()))
    codec, program, head = manifest.stages
    assert codec == BytesCodec("bytes", "tokens", 8, 8, 4, 2, 256, True)
    assert isinstance(program, ProgramStage)
    assert (program.inputs, program.outputs) == ((Binding("t", "tokens"),), (Binding("s", "scores"),))
    assert head == TopKHead("scores", "label", 1, "labels.txt", "short", 3)


def test_labels_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("ä\nb\nc\n", encoding="utf-8")
    bundle = bytes_bundle(bytes_model(tmp_path), labels=tmp_path / "labels.txt", top_k=2)
    assert bundle.files["labels.txt"] == "ä\nb\nc\n".encode()
    names = [column.name for column in bundle.manifest.output_schema.columns]
    assert names == ["label_0", "label_0_score", "label_1", "label_1_score"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": ["a", "b"]}, "2 labels for 3 scores"),
        ({"labels": ["a", "b", "c\nd"]}, "label 2 is 'c\\nd'"),
        ({"labels": ["a", "", "c"]}, "label 1 is ''"),
        ({"labels": "/nowhere/labels.txt"}, "cannot read the labels file"),
        ({"top_k": 4}, "the best 4 of 3 labels"),
        ({"head_window": 3}, "4 head tokens from a window of 3 bytes"),
        ({"head_tokens": 5}, "cannot have row shape [7]"),
    ],
)
def test_figures_that_do_not_fit_the_bytes_model_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(FallowError) as error:
        bytes_bundle(bytes_model(tmp_path), **changes)
    assert error.value.reason is Reason.BUNDLE_INVALID
    assert told in str(error.value)


def test_a_bytes_model_must_take_int32(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="takes int64"):
        bytes_bundle(bytes_model(tmp_path, dtype=INT64))
