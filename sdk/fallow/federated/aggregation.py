"""Rules that make one update of many.

Every rule but the median and the trimmed mean combines updates linearly, with coefficients that follow from their inner
products alone. So a rule reads the updates twice, in blocks of parameters: once for the products, once for the sum.
Updates may therefore be memory maps, and no rule needs more than a block of each. Sums are float64, in the order in
which the cohort lists its clients: the same cohort gives the same bits, whatever the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated.updates import Vector

Reals = NDArray[np.float64]
BLOCK_BYTES = 64 * 1024 * 1024
"""Of float64, for all updates together."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """What one round has gathered: updates in the order of the clients, and what the rule may lean on."""

    updates: Sequence[Vector]
    """Each float32 (parameters,)."""
    weights: Sequence[float]
    """One a client, not negative, bounded by the caller: a client may claim any count of rows."""
    root: Vector | None = None
    """The update that the operator made himself from data that he trusts."""
    centre: Vector | None = None
    """The round before's result; nothing counts as zeros."""

    def __post_init__(self) -> None:
        """Raises FIELD_INVALID when the numbers do not fit together."""
        if not self.updates:
            raise FallowError(Reason.FIELD_INVALID, "no client has sent an update", field="updates")
        if len(self.weights) != len(self.updates):
            raise FallowError(
                Reason.FIELD_INVALID, f"{len(self.weights)} weights for {len(self.updates)} updates", field="weights"
            )
        if min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
            raise FallowError(
                Reason.FIELD_INVALID, "weights must be finite, not negative, and not all zero", field="weights"
            )
        shape = self.updates[0].shape
        for vector in (*self.updates, *(() if self.root is None else (self.root,))):
            if vector.shape != shape or vector.dtype != np.float32:
                raise FallowError(
                    Reason.FIELD_INVALID,
                    f"an update is {vector.dtype}{list(vector.shape)}",
                    field="updates",
                    limit=f"float32{list(shape)}",
                )

    @property
    def clients(self) -> int:
        """How many updates there are."""
        return len(self.updates)


class Rule(Protocol):
    """Makes one update of a cohort's."""

    @property
    def name(self) -> str:
        """As users call it."""
        ...

    def aggregate(self, cohort: Cohort) -> Vector:
        """Float32 (parameters,). Raises FIELD_INVALID when the rule's conditions do not hold."""
        ...


