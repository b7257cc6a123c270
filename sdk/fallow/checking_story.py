"""What the records of one job say about the checking of its rows: draws, audits, verdicts, corrections, and what holds.

A draw that does not follow from the secret, an audit by the audited worker's own owner, a verdict that its referee's
findings do not bear out, a row that was drawn and never decided: each is told by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fallow.assurance import PPM, drawn_rows, wrong_rows_bound_ppm
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.job_records import (
    Accepted,
    CheckedRow,
    Compared,
    Corrected,
    Distrusted,
    Drawn,
    GivenUp,
    Judged,
    Released,
    Reported,
    SecretSet,
    TaskMade,
    Voided,
)

CONFIDENCE_PPM = 990_000
"""Of the bounds that a certificate tells, whatever the job asked for."""

ANNULLING = frozenset({"proven-wrong", "auditor-wrong", "unexplained"})
"""Verdicts that withdraw whatever of a lease was not checked itself: its other drawn rows are never decided."""

CheckingFact = (
    SecretSet | Drawn | Compared | GivenUp | Reported | Judged | Corrected | Released | Voided | Distrusted | Accepted
)


def wrong(where: str, what: str) -> FallowError:
    """The error that names what is wrong in a certificate or its evidence."""
    return FallowError(Reason.EVIDENCE_WRONG, f"{where}: {what}", field=where)


@dataclass(frozen=True, slots=True)
class Bound:
    """How many of a worker's rows may be wrong although the checks that were made found nothing."""

    worker_id: str
    rows: int
    """Delivered by it, and not withdrawn."""
    rows_checked: int
    rows_by_referee: int
    """Those that a referee worked out: all that counts against colluders."""
    wrong_ppm_max: int
    """Of a worker that cheats by itself."""
    wrong_ppm_max_of_colluders: int


