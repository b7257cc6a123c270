"""A program that takes milliseconds a row and whose exact answer is known, for tests that need to be in mid-job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fallow.bundle_file import Bundle

FEATURES = 1024
STEPS = 120
"""Each step moves every feature to the next place by a full matrix product: 2 MFLOP a row, exact in float32."""


def slow_bundle(folder: Path) -> Bundle:
    """The bundle of y = x moved round by `STEPS` places."""
    shift = np.roll(np.eye(FEATURES, dtype=np.float32), 1, axis=1)
    names = ["x", *(f"s{step}" for step in range(1, STEPS)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], "shift"], [names[i + 1]]) for i in range(STEPS)]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", FEATURES])],
        [numpy_helper.from_array(shift, "shift")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "slow.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)
    return Bundle.from_onnx(path)


def rows_of(count: int) -> NDArray[np.float32]:
    """Rows that all differ."""
    return np.random.default_rng(count).standard_normal((count, FEATURES), dtype=np.float32)


def expected(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the program must give, bit for bit."""
    return np.roll(rows, STEPS, axis=1)
