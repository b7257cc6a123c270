"""Named settings and limits of the coordinator's processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fallow_coordinator.core.commands import MeasuringRules

MIB = 1024 * 1024

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

    chunk_records: int = 2_000
    """Records put into the views in one transaction."""
    idle_poll_ms: int = 100
    """Longest wait between two looks at an idle journal: the lag of the views stays below 200 ms."""
    busy_poll_ms: int = 10
    """Wait after a look that found something."""
    snapshot_records: int = 20_000
    """A snapshot is written when the newest is so many records old: about what a start has to fold at most."""
    snapshot_ms: int = 300_000
    """Or when it is so old and anything happened since."""
    snapshot_rest_ms: int = 10_000
    """Shortest time between two tries; four times what the last one took, when that is longer."""
    segment_records: int = 1 << 16
    """Records of a sealed segment: a power of two."""
