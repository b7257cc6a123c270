"""Why work waits, or why a worker has none: counts and reasons, each with what a person can do."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import JobId, PartyId
from fallow.job import JobState


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason with how many it concerns."""

    code: str
    """For programs."""
    count: int
    """Workers, or jobs, or 0 when it is about one thing alone."""
    words: str
    """What is so."""
    advice: str = ""
    """What a person can do; empty: nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class JobExplanation:
    """A job as the matching sees it: who could do its work, who cannot and why, and what it waits for now."""

    job_id: JobId
    state: JobState
    workers_considered: int
    workers_fitting: int
    """Those that could take its tasks, busy or not."""
    workers_free: int
    """Those of them that have room now."""
    fallen_out: tuple[Obstacle, ...]
    """Why the others cannot, the most frequent first; each worker counts once."""
    waits_for: tuple[Obstacle, ...]
    """What binds now, the strongest first; empty when nothing does."""
    accounts_before: int
    """Accounts with rows to cut in the same lane that were served less lately."""
    jobs_before: int
    """Jobs of the same account in the same lane that are due earlier."""
    usage_units: int
    """Units done for the account lately, halved each day."""


@dataclass(frozen=True, slots=True)
class WorkerExplanation:
    """A worker as the matching sees it: what it holds, and why it has no more."""

    worker_id: PartyId
    connected: bool
    leases: int
    window: int
    """Leases that it offered to hold."""
    room: int
    """Leases that it may hold now."""
    strikes: int
    """Failures of its own that no success has made good."""
    jobs_considered: int
    """Unfinished jobs."""
    jobs_fitting: int
    """Those whose tasks it could take."""
    fallen_out: tuple[Obstacle, ...]
    """Why it cannot take the others', the most frequent first."""
    reasons: tuple[Obstacle, ...]
    """Why it has no more work now, the strongest first; empty when it has as much as it takes."""
