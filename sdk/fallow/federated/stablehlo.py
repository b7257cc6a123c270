"""Looks into StableHLO artifacts before anything compiles them: operations, sizes, loops. Needs the extra `federated`.

Parsing is native code and no boundary: what a stranger sent is parsed in a sandboxed child alone. These rules decide
what may then be compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

from fallow.errors import FallowError, Reason
from fallow.limits import GIB

OPERATIONS_MAX: Final = 50_000
TENSOR_BYTES_MAX: Final = 4 * GIB
NESTING_MAX: Final = 16
TRIPS_MAX: Final = 1_000_000
"""Of one loop, all loops around it included."""

_MAGIC: Final = b"ML\xefR"
"""How MLIR bytecode begins."""

ALLOWED: Final = frozenset(
    f"stablehlo.{name}"
    for name in [
        "abs",
        "add",
        "and",
        "atan2",
        "bitcast_convert",
        "broadcast_in_dim",
        "case",
        "cbrt",
        "ceil",
        "cholesky",
        "clamp",
        "compare",
        "complex",
        "concatenate",
        "constant",
        "convert",
        "convolution",
        "cosine",
        "count_leading_zeros",
        "divide",
        "dot_general",
        "dynamic_slice",
        "dynamic_update_slice",
        "exponential",
        "exponential_minus_one",
        "fft",
        "floor",
        "gather",
        "get_tuple_element",
        "if",
        "imag",
        "iota",
        "is_finite",
        "log",
        "log_plus_one",
        "logistic",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "optimization_barrier",
        "or",
        "pad",
        "popcnt",
        "power",
        "real",
        "reduce",
        "reduce_precision",
        "reduce_window",
        "remainder",
        "reshape",
        "return",
        "reverse",
        "rng_bit_generator",
        "round_nearest_afz",
        "round_nearest_even",
        "rsqrt",
        "scatter",
        "select",
        "select_and_scatter",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sine",
        "slice",
        "sort",
        "sqrt",
        "subtract",
        "tan",
        "tanh",
        "transpose",
        "triangular_solve",
        "tuple",
        "while",
        "xor",
    ]
) | {"func.func", "func.return", "func.call", "builtin.module"}
"""Pure arithmetic on arrays. No custom calls, feeds, sends, collectives, nor `rng`, whose numbers nobody can redo."""


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """What an artifact is made of."""

    operations: int
    kinds: tuple[tuple[str, int], ...]
    """(operation, how often), by name."""
    tensor_bytes_max: int
    trips_max: int
    """Of the busiest loop, loops around it multiplied; 0: there is none."""
    arguments: tuple[tuple[str, tuple[int, ...]], ...]
    """(element type as MLIR writes it, shape)."""
    results: tuple[tuple[str, tuple[int, ...]], ...]


@cache
def jax_modules() -> Any:
    """JAX and its parts. Raises BUNDLE_INVALID without the extra."""
    try:
        import jax
        from jax import export
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import func, stablehlo
    except ImportError as missing:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"training programs need {missing.name}",
            hint='install it: pip install "fallow[federated]"',
        ) from None
    return SimpleNamespace(jax=jax, numpy=jax.numpy, export=export, ir=ir, stablehlo=stablehlo, func=func)


def check_artifact(name: str, artifact: bytes) -> ArtifactFacts:
    """What an artifact is made of, once it obeys every rule here.

    Raises PROGRAM_REFUSED naming the first operation, size or loop that may not be, or when it is no artifact at all.
    """
    if not artifact.startswith(_MAGIC):
        # The binding would read text too, and nothing at all as an empty module.
        raise FallowError(Reason.PROGRAM_REFUSED, f"{name} is no StableHLO artifact", field=name)
    modules = jax_modules()
    ir = modules.ir
    with ir.Context() as context:
        modules.stablehlo.register_dialect(context)
        try:
            module = modules.stablehlo.deserialize_portable_artifact(context, artifact)
        except Exception as problem:
            raise FallowError(
                Reason.PROGRAM_REFUSED,
                f"{name} is no StableHLO artifact: {str(problem).splitlines()[0][:200]}",
                field=name,
            ) from None
        return _Walk(name, ir).facts(module)


class _Walk:
    def __init__(self, name: str, ir: Any) -> None:
        self._name = name
        self._ir = ir
        self._kinds: Counter[str] = Counter()
        self._tensor_bytes_max = 0
        self._trips_max = 0
        self._functions: dict[str, Any] = {}

    def facts(self, module: Any) -> ArtifactFacts:
        for operation in module.body.operations:
            self._functions[str(operation.attributes["sym_name"]).strip('"')] = operation.operation
        main = self._functions.get("main")
        if main is None:
            raise self._refused("it has no function main")
        self._walk(main, depth=0, trips=1, calling=("main",))
        kind = self._ir.FunctionType(self._ir.TypeAttr(main.attributes["function_type"]).value)
        return ArtifactFacts(
            operations=self._kinds.total(),
            kinds=tuple(sorted(self._kinds.items())),
            tensor_bytes_max=self._tensor_bytes_max,
            trips_max=self._trips_max,
            arguments=tuple(_signature(each) for each in kind.inputs),
            results=tuple(_signature(each) for each in kind.results),
        )

    def _walk(self, operation: Any, *, depth: int, trips: int, calling: tuple[str, ...]) -> None:
        if depth > NESTING_MAX:
            raise self._refused(f"it is nested more than {NESTING_MAX} deep")
        for inner in _inside(operation):
            name = inner.name
            self._kinds[name] += 1
            if self._kinds.total() > OPERATIONS_MAX:
                raise self._refused(f"it has more than {OPERATIONS_MAX} operations")
            if name not in ALLOWED:
                raise self._refused(f"it uses {name}", hint="only arithmetic on arrays may travel")
            for value in inner.results:
                self._count_bytes(value.type)
            around = trips
            if name == "stablehlo.while":
                around = trips * self._trips(inner)
                self._trips_max = max(self._trips_max, around)
                if around > TRIPS_MAX:
                    raise self._refused(f"a loop runs {around} times", hint=f"allowed are {TRIPS_MAX}")
            if name == "func.call":
                self._call(inner, depth=depth, trips=trips, calling=calling)
            self._walk(inner, depth=depth + 1, trips=around, calling=calling)

    def _call(self, call: Any, *, depth: int, trips: int, calling: tuple[str, ...]) -> None:
        name = str(call.attributes["callee"]).lstrip("@").strip('"')
        if name in calling or name not in self._functions:
            raise self._refused(f"it calls {name!r}, which calls itself or is not there")
        self._walk(self._functions[name], depth=depth + 1, trips=trips, calling=(*calling, name))

    def _count_bytes(self, kind: Any) -> None:
        # A type of its own kind comes out of the binding as the most special class.
        if not isinstance(kind, self._ir.RankedTensorType):
            return
        tensor = kind
        if not tensor.has_static_shape:
            raise self._refused("a tensor's shape is not fixed")
        size = max(1, _bits(tensor.element_type) // 8)
        for dim in tensor.shape:
            size *= dim
        self._tensor_bytes_max = max(self._tensor_bytes_max, size)
        if size > TENSOR_BYTES_MAX:
            raise self._refused(f"a tensor takes {size} bytes", hint=f"allowed are {TENSOR_BYTES_MAX}")

    def _trips(self, loop: Any) -> int:
        """How often a loop runs: it counts one of its values up by a constant from a constant to a constant."""
        condition, body = (region.blocks[0] for region in loop.regions)
        compare = _maker(condition.operations[len(condition.operations) - 1].operands[0])
        if (
            compare is None
            or compare.name != "stablehlo.compare"
            or "LT" not in str(compare.attributes["comparison_direction"])
        ):
            raise self._unbounded()
        place = _argument_number(compare.operands[0], condition)
        limit = _constant(compare.operands[1], self._ir)
        if limit is None:
            outer = _argument_number(compare.operands[1], condition)
            stays = outer is not None and _argument_number(_returned(body, outer), body) == outer
            limit = _constant(loop.operands[outer], self._ir) if stays and outer is not None else None
        if place is None or limit is None:
            raise self._unbounded()
        start = _constant(loop.operands[place], self._ir)
        step = self._step(_maker(_returned(body, place)), body, place)
        if start is None or step is None or step <= 0:
            raise self._unbounded()
        return max(0, -(-(limit - start) // step))

    def _step(self, add: Any, body: Any, place: int) -> int | None:
        if add is None or add.name != "stablehlo.add":
            return None
        for counter, other in ((0, 1), (1, 0)):
            if _argument_number(add.operands[counter], body) == place:
                return _constant(add.operands[other], self._ir)
        return None

    def _unbounded(self) -> FallowError:
        return self._refused(
            "nobody can tell how often a loop runs", hint="use lax.scan, or fori_loop with constant bounds"
        )

    def _refused(self, why: str, *, hint: str = "") -> FallowError:
        return FallowError(Reason.PROGRAM_REFUSED, f"{self._name} may not run: {why}", field=self._name, hint=hint)


def _inside(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for each in block.operations:
                yield each.operation


def _signature(kind: Any) -> tuple[str, tuple[int, ...]]:
    return str(kind.element_type), tuple(kind.shape)


def _bits(element: Any) -> int:
    text = str(element)
    digits = "".join(character for character in text if character.isdigit())
    width = int(digits) if digits else 8
    return 2 * width if text.startswith("complex") else width


def _maker(value: Any) -> Any:
    """The operation whose result this is; None for an argument."""
    owner = value.owner
    return getattr(owner, "operation", owner) if hasattr(owner, "name") and hasattr(owner, "operands") else None


def _argument_number(value: Any, block: Any) -> int | None:
    for number, argument in enumerate(block.arguments):
        if argument == value:
            return number
    return None


def _returned(body: Any, place: int) -> Any:
    return body.operations[len(body.operations) - 1].operands[place]


def _constant(value: Any, ir: Any) -> int | None:
    """A whole number that is written down; None for anything else."""
    maker = _maker(value)
    if maker is not None and maker.name == "stablehlo.convert":
        return _constant(maker.operands[0], ir)
    if maker is None or maker.name != "stablehlo.constant":
        return None
    attribute = maker.attributes["value"]
    if not isinstance(attribute, ir.DenseIntElementsAttr):
        return None
    dense = attribute
    return int(dense[0]) if len(dense) == 1 else None
