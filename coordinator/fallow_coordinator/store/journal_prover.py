"""Proves what the journal holds, whichever records have left the database, without hashing all of it for a question.

What is asked for is put together from runs of 256 records: their roots are kept in the views, and only the runs that
hold a wanted record, or the journal's end, are read. The nodes above them are remembered, a handful for a million
records.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fallow.ids import Digest, JobId
from fallow.job import JOB_STATES_FINAL
from fallow.journal_proof import consistency_of, inclusion_of
from fallow.merkle import EMPTY_ROOT, node_digest
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.journal_nodes import RUN_HEIGHT, RUN_RECORDS
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.stored_record import StoredRecord
from fallow_coordinator.store.views import SqliteViews

RUNS_REMEMBERED_MAX: Final = 16
"""Runs whose leaves are held: 8 KiB each."""
NODES_REMEMBERED_MAX: Final = 65_536
"""Nodes over 65,536 records each: those of four thousand million."""
TALL: Final = 2 * RUN_HEIGHT
"""Height of the nodes that are remembered; those between them and the runs are put together each time."""


class JournalProver:
    """One reader's proofs. Synchronous, one thread at a time; raises StorageFailed where the journal is damaged."""

    def __init__(self, folder: Path, views: SqliteViews) -> None:
        """Of the journal in `folder`, which is opened when it is first asked about."""
        self._folder = folder
        self._views = views
        self._reader: JournalReader | None = None
        self._runs: OrderedDict[int, list[bytes]] = OrderedDict()
        self._tall: OrderedDict[int, bytes] = OrderedDict()

    def size(self) -> int:
        """How many records the journal has now."""
        return self._journal.last_sequence()

    def job_records(self, job_id: JobId) -> tuple[int, Sequence[tuple[int, str]]]:
        """As `SqliteViews.job_records`."""
        return self._views.job_records(job_id)

    def has_ended(self, job_id: JobId) -> bool:
        """Whether the views, and with them `job_records`, know of the job's end."""
        status = self._views.job_status(job_id)
        return status is not None and status.state in JOB_STATES_FINAL

    def root(self, size: int) -> Digest:
        """The root over the first `size` records."""
        return Digest(self._subtree(0, size)) if size else EMPTY_ROOT

    def inclusion(self, sequences: Sequence[int], size: int) -> list[bytes]:
        """The proof that these records (rising) are among the first `size`."""
        return inclusion_of([sequence - 1 for sequence in sequences], size, self._subtree)

    def consistency(self, old_size: int, size: int) -> list[bytes]:
        """The proof that the first `old_size` records begin the first `size`."""
        return consistency_of(old_size, size, self._subtree)

    def records(self, sequences: Sequence[int]) -> Iterator[list[StoredRecord]]:
        """These records (rising), a run of the journal at a time."""
        wanted: list[int] = []
        for sequence in sequences:
            if wanted and (sequence - 1) // RUN_RECORDS != (wanted[0] - 1) // RUN_RECORDS:
                yield self._records(wanted)
                wanted = []
            wanted.append(sequence)
        if wanted:
            yield self._records(wanted)

    def close(self) -> None:
        """Gives the file back."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # --------------------------------------------------------------------------------------------- nodes

    def _subtree(self, low: int, high: int) -> bytes:
        """The root over leaves `low` up to `high`, from 0: a perfect subtree, or the right edge of the tree."""
        count = high - low
        if count & (count - 1) == 0 and low % count == 0:
            height = count.bit_length() - 1
            return self._node(height, low >> height)
        left = 1 << ((count - 1).bit_length() - 1)
        return node_digest(self._subtree(low, low + left), self._subtree(low + left, high))

    def _node(self, height: int, index: int) -> bytes:
        """The root of a perfect subtree of 2^height leaves, the `index`-th of its height."""
        if height < RUN_HEIGHT:
            first = index << height
            run = self._leaves(first // RUN_RECORDS)
            low = first % RUN_RECORDS
            return _root(run[low : low + (1 << height)])
        if height <= TALL:
            first, count = index << (height - RUN_HEIGHT), 1 << (height - RUN_HEIGHT)
            if height < TALL:
                return _root(self._run_roots(first, count))
            node = self._tall.get(index)
            if node is None:
                node = self._tall[index] = _root(self._run_roots(first, count))
                if len(self._tall) > NODES_REMEMBERED_MAX:
                    self._tall.popitem(last=False)
            return node
        return node_digest(self._node(height - 1, 2 * index), self._node(height - 1, 2 * index + 1))

    def _run_roots(self, first: int, count: int) -> list[bytes]:
        """Roots of full runs; of those that the views do not have yet, from their leaves."""
        known = dict(self._views.run_roots(first, count))
        return [known.get(number) or _root(self._leaves(number)) for number in range(first, first + count)]

    def _leaves(self, run: int) -> list[bytes]:
        """The leaves of a run, as far as it goes."""
        leaves = self._runs.get(run)
        if leaves is None or len(leaves) < RUN_RECORDS:
            stored = self._journal.stretch(after_sequence=run * RUN_RECORDS, limit=RUN_RECORDS)
            leaves = self._runs[run] = [record.leaf for record in stored]
            if len(self._runs) > RUNS_REMEMBERED_MAX:
                self._runs.popitem(last=False)
        return leaves

    def _records(self, sequences: Sequence[int]) -> list[StoredRecord]:
        start = (sequences[0] - 1) // RUN_RECORDS * RUN_RECORDS
        stored = self._journal.stretch(after_sequence=start, limit=sequences[-1] - start)
        found = {record.sequence: record for record in stored}
        missing = [sequence for sequence in sequences if sequence not in found]
        if missing:
            raise StorageFailed(f"{self._journal.path}: record {missing[0]} is missing; restore it from a backup")
        return [found[sequence] for sequence in sequences]

    @property
    def _journal(self) -> JournalReader:
        if self._reader is None:
            self._reader = JournalReader(self._folder / JOURNAL_FILE)
        return self._reader


def _root(level: Sequence[bytes]) -> bytes:
    """The root over as many nodes as a power of two."""
    while len(level) > 1:
        level = [node_digest(level[at], level[at + 1]) for at in range(0, len(level), 2)]
    return level[0]
