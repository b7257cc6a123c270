"""A journal in memory, for tests and simulations: the same contract, and a disk that outlives its writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fallow.ids import Digest, digest_of
from fallow_coordinator.core.events import Event
from fallow_coordinator.ports import Record, StorageFailed, WriterFenced
from fallow_coordinator.store.encoding import SALT_BYTES, encode_event, leaf_of
from fallow_coordinator.store.journal_reader import decode_records
from fallow_coordinator.store.stored_record import StoredRecord

_NAME = Path("journal in memory")


@dataclass(slots=True)
class MemoryDisk:
    """What lies on disk: give it to the next `MemoryStore` to restart from it."""

    records: list[StoredRecord] = field(default_factory=list[StoredRecord])
    payloads: dict[Digest, bytes] = field(default_factory=dict[Digest, bytes])
    epoch: int = 0
    failure: str = ""
    """Words with which every append fails from now on; empty: none does."""


class MemoryStore:
    """A Store on a MemoryDisk. Salts are derived from the sequence, so a simulation repeats itself byte for byte."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        """Opens `disk` for writing, which takes the next epoch."""
        self._disk = MemoryDisk() if disk is None else disk
        self._disk.epoch += 1
        self._epoch = self._disk.epoch

    @property
    def disk(self) -> MemoryDisk:
        """What outlives this store."""
        return self._disk

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def last_sequence(self) -> int:
        return len(self._disk.records)

    @property
    def last_at_ms(self) -> int:
        return self._disk.records[-1].at_ms if self._disk.records else 0

    def append(
        self, *, expected_sequence: int, events: Sequence[tuple[int, Event]], payloads: Mapping[Digest, bytes]
    ) -> None:
        disk = self._disk
        if disk.failure:
            raise StorageFailed(f"{_NAME}: {disk.failure}")
        if disk.epoch != self._epoch:
            raise WriterFenced(f"{_NAME}: a coordinator with epoch {disk.epoch} has taken over from {self._epoch}")
        if len(disk.records) != expected_sequence:
            raise WriterFenced(
                f"{_NAME}: the journal ends at {len(disk.records)}, this writer expected {expected_sequence}"
            )
        clock = self.last_at_ms
        fresh: list[StoredRecord] = []
        for sequence, (at_ms, event) in enumerate(events, expected_sequence + 1):
            assert at_ms >= clock, "the journal's clock never goes back"
            clock = at_ms
            data, salt = encode_event(event), digest_of(sequence.to_bytes(8, "big"))[:SALT_BYTES]
            leaf = leaf_of(salt=salt, sequence=sequence, at_ms=at_ms, epoch=self._epoch, event=data)
            fresh.append(StoredRecord(sequence, at_ms, self._epoch, data, salt, leaf))
        disk.records.extend(fresh)
        for digest, data in payloads.items():
            disk.payloads.setdefault(digest, data)

    def read(self, *, after_sequence: int, limit: int) -> Sequence[Record]:
        return decode_records(self._disk.records[after_sequence : after_sequence + limit], after_sequence, _NAME)

    def payload(self, digest: Digest) -> bytes | None:
        return self._disk.payloads.get(digest)

    def payload_digests(self, *, after: Digest, limit: int) -> Sequence[Digest]:
        return sorted(digest for digest in self._disk.payloads if digest > after)[:limit]

    def drop_payloads(self, digests: Sequence[Digest]) -> int:
        return sum(self._disk.payloads.pop(digest, None) is not None for digest in digests)

    def let_go_of_sealed(self, limit: int) -> int:
        return 0

    def close(self) -> None:
        """Nothing to give back."""
