"""Runs training programs on this process's own devices, through XLA. Needs the extra `federated`.

Steps over the batches of a client are one compiled loop around the program's step; a batch of padding alone changes
nothing. Rows and batches are padded to powers of two, so that clients of many sizes share few compilations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated.partition import Columns, Places, Shuffle, rows_of
from fallow.federated.program import TrainingProgram
from fallow.federated.stablehlo import ArtifactFacts, check_artifact, jax_modules
from fallow.federated.updates import TensorSpec, Vector
from fallow.schema import TensorColumn


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a client's pass over its rows has come to."""

    weights: Vector
    rows: int
    """Rows stepped over, each epoch counted."""
    metrics: dict[str, float]
    """Means over those rows, as they were when stepped over."""


class Runner:
    """One program, checked against its header and ready to run."""

    def __init__(self, program: TrainingProgram) -> None:
        """Raises PROGRAM_REFUSED when an artifact may not run, or does not take and give what the header says."""
        self.program = program
        weights, state = _shapes(program.weights), _shapes(program.state)
        batch = [(column.dtype.value, (program.batch_rows, *column.shape)) for column in program.columns]
        mask, seed = ("float32", (program.batch_rows,)), ("uint32", (2,))
        hyper = [("float32", ())] * len(program.hyperparameters)
        metrics = [("float32", ())] * len(program.metrics)
        self._check(
            "train", program.train, [*weights, *state, *batch, mask, seed, *hyper], [*weights, *state, *metrics]
        )
        self._check("evaluate", program.evaluate, [*weights, *batch, mask], metrics)
        if program.init:
            self._check("init", program.init, [*weights, seed], state)

    def _check(self, name: str, artifact: bytes, arguments: list[Any], results: list[Any]) -> None:
        facts: ArtifactFacts = check_artifact(name, artifact)
        if len(self.program.platforms) > 1:
            arguments = [("int32", ()), *arguments]
        for kind, wanted, found in (("takes", arguments, facts.arguments), ("gives", results, facts.results)):
            told = [(_MLIR[dtype], tuple(shape)) for dtype, shape in wanted]
            if told != list(found):
                raise FallowError(
                    Reason.PROGRAM_REFUSED, f"{name} {kind} something else than its header says", field=name
                )

    def train(
        self,
        weights: Vector,
        columns: Columns,
        *,
        epochs: int = 1,
        seed: bytes = b"",
        hyperparameters: Mapping[str, float] | None = None,
    ) -> LocalResult:
        """Steps over these rows `epochs` times, in an order that follows from `seed`. Raises FIELD_INVALID."""
        program = self.program
        rows = self._checked_rows(columns)
        hyper = self._hyperparameters(hyperparameters or {})
        shuffle = Shuffle(seed)
        order = [_batches(shuffle.order(f"epoch {epoch}", rows), program.batch_rows) for epoch in range(epochs)]
        places, mask = (np.concatenate(parts) for parts in zip(*order, strict=True))
        places, mask = _padded(places, _power(len(places))), _padded(mask, _power(len(mask)))
        seeds = shuffle.numbers("steps", len(places)).view(np.uint32).reshape(-1, 2)
        table = {column.name: _padded(columns[column.name], _power(rows)) for column in program.columns}
        named = program.layout.arrays(weights)
        moved, sums = self._epochs(named, table, places, mask, seeds, hyper)
        stepped = rows * epochs
        return LocalResult(
            program.layout.flat({name: np.asarray(array) for name, array in moved.items()}),
            stepped,
            {name: float(total) / stepped for name, total in sums.items()},
        )

    def evaluate(self, weights: Vector, columns: Columns) -> dict[str, float]:
        """Means of the metrics over these rows."""
        rows = self._checked_rows(columns)
        places, mask = _batches(np.arange(rows), self.program.batch_rows)
        places, mask = _padded(places, _power(len(places))), _padded(mask, _power(len(mask)))
        table = {column.name: _padded(columns[column.name], _power(rows)) for column in self.program.columns}
        sums = self._evaluation(self.program.layout.arrays(weights), table, places, mask)
        return {name: float(total) / rows for name, total in sums.items()}

    # --------------------------------------------------------------------------------------------- compiled

    @cached_property
    def _epochs(self) -> Any:
        modules = jax_modules()
        jax, jnp = modules.jax, modules.numpy
        program = self.program
        step = self._function("train", program.train)
        start = self._function("init", program.init) if program.init else None

        def run(weights: Any, table: Any, places: Any, mask: Any, seeds: Any, hyper: Any) -> Any:
            state: Any = start(weights, seeds[0]) if start is not None else {}
            zeros = {name: jnp.zeros((), jnp.float32) for name in program.metrics}

            def one(carried: Any, batch: Any) -> Any:
                where, rows, seed = batch

                def stepped() -> Any:
                    weights, state, sums = carried
                    columns = {name: array[where] for name, array in table.items()}
                    weights, state, found = step(weights, state, columns, rows, seed, hyper)
                    return weights, state, {name: sums[name] + found[name] for name in sums}

                return jax.lax.cond(rows.sum() > 0, stepped, lambda: carried), None

            (weights, _, sums), _ = jax.lax.scan(one, (weights, state, zeros), (places, mask, seeds))
            return weights, sums

        return jax.jit(run)

    @cached_property
    def _evaluation(self) -> Any:
        modules = jax_modules()
        jax, jnp = modules.jax, modules.numpy
        evaluate = self._function("evaluate", self.program.evaluate)

        def run(weights: Any, table: Any, places: Any, mask: Any) -> Any:
            def one(sums: Any, batch: Any) -> Any:
                where, rows = batch
                found = evaluate(weights, {name: array[where] for name, array in table.items()}, rows)
                return {name: sums[name] + found[name] for name in sums}, None

            zeros = {name: jnp.zeros((), jnp.float32) for name in self.program.metrics}
            return jax.lax.scan(one, zeros, (places, mask))[0]

        return jax.jit(run)

    def _function(self, name: str, artifact: bytes) -> Any:
        """The artifact as a JAX function, so that it can stand inside compiled loops."""
        modules = jax_modules()
        arguments, results = self._trees(name)
        tree_util = modules.jax.tree_util
        inputs, in_tree = tree_util.tree_flatten((arguments, {}))
        outputs, out_tree = tree_util.tree_flatten(results)
        aval = modules.jax.core.ShapedArray
        exported = modules.export.Exported(
            fun_name=name,
            in_tree=in_tree,
            in_avals=tuple(aval(each.shape, each.dtype) for each in inputs),
            out_tree=out_tree,
            out_avals=tuple(aval(each.shape, each.dtype) for each in outputs),
            _has_named_shardings=False,
            _in_named_shardings=(None,) * len(inputs),
            _out_named_shardings=(None,) * len(outputs),
            in_shardings_hlo=(None,) * len(inputs),
            out_shardings_hlo=(None,) * len(outputs),
            nr_devices=1,
            platforms=self.program.platforms,
            ordered_effects=(),
            unordered_effects=(),
            disabled_safety_checks=(),
            mlir_module_serialized=artifact,
            calling_convention_version=modules.export.maximum_supported_calling_convention_version,
            module_kept_var_idx=tuple(range(len(inputs))),
            uses_global_constants=len(self.program.platforms) > 1,
            _get_vjp=None,
        )
        return exported.call

    def _trees(self, name: str) -> tuple[Any, Any]:
        """Arguments and results of an artifact, as trees of shapes."""
        program = self.program
        shape = jax_modules().jax.ShapeDtypeStruct
        weights = {spec.name: shape(spec.shape, np.dtype(spec.dtype)) for spec in program.weights}
        state = {spec.name: shape(spec.shape, np.dtype(spec.dtype)) for spec in program.state}
        batch = {
            column.name: shape((program.batch_rows, *column.shape), np.dtype(column.dtype.value))
            for column in program.columns
        }
        mask, seed = shape((program.batch_rows,), np.float32), shape((2,), np.uint32)
        metrics = {each: shape((), np.float32) for each in program.metrics}
        hyper = {each.name: shape((), np.float32) for each in program.hyperparameters}
        if name == "train":
            return (weights, state, batch, mask, seed, hyper), (weights, state, metrics)
        return ((weights, batch, mask), metrics) if name == "evaluate" else ((weights, seed), state)

    # --------------------------------------------------------------------------------------------- what is given

    def _checked_rows(self, columns: Columns) -> int:
        return rows_of({column.name: _checked(columns, column) for column in self.program.columns})

    def _hyperparameters(self, given: Mapping[str, float]) -> dict[str, NDArray[np.float32]]:
        known = {each.name: each.value for each in self.program.hyperparameters}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"the program has no hyper-parameter {unknown[0]!r}",
                field="hyperparameters",
                limit=", ".join(known) or "none",
            )
        return {name: np.asarray(value, np.float32) for name, value in {**known, **given}.items()}


