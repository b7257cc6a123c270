"""What can be known of an ONNX program without running it: limits, operators, what it must not contain, what it asks
for.

Uses the `onnx` package, which is imported before lock-down in inspecting children only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import numpy as np
import onnx as onnx_package
from google.protobuf.message import DecodeError

from fallow.limits import (
    LOOP_TRIPS_MAX,
    PROGRAM_BYTES_MAX,
    PROGRAM_NESTING_MAX,
    PROGRAM_NODES_MAX,
    PROGRAM_TENSOR_BYTES_MAX,
)
from fallow_worker.engine.operators import BY_DOMAIN, RANDOM, is_allowed, qualified

onnx: Any = onnx_package
"""The package has no complete types."""

IR_VERSION_MIN: Final = 3
OPSET_MIN: Final = 7
REFUSALS_LISTED_MAX: Final = 20
SHAPE_BATCH_ROWS: Final = 1
"""Rows for which tensors are sized: what a single row asks for must fit, more rows are measured."""
_INLINE_CONSTANT_BYTES: Final = 4096
"""Larger initializers are left out when shapes are inferred: nobody computes a shape from them."""
_PICKLE_PROTOCOLS: Final = frozenset(range(2, 6))
_IGNORED_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml"})


@dataclass(slots=True)
class GraphFindings:
    """What a look at the graph gave."""

    refusals: list[str] = field(default_factory=list[str])
    operators: Counter[str] = field(default_factory=Counter[str])
    flops_per_row: int = 0
    """In matrix products and convolutions, as far as shapes are known; a lower bound."""

    def refuse(self, sentence: str) -> None:
        """Notes one reason; further ones than `REFUSALS_LISTED_MAX` add nothing."""
        if len(self.refusals) < REFUSALS_LISTED_MAX:
            self.refusals.append(sentence)


def examine(model: bytes, name: str) -> GraphFindings:
    """Everything that speaks against a model file, before it is given to a runtime."""
    findings = GraphFindings()
    parsed = _parsed(model, name, findings)
    if parsed is None:
        return findings
    _check_header(parsed, findings)
    _Walk(findings).graph(parsed.graph, "graph", depth=1, trips=1, constants={})
    if not findings.refusals:
        _check_sizes(parsed, findings)
    return findings


def _parsed(model: bytes, name: str, findings: GraphFindings) -> Any:
    if len(model) > PROGRAM_BYTES_MAX:
        findings.refuse(f"{name!r} has {len(model)} bytes, more than {PROGRAM_BYTES_MAX}")
        return None
    if len(model) >= 2 and model[0] == 0x80 and model[1] in _PICKLE_PROTOCOLS:
        findings.refuse(f"{name!r} is a Python pickle, which is code: export the model to ONNX")
        return None
    if model[:4] == b"PK\x03\x04":
        findings.refuse(f"{name!r} is a zip archive, perhaps a PyTorch checkpoint: export the model to ONNX")
        return None
    parsed = onnx.ModelProto()
    try:
        parsed.ParseFromString(model)
    except (DecodeError, ValueError, RecursionError):
        findings.refuse(f"{name!r} is no ONNX model: its bytes are no protobuf of one")
        return None
    if parsed.ir_version == 0 or not parsed.graph.node:
        findings.refuse(f"{name!r} is no ONNX model: it holds no graph")
        return None
    return parsed


def _check_header(model: Any, findings: GraphFindings) -> None:
    if not IR_VERSION_MIN <= model.ir_version <= onnx.IR_VERSION:
        findings.refuse(f"IR version {model.ir_version} is not between {IR_VERSION_MIN} and {onnx.IR_VERSION}")
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in {"", "ai.onnx"} and not OPSET_MIN <= opset.version <= newest:
            findings.refuse(f"opset {opset.version} is not between {OPSET_MIN} and {newest}")
    if model.functions:
        findings.refuse(f"the model defines functions of its own, {model.functions[0].name!r} first")
    if model.training_info:
        findings.refuse("the model holds training information")
    for entry in model.metadata_props:
        if entry.key.startswith("ort_config"):
            findings.refuse(f"metadata {entry.key!r} would configure the runtime")


class _Walk:
    """Visits every node of every graph once."""

    def __init__(self, findings: GraphFindings) -> None:
        self._findings = findings
        self._nodes = 0

    def graph(self, graph: Any, where: str, *, depth: int, trips: int, constants: dict[str, Any]) -> None:
        """Checks a graph and those within it; `trips`: how often it runs, by the loops around it."""
        if depth > PROGRAM_NESTING_MAX:
            self._findings.refuse(f"{where} is nested more than {PROGRAM_NESTING_MAX} deep")
            return
        self._nodes += len(graph.node)
        if self._nodes > PROGRAM_NODES_MAX:
            self._findings.refuse(f"the program has more than {PROGRAM_NODES_MAX} nodes")
            return
        known = dict(constants)
        for tensor in graph.initializer:
            self._tensor(tensor, f"initializer {tensor.name!r}")
            known[tensor.name] = tensor
        for sparse in graph.sparse_initializer:
            self._tensor(sparse.values, f"sparse initializer {sparse.values.name!r}")
            self._tensor(sparse.indices, f"sparse initializer {sparse.values.name!r}")
        for index, node in enumerate(graph.node):
            label = f"node {node.name or index!r} ({qualified(node.domain, node.op_type)})"
            self._node(node, label, depth=depth, trips=trips, constants=known)

    def _node(self, node: Any, label: str, *, depth: int, trips: int, constants: dict[str, Any]) -> None:
        findings = self._findings
        if is_allowed(node.domain, node.op_type):
            # Names of others are the submitter's to choose: a report must not grow with them.
            findings.operators[qualified(node.domain, node.op_type)] += 1
        else:
            domains = ", ".join(repr(domain) for domain in BY_DOMAIN if domain)
            why = "is not on the list of operators" if node.domain in BY_DOMAIN else f"is of no domain among {domains}"
            findings.refuse(f"{label} {why}")
        if node.op_type in RANDOM and not any(attribute.name == "seed" for attribute in node.attribute):
            findings.refuse(f"{label} draws random numbers without a seed")
        inner_trips = trips
        if node.op_type == "Loop" and node.domain in {"", "ai.onnx"}:
            inner_trips = trips * self._loop_trips(node, label, constants)
            if inner_trips > LOOP_TRIPS_MAX:
                findings.refuse(f"{label} may run {inner_trips} times, more than {LOOP_TRIPS_MAX}")
        for attribute in node.attribute:
            place = f"attribute {attribute.name!r} of {label}"
            if attribute.HasField("t"):
                self._tensor(attribute.t, place)
                if node.op_type == "Constant" and node.output:
                    constants[node.output[0]] = attribute.t
            for tensor in attribute.tensors:
                self._tensor(tensor, place)
            if attribute.HasField("sparse_tensor"):
                self._tensor(attribute.sparse_tensor.values, place)
            graphs = [attribute.g] if attribute.HasField("g") else []
            for graph in [*graphs, *attribute.graphs]:
                self.graph(graph, place, depth=depth + 1, trips=inner_trips, constants=constants)

    def _loop_trips(self, node: Any, label: str, constants: dict[str, Any]) -> int:
        limit = node.input[0] if node.input else ""
        tensor = constants.get(limit)
        if tensor is None or prod(tensor.dims) != 1:
            self._findings.refuse(f"{label} has no constant limit of trips; at most {LOOP_TRIPS_MAX} are allowed")
            return 1
        try:
            return max(1, int(np.asarray(onnx.numpy_helper.to_array(tensor)).reshape(-1)[0]))
        except (ValueError, TypeError):
            self._findings.refuse(f"{label} has a limit of trips that cannot be read")
            return 1

    def _tensor(self, tensor: Any, place: str) -> None:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            self._findings.refuse(f"{place} lies in another file: external data is not allowed, put it into the model")
        size = _tensor_bytes(tensor.data_type, tensor.dims)
        if any(dim < 0 for dim in tensor.dims) or size > PROGRAM_TENSOR_BYTES_MAX:
            self._findings.refuse(f"{place} has shape {list(tensor.dims)}, more than {PROGRAM_TENSOR_BYTES_MAX} bytes")


def _check_sizes(model: Any, findings: GraphFindings) -> None:
    """Infers shapes for `SHAPE_BATCH_ROWS` rows and refuses tensors that no machine should make. Changes `model`."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in initializers and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = SHAPE_BATCH_ROWS
    declared = {value.name for value in model.graph.input}
    small: list[Any] = []
    for tensor in model.graph.initializer:
        if _tensor_bytes(tensor.data_type, tensor.dims) <= _INLINE_CONSTANT_BYTES:
            small.append(tensor)
        elif tensor.name not in declared:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in small]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:  # the library raises several kinds for graphs that contradict themselves
        findings.refuse(f"shapes cannot be inferred: {str(error).splitlines()[0][:200] if str(error) else 'unknown'}")
        return
    findings.flops_per_row = _flops_per_row(inferred.graph)
    for value in _values(inferred.graph):
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else 1 for dim in kind.shape.dim]
        size = _tensor_bytes(kind.elem_type, dims)
        if any(dim < 0 for dim in dims) or size > PROGRAM_TENSOR_BYTES_MAX:
            findings.refuse(
                f"tensor {value.name!r} of shape {dims} asks for {size} bytes, more than {PROGRAM_TENSOR_BYTES_MAX}"
            )


