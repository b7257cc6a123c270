"""What did happen while it was learned how far classes lie apart. As in `events`: a shipped shape is for ever."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import AccountId, Digest


@dataclass(frozen=True, slots=True)
class DeviationsLearned:
    """Rows of one account in one class lay so far from a referee's of another class."""

    bundle_digest: Digest
    referee_class: str
    candidate_class: str
    account_id: AccountId
    """Whose worker did them."""
    deviations_ppm: tuple[int, ...]
    """In millionths of the bundle's spread, in the order of the rows."""


ToleranceEvent = DeviationsLearned
