"""Graphs that run, but not as they say: dependent rows, chance, lies, crashes, bombs, operators of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from adversarial.hostile_models import BOOL, FLOAT, HUGE, INT64, Fate, Hostile, hostile, simple
from engine_models import FEATURES


@hostile(Fate.REFUSED)
def _output_bigger_than_declared() -> bytes:
    return simple(helper.make_node("Concat", ["x", "x"], ["y"], axis=1))


@hostile(Fate.REFUSED)
def _rows_dropped() -> bytes:
    return simple(
        helper.make_node("Slice", ["x", "start", "end"], ["y"]),
        initializers={"start": np.array([0], np.int64), "end": np.array([1], np.int64)},
    )


@hostile(Fate.ANY)
def _row_axis_depends_on_values() -> bytes:
    """As many rows as are not zero: right for some inputs only."""
    return simple(
        helper.make_node("ReduceMax", ["x"], ["top"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["top"], ["kept"], to=BOOL),
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=0),
    )


@hostile(Fate.LONE)
def _rows_summed_over_the_batch() -> bytes:
    return simple(helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"]))


@hostile(Fate.LONE)
def _rows_reversed() -> bytes:
    return simple(
        helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["y"]),
        initializers={
            "start": np.array([-1], np.int64),
            "end": np.array([-(2**40)], np.int64),
            "axis": np.array([0], np.int64),
            "step": np.array([-1], np.int64),
        },
    )


@hostile(Fate.LONE)
def _dynamically_quantised() -> bytes:
    return simple(
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    )


@hostile(Fate.LONE)
def _softmax_over_the_batch() -> bytes:
    return simple(helper.make_node("Softmax", ["x"], ["y"], axis=0))


@hostile(Fate.LONE)
def _cumulative_over_the_batch() -> bytes:
    return simple(helper.make_node("CumSum", ["x", "axis"], ["y"]), initializers={"axis": np.array(0, np.int32)})


@hostile(Fate.ANY)
def _depends_on_its_slot() -> bytes:
    return simple(
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["at"]),
        helper.make_node("Cast", ["at"], ["f"], to=FLOAT),
        helper.make_node("Unsqueeze", ["f", "axis"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
        initializers={"zero": np.array(0, np.int64), "one": np.array(1, np.int64), "axis": np.array([1], np.int64)},
    )


@hostile(Fate.REFUSED_UNRUN, "without a seed")
def _random_without_a_seed() -> bytes:
    return simple(helper.make_node("RandomNormalLike", ["x"], ["y"]))


@hostile(Fate.REFUSED)
def _random_with_a_seed() -> bytes:
    return simple(helper.make_node("RandomNormalLike", ["x"], ["y"], seed=7.0))


@hostile(Fate.REFUSED)
def _dropout_in_training() -> bytes:
    return simple(
        helper.make_node("Dropout", ["x", "ratio", "training"], ["y"]),
        initializers={"ratio": np.array(0.5, np.float32), "training": np.array(True)},
    )


@hostile(Fate.ANY)
def _not_a_number() -> bytes:
    return simple(helper.make_node("Sub", ["x", "x"], ["z"]), helper.make_node("Div", ["z", "z"], ["y"]))


@hostile(Fate.ANY)
def _division_of_integers_by_zero() -> bytes:
    return simple(
        helper.make_node("Cast", ["x"], ["i"], to=INT64),
        helper.make_node("Sub", ["i", "i"], ["z"]),
        helper.make_node("Div", ["i", "z"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=FLOAT),
    )


@hostile(Fate.CRASH)
def _smallest_integer_by_minus_one() -> bytes:
    return simple(
        helper.make_node("Div", ["least", "minus"], ["d"]),
        helper.make_node("Cast", ["d"], ["f"], to=FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
        initializers={"least": np.array(-(2**63), np.int64), "minus": np.array(-1, np.int64)},
    )


@hostile(Fate.ANY)
def _gather_far_out_of_range() -> bytes:
    return simple(
        helper.make_node("Gather", ["x", "at"], ["y"], axis=1),
        initializers={"at": np.array([2**40] * FEATURES, np.int64)},
    )


@hostile(Fate.ANY)
def _scatter_far_out_of_range() -> bytes:
    return simple(
        helper.make_node("ScatterND", ["x", "at", "with"], ["y"]),
        initializers={"at": np.array([[2**40, -(2**40)]], np.int64), "with": np.array([1.0], np.float32)},
    )


@hostile(Fate.ANY)
def _catastrophic_regular_expression() -> bytes:
    return simple(
        helper.make_node("RegexFullMatch", ["text"], ["m"], pattern="(a|a)*" * 40 + "b"),
        helper.make_node("Cast", ["m"], ["f"], to=FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
        initializers={"text": np.array(["a" * 5_000], object)},
        opset=20,
    )


def wrong_operators() -> list[Hostile]:
    domains = [
        ("com.microsoft", "EPContext", {}),
        ("com.microsoft", "PyOp", {}),
        ("ai.onnx.contrib", "PyOp", {}),
        ("ai.onnx.contrib", "OpenAIAudioToText", {}),
        ("com.example", "Anything", {}),
        ("", "ImageDecoder", {}),
        ("", "NoSuchOperator", {}),
        ("com.microsoft", "BeamSearch", {}),
        ("com.microsoft.nchwc", "Conv", {}),
        ("org.pytorch.aten", "ATen", {"operator": "os::system"}),
        ("ai.onnx.preview.training", "Adam", {}),
        ("com.microsoft.dml", "DmlFusedConv", {}),
    ]
    return [
        Hostile(
            f"operator {domain}.{operator}",
            Fate.REFUSED_UNRUN,
            simple(
                helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes),
                extra_domains=[domain] if domain else [],
            ),
            "is of no domain" if domain not in ("", "com.microsoft") else "is not on the list",
        )
        for domain, operator, attributes in domains
    ]


def bombs() -> list[Hostile]:
    """Tensors of 2⁴⁰ elements, asked for by constants that shapes can be inferred from, and by values that hide it."""
    shape = np.array([HUGE], np.int64)
    made: dict[str, list[Any]] = {
        "ConstantOfShape": [helper.make_node("ConstantOfShape", ["shape"], ["big"])],
        "Expand": [helper.make_node("Expand", ["one", "shape"], ["big"])],
        "Tile": [helper.make_node("Tile", ["ones", "shape"], ["big"])],
        "Range": [helper.make_node("Range", ["zero", "many", "step"], ["big"])],
        "Pad": [helper.make_node("Pad", ["ones", "pads"], ["big"])],
        "OneHot": [
            helper.make_node("OneHot", ["index", "many", "off_on"], ["hot"]),
            helper.make_node("Cast", ["hot"], ["big"], to=FLOAT),
        ],
        "Resize": [helper.make_node("Resize", ["ones", "", "scales"], ["big"])],
        "EyeLike": [
            helper.make_node("ConstantOfShape", ["square"], ["s"]),
            helper.make_node("EyeLike", ["s"], ["big"], dtype=FLOAT),
        ],
        "HannWindow": [helper.make_node("HannWindow", ["many"], ["big"])],
        "RandomUniform": [helper.make_node("RandomUniform", [], ["big"], shape=[HUGE], seed=1.0)],
    }
    constants = {
        "shape": shape,
        "one": np.array([1.0], np.float32),
        "ones": np.array([1.0], np.float32),
        "zero": np.array(0, np.float32),
        "many": np.array(HUGE, np.int64),
        "step": np.array(1, np.float32),
        "pads": np.array([0, HUGE], np.int64),
        "index": np.array([1], np.int64),
        "off_on": np.array([0.0, 1.0], np.float32),
        "scales": np.array([float(HUGE)], np.float32),
        "square": np.array([2**20, 2**20], np.int64),
    }
    bombs: list[Hostile] = []
    for name, nodes in made.items():
        used = {value for node in nodes for value in node.input}
        needed = {key: value for key, value in constants.items() if key in used}
        if name == "Range":
            needed["many"] = np.array(2.0**40, np.float32)
        tail = [helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0), helper.make_node("Add", ["x", "m"], ["y"])]
        bombs.append(Hostile(f"bomb {name}", Fate.REFUSED, simple(*nodes, *tail, initializers=needed)))
        if len(nodes) == 1 and "shape" in used:
            hidden = [
                helper.make_node("Sub", ["x", "x"], ["nothing"]),
                helper.make_node("ReduceMax", ["nothing"], ["zero_f"], keepdims=0),
                helper.make_node("Cast", ["zero_f"], ["zero_i"], to=INT64),
                helper.make_node("Add", ["shape", "zero_i"], ["secret"]),
            ]
            copy = onnx.NodeProto()
            copy.CopyFrom(nodes[0])
            copy.input[list(copy.input).index("shape")] = "secret"
            bombs.append(
                Hostile(f"bomb {name} hidden", Fate.REFUSED, simple(*hidden, copy, *tail, initializers=needed))
            )
    return bombs
