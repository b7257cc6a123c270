"""Nonces and token buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint
from fallow_coordinator.service.nonces import NONCE_VALID_FOR_MS, Nonces
from fallow_coordinator.service.rate_limit import RateLimit

MINE, THEIRS = KeyFingerprint(b"m" * 32), KeyFingerprint(b"t" * 32)


def refused(nonces: Nonces, nonce: bytes, key: KeyFingerprint, now_ms: int) -> bool:
    try:
        nonces.check(nonce, key, now_ms=now_ms)
    except FallowError as error:
        assert error.reason is Reason.NONCE_INVALID
        return True
    return False


def test_nonce_is_good_once_for_its_key_until_it_expires() -> None:
    nonces = Nonces(b"s" * 32)
    nonce, expires_at_ms = nonces.give(MINE, now_ms=1_000, random=b"r" * 16)
    assert expires_at_ms == 1_000 + NONCE_VALID_FOR_MS
    assert not refused(nonces, nonce, MINE, expires_at_ms)
    assert refused(nonces, nonce, MINE, expires_at_ms + 1)
    assert refused(nonces, nonce, THEIRS, 1_000)
    assert refused(Nonces(b"x" * 32), nonce, MINE, 1_000), "another process does not know it"
    nonces.use(nonce, MINE, now_ms=1_000)
    assert refused(nonces, nonce, MINE, 1_000)


@given(st.binary(max_size=80))
def test_no_made_up_nonce_is_taken(nonce: bytes) -> None:
    assert refused(Nonces(b"s" * 32), nonce, MINE, 0)


def test_used_nonces_are_forgotten_once_they_have_expired() -> None:
    nonces = Nonces(b"s" * 32)
    for number in range(100):
        now_ms = number * NONCE_VALID_FOR_MS * 2
        nonce, _ = nonces.give(MINE, now_ms=now_ms, random=b"r" * 16)
        nonces.use(nonce, MINE, now_ms=now_ms)
    assert len(nonces._used) == 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def taken(limit: RateLimit, peer: str, times: int) -> int:
    count = 0
    for _ in range(times):
        try:
            limit.take(peer)
        except FallowError as error:
            assert error.reason is Reason.OVERLOADED
            assert error.limit
        else:
            count += 1
    return count


def test_bucket_gives_its_burst_then_its_rate() -> None:
    clock = Clock()
    limit = RateLimit(per_s=2, burst=5, peers_max=10, clock=clock)
    assert taken(limit, "a", 20) == 5
    assert taken(limit, "b", 20) == 5, "peers do not share a bucket"
    clock.now_s += 1
    assert taken(limit, "a", 20) == 2
    clock.now_s += 1_000
    assert taken(limit, "a", 20) == 5


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), max_size=30))
def test_bucket_never_gives_more_than_burst_and_rate(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    limit = RateLimit(per_s=3, burst=7, peers_max=4, clock=clock)
    count = 0
    for wait_s, times in steps:
        clock.now_s += wait_s
        count += taken(limit, "a", times)
    assert count <= 7 + 3 * clock.now_s + 1e-6


def test_buckets_do_not_grow_without_end() -> None:
    limit = RateLimit(per_s=1, burst=1, peers_max=3, clock=Clock())
    for number in range(100):
        limit.take(f"peer {number}")
    assert len(limit._buckets) == 3
    with pytest.raises(FallowError):
        limit.take("peer 99")
