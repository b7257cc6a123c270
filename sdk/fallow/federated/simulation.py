"""Federated rounds over virtual clients in this process: the same rounds, programs and chance as on real machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated.partition import Columns, Dealing, Places, iid, rows_of
from fallow.federated.program import TrainingProgram
from fallow.federated.rounds import ClientUpdate, Progress, Study, beginning, client_seed, finished, participants
from fallow.federated.runner import Runner
from fallow.federated.updates import Arrays, Vector

Tampering = Callable[[Mapping[int, Vector], int], Mapping[int, Vector]]
"""(honest changes by client, round) → what clients send: how attacks are tried."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round that is over."""

    number: int
    """From 1."""
    weights: Mapping[str, NDArray[np.float32]]
    """After the round."""
    metrics: Mapping[str, float]
    """On the test rows with the weights after the round; empty without test rows."""
    training: Mapping[str, float]
    """Means over the rows that clients stepped over."""
    clients: tuple[int, ...]
    """Whose updates counted."""
    refused: Mapping[int, str]
    """Whose did not, and why."""
    stalled: str
    """Why the weights stayed as they were; empty when they moved."""


class Simulation:
    """A study over virtual clients; iterate over it, or call `run`."""

    def __init__(
        self,
        program: TrainingProgram | Runner,
        weights: Arrays,
        data: Columns,
        *,
        clients: int,
        partition: Dealing = iid,
        study: Study,
        epochs: int = 1,
        test: Columns | None = None,
        root: Columns | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        tampering: Tampering | None = None,
    ) -> None:
        """Deals the rows and compiles nothing yet. A runner of earlier simulations brings what it has compiled.

        Raises FIELD_INVALID, PROGRAM_REFUSED.
        """
        if epochs < 1:
            raise FallowError(Reason.FIELD_INVALID, f"epochs is {epochs}", field="epochs", limit="at least 1")
        rows_of(data)
        self._runner = program if isinstance(program, Runner) else Runner(program)
        self._program = self._runner.program
        self._study = study
        self._data = data
        self._test = test
        self._root = root
        self._epochs = epochs
        self._hyperparameters = hyperparameters
        self._tampering = tampering
        self.shards: list[Places] = partition(data, clients, study.seed)
        """Places of each client's rows."""
        self.progress: Progress = beginning(self._program.layout.flat(weights), study)

    def rounds(self, count: int) -> Iterator[Round]:
        """So many more rounds, one after the other."""
        for _ in range(count):
            yield self._round()

    def evaluate(self, rows: Columns) -> dict[str, float]:
        """Means of the metrics over these rows with the weights as they are."""
        return self._runner.evaluate(self.progress.weights, rows)

    def _round(self) -> Round:
        number = self.progress.number + 1
        chosen = participants(self._study, len(self.shards), number)
        changes: dict[int, Vector] = {}
        sums: dict[str, float] = dict.fromkeys(self._program.metrics, 0.0)
        stepped = 0
        for client in chosen:
            rows = {name: array[self.shards[client]] for name, array in self._data.items()}
            result = self._runner.train(
                self.progress.weights,
                rows,
                epochs=self._epochs,
                seed=client_seed(self._study, number=number, client=client),
                hyperparameters=self._hyperparameters,
            )
            changes[client] = result.weights - self.progress.weights
            stepped += result.rows
            for name, mean in result.metrics.items():
                sums[name] += mean * result.rows
        sent = self._tampering(changes, number) if self._tampering is not None else changes
        updates = [ClientUpdate(client, change, len(self.shards[client])) for client, change in sent.items()]
        outcome = finished(self._study, self.progress, updates, root=self._root_change(number))
        self.progress = outcome.progress
        return Round(
            number,
            self._program.layout.arrays(self.progress.weights),
            self._runner.evaluate(self.progress.weights, self._test) if self._test is not None else {},
            {name: total / stepped for name, total in sums.items()},
            outcome.accepted,
            outcome.refused,
            outcome.stalled,
        )

    def _root_change(self, number: int) -> Vector | None:
        """What the operator's own rows propose."""
        if self._root is None:
            return None
        seed = client_seed(self._study, number=number, client=-1)
        result = self._runner.train(
            self.progress.weights, self._root, epochs=self._epochs, seed=seed, hyperparameters=self._hyperparameters
        )
        return result.weights - self.progress.weights