# ------------------------------------------------------------------------------------------------- linear rules


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean (McMahan et al., 2017). Anybody can move it anywhere."""

    name: str = "fedavg"

    def aggregate(self, cohort: Cohort) -> Vector:
        """Σ wᵢΔᵢ / Σ wᵢ."""
        return combined(cohort.updates, _shares(cohort))


@dataclass(frozen=True, slots=True)
class ClippedMean:
    """The weighted mean of updates cut to a length (Sun et al., 2019)."""

    norm_max: float
    name: str = "norm-clip"

    def aggregate(self, cohort: Cohort) -> Vector:
        """Σ wᵢΔᵢ·min(1, C/‖Δᵢ‖) / Σ wᵢ."""
        _positive("norm_max", self.norm_max)
        norms = np.sqrt(_diagonal(products(cohort.updates)))
        return combined(cohort.updates, _shares(cohort) * _clipping(self.norm_max, norms))


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """The mean of the updates that lie closest to most others (Blanchard et al., 2017). Blind to weights."""

    byzantine: int
    keep: int | None = None
    """How many are averaged; 1 is Krum; nothing: all but `byzantine`."""
    name: str = "multi-krum"

    def aggregate(self, cohort: Cohort) -> Vector:
        """Scores are sums of squared distances to the n − f − 2 nearest; needs n ≥ 2f + 3."""
        clients = cohort.clients
        _needs(self.name, self.byzantine, clients, 2 * self.byzantine + 3)
        keep = clients - self.byzantine if self.keep is None else self.keep
        if not 1 <= keep <= clients - self.byzantine:
            raise FallowError(
                Reason.FIELD_INVALID, f"keep is {keep}", field="keep", limit=f"1 to {clients - self.byzantine}"
            )
        distances = squared_distances(products(cohort.updates))
        near = np.sort(distances, axis=1)[:, 1 : clients - self.byzantine - 1]
        # The farther of two equal scores is decided by place, so that the outcome is one.
        chosen = np.argsort(near.sum(axis=1), kind="stable")[:keep]
        coefficients = np.zeros(clients)
        coefficients[chosen] = 1.0 / keep
        return combined(cohort.updates, coefficients)


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """The point with the least sum of distances, by smoothed Weiszfeld steps (RFA; Pillutla et al., 2022)."""

    steps: int = 8
    smoothing: float = 1e-6
    name: str = "geometric-median"

    def aggregate(self, cohort: Cohort) -> Vector:
        """βᵢ = αᵢ / max(ν, ‖z − Δᵢ‖), z = Σ βᵢΔᵢ / Σ βᵢ, beginning at the weighted mean."""
        gram = products(cohort.updates)
        shares = _shares(cohort)
        coefficients = shares
        for _ in range(self.steps):
            distances = np.sqrt(_to_point(gram, coefficients))
            pulled = shares / np.maximum(self.smoothing, distances)
            coefficients = pulled / pulled.sum()
        return combined(cohort.updates, coefficients)


@dataclass(frozen=True, slots=True)
class CentredClipping:
    """Steps from a centre, each client's pull cut to a radius (Karimireddy et al., 2021)."""

    radius: float
    steps: int = 3
    name: str = "centred-clipping"

    def aggregate(self, cohort: Cohort) -> Vector:
        """v ← v + mean((Δᵢ − v)·min(1, τ/‖Δᵢ − v‖)), from the last round's result on."""
        _positive("radius", self.radius)
        centre = cohort.centre if cohort.centre is not None else np.zeros_like(cohort.updates[0])
        vectors = [*cohort.updates, centre]
        gram = products(vectors)
        clients = cohort.clients
        coefficients = np.zeros(clients + 1)
        coefficients[clients] = 1.0
        for _ in range(self.steps):
            pulls = _clipping(self.radius, np.sqrt(_to_point(gram, coefficients)[:clients])) / clients
            coefficients = coefficients * (1.0 - pulls.sum())
            coefficients[:clients] += pulls
        return combined(vectors, coefficients)


@dataclass(frozen=True, slots=True)
class FLTrust:
    """Updates count as far as they agree with the operator's own (Cao et al., 2021), however many lie."""

    name: str = "fltrust"

    def aggregate(self, cohort: Cohort) -> Vector:
        """tᵢ = max(0, cos(Δᵢ, g₀)); Σ tᵢ·Δᵢ·‖g₀‖/‖Δᵢ‖ / Σ tᵢ; zeros when nobody agrees."""
        if cohort.root is None:
            raise FallowError(
                Reason.FIELD_INVALID,
                "fltrust compares with an update from rows that you trust, and there are none",
                field="root",
                hint="give a root set of about a hundred clean rows, or choose another rule",
            )
        gram = products([*cohort.updates, cohort.root])
        clients = cohort.clients
        norms = np.sqrt(_diagonal(gram))
        own = norms[clients]
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines = np.where(norms[:clients] > 0, gram[:clients, clients] / (norms[:clients] * own), 0.0)
        trust = np.maximum(0.0, np.nan_to_num(cosines))
        if trust.sum() <= 0:
            return np.zeros_like(cohort.root)
        scale = np.divide(own, norms[:clients], out=np.zeros(clients), where=norms[:clients] > 0)
        return combined(cohort.updates, trust * scale / trust.sum())


# ------------------------------------------------------------------------------------------------- rules by coordinate


