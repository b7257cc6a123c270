"""Model files that are none, that lie about themselves, or are too large: most are refused before anything runs."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adversarial.hostile_models import (
    BOOL,
    FLOAT,
    INT64,
    Fate,
    hostile,
    identity,
    loop,
    model_bytes,
    simple,
)
from engine_models import FEATURES, dense_model


@hostile(Fate.REFUSED_UNRUN, "pickle")
def _pickle_renamed() -> bytes:
    return pickle.dumps({"weights": [1.0] * 100}, protocol=4)


@hostile(Fate.REFUSED_UNRUN, "no ONNX model")
def _pickle_of_the_first_protocol() -> bytes:
    return pickle.dumps({"weights": [1.0] * 100}, protocol=0)


@hostile(Fate.REFUSED_UNRUN, "zip")
def _zip_bomb() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(4_000_000))
    return target.getvalue()


@hostile(Fate.REFUSED_UNRUN)
def _plain_text() -> bytes:
    return b"import os; os.system('true')\n" * 40


@hostile(Fate.REFUSED_UNRUN)
def _one_zero_byte() -> bytes:
    return b"\0"


@hostile(Fate.REFUSED_UNRUN)
def _elf_header() -> bytes:
    return b"\x7fELF" + bytes(200)


@hostile(Fate.REFUSED_UNRUN)
def _truncated() -> bytes:
    return dense_model()[:-60]


@hostile(Fate.REFUSED_UNRUN)
def _nested_groups_of_protobuf() -> bytes:
    return b"\x3b" * 200_000


@hostile(Fate.REFUSED_UNRUN)
def _no_graph() -> bytes:
    return model_bytes(onnx.ModelProto(ir_version=8))


# ------------------------------------------------------------------------------------------------ headers


@hostile(Fate.REFUSED_UNRUN, "opset")
def _opset_of_the_future() -> bytes:
    model = identity()
    model.opset_import[0].version = 1_000_000
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "opset")
def _opset_negative() -> bytes:
    model = identity()
    model.opset_import[0].version = -1
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "IR version")
def _ir_of_the_future() -> bytes:
    model = identity()
    model.ir_version = 2**40
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "functions")
def _function_of_its_own() -> bytes:
    model = identity()
    body = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("evil", "F", ["a"], ["b"], [body], [helper.make_opsetid("", 17)]))
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "configure")
def _configures_the_runtime() -> bytes:
    model = identity()
    entry = model.metadata_props.add()
    entry.key, entry.value = "ort_config", '{"session_options": {"enable_profiling": 1}}'
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "training")
def _training_information() -> bytes:
    model = identity()
    model.training_info.add()
    return model_bytes(model)


# ------------------------------------------------------------------------------------------------ files


def _external(location: str, *, marked: bool = True) -> bytes:
    model = onnx.load_from_string(
        simple(helper.make_node("Add", ["x", "w"], ["y"]), initializers={"w": np.ones((FEATURES,), np.float32)})
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    if marked:
        tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "24")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_above() -> bytes:
    return _external("../../../../etc/passwd")


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_absolute() -> bytes:
    return _external("/etc/passwd")


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_not_marked() -> bytes:
    return _external("/etc/passwd", marked=False)


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_in_memory() -> bytes:
    return _external("*/_ORT_MEM_ADDR_/*")


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_in_an_attribute() -> bytes:
    tensor = TensorProto(name="c", data_type=FLOAT, dims=[FEATURES], data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    node = helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add()
    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
    attribute.t.CopyFrom(tensor)
    return simple(node, helper.make_node("Add", ["x", "c"], ["y"]))


@hostile(Fate.REFUSED_UNRUN, "external data")
def _external_data_in_a_branch() -> bytes:
    model = onnx.load_from_string(_if_tower(1))
    tensor = model.graph.node[0].attribute[0].g.initializer.add()
    tensor.CopyFrom(onnx.load_from_string(_external("/etc/passwd")).graph.initializer[0])
    return model_bytes(model)


# ------------------------------------------------------------------------------------------------ size and nesting


def _if_tower(depth: int) -> bytes:
    def branch(level: int) -> Any:
        output = [helper.make_tensor_value_info("out", FLOAT, None)]
        if level == 0:
            return helper.make_graph([helper.make_node("Identity", ["x"], ["out"])], "leaf", [], output)
        inner = helper.make_node("If", ["yes"], ["out"], then_branch=branch(level - 1), else_branch=_leaf(output))
        return helper.make_graph([inner], "branch", [], output)

    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch(depth), else_branch=branch(0))
    return simple(node, initializers={"yes": np.array(True)})


def _leaf(output: list[Any]) -> Any:
    return helper.make_graph([helper.make_node("Identity", ["x"], ["out"])], "leaf", [], output)


@hostile(Fate.REFUSED_UNRUN, "nested")
def _ifs_nested_thirty_deep() -> bytes:
    return _if_tower(30)


@hostile(Fate.REFUSED_UNRUN)
def _ifs_nested_beyond_protobuf() -> bytes:
    graph = _bytes_of_graph(helper.make_graph([helper.make_node("Identity", ["x"], ["out"])], "g", [], []))
    for _ in range(2_000):
        attribute = b"\x0a\x01g" + _field(6, graph) + b"\xa0\x01\x05"
        node = _field(4, b"If") + _field(5, attribute)
        graph = _field(1, node) + _field(2, b"g")
    return b"\x08\x08" + _field(7, graph) + _field(8, b"\x10\x11")


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made += bytes((value & 127 | 128,))
        value >>= 7
    return made + bytes((value,))


def _bytes_of_graph(graph: Any) -> bytes:
    return bytes(graph.SerializeToString())


@hostile(Fate.REFUSED_UNRUN, "nodes")
def _hundred_thousand_nodes() -> bytes:
    model = identity()
    del model.graph.node[:]
    for index in range(100_000):
        model.graph.node.append(helper.make_node("Identity", ["x" if not index else f"v{index}"], [f"v{index + 1}"]))
    model.graph.node.append(helper.make_node("Identity", ["v100000"], ["y"]))
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN)
def _names_that_fill_a_report() -> bytes:
    nodes = [
        helper.make_node(f"Evil{index}" + "x" * 20_000, ["x"], [f"v{index}"], name="n" * 20_000) for index in range(50)
    ]
    return simple(*nodes, helper.make_node("Identity", ["x"], ["y"]))


@hostile(Fate.REFUSED_UNRUN)
def _names_with_escape_sequences() -> bytes:
    return simple(helper.make_node("\x1b[2J\nEvil", ["x"], ["y"], name="\x1b]0;owned\x07"))


@hostile(Fate.REFUSED)
def _cyclic_graph() -> bytes:
    return simple(
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("Identity", ["b"], ["y"]),
    )


@hostile(Fate.REFUSED)
def _value_made_twice() -> bytes:
    return simple(helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"]))


@hostile(Fate.REFUSED)
def _input_from_nowhere() -> bytes:
    return simple(helper.make_node("Add", ["x", "nowhere"], ["y"]))


@hostile(Fate.ANY)
def _initializer_twice() -> bytes:
    model = onnx.load_from_string(
        simple(helper.make_node("Add", ["x", "w"], ["y"]), initializers={"w": np.ones(FEATURES, np.float32)})
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(FEATURES, np.float32), "w"))
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "shape")
def _initializer_of_negative_shape() -> bytes:
    model = identity()
    model.graph.initializer.add(name="w", data_type=FLOAT, dims=[-1, 4])
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "shape")
def _initializer_of_a_huge_shape() -> bytes:
    model = identity()
    model.graph.initializer.add(name="w", data_type=FLOAT, dims=[2**31, 2**31, 2**31])
    return model_bytes(model)


@hostile(Fate.REFUSED)
def _initializer_shorter_than_its_shape() -> bytes:
    model = onnx.load_from_string(simple(helper.make_node("Add", ["x", "w"], ["y"])))
    model.graph.initializer.add(name="w", data_type=FLOAT, dims=[1000, FEATURES], raw_data=b"\0" * 4)
    return model_bytes(model)


@hostile(Fate.REFUSED)
def _initializer_of_an_unknown_type() -> bytes:
    model = onnx.load_from_string(simple(helper.make_node("Add", ["x", "w"], ["y"])))
    model.graph.initializer.add(name="w", data_type=9999, dims=[FEATURES], raw_data=b"\0" * 24)
    return model_bytes(model)


@hostile(Fate.REFUSED)
def _sparse_indices_out_of_range() -> bytes:
    model = onnx.load_from_string(simple(helper.make_node("Add", ["x", "w"], ["y"])))
    values = numpy_helper.from_array(np.ones(3, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 10**9, -5], np.int64), "w_at")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [FEATURES]))
    return model_bytes(model)


# ------------------------------------------------------------------------------------------------ loops


@hostile(Fate.REFUSED_UNRUN, "may run")
def _loop_of_two_to_the_63rd() -> bytes:
    return loop(np.array(2**63 - 1, np.int64), helper.make_node("Neg", ["carried"], ["next"]))


@hostile(Fate.REFUSED_UNRUN, "no constant limit")
def _loop_whose_limit_is_computed() -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["carried"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("trip", INT64, []),
            helper.make_tensor_value_info("go", BOOL, []),
            helper.make_tensor_value_info("carried", FLOAT, None),
        ],
        [helper.make_tensor_value_info("on", BOOL, []), helper.make_tensor_value_info("next", FLOAT, None)],
    )
    return simple(
        helper.make_node("Mul", ["big", "big"], ["trips"]),
        helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body),
        initializers={"big": np.array(2**31, np.int64), "yes": np.array(True)},
    )


@hostile(Fate.ANY)
def _loop_whose_limit_an_input_overrides() -> bytes:
    """The limit is an initializer and an input too; the engine never feeds it, so that its own value counts."""
    model = onnx.load_from_string(loop(np.array(5, np.int64), helper.make_node("Neg", ["carried"], ["next"])))
    model.graph.input.append(helper.make_tensor_value_info("trips", INT64, []))
    return model_bytes(model)


@hostile(Fate.REFUSED_UNRUN, "may run")
def _loops_within_loops() -> bytes:
    info = helper.make_tensor_value_info

    def body(level: int) -> Any:
        inner = (
            helper.make_node("Neg", ["c" + str(level)], ["n" + str(level)])
            if level == 0
            else helper.make_node("Loop", ["trips", "yes", "c" + str(level)], ["n" + str(level)], body=body(level - 1))
        )
        tag = str(level)
        return helper.make_graph(
            [inner, helper.make_node("Identity", ["g" + tag], ["o" + tag])],
            "body" + tag,
            [info("t" + tag, INT64, []), info("g" + tag, BOOL, []), info("c" + tag, FLOAT, None)],
            [info("o" + tag, BOOL, []), info("n" + tag, FLOAT, None)],
        )

    node = helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body(4))
    return simple(node, initializers={"trips": np.array(1_000, np.int64), "yes": np.array(True)})


@hostile(Fate.REFUSED)
def _loop_that_doubles_its_memory() -> bytes:
    return loop(np.array(60, np.int64), helper.make_node("Concat", ["carried", "carried"], ["next"], axis=0))


@hostile(Fate.ANY)
def _loop_that_shrinks_to_a_negative_trip() -> bytes:
    return loop(np.array(-(2**62), np.int64), helper.make_node("Concat", ["carried", "carried"], ["next"], axis=1))
