"""How much the blob service takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.limits import GIB, MIB


@dataclass(frozen=True, slots=True)
class BlobLimits:
    """Named limits of one blob service process."""

    uploads_max: int = 64
    """Uploads at once, of all peers; waiting ones count."""
    downloads_max: int = 256
    streams_per_peer_max: int = 16
    packs_max: int = 4
    """Packs worked on at once; further ones wait their turn."""
    packs_waiting_max: int = 1_024
    calls_max: int = 1_024
    """Calls of all kinds at once; the transport refuses more."""
    calls_per_peer_s: float = 2_000.0
    calls_per_peer_burst: int = 4_000
    free_bytes_floor: int = 1 * GIB
    """Storage that is never filled: uploads that would reach into it are refused."""
    chunk_patience_ms: int = 60_000
    """How long a stream may stand still before it is cut off; what came stays and can be resumed."""
    takeover_patience_ms: int = 5_000
    """How long an upload may stand still while a second stream of the same account wants to go on with it."""
    partial_age_ms_max: int = 24 * 3_600_000
    """Partial uploads that nobody touched for so long are removed."""
    sweep_interval_ms: int = 600_000
    source_cache_bytes: int = 128 * MIB
    """Blocks kept parsed because the next pack is likely to cut from them too."""
    grace_ms: int = 2 * 3_600_000
    """What was stored or receipted within this time before it was found superfluous is not deleted."""
    touches_remembered_max: int = 100_000
    """Blobs of which the service knows when it last gave a receipt; of others it assumes the latest it forgot."""
    listed_max: int = 5_000
    deleted_per_call_max: int = 5_000
    threads: int = 8
    """For disk and hashing."""