@dataclass(slots=True)
class Checks:
    """The checking of one job's rows. `take` each fact in the journal's order, then `finish`."""

    secret: bytes = b""
    secret_record: int = 0
    draws: list[tuple[int, Drawn]] = field(default_factory=list[tuple[int, Drawn]])
    audits: list[tuple[int, Compared]] = field(default_factory=list[tuple[int, Compared]])
    given_up: list[tuple[int, GivenUp]] = field(default_factory=list[tuple[int, GivenUp]])
    reports: list[tuple[int, Reported]] = field(default_factory=list[tuple[int, Reported]])
    verdicts: list[tuple[int, Judged]] = field(default_factory=list[tuple[int, Judged]])
    corrections: list[tuple[int, Corrected]] = field(default_factory=list[tuple[int, Corrected]])
    released: list[tuple[int, Released]] = field(default_factory=list[tuple[int, Released]])
    voided: list[tuple[int, Voided]] = field(default_factory=list[tuple[int, Voided]])
    distrusted: list[tuple[int, Distrusted]] = field(default_factory=list[tuple[int, Distrusted]])
    accepted: bool = False
    _drawn: dict[CheckedRow, None] = field(default_factory=dict[CheckedRow, None])
    _passed: dict[CheckedRow, bool] = field(default_factory=dict[CheckedRow, bool])
    """Rows that were found right; whether by a referee."""
    _decided: dict[CheckedRow, str] = field(default_factory=dict[CheckedRow, str])
    _tasks: dict[str, TaskMade] = field(default_factory=dict[str, TaskMade])

    def take(self, record: int, fact: CheckingFact, tasks: Mapping[str, TaskMade]) -> None:
        """Takes in a fact. Raises EVIDENCE_WRONG, naming the record."""
        where = f"record {record}"
        match fact:
            case SecretSet(secret):
                if self.secret:
                    raise wrong(where, "sets a second key for draws")
                self.secret, self.secret_record = secret, record
            case Drawn():
                self._draw(record, where, fact)
            case Compared():
                self._compare(where, fact, tasks)
                self.audits.append((record, fact))
            case GivenUp():
                self.given_up.append((record, fact))
            case Reported():
                if fact.task_id not in tasks:
                    raise wrong(where, f"speaks of task {fact.task_id}, which is none of this job's")
                self.reports.append((record, fact))
            case Judged():
                self._judge(where, fact, tasks)
                self.verdicts.append((record, fact))
            case Corrected():
                self.corrections.append((record, fact))
            case Released():
                self.released.append((record, fact))
            case Voided():
                self.voided.append((record, fact))
            case Distrusted():
                self.distrusted.append((record, fact))
            case Accepted():
                self.accepted = True

    def check_draws(self, commitments: Mapping[str, tuple[int, Digest]]) -> None:
        """Returns when all rows were drawn as the secret, fixed before, says. Raises EVIDENCE_WRONG.

        `commitments` are (record, digest of the signed message) by lease.
        """
        rows: dict[str, set[int]] = {}
        for at, (_, draw) in enumerate(self.draws):
            where = f"verification.draws[{at}]"
            if draw.lease_id not in commitments:
                raise wrong(where, f"is of lease {draw.lease_id}, which committed to nothing")
            record, digest = commitments[draw.lease_id]
            if record < self.secret_record:
                raise wrong(where, "its commitment is older than the key of the draw")
            drawn = rows.setdefault(draw.lease_id, set())
            drawn.update(draw.drawn)
            expected = drawn_rows(secret=self.secret, commitment=digest, rows=draw.rows, count=len(drawn))
            if tuple(sorted(drawn)) != expected:
                raise wrong(f"{where}.rows", f"are not those that the key draws: {list(expected)}")
            if not set(draw.refereed) <= set(draw.drawn):
                raise wrong(f"{where}.rows_to_referee", "were not drawn")

    def check_owners(self, owners: Mapping[str, bytes], workers: Mapping[str, str]) -> None:
        """Returns when nobody audited rows of one owner. `owners` are tags by worker, `workers` workers by lease."""
        for at, (_, audit) in enumerate(self.audits):
            for row in self._tasks[audit.task_id].checks:
                audited = workers.get(row.lease_id, "")
                if owners.get(audited) == owners.get(audit.worker_id):
                    raise wrong(f"verification.audits[{at}]", f"{audit.worker_id} and {audited} have one owner")

    def undecided(self) -> CheckedRow | None:
        """A row that was drawn, and of which nothing was found; None: there is none."""
        gone = self._withdrawn_leases()
        for row in self._drawn:
            if row not in self._passed and row not in self._decided and row.lease_id not in gone:
                return row
        return None

    def passed(self, lease_id: str) -> Iterator[tuple[int, bool]]:
        """(row, whether a referee did) of each row of a lease that was found right."""
        for row, by_referee in self._passed.items():
            if row.lease_id == lease_id:
                yield row.row, by_referee

    def bounds(self, standing: Mapping[str, int], leases: Mapping[str, str]) -> list[Bound]:
        """A bound for each worker whose rows were checked: rows that stand by worker, workers by lease."""
        trusted = {draw.worker_id for _, draw in self.draws if draw.trust != "none"}
        checked: dict[str, int] = {}
        refereed: dict[str, int] = {}
        for row, by_referee in self._passed.items():
            worker_id = leases[row.lease_id]
            checked[worker_id] = checked.get(worker_id, 0) + 1
            refereed[worker_id] = refereed.get(worker_id, 0) + by_referee
        return [
            Bound(
                worker_id=worker_id,
                rows=rows,
                rows_checked=checked.get(worker_id, 0),
                rows_by_referee=refereed.get(worker_id, 0),
                wrong_ppm_max=_bound(rows, checked.get(worker_id, 0)),
                wrong_ppm_max_of_colluders=_bound(rows, refereed.get(worker_id, 0)),
            )
            for worker_id, rows in sorted(standing.items())
            if rows and worker_id not in trusted
        ]

    # --------------------------------------------------------------------------------------------- taking in

    def _draw(self, record: int, where: str, fact: Drawn) -> None:
        if not self.secret:
            raise wrong(where, "draws rows before the key of draws was fixed")
        for row in fact.drawn:
            if not 0 <= row < fact.rows:
                raise wrong(where, f"draws row {row} of {fact.rows}")
            self._drawn[CheckedRow(fact.lease_id, row)] = None
        self.draws.append((record, fact))

    def _compare(self, where: str, fact: Compared, tasks: Mapping[str, TaskMade]) -> None:
        task = tasks.get(fact.task_id)
        if task is None or len(task.checks) != len(fact.equal):
            raise wrong(where, f"compares {len(fact.equal)} rows of task {fact.task_id}, which checks others")
        self._tasks[fact.task_id] = task
        for row, equal in zip(task.checks, fact.equal, strict=True):
            if equal:
                self._passed.setdefault(row, False)

    def _judge(self, where: str, fact: Judged, tasks: Mapping[str, TaskMade]) -> None:
        report = next((told for _, told in reversed(self.reports) if told.lease_id == fact.referee_lease_id), None)
        if report is None:
            raise wrong(where, f"reaches a verdict by lease {fact.referee_lease_id}, which reported nothing")
        row = CheckedRow(fact.lease_id, fact.row)
        found = _findings(report, tasks[report.task_id], row)
        if fact.verdict == "proven-wrong" and "wrong" not in found:
            raise wrong(where, f"calls row {fact.row} of {fact.worker_id} wrong, and the referee did not find so")
        if fact.verdict == "unexplained" and "unexplained" not in found:
            raise wrong(where, f"calls row {fact.row} of {fact.worker_id} unexplained, and the referee did not find so")
        if fact.verdict == "upheld":
            if not {"equal", "within-tolerance"} & set(found):
                raise wrong(where, f"upholds row {fact.row} of {fact.worker_id}, and the referee did not find so")
            self._passed[row] = True
        if fact.verdict == "auditor-wrong":
            if not any("wrong" in candidates[1:] for candidates in report.findings):
                raise wrong(where, f"calls an audit of {fact.worker_id} wrong, and the referee did not find so")
            return
        self._decided[row] = fact.verdict

    def _withdrawn_leases(self) -> set[str]:
        return {fact.lease_id for _, fact in self.corrections if fact.verdict in ANNULLING}


def _findings(report: Reported, task: TaskMade, row: CheckedRow) -> tuple[str, ...]:
    """What the referee found of the row itself; the findings of other candidates are left out."""
    return tuple(
        candidates[0]
        for checked, candidates in zip(task.checks, report.findings, strict=False)
        if checked == row and candidates
    )


def _bound(rows: int, checked: int) -> int:
    """Share of `rows` that may be wrong when so many of them were found right; 0 when all of them were."""
    if checked >= rows:
        return 0
    return min(PPM, wrong_rows_bound_ppm(audited=checked, confidence_ppm=CONFIDENCE_PPM))
