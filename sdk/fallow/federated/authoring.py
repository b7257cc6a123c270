"""Makes training programs of JAX functions: where a user's Python becomes data. Needs the extra `federated`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated.program import LOSS, PLATFORMS, STABLEHLO_VERSION, Hyperparameter, TrainingProgram
from fallow.federated.stablehlo import check_artifact, jax_modules
from fallow.federated.updates import TensorSpec
from fallow.schema import DType, TensorColumn

PyTree = Any
Batch = Mapping[str, Any]
PerRow = Callable[..., Any]
"""(weights, batch) or (weights, batch, key) → one float for each row of the batch."""
ANCHOR = "anchor/"
"""State of FedProx: the weights as the round began."""


@dataclass(frozen=True, slots=True)
class ClientOptimizer:
    """How a client steps. State begins anew each round."""

    start: Callable[[dict[str, Any]], dict[str, Any]]
    """State from the weights; no array more than the step needs."""
    step: Callable[
        [dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]
    ]
    """(weights, gradients, state, hyper-parameters) → (weights, state)."""
    hyperparameters: Mapping[str, float] = field(default_factory=dict[str, float])


def sgd(learning_rate: float = 0.1, *, proximal: float = 0.0) -> ClientOptimizer:
    """w − η(g + μ(w − w₀)): plain descent, and FedProx where `proximal` is not 0 (Li et al., 2020)."""

    def start(weights: dict[str, Any]) -> dict[str, Any]:
        return {f"{ANCHOR}{name}": value for name, value in weights.items()} if proximal else {}

    def step(
        weights: dict[str, Any], gradients: dict[str, Any], state: dict[str, Any], hyper: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        def moved(name: str) -> Any:
            slope = gradients[name]
            if proximal:
                slope = slope + hyper["proximal"] * (weights[name] - state[f"{ANCHOR}{name}"])
            return weights[name] - hyper["learning_rate"] * slope

        return {name: moved(name) for name in weights}, state

    numbers = {"learning_rate": learning_rate} | ({"proximal": proximal} if proximal else {})
    return ClientOptimizer(start, step, numbers)


def adamw(
    learning_rate: float = 1e-3, *, beta1: float = 0.9, beta2: float = 0.999, decay: float = 0.0, epsilon: float = 1e-8
) -> ClientOptimizer:
    """AdamW with bias correction (Loshchilov and Hutter, 2019)."""

    def start(weights: dict[str, Any]) -> dict[str, Any]:
        jnp = jax_modules().numpy
        moments = {f"{kind}/{name}": jnp.zeros_like(value) for kind in ("m", "v") for name, value in weights.items()}
        return {**moments, "steps": jnp.zeros((), jnp.float32)}

    def step(
        weights: dict[str, Any], gradients: dict[str, Any], state: dict[str, Any], hyper: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        jnp = jax_modules().numpy
        steps = state["steps"] + 1
        kept: dict[str, Any] = {"steps": steps}
        moved: dict[str, Any] = {}
        for name, slope in gradients.items():
            m = kept[f"m/{name}"] = beta1 * state[f"m/{name}"] + (1 - beta1) * slope
            v = kept[f"v/{name}"] = beta2 * state[f"v/{name}"] + (1 - beta2) * slope * slope
            direction = (m / (1 - beta1**steps)) / (jnp.sqrt(v / (1 - beta2**steps)) + epsilon)
            moved[name] = weights[name] - hyper["learning_rate"] * (direction + decay * weights[name])
        return moved, kept

    return ClientOptimizer(start, step, {"learning_rate": learning_rate})


def training_program(
    loss: PerRow,
    weights: PyTree,
    *,
    columns: Mapping[str, tuple[str, Sequence[int]]],
    batch_rows: int,
    optimizer: ClientOptimizer | None = None,
    metrics: Mapping[str, PerRow] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> TrainingProgram:
    """A program that minimises the mean over rows of `loss(weights, batch)`, or of `loss(weights, batch, key)`.

    `weights` is any tree of float32 arrays: an example, whose values do not matter. `columns` gives dtype and shape of
    a row, such as {"x": ("float32", (28, 28)), "y": ("int32", ())}. `metrics` are more functions like `loss`, summed
    over rows in training and evaluation. Raises FIELD_INVALID where something cannot be exported or may not travel.
    """
    optimizer = optimizer or sgd()
    author = _Author(loss, dict(metrics or {}), optimizer, weights, columns, batch_rows, tuple(platforms))
    return author.program()


def named_weights(weights: PyTree) -> dict[str, NDArray[np.float32]]:
    """A tree of arrays by name, such as `layers/0/bias`: as programs, rounds and files have them."""
    jax = jax_modules().jax
    leaves = jax.tree_util.tree_flatten_with_path(weights)[0]
    found: dict[str, NDArray[np.float32]] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "weights"
        array = np.asarray(leaf)
        if array.dtype != np.float32:
            raise FallowError(
                Reason.FIELD_INVALID, f"weight {name!r} is {array.dtype}", field=f"weights[{name}]", limit="float32"
            )
        found[name] = array
    return found


def tree_of(named: Mapping[str, Any], like: PyTree) -> PyTree:
    """Named arrays as a tree of the same form as `like`."""
    tree_util = jax_modules().jax.tree_util
    leaves, form = tree_util.tree_flatten_with_path(like)
    names = [tree_util.keystr(path, simple=True, separator="/") or "weights" for path, _ in leaves]
    return tree_util.tree_unflatten(form, [named[name] for name in names])


@dataclass(frozen=True, slots=True)
class _Author:
    loss: PerRow
    metrics: dict[str, PerRow]
    optimizer: ClientOptimizer
    weights: PyTree
    columns: Mapping[str, tuple[str, Sequence[int]]]
    batch_rows: int
    platforms: tuple[str, ...]

    def program(self) -> TrainingProgram:
        jax = jax_modules().jax
        named = named_weights(self.weights)
        state = jax.eval_shape(self.optimizer.start, named)
        shape = jax.ShapeDtypeStruct
        batch = {
            name: shape((self.batch_rows, *sizes), np.dtype(dtype)) for name, (dtype, sizes) in self.columns.items()
        }
        mask, seed = shape((self.batch_rows,), np.float32), shape((2,), np.uint32)
        hyper = {name: shape((), np.float32) for name in self.optimizer.hyperparameters}
        of_weights = {name: shape(array.shape, array.dtype) for name, array in named.items()}
        train = self._export("train", self._train, of_weights, state, batch, mask, seed, hyper)
        evaluate = self._export("evaluate", self._evaluate, of_weights, batch, mask)
        init = self._export("init", self._init, of_weights, seed) if state else b""
        return TrainingProgram(
            columns=tuple(
                TensorColumn(name, DType(np.dtype(dtype).name), tuple(sizes))
                for name, (dtype, sizes) in sorted(self.columns.items())
            ),
            weights=_specs(of_weights),
            state=_specs(state),
            hyperparameters=tuple(
                Hyperparameter(name, float(np.float32(value)))
                for name, value in sorted(self.optimizer.hyperparameters.items())
            ),
            metrics=tuple(sorted({LOSS, *self.metrics})),
            batch_rows=self.batch_rows,
            train=train,
            evaluate=evaluate,
            init=init,
            platforms=self.platforms,
        )

    def _train(self, weights: Any, state: Any, batch: Any, mask: Any, seed: Any, hyper: Any) -> Any:
        modules = jax_modules()
        key = modules.jax.random.wrap_key_data(seed, impl="threefry2x32")

        def mean_loss(named: dict[str, Any]) -> tuple[Any, Any]:
            rows = self._rows(self.loss, named, batch, key)
            total = (rows * mask).sum()
            return total / modules.numpy.maximum(mask.sum(), 1.0), total

        (_, total), gradients = modules.jax.value_and_grad(mean_loss, has_aux=True)(weights)
        found = {name: (self._rows(each, weights, batch, key) * mask).sum() for name, each in self.metrics.items()}
        moved, kept = self.optimizer.step(weights, gradients, state, hyper)
        return moved, kept, {**found, LOSS: total}

    def _evaluate(self, weights: Any, batch: Any, mask: Any) -> Any:
        return {
            name: (self._rows(each, weights, batch, None) * mask).sum()
            for name, each in {**self.metrics, LOSS: self.loss}.items()
        }

    def _init(self, weights: Any, seed: Any) -> Any:
        return self.optimizer.start(weights)

    def _rows(self, function: PerRow, named: dict[str, Any], batch: Batch, key: Any) -> Any:
        """One number for each row. A function that takes a key gets None when evaluated."""
        tree = tree_of(named, self.weights)
        takes_key = len(inspect.signature(function).parameters) > 2
        found = function(tree, batch, key) if takes_key else function(tree, batch)
        if getattr(found, "shape", None) != (self.batch_rows,):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{getattr(function, '__name__', 'a function')} gives the shape {list(getattr(found, 'shape', []))}",
                field="loss",
                limit=f"one number for each row: [{self.batch_rows}]",
                hint="leave the mean over rows to the program: rows of padding must not count",
            )
        return found.astype(np.float32)

    def _export(self, name: str, function: Callable[..., Any], *arguments: Any) -> bytes:
        modules = jax_modules()
        try:
            exported = modules.export.export(modules.jax.jit(function, keep_unused=True), platforms=self.platforms)(
                *arguments
            )
        except FallowError:
            raise
        except (ValueError, NotImplementedError, TypeError) as problem:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{name} cannot be made data: {str(problem).splitlines()[0]}",
                field=name,
                hint="callbacks, prints and shapes that depend on values have no place in a step that travels",
            ) from problem
        artifact: bytes = modules.stablehlo.serialize_portable_artifact_str(exported.mlir_module(), STABLEHLO_VERSION)
        check_artifact(name, artifact)
        return artifact


def _specs(tree: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, np.dtype(tree[name].dtype).name, tuple(tree[name].shape)) for name in sorted(tree))
