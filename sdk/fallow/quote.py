"""What a job would cost, when it would end and who could do it, before it is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fallow.cost import SizeBin
from fallow.ids import Digest
from fallow.job import JobOptions
from fallow.roles import DataClass

QUOTE_BINS_MAX: Final = 4_096
"""Groups of rows of like size in one question."""
BUDGET_PERCENT: Final = 120
"""A budget that nobody stated is this share of the quote."""


@dataclass(frozen=True, slots=True)
class QuoteRequest:
    """A job as far as its price and time depend on it; no row travels."""

    bundle_digest: Digest
    bins: tuple[SizeBin, ...]
    """All rows, grouped by size."""
    data_class: DataClass
    pool_id: str = ""
    """Empty: the caller's own."""
    options: JobOptions = field(default_factory=JobOptions)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Workers that could not take the job, and why."""

    code: str
    workers: int
    words: str
    advice: str


@dataclass(frozen=True, slots=True)
class Quote:
    """An estimate for this fleet, now; nothing is reserved, and prices may change before the job is submitted."""

    bundle_digest: Digest
    rows: int
    unit_micros: int
    """Estimated work of all rows: 10⁻⁶ units, a unit being a second of a reference core."""
    learned_permille: int
    """What accepted work has taught about this bundle's cost; counted in `unit_micros`. 1,000: nothing."""
    pool_id: str
    pool_mode: str
    """`donation`, `quota` or `market`."""
    policy: str
    """How results are checked."""
    price_microcredits_per_unit: int
    price_microcredits_per_1000_rows: int
    price_microcredits: int
    """For all rows; in a quota pool, of the account's allotment."""
    budget_microcredits: int
    """What to set aside: the price and a fifth more; 0 where nothing is paid."""
    wait_ms: int
    """Until its first row is taken, as far as the queue tells."""
    run_ms: int
    """From then to its last row, with its share of the workers that fit."""
    end_at_ms: int
    """Moment of the end; 0: never, with the workers there are."""
    millijoules: int
    """Estimated from what these workers spent on accepted work, or by a rule of thumb; see `energy_source`."""
    energy_source: str
    """`accepted-work`, `rule-of-thumb` or empty."""
    micrograms: int
    """CO₂ equivalents, by the coordinator's carbon table."""
    carbon_known: bool
    """Whether the table covers the workers; else `micrograms` says nothing."""
    checking_permille: int
    """Work added by checks; 0 under policy `unverified`."""
    workers_considered: int
    workers_fitting: int
    workers_free: int
    own_workers: int
    """Workers of the caller's own account among those that fit: their work is free."""
    fallen_out: tuple[Shortfall, ...] = ()
    """Why the other workers cannot take it, the most frequent first; each counts once."""
    warnings: tuple[str, ...] = ()
    form: str = "fp32"
    """The form of the program that this is about."""
    alternatives: tuple[Quote, ...] = ()
    """Quotes of the other forms that were accepted, the next best first."""

    @property
    def units(self) -> float:
        """Work of all rows in units."""
        return self.unit_micros / 1_000_000
