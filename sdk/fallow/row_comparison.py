"""Comparing output rows of different machines: a ladder, the cheapest step first. Pure; docs/decisions/0024 has why.

Rows of one execution class are the same bytes or somebody lies. Between classes every element may differ by rounding,
and how much that is, is measured in units of the bundle's *spread*: how far its own outputs move when one machine runs
the same rows in other forms of the same arithmetic (another batch, no graph optimisation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import Precision
from fallow.comparison import (
    CEILING_PPM,
    PPM,
    PPM_MAX,
    PROFILE_SAMPLES_MIN,
    CandidateFinding,
    ColumnSpread,
    Finding,
    Spread,
    ToleranceProfile,
)
from fallow.ids import Digest
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.rows import DecodedRows, RowCodec
from fallow.schema import RaggedColumn, Schema, TensorColumn

SPREAD_FLOORS: Final[Mapping[Precision, float]] = {
    Precision.FP32: 2.0**-22,
    Precision.TF32: 2.0**-11,
    Precision.FP16: 2.0**-11,
    Precision.INT8: 2.0**-8,
}
"""The least spread of a column by declared precision: the round-off of its products, four of them in float32."""
PROFILE_FLOOR_PPM: Final = PPM // 2
"""No profile is narrower than this, however close the rows were that taught it."""
ALLOWED_FACTOR: Final = 1.5
"""Honest rows lie within this of the largest deviation of their profile (TAO, arXiv 2510.16028, and facts §2.2)."""
GUILT_FACTOR: Final = 2.5
"""A lie is proven from here on. Between the two nothing is proven: the largest of a million light-tailed samples is
about 1.6 times the largest of 200."""

Float64s = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What a head chose labels from, so that a label may be told from its near ties."""

    columns: tuple[str, ...]
    """Label columns of the output, best first."""
    labels: tuple[str, ...]
    value: str
    """Name of the scored value: its spread stands in `Spread.columns`."""
    scores: Mapping[int, Float64s]
    """The referee's own scores of a row, one for each label, by row of its block."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The referee's own outputs."""

    block: RowBlock
    execution_class: str
    spread: Spread
    forms: tuple[RowBlock, ...] = ()
    """The same rows in other forms: a row that moves there by more than the spread has a wider one of its own."""
    labels: tuple[LabelScores, ...] = ()
    steady: frozenset[int] = frozenset()
    """Rows that gave these very bytes again in other places and among other rows: of these alone a difference in the
    same class is proof."""


def unmeasured(precision: Precision) -> Spread:
    """The spread of a bundle that nobody could run in another form: from its precision alone."""
    return Spread((), 0, SPREAD_FLOORS[precision])


def measured_spread(
    own: Mapping[str, ColumnValues], forms: Sequence[Mapping[str, ColumnValues]], precision: Precision
) -> Spread:
    """The spread from `own` rows and the same rows in other forms, column by column; floating tensors alone count."""
    floor = SPREAD_FLOORS[precision]
    columns: list[ColumnSpread] = []
    for name, values in own.items():
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            continue
        finite = np.abs(values[np.isfinite(values)].astype(np.float64))
        scale = float(np.median(finite[finite > 0])) if (finite > 0).any() else 0.0
        largest = floor
        for form in forms:
            other = cast("NDArray[Any]", form[name])
            for row in range(min(len(values), len(other))):
                moved = deviation_of(values[row], other[row], scale=scale)
                largest = max(largest, moved if moved is not None and np.isfinite(moved) else 0.0)
        columns.append(ColumnSpread(name, largest, scale))
    return Spread(tuple(columns), max(map(len, own.values()), default=0), floor)


