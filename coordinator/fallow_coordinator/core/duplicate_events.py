"""Events of duplicates: second leases of a task whose first one is late."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fallow.ids import LeaseId, TaskId
from fallow.job import Footprint


class Agreement(StrEnum):
    """What a late commitment says of the one that delivered the same rows."""

    SAME = "same"
    """Equal roots of equal execution classes."""
    DIFFERENT = "different"
    """Other roots of equal execution classes: one of the two is wrong."""
    INCOMPARABLE = "incomparable"
    """Of different execution classes, whose bits may differ: it says nothing by its digest alone."""


@dataclass(frozen=True, slots=True)
class LateLeaseSettled:
    """Another lease has delivered the task's rows: this one's commitment is compared and paid, and delivers nothing.

    Evidence for whoever verifies: the two commitments stand in the journal as `CommitmentRecorded`.
    """

    task_id: TaskId
    lease_id: LeaseId
    delivered_lease_id: LeaseId
    """The lease whose commitment became the task's result."""
    agreement: Agreement
    rows: int
    rows_failed: int
    microcredits: int
    """What the job pays for the rows done."""
    released: bool = False
    """True: the worker's account may spend it at once; false: it is pending."""
    contribution_microcredits: int = 0
    """Recorded for the worker's account where nobody pays."""
    speed_milliunits_per_s: int = 0
    """The worker's speed with the bundle from here on (`speeds`); 0: unchanged."""
    footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
