"""What a look at an ONNX graph finds, before any runtime sees it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine_models import FEATURES, dense_model, onnx_model
from fallow_worker.engine import canary, onnx_graph, operators

X = ("x", TensorProto.FLOAT, ["rows", FEATURES])
Y = ("y", TensorProto.FLOAT, ["rows", FEATURES])


def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.ModelProto.FromString(dense_model())
    change(model)
    return model.SerializeToString()


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    tensor.ClearField("raw_data")


def domain(name: str, operator: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[1]
        node.domain, node.op_type = name, operator
        model.opset_import.add(domain=name, version=1)

    return change


def function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function("mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [])
    )


def hidden_external(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "value")
    tensor.data_location = TensorProto.EXTERNAL
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor)],
        "then",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])],
    )
    model.graph.node.append(helper.make_node("If", ["yes"], ["c"], then_branch=body, else_branch=body))


def loop(trips: int | None) -> bytes:
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "carried"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, ["rows", FEATURES]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["rows", FEATURES]),
        ],
    )
    constants = {"yes": np.array(True)} | ({} if trips is None else {"limit": np.array(trips, np.int64)})
    node = helper.make_node("Loop", ["" if trips is None else "limit", "yes", "x"], ["y"], body=body)
    return onnx_model([node], [X], [Y], constants)


def nested(depth: int) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["r0"])], "g0", [], [helper.make_tensor_value_info("r0", 1, None)]
    )
    for level in range(1, depth):
        node = helper.make_node("If", ["yes"], [f"r{level}"], then_branch=graph, else_branch=graph)
        if depth > 8:
            # One branch is enough where two would double the size at every level.
            del node.attribute[1:]
        graph = helper.make_graph([node], f"g{level}", [], [helper.make_tensor_value_info(f"r{level}", 1, None)])
    return onnx_model(
        [helper.make_node("If", ["yes"], ["y"], then_branch=graph, else_branch=graph)],
        [X],
        [Y],
        {"yes": np.array(True)},
        check=False,
    )


def huge() -> bytes:
    return onnx_model(
        [helper.make_node("ConstantOfShape", ["shape"], ["big"]), helper.make_node("ReduceSum", ["big"], ["s"]),
         helper.make_node("Add", ["x", "s"], ["y"])],
        [X], [Y], {"shape": np.array([1 << 20, 1 << 20], np.int64)},
    )  # fmt: skip


def widened(operator: str) -> bytes:
    shape = np.array([1 << 33, FEATURES], np.int64)
    nodes = {
        "Expand": [helper.make_node("Expand", ["x", "shape"], ["big"])],
        "Tile": [helper.make_node("Tile", ["x", "shape"], ["big"])],
        "Range": [helper.make_node("Range", ["zero", "many", "one"], ["big"])],
        "Pad": [helper.make_node("Pad", ["x", "pads"], ["big"])],
    }[operator]
    return onnx_model(
        [*nodes, helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0), helper.make_node("Add", ["x", "m"], ["y"])],
        [X],
        [Y],
        {
            "shape": shape,
            "zero": np.array(0, np.float32),
            "many": np.array(1e11, np.float32),
            "one": np.array(1, np.float32),
            "pads": np.array([0, 0, 1 << 33, 0], np.int64),
        },
    )


REFUSED = {
    "pickle": (pickle.dumps({"weights": [1, 2, 3]}), "Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "text": (b"<html>not found</html>", "no ONNX model"),
    "empty": (b"", "no ONNX model"),
    "external data": (changed(external), "external data is not allowed"),
    "hidden external data": (changed(hidden_external), "external data is not allowed"),
    "custom domain": (changed(domain("com.example", "Anything")), "is of no domain among"),
    "vendor binary": (changed(domain("com.microsoft", "EPContext")), "EPContext) is not on the list"),
    "Python operator": (changed(domain("com.microsoft", "PyOp")), "PyOp) is not on the list"),
    "unknown operator": (changed(domain("", "Nonsense")), "Nonsense) is not on the list"),
    "function": (changed(function), "defines functions of its own"),
    "old opset": (changed(lambda model: setattr(model.opset_import[0], "version", 3)), "opset 3 is not between"),
    "future IR": (changed(lambda model: setattr(model, "ir_version", 99)), "IR version 99"),
    "runtime configuration": (
        changed(lambda model: helper.set_model_props(model, {"ort_config": "{}"})),
        "would configure the runtime",
    ),
    "endless loop": (loop(None), "no constant limit of trips"),
    "long loop": (loop(10**9), "may run 1000000000 times"),
    "deep nesting": (nested(20), "nested more than 16 deep"),
    "huge constant": (huge(), "asks for"),
    "huge Expand": (widened("Expand"), "asks for"),
    "huge Tile": (widened("Tile"), "asks for"),
    "huge Range": (widened("Range"), "asks for"),
    "huge Pad": (widened("Pad"), "asks for"),
    "unseeded randomness": (
        onnx_model(
            [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])], [X], [Y]
        ),
        "without a seed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_program_may_contain_is_refused_in_words(name: str) -> None:
    model, words = REFUSED[name]
    findings = onnx_graph.examine(model, "program.onnx")
    assert any(words in refusal for refusal in findings.refusals), findings.refusals
    assert len(findings.refusals) <= onnx_graph.REFUSALS_LISTED_MAX


@pytest.mark.parametrize("model", [dense_model(), dense_model(batch=4), loop(100), nested(3), canary.MODEL])
def test_honest_programs_pass(model: bytes) -> None:
    findings = onnx_graph.examine(model, "program.onnx")
    assert findings.refusals == []
    assert findings.operators.total() > 0


def test_too_many_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "PROGRAM_NODES_MAX", 2)
    assert any("more than 2 nodes" in refusal for refusal in onnx_graph.examine(dense_model(), "p").refusals)


def test_the_canary_is_a_valid_model() -> None:
    onnx.checker.check_model(onnx.ModelProto.FromString(canary.MODEL))


def test_the_published_operators_exist_in_the_standard() -> None:
    known = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()}
    for name in operators.STANDARD - {"SimplifiedLayerNormalization"}:
        assert ("", name) in known
    for name in operators.MACHINE_LEARNING:
        assert ("ai.onnx.ml", name) in known
    assert not operators.is_allowed("com.microsoft", "EPContext")
    assert operators.qualified("com.microsoft", "Gelu") == "com.microsoft.Gelu"
