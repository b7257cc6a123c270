"""What every Store promises, whatever it stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fallow.ids import AccountId, Digest, digest_of
from fallow_coordinator.core.events import AccountCreated, Event, JournalStarted
from fallow_coordinator.ports import Store, WriterFenced
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore
from fallow_coordinator.store.sqlite import SqliteStore

Open = Callable[[], Store]
"""Opens the same journal once more, as a fresh process would."""


def event(number: int) -> Event:
    return AccountCreated(AccountId(f"account-{number}"), f"number {number}")


def append(store: Store, *numbers: int, at_ms: int = 1_000, payloads: dict[Digest, bytes] | None = None) -> None:
    store.append(
        expected_sequence=store.last_sequence,
        events=[(at_ms, event(number)) for number in numbers],
        payloads=payloads or {},
    )


@pytest.fixture(params=["sqlite", "memory"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    opened: list[Store] = []
    disk = MemoryDisk()

    def open_one() -> Store:
        store: Store = SqliteStore(tmp_path / "state") if request.param == "sqlite" else MemoryStore(disk)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


def test_new_journal_is_empty(open_store: Open) -> None:
    store = open_store()
    assert (store.epoch, store.last_sequence, store.last_at_ms) == (1, 0, 0)
    assert list(store.read(after_sequence=0, limit=10)) == []
    assert store.payload(digest_of(b"anything")) is None


def test_appended_events_are_read_in_order_without_gaps(open_store: Open) -> None:
    store = open_store()
    append(store, 1, 2, at_ms=1_000)
    append(store, 3, at_ms=2_000)
    records = store.read(after_sequence=0, limit=10)
    assert [(record.sequence, record.at_ms, record.event) for record in records] == [
        (1, 1_000, event(1)),
        (2, 1_000, event(2)),
        (3, 2_000, event(3)),
    ]
    assert (store.last_sequence, store.last_at_ms) == (3, 2_000)


def test_reading_pages_by_sequence_and_limit(open_store: Open) -> None:
    store = open_store()
    append(store, *range(1, 8))
    assert [record.sequence for record in store.read(after_sequence=2, limit=3)] == [3, 4, 5]
    assert [record.sequence for record in store.read(after_sequence=5, limit=100)] == [6, 7]
    assert list(store.read(after_sequence=7, limit=100)) == []


def test_reopened_journal_holds_all_that_was_appended(open_store: Open) -> None:
    store = open_store()
    data = b"an inline block"
    append(store, 1, 2, 3, at_ms=5_000, payloads={digest_of(data): data})
    store.close()
    again = open_store()
    assert (again.last_sequence, again.last_at_ms) == (3, 5_000)
    assert [record.event for record in again.read(after_sequence=0, limit=10)] == [event(1), event(2), event(3)]
    assert again.payload(digest_of(data)) == data


def test_opening_takes_the_next_epoch_and_fences_the_older_writer(open_store: Open) -> None:
    old = open_store()
    append(old, 1)
    new = open_store()
    assert new.epoch == old.epoch + 1
    data = b"too late"
    with pytest.raises(WriterFenced, match="taken over"):
        append(old, 2, payloads={digest_of(data): data})
    append(new, 3)
    assert [record.event for record in new.read(after_sequence=0, limit=10)] == [event(1), event(3)]
    assert new.payload(digest_of(data)) is None


def test_fenced_writer_stays_fenced_when_its_successor_has_gone(open_store: Open) -> None:
    old = open_store()
    open_store().close()
    with pytest.raises(WriterFenced):
        append(old, 1)


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_append_after_another_sequence_is_fenced_and_changes_nothing(open_store: Open, expected: int) -> None:
    store = open_store()
    append(store, 1, 2)
    with pytest.raises(WriterFenced):
        store.append(expected_sequence=expected, events=[(1_000, event(9))], payloads={})
    assert [record.event for record in store.read(after_sequence=0, limit=10)] == [event(1), event(2)]
    append(store, 3)
    assert store.last_sequence == 3


def test_clock_that_goes_back_is_our_own_mistake(open_store: Open) -> None:
    store = open_store()
    append(store, 1, at_ms=2_000)
    with pytest.raises(AssertionError):
        append(store, 2, at_ms=1_999)
    assert store.last_sequence == 1


def test_same_payload_twice_is_kept_once(open_store: Open) -> None:
    store = open_store()
    data = b"twice"
    append(store, 1, payloads={digest_of(data): data})
    append(store, 2, payloads={digest_of(data): data})
    assert store.payload(digest_of(data)) == data
    assert store.payload_digests(after=Digest(b""), limit=10) == [digest_of(data)]
    assert store.drop_payloads([digest_of(data)]) == 1


def test_dropped_payloads_are_gone_and_others_are_not(open_store: Open) -> None:
    store = open_store()
    kept, dropped = b"kept", b"dropped"
    append(store, 1, payloads={digest_of(kept): kept, digest_of(dropped): dropped})
    assert store.drop_payloads([digest_of(dropped), digest_of(b"never seen")]) == 1
    assert store.payload(digest_of(kept)) == kept
    assert store.payload(digest_of(dropped)) is None
    append(store, 2)
    assert store.last_sequence == 2


def test_payloads_are_listed_in_pages(open_store: Open) -> None:
    store = open_store()
    data = [f"payload {number}".encode() for number in range(25)]
    append(store, 1, payloads={digest_of(one): one for one in data})
    listed: list[Digest] = []
    while page := store.payload_digests(after=listed[-1] if listed else Digest(b""), limit=7):
        listed.extend(page)
    assert listed == sorted(digest_of(one) for one in data)


def test_every_event_is_there_once_whatever_the_batches_and_restarts(open_store: Open) -> None:
    """Batches of any size with restarts between them leave the same journal as one batch would."""
    store = open_store()
    append_events = [(1, JournalStarted(b"journal"))]
    store.append(expected_sequence=0, events=append_events, payloads={})
    expected: list[Event] = [JournalStarted(b"journal")]

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4))
    def run(steps: list[tuple[int, bool]]) -> None:
        nonlocal store
        for count, restart in steps:
            numbers = range(len(expected), len(expected) + count)
            append(store, *numbers, at_ms=1_000 + len(expected))
            expected.extend(event(number) for number in numbers)
            if restart:
                store.close()
                store = open_store()
        records = store.read(after_sequence=0, limit=1_000_000)
        assert [record.event for record in records] == expected
        assert [record.sequence for record in records] == list(range(1, len(expected) + 1))

    run()


def test_an_empty_batch_changes_nothing(open_store: Open) -> None:
    store = open_store()
    append(store, 1)
    append(store)
    assert (store.last_sequence, store.last_at_ms) == (1, 1_000)
