"""One round as functions of what is known: who takes part, and what follows from their updates. No clock, no network.

A simulation and a deployment run the same functions, so that equal updates give equal weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fallow.errors import FallowError, Reason
from fallow.federated.aggregation import Cohort, Mean, Rule
from fallow.federated.outer import Moments, OuterOptimizer, Plain
from fallow.federated.partition import Shuffle
from fallow.federated.updates import Vector, update_fault, zeros

ROWS_WEIGHT_MAX_DEFAULT = 10_000
"""Rows of one client that count at most: what a client says of itself is no reason to trust it more."""


@dataclass(frozen=True, slots=True)
class Study:
    """What stays the same from round to round."""

    seed: bytes
    rule: Rule = field(default_factory=Mean)
    outer: OuterOptimizer = field(default_factory=Plain)
    clients_per_round: int = 0
    """0: all that are there."""
    clients_min: int = 1
    """With fewer sound updates the weights stay as they are."""
    rows_weight_max: int = ROWS_WEIGHT_MAX_DEFAULT
    norm_max: float | None = None
    """Longer updates are refused."""

    def __post_init__(self) -> None:
        """Raises FIELD_INVALID naming what cannot be."""
        for name in ("clients_min", "rows_weight_max"):
            if getattr(self, name) < 1:
                raise FallowError(
                    Reason.FIELD_INVALID, f"{name} is {getattr(self, name)}", field=name, limit="at least 1"
                )
        if self.clients_per_round < 0 or 0 < self.clients_per_round < self.clients_min:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"clients_per_round is {self.clients_per_round}",
                field="clients_per_round",
                limit=f"0 (all), or at least clients_min ({self.clients_min})",
            )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a study is."""

    number: int
    """Rounds done."""
    weights: Vector
    moments: Moments
    centre: Vector
    """The last round's aggregate."""


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """What a client proposes: a change of the weights, and what it says of its rows."""

    client: int
    change: Vector
    rows: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to."""

    progress: Progress
    accepted: tuple[int, ...]
    """Clients whose updates counted, rising."""
    refused: Mapping[int, str]
    """Clients whose updates did not, and why."""
    aggregate: Vector
    stalled: str = ""
    """Why the weights stayed as they were; empty when they moved."""


def beginning(weights: Vector, study: Study) -> Progress:
    """Before the first round."""
    parameters = weights.shape[0]
    return Progress(0, weights, study.outer.start(parameters), zeros(parameters))


def participants(study: Study, clients: int, number: int) -> tuple[int, ...]:
    """Clients of a round, rising: all, or so many drawn without favour."""
    wanted = min(study.clients_per_round or clients, clients)
    return tuple(
        sorted(int(client) for client in Shuffle(study.seed).order(f"clients of round {number}", clients)[:wanted])
    )


def client_seed(study: Study, *, number: int, client: int) -> bytes:
    """What a client's chance follows from in a round."""
    return study.seed + f"/round {number}/client {client}".encode()


def finished(
    study: Study, progress: Progress, updates: Sequence[ClientUpdate], *, root: Vector | None = None
) -> Outcome:
    """Aggregates sound updates in the order of their clients and steps; the order of arrival does not matter.

    Raises FIELD_INVALID when two updates are of one client, or the rule's conditions do not hold.
    """
    if len({update.client for update in updates}) != len(updates):
        raise FallowError(Reason.FIELD_INVALID, "a client has sent two updates", field="updates")
    parameters = progress.weights.shape[0]
    sound: list[ClientUpdate] = []
    refused: dict[int, str] = {}
    for update in sorted(updates, key=lambda each: each.client):
        fault = update_fault(update.change, parameters=parameters, norm_max=study.norm_max)
        if not fault and update.rows < 1:
            fault = f"it says that it has {update.rows} rows"
        if fault:
            refused[update.client] = fault
        else:
            sound.append(update)
    accepted = tuple(update.client for update in sound)
    if len(sound) < study.clients_min:
        kept = Progress(progress.number + 1, progress.weights, progress.moments, progress.centre)
        why = f"{len(sound)} sound updates, wanted are {study.clients_min}"
        return Outcome(kept, accepted, refused, zeros(parameters), why)
    weights = [float(min(update.rows, study.rows_weight_max)) for update in sound]
    cohort = Cohort([update.change for update in sound], weights, root=root, centre=progress.centre)
    change = study.rule.aggregate(cohort)
    moved, moments = study.outer.step(progress.weights, change, progress.moments)
    return Outcome(Progress(progress.number + 1, moved, moments, change), accepted, refused, change)
