"""What may teach how far classes lie apart, and what cannot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.comparison import CEILING_PPM, PPM, PPM_MAX, PROFILE_SAMPLES_MIN, CandidateFinding, Finding
from fallow.ids import AccountId, Digest, digest_of
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.limits import (
    DEVIATIONS_KEPT,
    PROFILE_ACCOUNTS_MAX,
    PROFILE_ACCOUNTS_MIN,
    TOLERANCES_KEPT_MAX,
)
from fallow_coordinator.core.state import State
from fallow_coordinator.core.tolerances import SAMPLES_PER_ACCOUNT, Sample, learned, profiles_of

BUNDLE = digest_of(b"bundle")
OWN, OTHER = "class-a", "class-b"


def tie(deviation_ppm: int) -> CandidateFinding:
    return CandidateFinding(Finding.TIE, deviation_ppm * PPM // CEILING_PPM, deviation_ppm)


def teach(
    state: State,
    account: str,
    deviations: Sequence[int],
    *,
    bundle: Digest = BUNDLE,
    execution_class: str = OTHER,
) -> None:
    samples = [Sample(AccountId(account), execution_class, tie(deviation)) for deviation in deviations]
    for event in learned(bundle, OWN, samples):
        evolve(state, event, 1)


def honest(seed: int) -> list[int]:
    """Deviations of up to 0.3 spreads."""
    return [(seed * 7919 + row * 104_729) % (3 * PPM // 10) for row in range(SAMPLES_PER_ACCOUNT)]


def test_a_profile_needs_enough_accounts_and_enough_rows_of_each() -> None:
    state = State()
    for number in range(PROFILE_ACCOUNTS_MIN - 1):
        teach(state, f"account-{number}", honest(number) * 3)
    assert profiles_of(state, BUNDLE) == ()
    teach(state, "last", honest(9)[:-1])
    assert profiles_of(state, BUNDLE) == ()
    teach(state, "last", honest(9)[-1:])
    [profile] = profiles_of(state, BUNDLE)
    assert (profile.referee_class, profile.candidate_class) == (OWN, OTHER)
    assert profile.samples == PROFILE_SAMPLES_MIN and profile.counts
    assert 0 < profile.median_ppm <= profile.p95_ppm <= profile.max_ppm < 3 * PPM // 10
    assert profiles_of(state, digest_of(b"another")) == ()


@given(st.lists(st.integers(0, 2 * CEILING_PPM), min_size=1, max_size=200), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_minority_cannot_widen_a_profile(lies: list[int], cheaters: int) -> None:
    state = State()
    for number in range(4):
        teach(state, f"honest-{number}", honest(number))
    for number in range(cheaters):
        teach(state, f"cheater-{number}", (lies * SAMPLES_PER_ACCOUNT)[:200])
    [profile] = profiles_of(state, BUNDLE)
    assert profile.max_ppm <= max(max(honest(number)) for number in range(4))


def test_a_majority_stays_below_what_rounding_explains() -> None:
    state = State()
    for number in range(8):
        teach(state, f"cheater-{number}", [PPM_MAX - 1] * SAMPLES_PER_ACCOUNT)
    assert [profile.max_ppm for profile in profiles_of(state, BUNDLE)] == [CEILING_PPM]


def test_what_teaches_nothing() -> None:
    account = AccountId("account")
    silent = [
        Sample(account, OWN, tie(1)),
        Sample(account, "", tie(1)),
        Sample(account, OTHER, CandidateFinding(Finding.TIE, PPM_MAX)),
        Sample(account, OTHER, CandidateFinding(Finding.WITHHELD, PPM_MAX)),
        Sample(account, OTHER, CandidateFinding(None)),
    ]
    assert list(learned(BUNDLE, OWN, silent)) == []
    for finding in (Finding.WRONG, Finding.UNEXPLAINED):
        damned = Sample(account, OTHER, CandidateFinding(finding, PPM_MAX, PPM_MAX))
        assert list(learned(BUNDLE, OWN, [Sample(account, OTHER, tie(1)), damned])) == []
    other = Sample(AccountId("other"), OTHER, CandidateFinding(Finding.EQUAL))
    [event] = learned(BUNDLE, OWN, [*silent, other])
    assert (event.account_id, event.deviations_ppm) == ("other", (0,))


def test_what_is_remembered_is_bounded_and_the_oldest_goes() -> None:
    state = State()
    for number in range(PROFILE_ACCOUNTS_MAX + 3):
        teach(state, f"account-{number}", range(DEVIATIONS_KEPT + 30))
    [accounts] = state.tolerances.values()
    assert list(accounts) == [f"account-{number}" for number in range(PROFILE_ACCOUNTS_MAX)]
    assert all(kept == tuple(range(30, DEVIATIONS_KEPT + 30)) for kept in accounts.values())
    for number in range(TOLERANCES_KEPT_MAX):
        teach(state, "account", [1], execution_class=f"class-{number}")
    assert len(state.tolerances) == TOLERANCES_KEPT_MAX
    assert (BUNDLE, OWN, OTHER) not in state.tolerances


@pytest.mark.parametrize("parts", [1, 5])
def test_reports_teach_the_same_in_one_and_in_many(parts: int) -> None:
    state, rows = State(), honest(1)
    for part in range(parts):
        teach(state, "account", rows[part * len(rows) // parts : (part + 1) * len(rows) // parts])
    assert state.tolerances == {(BUNDLE, OWN, OTHER): {"account": tuple(rows)}}
