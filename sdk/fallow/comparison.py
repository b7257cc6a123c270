"""What a referee says of rows that others worked out: findings, and the profiles by which classes are compared."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PROFILE_SAMPLES_MIN: Final = 200
"""A profile of fewer rows counts for nothing: a difference between classes is then nobody's guilt."""
PPM: Final = 1_000_000
PPM_MAX: Final = 1 << 40
"""What no number can tell: values that are not numbers, lengths that differ, integers and texts."""


class Finding(StrEnum):
    """How a candidate's row stands beside the referee's own row."""

    EQUAL = "equal"
    """The same bytes; or both have no value."""
    WITHIN_TOLERANCE = "within-tolerance"
    """Of another execution class, and no further away than honest workers of that class are."""
    WRONG = "wrong"
    """Proven: other bytes in the same execution class, or beyond what the profile of the two classes allows."""
    TIE = "tie"
    """Of another class without a profile and no further away than rounding explains; or the referee has no value."""
    UNEXPLAINED = "unexplained"
    """Of another class without a profile and further away than rounding explains: no guilt, and not to be upheld."""
    WITHHELD = "withheld"
    """The candidate has no value where the referee has one: to be done again, and nobody's lie."""


@dataclass(frozen=True, slots=True)
class CandidateFinding:
    """What became of one row of one candidate."""

    finding: Finding | None
    """None: the candidate has no such row."""
    error_ppm_of_tolerance: int = 0
    """How far it is from the referee's row, in millionths of what is allowed; PPM_MAX when it cannot be said."""
    deviation_ppm: int = 0
    """The same in millionths of the bundle's spread, for rows of another class: what profiles are learned from."""


@dataclass(frozen=True, slots=True)
class RowFinding:
    """What became of one row of a referee's lease."""

    row: int
    """Position in the lease's block."""
    candidates: tuple[CandidateFinding, ...]
    """One for each candidate of the lease, in its order."""


@dataclass(frozen=True, slots=True)
class ToleranceProfile:
    """How far honest rows of one class lie from a referee's of another, for one bundle; quantiles of the deviation."""

    referee_class: str
    candidate_class: str
    samples: int
    median_ppm: int
    p95_ppm: int
    max_ppm: int

    @property
    def counts(self) -> bool:
        """Whether enough rows taught it."""
        return self.samples >= PROFILE_SAMPLES_MIN
