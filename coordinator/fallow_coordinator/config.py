"""Named settings and limits of the coordinator's processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fallow_coordinator.core.commands import MeasuringRules

MIB = 1024 * 1024

COLLECTOR_THRESHOLDS: Final = (10_000, 20, 100)
"""Python's garbage collector looks for cycles this rarely: a busy writer or follower makes much that is free at once
and little that is not, and with the usual thresholds the search took a seventh of its time."""

EXIT_FAILED = 1
"""Something a person can act on: the line on standard error says what."""
EXIT_STORAGE_FAILED = 74
"""The journal could not be written (EX_IOERR): look at the last line of the log."""
EXIT_WRITER_FENCED = 75
"""Another coordinator has taken over the journal (EX_TEMPFAIL)."""
EXIT_LEDGER_UNSOUND = 76
"""The journal's books do not add up (EX_PROTOCOL): `fallow-coordinator check` tells where; restore a backup."""
EXIT_BROKEN = 70
"""A mistake of ours left the state in doubt (EX_SOFTWARE): what is on disk is whole, start again."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the single writer works."""

    queue_max: int = 10_000
    """Commands that may wait; one more is refused as OVERLOADED."""
    batch_max: int = 512
    """Commands decided in one transaction."""
    batch_ms_max: float = 16.0
    """After so long a batch takes no further command: the first of it waits for the last, and for the disk."""
    collect_ms_max: float = 5.0
    """Longest time for which a busy writer lets commands gather into a batch."""
    tick_ms: int = 250
    measure_ms: int = 1_000
    """How often devices are looked at: who is to be challenged, whose answer is to be checked."""
    measuring: MeasuringRules | None = field(default_factory=MeasuringRules)
    """None: devices are never challenged."""
    archive_ms: int = 10_000
    """How often finished jobs that are in the views leave the memory."""
    collect_ms: int = 3_600_000
    """How often inline payloads that nothing refers to any more are dropped."""
    collect_page: int = 1_000
    """Payloads looked at together: what the writer holds of them at a time, and drops in one transaction."""
    packs_at_once: int = 8
    """Pack calls to the blob service under way at a time."""
    payload_cache_bytes_max: int = 16 * MIB
    """Inline payloads kept in memory after they were written."""
    replay_chunk_records: int = 2_000
    """Records read at a time when the writer starts."""
    let_go_idle_ms: int = 2_000
    """How often sealed records are looked for, which may leave the database."""
    let_go_ms: int = 100
    """Wait between two departures while there are some: with the next, room for 10,000 events a second."""
    let_go_records: int = 1_000
    """How many leave at a time, in a transaction of a few milliseconds."""


@dataclass(frozen=True, slots=True)
class CollectionSettings:
    """How blobs that nobody needs any more are let go."""

    interval_ms: int = 600_000
    """How often retention is looked at and the blob service is swept."""
    blob_grace_ms: int = 2 * 3_600_000
    """A blob that was stored or receipted within this time before it was found superfluous stays."""
    upload_grace_ms: int = 24 * 3_600_000
    """How long an upload stays that no job or bundle uses."""

    @property
    def receipt_valid_ms(self) -> int:
        """How old a receipt may be when it is recorded. The other half of the grace is for clocks that disagree."""
        return self.blob_grace_ms // 2


@dataclass(frozen=True, slots=True)
class FollowerSettings:
    """How the follower tails the journal."""

    niceness: int = 5
    """Its priority on a busy machine: about a third of the writer's share of a core, so that it keeps up."""
    chunk_records: int = 2_000
    """Records put into the views in one transaction."""
    idle_poll_ms: int = 100
    """Longest wait between two looks at an idle journal: the lag of the views stays below 200 ms."""
    busy_poll_ms: int = 10
    """Wait after a look that found something."""
    load_poll_ms: int = 50
    """Wait after a look that found much: larger transactions write less."""
    load_records: int = 100
    """So many records are much."""
    snapshot_records: int = 20_000
    """A snapshot is due when the newest is so many records old, unless snapshots took too much time lately."""
    snapshot_records_late: int = 100_000
    """When it is so old, they may take more: about what a start has to fold at most, some two seconds."""
    snapshot_ms: int = 300_000
    """Or when it is so old and anything happened since."""
    snapshot_rest_ms: int = 10_000
    """Shortest time between two tries."""
    segment_records: int = 1 << 16
    """Records of a sealed segment: a power of two."""

    def poll_ms(self, found: int) -> int:
        """How long to wait after a look that found so many records, fewer than a chunk."""
        if not found:
            return self.idle_poll_ms
        return self.load_poll_ms if found >= self.load_records else self.busy_poll_ms
