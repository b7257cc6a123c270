"""Roots over runs of 256 records, kept in the views: proofs follow from them and a run or two, not from all records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fallow_coordinator.store.journal_tree import JournalTree

RUN_HEIGHT: Final = 8
RUN_RECORDS: Final = 1 << RUN_HEIGHT


def run_start(sequence: int) -> int:
    """The last record before the unfinished run that a journal of `sequence` records ends with."""
    return sequence - sequence % RUN_RECORDS


class JournalNodes:
    """The run that is being filled. Holds its peaks alone."""

    def __init__(self, sequence: int, leaves: Sequence[bytes] = ()) -> None:
        """Goes on after `sequence`; `leaves` are those since `run_start(sequence)`."""
        assert len(leaves) == sequence % RUN_RECORDS, "a run is known from its start"
        self._finished = sequence // RUN_RECORDS
        self._run = JournalTree()
        for leaf in leaves:
            self._run.add(leaf)

    def add(self, leaf: bytes) -> list[tuple[object, ...]]:
        """The next leaf; gives (number of the run from 0, root) once it fills one."""
        self._run.add(leaf)
        if self._run.size < RUN_RECORDS:
            return []
        row = (self._finished, self._run.root())
        self._finished, self._run = self._finished + 1, JournalTree()
        return [row]
