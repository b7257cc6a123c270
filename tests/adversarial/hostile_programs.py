"""A corpus of programs that mean harm, made from a seed: bombs, endless loops, lies about shapes, broken files."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engine_models import FEATURES, dense_model, onnx_model, tensor_manifest
from fallow.bundle import BundleManifest
from fallow.schema import DType, TensorColumn

ENDLESS_TRIPS = 2**62


@dataclass(frozen=True, slots=True)
class HostileProgram:
    """A bundle and the rows that set it off."""

    manifest: BundleManifest
    model: bytes
    rows: dict[str, NDArray[Any]]


def _scalars(model: bytes, dtype: DType, rows: NDArray[Any], output: DType = DType.FLOAT32) -> HostileProgram:
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", dtype, ()),),
        output_columns=(TensorColumn("y", output, ()),),
    )
    return HostileProgram(manifest, model, {"x": rows})


def memory_bomb(elements: int) -> HostileProgram:
    """Each row asks for a tensor of as many float32 as its value says, and touches all of it."""
    model = onnx_model(
        [
            helper.make_node("ReduceMax", ["x"], ["many"], keepdims=0),
            helper.make_node("Unsqueeze", ["many", "zero"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["big"]),
            helper.make_node("Exp", ["big"], ["touched"]),
            helper.make_node("ReduceSum", ["touched"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["x"], ["own"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["own", "sum"], ["y"]),
        ],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.FLOAT, ["rows"])],
        {"zero": np.array([0], np.int64)},
    )
    return _scalars(model, DType.INT64, np.array([1, elements, 2], np.int64))


def range_bomb() -> HostileProgram:
    """Each row asks for the integers up to its value."""
    model = onnx_model(
        [
            helper.make_node("ReduceMax", ["x"], ["many"], keepdims=0),
            helper.make_node("Range", ["zero", "many", "one"], ["big"]),
            helper.make_node("ReduceMax", ["big"], ["top"], keepdims=0),
            helper.make_node("Add", ["x", "top"], ["y"]),
        ],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.INT64, ["rows"])],
        {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)},
    )
    return _scalars(model, DType.INT64, np.array([2**40], np.int64), DType.INT64)


def endless_loop() -> HostileProgram:
    """Loops as often as a row says."""
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "carried"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.INT64, ["rows"]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.INT64, ["rows"]),
        ],
    )
    model = onnx_model(
        [
            helper.make_node("ReduceMax", ["x"], ["trips"], keepdims=0),
            helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body),
        ],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.INT64, ["rows"])],
        {"yes": np.array(True)},
    )
    return _scalars(model, DType.INT64, np.array([ENDLESS_TRIPS], np.int64), DType.INT64)


def shape_liar() -> HostileProgram:
    """Declares three values a row and gives as many as the row says."""
    model = onnx_model(
        [
            helper.make_node("ReduceMax", ["x"], ["many"], keepdims=0),
            helper.make_node("Unsqueeze", ["many", "zero"], ["wide"]),
            helper.make_node("Shape", ["x"], ["count"]),
            helper.make_node("Concat", ["count", "wide"], ["shape"], axis=0),
            helper.make_node("ConstantOfShape", ["shape"], ["y"]),
        ],
        [("x", TensorProto.INT64, ["rows"])],
        [("y", TensorProto.FLOAT, ["rows", "many"])],
        {"zero": np.array([0], np.int64)},
    )
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.INT64, ()),),
        output_columns=(TensorColumn("y", DType.FLOAT32, (3,)),),
    )
    return HostileProgram(manifest, model, {"x": np.array([3, 50_000], np.int64)})


def broken_files(count: int, *, seed: int) -> list[HostileProgram]:
    """An honest model with bytes flipped, cut, doubled and replaced."""
    chance = Random(seed)
    honest = dense_model()
    programs: list[HostileProgram] = []
    for _ in range(count):
        data = bytearray(honest)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[place] ^= 1 << chance.randrange(8)
                case 1:
                    del data[place : place + chance.randint(1, 40)]
                case 2:
                    data[place:place] = data[place : place + chance.randint(1, 200)]
                case _:
                    data[place : place + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\x80\x80\x80\x80"])
        model = bytes(data)
        rows = np.ones((3, FEATURES), np.float32)
        programs.append(HostileProgram(tensor_manifest(model), model, {"x": rows}))
    return programs