def deviation_of(own: NDArray[Any], other: NDArray[Any], *, scale: float) -> float | None:
    """The largest |own − other| over |own| and the scale, 0 where both are NaN, or the same infinity; None: no number.

    The scale is the larger of the column's and of the row's own median, so that elements near zero, where sums cancel,
    are measured by what was summed.
    """
    if own.shape != other.shape or own.dtype != other.dtype:
        return None
    mine, theirs = own.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    finite = np.isfinite(mine)
    odd = ~finite | ~np.isfinite(theirs)
    if odd.any():
        same = (mine[odd] == theirs[odd]) | (np.isnan(mine[odd]) & np.isnan(theirs[odd]))
        if not same.all():
            return None
        mine, theirs = mine[~odd], theirs[~odd]
    if not len(mine):
        return 0.0
    sizes = np.abs(mine)
    typical = max(scale, float(np.median(sizes)))
    differences = np.abs(mine - theirs)
    if not differences.any():
        return 0.0
    with np.errstate(over="ignore", divide="ignore"):
        return float((differences / (sizes + typical)).max())


@dataclass(slots=True)
class Distance:
    """How far a row is, in spreads."""

    spreads: float = 0.0
    proof: bool = True
    """False: some column differs in what has no distance; that is never guilt."""

    def add(self, spreads: float | None) -> None:
        if spreads is None or not np.isfinite(spreads):
            self.proof, self.spreads = False, float("inf")
        else:
            self.spreads = max(self.spreads, spreads)

    @property
    def ppm(self) -> int:
        return PPM_MAX if self.spreads * PPM >= PPM_MAX else int(np.ceil(self.spreads * PPM))


@dataclass(slots=True)
class _Rows:
    """A decoded block, by row."""

    decoded: DecodedRows
    at: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        self.at = {int(row): place for place, row in enumerate(self.decoded.positions.tolist())}

    def value(self, column: str, row: int) -> Any:
        return self.decoded.columns[column][self.at[row]]


