"""A record of the journal as it lies on disk, in the database or in a segment."""

from __future__ import annotations

from typing import NamedTuple

from fallow_coordinator.store.encoding import leaf_of


class StoredRecord(NamedTuple):
    """A record as it lies on disk; a tuple, because there are so many that making one must cost nothing."""

    sequence: int
    at_ms: int
    epoch: int
    event: bytes
    salt: bytes
    leaf: bytes

    def leaf_holds(self) -> bool:
        """Whether the leaf is the hash of the rest."""
        return self.leaf == leaf_of(
            salt=self.salt, sequence=self.sequence, at_ms=self.at_ms, epoch=self.epoch, event=self.event
        )
