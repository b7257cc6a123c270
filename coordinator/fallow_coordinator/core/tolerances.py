"""How far honest rows of one class lie from a referee's of another: what is learned of it, and from whom.

Nobody may teach a tolerance by himself. Only rows that were drawn for the referee by chance count, at most
`DEVIATIONS_KEPT` of each account; a profile needs `PROFILE_ACCOUNTS_MIN` accounts that count alike, so that none has
more than a quarter of it; and its quantiles are the lower medians of theirs, which fewer than half of the accounts
cannot move beyond what honest ones show. Whatever a majority teaches stays below `CEILING_PPM`, in units that the
referee measures by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fallow.comparison import CEILING_PPM, PPM_MAX, PROFILE_SAMPLES_MIN, CandidateFinding, Finding, ToleranceProfile
from fallow.ids import AccountId, Digest
from fallow.limits import REFEREE_CLASSES_MAX
from fallow_coordinator.core.limits import (
    DEVIATIONS_KEPT,
    PROFILE_ACCOUNTS_MAX,
    PROFILE_ACCOUNTS_MIN,
    TOLERANCES_KEPT_MAX,
)
from fallow_coordinator.core.state import State
from fallow_coordinator.core.tolerance_events import DeviationsLearned

SAMPLES_PER_ACCOUNT = PROFILE_SAMPLES_MIN // PROFILE_ACCOUNTS_MIN
"""An account with so many rows counts; further ones count as little more than that."""

_TEACHING = frozenset({Finding.EQUAL, Finding.WITHIN_TOLERANCE, Finding.TIE})
_DAMNING = frozenset({Finding.WRONG, Finding.UNEXPLAINED})


@dataclass(frozen=True, slots=True)
class Sample:
    """One row that was drawn for the referee by chance, and what the referee found."""

    account_id: AccountId
    execution_class: str
    found: CandidateFinding


def learned(bundle_digest: Digest, referee_class: str, samples: Iterable[Sample]) -> Iterator[DeviationsLearned]:
    """What one report of a referee teaches: nothing of an account with a row in it that is wrong or unexplained."""
    by_teacher: dict[tuple[AccountId, str], list[int]] = {}
    damned: set[AccountId] = set()
    for sample in samples:
        found = sample.found
        if found.finding in _DAMNING:
            damned.add(sample.account_id)
        of_another_class = sample.execution_class not in ("", referee_class)
        if of_another_class and found.finding in _TEACHING and found.error_ppm_of_tolerance < PPM_MAX:
            key = (sample.account_id, sample.execution_class)
            by_teacher.setdefault(key, []).append(min(found.deviation_ppm, CEILING_PPM))
    for (account_id, execution_class), deviations in by_teacher.items():
        if account_id not in damned:
            yield DeviationsLearned(
                bundle_digest, referee_class, execution_class, account_id, tuple(deviations[-DEVIATIONS_KEPT:])
            )


def evolve_tolerances(state: State, event: DeviationsLearned) -> None:
    """Applies what was learned; the pair of classes that nothing was learned of for longest makes room."""
    key = (event.bundle_digest, event.referee_class, event.candidate_class)
    accounts = state.tolerances.pop(key, {})
    state.tolerances[key] = accounts
    while len(state.tolerances) > TOLERANCES_KEPT_MAX:
        del state.tolerances[next(iter(state.tolerances))]
    if event.account_id in accounts or len(accounts) < PROFILE_ACCOUNTS_MAX:
        kept = (*accounts.get(event.account_id, ()), *event.deviations_ppm)
        accounts[event.account_id] = kept[-DEVIATIONS_KEPT:]


def profiles_of(state: State, bundle_digest: Digest) -> tuple[ToleranceProfile, ...]:
    """Every profile of a bundle that enough accounts have taught, as leases of a referee carry them."""
    found: list[ToleranceProfile] = []
    for (bundle, referee_class, candidate_class), accounts in state.tolerances.items():
        full = [sorted(one) for one in accounts.values() if len(one) >= SAMPLES_PER_ACCOUNT]
        if bundle == bundle_digest and len(full) >= PROFILE_ACCOUNTS_MIN:
            found.append(
                ToleranceProfile(
                    referee_class,
                    candidate_class,
                    SAMPLES_PER_ACCOUNT * len(full),
                    median_ppm=_lower_median([one[len(one) // 2] for one in full]),
                    p95_ppm=_lower_median([one[len(one) * 19 // 20] for one in full]),
                    max_ppm=_lower_median([one[-1] for one in full]),
                )
            )
    return tuple(found[-REFEREE_CLASSES_MAX:])


def _lower_median(values: list[int]) -> int:
    return sorted(values)[(len(values) - 1) // 2]
