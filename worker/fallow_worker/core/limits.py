"""Named limits of a worker's plan: times in milliseconds, counts of tries."""

from __future__ import annotations

from typing import Final

from fallow.limits import GIB, LEASES_PER_WORKER_MAX, MIB

FETCHES_AT_ONCE_MAX: Final = 4
UPLOADS_AT_ONCE_MAX: Final = 4
FETCH_ATTEMPTS_MAX: Final = 4
UPLOAD_ATTEMPTS_MAX: Final = 6
"""On top of what the blob client tries by itself."""
TRANSFER_RETRY_BASE_MS: Final = 500
TRANSFER_RETRY_CAP_MS: Final = 30_000
INPUT_BYTES_AHEAD_MAX: Final = 256 * MIB
"""Input blocks held or being fetched, unless there would be none at all."""
RUNS_QUEUED: Final = 1
"""Leases given to the executor beyond its slots; a lease's clock starts when it begins."""

RECONNECT_BASE_MS: Final = 1_000
RECONNECT_CAP_MS: Final = 20_000
"""Less than the grace that a restarted coordinator gives (30 s), so that what is held is kept after any down time."""
RECONNECT_LEAST_MS: Final = 50
SESSION_HOLDS_MS: Final = 30_000
"""A session that lasted so long was a good one: the next back-off starts small again."""

ANSWER_WAIT_MS: Final = 30_000
"""A commitment, delivery or inspection without an answer is said again after this."""
ANSWERS_ASKED_MAX: Final = 5
"""After so many times in one session, the lease is dropped: it will expire over there."""

TROUBLE_BASE_MS: Final = 1_000
TROUBLE_CAP_MS: Final = 300_000
TROUBLE_RETURN_MS: Final = 5_000
"""When nothing can begin for longer than this, leases go back rather than wait."""

AHEAD_MS: Final = 500
"""So much work lies ready beside what runs, so that a fast worker never waits for its next lease."""
AHEAD_PER_SLOT_MAX: Final = 16
WINDOW_SAID_EVERY_MS: Final = 1_000
"""A larger window is said at most so often; a smaller one at once."""
WINDOW_MAX: Final = LEASES_PER_WORKER_MAX

CAPABILITY_SAID_EVERY_MS: Final = 10_000
"""A change of what the worker can do (a device, the battery) is told at most so often, however often it flips."""
MEMORY_SAID_EVERY_MS: Final = 60_000
"""The same when free memory alone has changed."""
NETWORK_STEP_PERCENT: Final = 150
"""A rate or round trip of the network is told anew when it is so much of what was told, or was told so much of it."""
MEMORY_STEP_BYTES: Final = GIB
MEMORY_STEP_PART: Final = 8
"""Free memory is told anew when it has moved by a step of this size, or by this part of what was told."""

OFFERS_KEPT_MAX: Final = 64
DRAIN_RUN_GRACE_MS: Final = 30_000
"""What runs when the owner asks for the machine may go on for so long, unless told otherwise."""
DRAIN_OPERATOR_RUN_GRACE_MS: Final = 3_000
"""The same for an operator's worker, which stops with its coordinator."""
DRAIN_WORDS_GRACE_MIN_MS: Final = 2_000
DRAIN_WORDS_GRACE_MAX_MS: Final = 20_000
"""Beyond the grace of runs, committing, delivering and giving back may take as long again, between these."""


def backoff_ms(attempts: int, jitter: float, *, base_ms: int, cap_ms: int, least_ms: int = 0) -> int:
    """How long to wait after `attempts` failures: full jitter under a doubling, capped ceiling.

    `jitter` is in [0, 1). Full jitter spreads a crowd that was cut off at one moment over the whole ceiling.
    """
    ceiling = min(cap_ms, base_ms << min(max(attempts, 0), 30))
    return max(least_ms, int(jitter * ceiling))
