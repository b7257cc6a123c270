"""A program with every weight moved by as much as rounding may move what it is multiplied into.

A sum of k rounded products equals the exact sum over weights that are off by about √k · u, with u the unit round-off
(backward error analysis; Higham, Accuracy and Stability, §3.1, in its probabilistic form). So a program run with its
weights off by that much, up or down by chance, shows how far honest machines may lie apart that add up in any order.
Uses the `onnx` package, which is imported before lock-down in inspecting children only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod, sqrt
from typing import Any, Final

import numpy as np
import onnx as onnx_package
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from fallow.bundle import Precision

onnx: Any = onnx_package
"""The package has no complete types."""

UNIT_ROUND_OFF: Final = {
    Precision.FP32: 2.0**-24,
    Precision.TF32: 2.0**-11,
    Precision.FP16: 2.0**-11,
    Precision.INT8: 2.0**-24,
}
"""Of one product, by declared precision; the products of int8 programs are exact, what surrounds them is float32."""
NESTING_MAX: Final = 16
Shape = tuple[int, ...]
Terms = Callable[[Shape], int]
"""How many terms a sum has into which a weight of that shape goes."""


def jittered(model: bytes, *, precision: Precision, seed: int) -> bytes | None:
    """The model with each floating weight times 1 ± √k · u; None when it has none, or cannot be taken apart."""
    parsed = onnx.ModelProto()
    try:
        parsed.ParseFromString(model)
    except (DecodeError, ValueError, RecursionError):
        return None
    generator = np.random.default_rng(seed)
    sums = {name: terms for graph in _graphs(parsed.graph, 0) for name, terms in _terms(graph)}
    changed = 0
    for graph in _graphs(parsed.graph, 0):
        tensors = [(tensor.name, tensor) for tensor in graph.initializer]
        tensors += [
            (node.output[0], attribute.t)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        ]
        for name, tensor in tensors:
            weights: NDArray[Any] = np.asarray(numpy_helper.to_array(tensor))
            if weights.dtype.kind != "f" or not weights.size:
                continue
            terms = sums.get(name, _alone)(weights.shape)
            signs = generator.integers(0, 2, weights.shape).astype(np.float64) * 2 - 1
            with np.errstate(over="ignore", invalid="ignore"):
                moved = weights.astype(np.float64) * (1 + signs * sqrt(terms) * UNIT_ROUND_OFF[precision])
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(weights.dtype), tensor.name))
            changed += 1
    return bytes(parsed.SerializeToString()) if changed else None


def _graphs(graph: Any, depth: int) -> Iterator[Any]:
    """The graph and those inside it."""
    yield graph
    if depth < NESTING_MAX:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from _graphs(attribute.g, depth + 1)


def _alone(shape: Shape) -> int:
    del shape
    return 1


def _last(shape: Shape) -> int:
    return shape[-1] if shape else 1


def _last_but_one(shape: Shape) -> int:
    return shape[-2] if len(shape) > 1 else prod(shape)


def _first(shape: Shape) -> int:
    return shape[0] if shape else 1


def _all_but_first(shape: Shape) -> int:
    return max(1, prod(shape[1:]))


def _terms(graph: Any) -> Iterator[tuple[str, Terms]]:
    """For weights that are multiplied into sums: how many terms a sum has, from the weight's shape."""
    for node in graph.node:
        transposed = {attribute.name: attribute.i for attribute in node.attribute if attribute.name.startswith("trans")}
        inputs: list[str] = list(node.input)
        match node.op_type:
            case "MatMul" | "FusedMatMul" if len(inputs) >= 2:
                yield inputs[0], _last
                yield inputs[1], _last_but_one
            case "Gemm" if len(inputs) >= 2:
                yield inputs[1], _last if transposed.get("transB") else _first
            case "Conv" | "ConvTranspose" if len(inputs) >= 2:
                yield inputs[1], _all_but_first
            case "LSTM" | "GRU" | "RNN":
                for name in inputs[1:3]:
                    yield name, _last
            case _:
                pass
