"""A model's weights as named arrays, and updates of them as flat float32 vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason

Vector = NDArray[np.float32]
"""All weights in one row, float32: shape (parameters,)."""
Arrays = Mapping[str, NDArray[np.generic]]
"""Weights by name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (as NumPy names it) and shape of an array."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array of the weights stands in a vector: one after the other, in the order of their names."""

    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(weights: Arrays) -> Layout:
        """The layout of these weights. Raises FIELD_INVALID for what is no float32 array, or when there are none."""
        if not weights:
            raise FallowError(Reason.FIELD_INVALID, "there are no weights", field="weights")
        for name, array in weights.items():
            if array.dtype != np.float32:
                raise FallowError(
                    Reason.FIELD_INVALID,
                    f"weight {name!r} is {array.dtype}",
                    field=f"weights[{name}]",
                    limit="float32",
                    hint="cast it; integers that do not learn belong into the state",
                )
        return Layout(tuple(TensorSpec(name, "float32", weights[name].shape) for name in sorted(weights)))

    @property
    def parameters(self) -> int:
        """The length of a vector."""
        return sum(tensor.elements for tensor in self.tensors)

    def flat(self, weights: Arrays) -> Vector:
        """The arrays as one vector. Raises FIELD_INVALID naming the first that does not fit."""
        extra = sorted(set(weights) - {tensor.name for tensor in self.tensors})
        if extra:
            raise FallowError(
                Reason.FIELD_INVALID, f"{extra[0]!r} is none of the weights", field=f"weights[{extra[0]}]"
            )
        vector = np.empty(self.parameters, np.float32)
        start = 0
        for tensor in self.tensors:
            array = weights.get(tensor.name)
            found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
            if array is None or array.dtype != np.float32 or array.shape != tensor.shape:
                raise FallowError(
                    Reason.FIELD_INVALID,
                    f"weight {tensor.name!r} is {found}",
                    field=f"weights[{tensor.name}]",
                    limit=f"float32{list(tensor.shape)}",
                )
            vector[start : start + tensor.elements] = array.ravel()
            start += tensor.elements
        return vector

    def arrays(self, vector: Vector) -> dict[str, NDArray[np.float32]]:
        """The vector as arrays by name; views of it."""
        if vector.shape != (self.parameters,):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{vector.shape[0] if vector.ndim == 1 else vector.shape} numbers are no weights",
                field="weights",
                limit=f"{self.parameters} numbers",
            )
        found: dict[str, NDArray[np.float32]] = {}
        start = 0
        for tensor in self.tensors:
            found[tensor.name] = vector[start : start + tensor.elements].reshape(tensor.shape)
            start += tensor.elements
        return found


def zeros(parameters: int) -> Vector:
    """A vector of zeros."""
    return np.zeros(parameters, np.float32)


def update_fault(update: NDArray[np.generic], *, parameters: int, norm_max: float | None) -> str:
    """What is wrong with an update before it may be aggregated, or nothing: its form, its numbers, its length."""
    if update.dtype != np.float32 or update.shape != (parameters,):
        return f"it is {update.dtype}{list(update.shape)}, wanted is float32[{parameters}]"
    if not np.isfinite(update).all():
        bad = int(np.flatnonzero(~np.isfinite(update))[0])
        return f"number {bad} is {update[bad]}"
    if norm_max is not None:
        norm = float(np.sqrt(np.dot(update.astype(np.float64), update)))
        if norm > norm_max:
            return f"its norm is {norm:.6g}, allowed is {norm_max:.6g}"
    return ""
