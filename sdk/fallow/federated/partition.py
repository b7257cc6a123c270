"""How rows are dealt to virtual clients. Equal arguments deal equally, on every machine and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason

Places = NDArray[np.int64]
"""Positions of rows."""
Columns = dict[str, NDArray[np.generic]]
"""A data set: arrays whose first axis is the rows."""
Dealing = Callable[[Columns, int, bytes], list[Places]]
"""Deals the rows of a data set to so many clients, by a seed."""


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Chance that is the same everywhere: raw numbers of Philox under a key from the seed and a purpose."""

    seed: bytes

    def numbers(self, purpose: str, count: int) -> NDArray[np.uint64]:
        """So many 64-bit numbers."""
        key = int.from_bytes(sha256(self.seed + b"\0" + purpose.encode()).digest()[:16], "little")
        raw = np.random.Philox(key=key).random_raw(count)
        return np.asarray(raw, np.uint64)

    def order(self, purpose: str, count: int) -> Places:
        """A permutation of `count` places."""
        return np.argsort(self.numbers(purpose, count), kind="stable").astype(np.int64)

    def fractions(self, purpose: str, count: int) -> NDArray[np.float64]:
        """So many numbers in (0, 1)."""
        return (self.numbers(purpose, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def rows_of(columns: Columns) -> int:
    """How many rows a data set has. Raises FIELD_INVALID when it has none, or its columns disagree."""
    counts = {name: int(array.shape[0]) if array.ndim else -1 for name, array in columns.items()}
    if not counts or set(counts.values()) & {0, -1}:
        raise FallowError(Reason.FIELD_INVALID, "the data set has no rows", field="data")
    if len(set(counts.values())) > 1:
        raise FallowError(
            Reason.FIELD_INVALID,
            "columns differ in rows: " + ", ".join(f"{name} has {count}" for name, count in counts.items()),
            field="data",
        )
    return next(iter(counts.values()))


def iid(columns: Columns, clients: int, seed: bytes) -> list[Places]:
    """Shuffled and dealt in parts as equal as can be. Raises FIELD_INVALID for more clients than rows."""
    rows = rows_of(columns)
    _enough(clients, rows)
    order = Shuffle(seed).order("iid", rows)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(alpha: float, label: str = "y") -> Dealing:
    """Each class is dealt by shares drawn from Dirichlet(α, …, α): the smaller α, the more skewed (Hsu et al., 2019).

    Clients that are left without a row take one from the largest.
    """
    if not 0 < alpha < float("inf"):
        raise FallowError(Reason.FIELD_INVALID, f"alpha is {alpha}", field="alpha", limit="a number above 0")

    def deal(columns: Columns, clients: int, seed: bytes) -> list[Places]:
        rows = rows_of(columns)
        _enough(clients, rows)
        labels = _column(columns, label)
        shuffle = Shuffle(seed)
        dealt: list[list[int]] = [[] for _ in range(clients)]
        for number, value in enumerate(np.unique(labels)):
            places = np.flatnonzero(labels == value)
            places = places[shuffle.order(f"rows of class {number}", len(places))]
            shares = _dirichlet(shuffle, f"shares of class {number}", alpha, clients)
            bounds = np.floor(np.cumsum(shares)[:-1] * len(places)).astype(np.int64)
            for client, part in enumerate(np.split(places, bounds)):
                dealt[client].extend(int(place) for place in part)
        for own in dealt:
            if not own:
                own.append(max(dealt, key=len).pop())
        return [np.sort(np.asarray(own, np.int64)) for own in dealt]

    return deal


def by(column: str) -> Dealing:
    """One client for each value of a column, in rising order: persons, sites, carriers."""

    def deal(columns: Columns, clients: int, seed: bytes) -> list[Places]:
        rows_of(columns)
        values = _column(columns, column)
        found = [np.flatnonzero(values == value) for value in np.unique(values)]
        if clients and clients != len(found):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"column {column!r} has {len(found)} values, and {clients} clients are asked for",
                field="clients",
                hint="leave `clients` out: there is one for each value",
            )
        return found

    return deal


def _dirichlet(shuffle: Shuffle, purpose: str, alpha: float, count: int) -> NDArray[np.float64]:
    """Shares that sum to 1: gamma variables by Marsaglia and Tsang (2000), divided by their sum.

    Logarithms keep tiny shares of small α from becoming zero together.
    """
    logs = np.array([_log_gamma(shuffle, f"{purpose} {number}", alpha) for number in range(count)])
    shares: NDArray[np.float64] = np.exp(logs - logs.max())
    shares /= shares.sum()
    return shares


def _log_gamma(shuffle: Shuffle, purpose: str, alpha: float) -> float:
    """The logarithm of one Gamma(α, 1) variable."""
    boost = 0.0
    if alpha < 1:
        boost = float(np.log(shuffle.fractions(f"{purpose} boost", 1)[0])) / alpha
        alpha += 1
    d = alpha - 1 / 3
    c = 1 / np.sqrt(9 * d)
    attempt = 0
    while True:
        first, second, third = shuffle.fractions(f"{purpose} {attempt}", 3)
        normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
        cubed = (1 + c * normal) ** 3
        if cubed > 0 and np.log(third) < normal**2 / 2 + d - d * cubed + d * np.log(cubed):
            return float(np.log(d * cubed)) + boost
        attempt += 1


def _column(columns: Columns, name: str) -> NDArray[np.generic]:
    array = columns.get(name)
    if array is None or array.ndim != 1:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the data set has no column {name!r} of one value a row; there is: {', '.join(columns)}",
            field="partition",
        )
    return array


def _enough(clients: int, rows: int) -> None:
    if not 1 <= clients <= rows:
        raise FallowError(
            Reason.FIELD_INVALID, f"clients is {clients}", field="clients", limit=f"1 to {rows} (the rows)"
        )
