"""What checking promises: numbers against the formulas' own tables, draws against chance and against each other."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.assurance import (
    PPM,
    PRESETS,
    Assurance,
    audit_rate_ppm,
    drawn_count,
    drawn_rows,
    goes_to_referee,
    rows_to_audit,
    wrong_rows_bound_ppm,
)
from fallow.errors import FallowError, Reason
from fallow.ids import Digest

SHARES = st.integers(1, PPM - 1)


@pytest.mark.parametrize(
    ("wrong_percent", "needed"),
    [(50, (4, 7, 10)), (20, (11, 21, 31)), (10, (22, 44, 66)), (5, (45, 90, 135))],
)
def test_the_published_table_of_ringers_comes_out(wrong_percent: int, needed: tuple[int, ...]) -> None:
    wrong_ppm = wrong_percent * 10_000
    assert tuple(rows_to_audit(wrong_ppm=wrong_ppm, confidence_ppm=q) for q in (900_000, 990_000, 999_000)) == needed


@given(wrong_ppm=st.integers(100, PPM - 1), confidence_ppm=st.integers(PPM // 2, PPM - 1000))
def test_so_many_checks_leave_no_larger_share_possible(wrong_ppm: int, confidence_ppm: int) -> None:
    audited = rows_to_audit(wrong_ppm=wrong_ppm, confidence_ppm=confidence_ppm)
    assert wrong_rows_bound_ppm(audited=audited, confidence_ppm=confidence_ppm) <= wrong_ppm + 1
    if audited > 1:
        assert wrong_rows_bound_ppm(audited=audited - 1, confidence_ppm=confidence_ppm) >= wrong_ppm


def test_weak_detection_asks_for_more_and_none_for_everything() -> None:
    sure = rows_to_audit(wrong_ppm=100_000, confidence_ppm=990_000)
    assert rows_to_audit(wrong_ppm=100_000, confidence_ppm=990_000, detection_ppm=PPM // 2) > 2 * sure - 3
    assert rows_to_audit(wrong_ppm=100_000, confidence_ppm=990_000, detection_ppm=0) == 10_000_000
    assert rows_to_audit(wrong_ppm=PPM, confidence_ppm=990_000) == 1


def test_the_bound_holds_as_often_as_it_says() -> None:
    chance, covered, runs = random.Random(5), 0, 2_000
    for _ in range(runs):
        share = chance.random() * 0.2
        found = sum(chance.random() < share for _ in range(80))
        covered += wrong_rows_bound_ppm(audited=80, confidence_ppm=950_000, found_wrong=found) >= share * PPM
    assert covered / runs > 0.94, "at least the confidence, but for three standard deviations of this many runs"


@given(audited=st.integers(0, 500), found=st.integers(0, 500), confidence_ppm=st.integers(PPM // 2, PPM - 1000))
def test_findings_only_widen_the_bound(audited: int, found: int, confidence_ppm: int) -> None:
    bound = wrong_rows_bound_ppm(audited=audited, confidence_ppm=confidence_ppm, found_wrong=found)
    more = wrong_rows_bound_ppm(audited=audited, confidence_ppm=confidence_ppm, found_wrong=found + 1)
    assert 0 < bound <= more <= PPM
    assert bound * audited >= min(found, audited) * PPM or audited == 0


@pytest.mark.parametrize("name", PRESETS)
def test_newcomers_are_audited_fully_and_veterans_at_the_floor(name: str) -> None:
    level = PRESETS[name]
    rates = [audit_rate_ppm(level, rows_verified=10**n - 1, stake_rows=10**n - 1) for n in range(9)]
    assert rates[0] == PPM and rates[-1] == level.audit_rate_ppm_min
    assert rates == sorted(rates, reverse=True)


def test_a_worker_without_stake_stays_audited_whatever_its_record() -> None:
    assert audit_rate_ppm(PRESETS["basic"], rows_verified=10**7, stake_rows=0) == PPM
    assert audit_rate_ppm(PRESETS["basic"], rows_verified=10**7, stake_rows=18) == PPM // 10


@given(
    secret=st.binary(min_size=16, max_size=32),
    seed=st.binary(max_size=8),
    rows=st.integers(1, 5_000),
    count=st.integers(0, 60),
)
def test_draws_are_different_rows_that_anybody_with_the_secret_draws_again(
    secret: bytes, seed: bytes, rows: int, count: int
) -> None:
    commitment = Digest(sha256(seed).digest())
    drawn = drawn_rows(secret=secret, commitment=commitment, rows=rows, count=count)
    assert drawn == drawn_rows(secret=secret, commitment=commitment, rows=rows, count=count)
    assert len(set(drawn)) == len(drawn) == min(rows, count)
    assert list(drawn) == sorted(drawn)
    assert all(0 <= row < rows for row in drawn)


def test_another_commitment_or_secret_draws_other_rows_and_no_row_is_favoured() -> None:
    counts: Counter[int] = Counter()
    for number in range(3_000):
        commitment = Digest(sha256(number.to_bytes(4, "big")).digest())
        counts.update(drawn_rows(secret=b"s" * 32, commitment=commitment, rows=10, count=3))
    assert sum(counts.values()) == 9_000
    assert all(abs(counts[row] - 900) < 5 * (900 * 0.7) ** 0.5 for row in range(10))
    one = Digest(sha256(b"one").digest())
    assert drawn_rows(secret=b"a" * 32, commitment=one, rows=10**6, count=9) != drawn_rows(
        secret=b"b" * 32, commitment=one, rows=10**6, count=9
    )


@pytest.mark.parametrize("field", ["wrong_rows_ppm_max", "confidence_ppm", "audit_rate_ppm_min", "referee_share_ppm"])
@pytest.mark.parametrize("value", [0, -1, PPM + 1])
def test_numbers_that_cannot_be_are_named(field: str, value: int) -> None:
    numbers = {
        "wrong_rows_ppm_max": 10_000,
        "confidence_ppm": 990_000,
        "audit_rate_ppm_min": 20_000,
        "referee_share_ppm": 200_000,
    }
    with pytest.raises(FallowError) as caught:
        Assurance(**(numbers | {field: value}))
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, field)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 5_000), SHARES)
def test_count_of_a_draw_is_the_rate_rounded_to_one_side_or_the_other(secret: bytes, rows: int, rate: int) -> None:
    count = drawn_count(secret=secret, commitment=Digest(secret), rows=rows, rate_ppm=rate)
    assert rows * rate // PPM <= count <= min(rows, rows * rate // PPM + 1)


def test_small_tasks_are_drawn_from_as_often_as_the_rate_says_and_referees_get_their_share() -> None:
    commitments = [Digest(sha256(b"%d" % number).digest()) for number in range(4_000)]
    counts = [drawn_count(secret=b"s" * 32, commitment=one, rows=5, rate_ppm=30_000) for one in commitments]
    assert set(counts) == {0, 1}
    assert 500 < sum(counts) < 700
    share = sum(
        goes_to_referee(secret=b"s" * 32, commitment=one, row=3, referee_share_ppm=200_000) for one in commitments
    )
    assert 700 < share < 900


@given(st.binary(min_size=32, max_size=32), st.integers(1, 300), st.data())
def test_a_larger_draw_holds_the_smaller_one(secret: bytes, rows: int, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(0, rows))
    more = data.draw(st.integers(fewer, rows))
    small, large = (
        set(drawn_rows(secret=secret, commitment=Digest(secret), rows=rows, count=count)) for count in (fewer, more)
    )
    assert small <= large and len(large) == more