_MLIR = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "ui8",
    "uint16": "ui16",
    "uint32": "ui32",
    "uint64": "ui64",
    "bool": "i1",
}


def _shapes(specs: tuple[TensorSpec, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(spec.dtype, spec.shape) for spec in specs]


def _checked(columns: Columns, column: TensorColumn) -> NDArray[np.generic]:
    array = columns.get(column.name)
    found = "missing" if array is None else f"{array.dtype}{list(array.shape[1:])} a row"
    if array is None or array.dtype != np.dtype(column.dtype.value) or array.shape[1:] != column.shape:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"column {column.name!r} is {found}",
            field=f"data[{column.name}]",
            limit=f"{column.dtype.value}{list(column.shape)} a row",
        )
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise FallowError(
            Reason.FIELD_INVALID,
            f"column {column.name!r} has no finite value in row {row}",
            field=f"data[{column.name}]",
            hint="fill or drop such rows",
        )
    return array


def _batches(order: Places, batch_rows: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Places in batches, (batches, batch_rows), and which of them are rows: 1, or padding: 0."""
    batches = -(-len(order) // batch_rows)
    mask = np.zeros(batches * batch_rows, np.float32)
    mask[: len(order)] = 1
    places = np.zeros(batches * batch_rows, np.int64)
    places[: len(order)] = order
    return places.reshape(batches, batch_rows).astype(np.int32), mask.reshape(batches, batch_rows)


def _power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _padded(array: NDArray[Any], rows: int) -> NDArray[Any]:
    if array.shape[0] == rows:
        return array
    return np.concatenate([array, np.zeros((rows - array.shape[0], *array.shape[1:]), array.dtype)])