@dataclass(frozen=True, slots=True)
class Median:
    """The median of each coordinate (Yin et al., 2018). Blind to weights."""

    name: str = "median"

    def aggregate(self, cohort: Cohort) -> Vector:
        """The middle value, or the mean of the two middle ones."""
        result = np.empty_like(cohort.updates[0])
        for start, block in _blocks(cohort.updates):
            result[start : start + block.shape[1]] = np.median(block, axis=0)
        return result


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of each coordinate without its extremes (Yin et al., 2018). Blind to weights."""

    byzantine: int
    """How many values are left out at either side."""
    name: str = "trimmed-mean"

    def aggregate(self, cohort: Cohort) -> Vector:
        """Needs n > 2f."""
        _needs(self.name, self.byzantine, cohort.clients, 2 * self.byzantine + 1)
        result = np.empty_like(cohort.updates[0])
        kept = slice(self.byzantine, cohort.clients - self.byzantine)
        for start, block in _blocks(cohort.updates):
            block.sort(axis=0)
            result[start : start + block.shape[1]] = block[kept].mean(axis=0)
        return result


# ------------------------------------------------------------------------------------------------- arithmetic


def products(vectors: Sequence[Vector]) -> Reals:
    """The inner product of each two vectors, float64 (n, n)."""
    gram = np.zeros((len(vectors), len(vectors)))
    for _, block in _blocks(vectors):
        gram += block @ block.T
    return (gram + gram.T) / 2


def squared_distances(gram: Reals) -> Reals:
    """‖a − b‖² of each two vectors from their inner products; never negative, zero on the diagonal."""
    lengths = _diagonal(gram)
    found = np.maximum(0.0, lengths[:, None] + lengths[None, :] - 2 * gram)
    np.fill_diagonal(found, 0.0)
    return found


def combined(vectors: Sequence[Vector], coefficients: Reals) -> Vector:
    """Σ cᵢ·vᵢ, summed in float64 in the order of the vectors."""
    result = np.empty_like(vectors[0])
    used = [(vector, float(value)) for vector, value in zip(vectors, coefficients, strict=True) if value != 0.0]
    width = _block_columns(1)
    for start in range(0, result.shape[0], width):
        total = np.zeros(min(width, result.shape[0] - start))
        for vector, value in used:
            total += vector[start : start + width].astype(np.float64) * value
        result[start : start + width] = total
    return result


def _blocks(vectors: Sequence[Vector]) -> Iterator[tuple[int, Reals]]:
    width = _block_columns(len(vectors))
    for start in range(0, vectors[0].shape[0], width):
        yield start, np.stack([vector[start : start + width] for vector in vectors]).astype(np.float64)


def _block_columns(rows: int) -> int:
    return max(1, BLOCK_BYTES // (8 * rows))


def _shares(cohort: Cohort) -> Reals:
    weights: Reals = np.array(cohort.weights, np.float64)
    weights /= weights.sum()
    return weights


def _diagonal(gram: Reals) -> Reals:
    return np.maximum(0.0, np.diagonal(gram))


def _to_point(gram: Reals, coefficients: Reals) -> Reals:
    """‖vᵢ − Σ cⱼvⱼ‖² for each i."""
    reached = gram @ coefficients
    return np.maximum(0.0, _diagonal(gram) - 2 * reached + coefficients @ reached)


def _clipping(length_max: float, lengths: Reals) -> Reals:
    """min(1, C/‖·‖), and 1 for what has no length."""
    parts: Reals = np.divide(length_max, lengths, out=np.ones_like(lengths), where=lengths > 0)
    return np.minimum(1.0, parts)


def _needs(name: str, byzantine: int, clients: int, least: int) -> None:
    if byzantine < 0 or clients < least:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{name} against {byzantine} liars needs {least} clients; there are {clients}",
            field="byzantine",
            hint="expect fewer liars, wait for more clients, or use fltrust with a root set",
        )


def _positive(field: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise FallowError(Reason.FIELD_INVALID, f"{field} is {value}", field=field, limit="a number above 0")
