"""How a round's aggregate changes the weights: the server's own optimiser.

Each takes Δ, the aggregated change that clients propose, and gives new weights. FedAdam, FedYogi and FedAdagrad are the
paper's (Reddi et al., 2021, algorithm 2): no bias correction, and second moments that begin at τ².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fallow.federated.updates import Vector


@dataclass(frozen=True, slots=True)
class Moments:
    """What an optimiser remembers from round to round."""

    first: Vector
    second: Vector


class OuterOptimizer(Protocol):
    """A server's step."""

    def start(self, parameters: int) -> Moments:
        """What it remembers before the first round."""
        ...

    def step(self, weights: Vector, change: Vector, moments: Moments) -> tuple[Vector, Moments]:
        """New weights and what to remember. Nothing given is changed."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """w + ηΔ; with η = 1 what federated averaging does."""

    learning_rate: float = 1.0

    def start(self, parameters: int) -> Moments:
        """Nothing."""
        return Moments(_empty(), _empty())

    def step(self, weights: Vector, change: Vector, moments: Moments) -> tuple[Vector, Moments]:
        """One step."""
        return _float32(weights + np.float32(self.learning_rate) * change), moments


@dataclass(frozen=True, slots=True)
class Momentum:
    """FedAvgM (Hsu et al., 2019): m ← βm + Δ, w + ηm; with Nesterov w + η(βm + Δ), the outer step of DiLoCo (2024)."""

    learning_rate: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    def start(self, parameters: int) -> Moments:
        """Zeros."""
        return Moments(np.zeros(parameters, np.float32), _empty())

    def step(self, weights: Vector, change: Vector, moments: Moments) -> tuple[Vector, Moments]:
        """One step."""
        beta = np.float32(self.momentum)
        first = beta * moments.first + change
        direction = beta * first + change if self.nesterov else first
        return _float32(weights + np.float32(self.learning_rate) * direction), Moments(first, moments.second)


def diloco() -> Momentum:
    """The outer step of DiLoCo with its published constants."""
    return Momentum(learning_rate=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """m ← β₁m + (1 − β₁)Δ; v by `rule`; w + ηm / (√v + τ)."""

    rule: str
    """adam: β₂v + (1 − β₂)Δ²; yogi: v − (1 − β₂)Δ²·sign(v − Δ²); adagrad: v + Δ²."""
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def start(self, parameters: int) -> Moments:
        """Zeros, and τ² as the paper asks (v₋₁ ≥ τ²)."""
        return Moments(np.zeros(parameters, np.float32), np.full(parameters, self.tau**2, np.float32))

    def step(self, weights: Vector, change: Vector, moments: Moments) -> tuple[Vector, Moments]:
        """One step."""
        beta1, rest1 = np.float32(self.beta1), np.float32(1 - self.beta1)
        beta2, rest2 = np.float32(self.beta2), np.float32(1 - self.beta2)
        first: Vector = _float32(beta1 * moments.first + rest1 * change)
        squares: Vector = _float32(change * change)
        second: Vector = moments.second
        if self.rule == "adam":
            second = _float32(beta2 * second + rest2 * squares)
        elif self.rule == "yogi":
            second = _float32(second - rest2 * squares * np.sign(second - squares))
        else:
            second = _float32(second + squares)
        moved = np.float32(self.learning_rate) * first / (np.sqrt(second) + np.float32(self.tau))
        return _float32(weights + moved), Moments(first, second)


def fedadam(learning_rate: float = 0.01, tau: float = 1e-3) -> Adaptive:
    """FedAdam."""
    return Adaptive("adam", learning_rate, tau=tau)


def fedyogi(learning_rate: float = 0.01, tau: float = 1e-3) -> Adaptive:
    """FedYogi."""
    return Adaptive("yogi", learning_rate, tau=tau)


def fedadagrad(learning_rate: float = 0.01, tau: float = 1e-3) -> Adaptive:
    """FedAdagrad: the paper takes β₁ = 0."""
    return Adaptive("adagrad", learning_rate, beta1=0.0, tau=tau)


def _float32(array: NDArray[np.floating]) -> Vector:
    """What NumPy's types take for float64 on the way."""
    return np.asarray(array, np.float32)


def _empty() -> Vector:
    return np.zeros(0, np.float32)