_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "FusedMatMul"})
_CONVOLUTIONS: Final = frozenset({"Conv", "ConvInteger", "QLinearConv"})
_FLOPS_MAX: Final = 1 << 62


def _flops_per_row(graph: Any) -> int:
    """Multiplications and additions of one row in the products and convolutions whose shapes are known."""
    shapes = {value.name: _dims(value) for value in (*graph.value_info, *graph.output, *graph.input)}
    shapes |= {tensor.name: [int(dim) for dim in tensor.dims] for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        given, made = [shapes.get(name, []) for name in node.input], shapes.get(node.output[0], [])
        if node.op_type in _PRODUCTS and given and given[0] and made:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += 2 * prod(made) * given[0][-2 if transposed and len(given[0]) > 1 else -1]
        elif node.op_type in _CONVOLUTIONS and made:
            kernels = [shape for shape in given[1:] if len(shape) == len(made)]
            total += 2 * prod(made) * prod(kernels[0][1:]) if kernels else 0
    rows = next((shape[0] for shape in (_dims(value) for value in graph.input) if shape), 1)
    return min(_FLOPS_MAX, max(0, total) // max(1, rows))


def _dims(value: Any) -> list[int]:
    return [max(1, dim.dim_value) if dim.HasField("dim_value") else 1 for dim in value.type.tensor_type.shape.dim]


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.value_info
    yield from graph.output
    yield from graph.input
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _values(attribute.g)
            for inner in attribute.graphs:
                yield from _values(inner)


def _tensor_bytes(element_type: int, dims: Any) -> int:
    if element_type == 0:
        return 0
    try:
        size = int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)
    except KeyError:
        size = 8
    return size * prod(max(0, int(dim)) for dim in dims)
