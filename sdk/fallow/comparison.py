"""What a referee says of rows that others worked out: findings, and the profiles by which classes are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PROFILE_SAMPLES_MIN: Final = 200
"""A profile of fewer rows counts for nothing: a difference between classes is then nobody's guilt."""
PPM: Final = 1_000_000
CEILING_PPM: Final = 4 * PPM
"""What rounding explains at most, in spreads: sums in another order moved rows by 0.35 at most, weights rounded to fp16
by 10 at least (docs/decisions/0024)."""
PPM_MAX: Final = 1 << 40
"""What no number can tell: values that are not numbers, lengths that differ, integers and texts."""
UNMEASURED_FACTOR: Final = 32.0
"""A bundle whose spread could not be measured is taken to have so many floors."""


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


@dataclass(frozen=True, slots=True)
class ColumnSpread:
    """How far a floating column, or what a head scores, moves."""

    column: str
    relative: float
    """The largest move of an element, relative to its size; never below the floor."""
    scale: float
    """The median size of an element: what elements near zero are measured by."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How far one machine's outputs move between forms of the same arithmetic."""

    columns: tuple[ColumnSpread, ...]
    samples: int
    """Rows by which it was measured; 0: it was not."""
    floor: float

    def of(self, column: str) -> ColumnSpread:
        """The spread of a column."""
        known = (one for one in self.columns if one.column == column)
        return next(known, ColumnSpread(column, UNMEASURED_FACTOR * self.floor, 0.0))


def fault_of_findings(findings: Sequence[RowFinding], *, rows: int, candidates: int) -> str:
    """What is wrong with the form of findings that a child gave for so many rows and candidates, or nothing."""
    if [found.row for found in findings] != list(range(rows)):
        return f"findings of {len(findings)} rows for {rows}"
    for found in findings:
        if len(found.candidates) != candidates:
            return f"row {found.row} has {len(found.candidates)} findings for {candidates} candidates"
        if any(max(one.error_ppm_of_tolerance, one.deviation_ppm) > PPM_MAX for one in found.candidates):
            return f"row {found.row} is further away than can be said"
    return ""