class Comparison:
    """One referee's rows, and candidates put beside them one after the other."""

    def __init__(self, schema: Schema, schema_digest: Digest, reference: Reference) -> None:
        """`schema` is the bundle's output schema. Raises SCHEMA_MISMATCH when the reference is of another."""
        self._schema = schema
        self._codec = RowCodec(schema, schema_digest)
        self._reference = reference
        self._own = _Rows(self._codec.decode(reference.block))
        self._forms = [_Rows(self._codec.decode(form)) for form in reference.forms]
        self._labels = {column: head for head in reference.labels for column in head.columns}

    def findings(
        self,
        candidate: RowBlock,
        rows: Sequence[int],
        classes: Sequence[str],
        profiles: Mapping[str, ToleranceProfile],
    ) -> list[CandidateFinding]:
        """What is found of each row of a candidate: row i answers row `rows[i]` of the reference, in `classes[i]`.

        `profiles` are those of the reference's class, by the candidate's. Raises SCHEMA_MISMATCH for a block of another
        schema.
        """
        assert len(candidate) == len(rows) == len(classes), "one place and one class for each row"
        theirs = _Rows(self._codec.decode(candidate))
        return [
            self._finding(candidate, theirs, place, row, execution_class, profiles.get(execution_class))
            for place, (row, execution_class) in enumerate(zip(rows, classes, strict=True))
        ]

    def differing(self, candidate: RowBlock, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(place in the candidate, row of the reference) where both have a value, and not the same one."""
        own = self._reference.block
        for place, row in enumerate(rows):
            if len(candidate[place]) and len(own[row]) and candidate[place] != own[row]:
                yield place, row

    def _finding(
        self,
        candidate: RowBlock,
        theirs: _Rows,
        place: int,
        row: int,
        execution_class: str,
        profile: ToleranceProfile | None,
    ) -> CandidateFinding:
        own = self._reference
        if candidate[place] == own.block[row]:
            return CandidateFinding(Finding.EQUAL)
        if not len(own.block[row]):
            return CandidateFinding(Finding.TIE, PPM_MAX)
        if not len(candidate[place]):
            return CandidateFinding(Finding.WITHHELD, PPM_MAX)
        if place not in theirs.at or row not in self._own.at:
            # No row of this schema at all: no honest engine writes one.
            return CandidateFinding(Finding.WRONG, PPM_MAX)
        if execution_class == own.execution_class:
            if row in own.steady:
                return CandidateFinding(Finding.WRONG, PPM_MAX)
            return judged(self._distance(theirs, place, row), None)
        return judged(self._distance(theirs, place, row), profile)

    def _distance(self, theirs: _Rows, place: int, row: int) -> Distance:
        distance = Distance()
        seen: dict[str, list[str]] = {}
        for column in self._schema.columns:
            own, other = self._own.value(column.name, row), theirs.value(column.name, place)
            if column.name in self._labels:
                head = self._labels[column.name]
                distance.add(self._label_spreads(head, column.name, row, other))
                seen.setdefault(head.value, []).append(other)
            elif isinstance(column, TensorColumn | RaggedColumn) and np.asarray(own).dtype.kind == "f":
                distance.add(self._float_spreads(column.name, row, np.asarray(own), np.asarray(other)))
            elif not _same(own, other) and not any(_same(form, other) for form in self._in_forms(column.name, row)):
                distance.add(None)
        if any(len(set(labels)) < len(labels) for labels in seen.values() if "" not in labels):
            distance.add(None)  # one label twice: no ranking gives that
        return distance

    def _float_spreads(self, column: str, row: int, own: NDArray[Any], other: NDArray[Any]) -> float | None:
        spread = self._reference.spread.of(column)
        unit = spread.relative
        for form in self._in_forms(column, row):
            unit = max(unit, deviation_of(own, np.asarray(form), scale=spread.scale) or 0.0)
        moved = deviation_of(own, other, scale=spread.scale)
        return None if moved is None else moved / unit

    def _label_spreads(self, head: LabelScores, column: str, row: int, label: str) -> float | None:
        """Half the margin by which the referee prefers another label for this rank: each side may have moved so far."""
        if label == self._own.value(column, row):
            return 0.0
        scores = head.scores.get(row)
        places = [index for index, known in enumerate(head.labels) if known == label]
        if scores is None or not places:
            return None
        ranked = np.sort(np.where(np.isnan(scores), -np.inf, scores))[::-1]
        chosen = ranked[head.columns.index(column)]
        gap = min(abs(float(chosen) - float(scores[index])) for index in places)
        spread = self._reference.spread.of(head.value)
        size = abs(float(chosen)) + spread.scale
        if gap == 0.0:
            return 0.0
        if not np.isfinite(gap) or size == 0.0:
            return None
        return gap / 2 / size / spread.relative

    def _in_forms(self, column: str, row: int) -> list[Any]:
        return [form.value(column, row) for form in self._forms if row in form.at]


def judged(distance: Distance, profile: ToleranceProfile | None) -> CandidateFinding:
    """What a distance between rows of two classes means, with a profile that counts and without."""
    ppm = distance.ppm
    if profile is not None and profile.samples >= PROFILE_SAMPLES_MIN:
        largest = min(max(profile.max_ppm, PROFILE_FLOOR_PPM), CEILING_PPM)
        allowed = min(int(ALLOWED_FACTOR * largest), CEILING_PPM)
        if ppm <= allowed:
            finding = Finding.WITHIN_TOLERANCE
        elif distance.proof and ppm > GUILT_FACTOR * largest:
            finding = Finding.WRONG
        else:
            finding = Finding.UNEXPLAINED
    else:
        allowed = CEILING_PPM
        finding = Finding.TIE if ppm <= allowed else Finding.UNEXPLAINED
    error_ppm = PPM_MAX if ppm == PPM_MAX else min(PPM_MAX, ppm * PPM // allowed)
    return CandidateFinding(finding, error_ppm, ppm)


def _same(own: Any, other: Any) -> bool:
    if isinstance(own, str | bytes):
        return own == cast("str | bytes", other)
    mine, theirs = np.asarray(own), np.asarray(other)
    return mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()
