"""Latencies are counted in buckets whose bounds hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fallow_coordinator.latency import BUCKETS, Latencies, bucket_of, quantile_ms, upper_bound_ms


@given(st.floats(0.0, 20_000.0))
def test_bucket_holds_its_duration_and_is_not_wide(duration_ms: float) -> None:
    bucket = bucket_of(duration_ms)
    assert duration_ms <= upper_bound_ms(bucket) * (1 + 1e-9)
    assert bucket == 0 or duration_ms > upper_bound_ms(bucket - 1) * (1 - 1e-9)
    assert bucket == 0 or upper_bound_ms(bucket) <= duration_ms * 1.1


def test_what_is_longer_than_all_buckets_counts_in_the_last() -> None:
    assert bucket_of(1e12) == BUCKETS - 1


@given(st.lists(st.floats(0.0, 10.0), min_size=1), st.floats(0.01, 1.0))
def test_quantile_is_never_below_the_true_one(durations_s: list[float], share: float) -> None:
    latencies = Latencies()
    for duration_s in durations_s:
        latencies.add(duration_s)
    ordered = sorted(durations_s)
    true_ms = ordered[max(0, min(len(ordered) - 1, int(share * len(ordered) + 0.999999) - 1))] * 1e3
    found_ms = quantile_ms(latencies.counts, share)
    assert found_ms >= true_ms * (1 - 1e-6)
    assert found_ms <= max(0.1, true_ms * 1.1) or share * len(ordered) % 1 < 1e-6


def test_nothing_measured_is_zero() -> None:
    assert quantile_ms(Latencies().counts, 0.99) == 0.0
