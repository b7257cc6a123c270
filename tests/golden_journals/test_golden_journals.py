"""Journals recorded by earlier versions fold to what they folded to then, for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fallow_coordinator.core import invariants
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import State
from fallow_coordinator.ports import StorageFailed
from fallow_coordinator.store.encoding import KINDS, EventUnreadable, encode_event
from fallow_coordinator.store.journal_reader import StoredRecord, decode_records
from fallow_coordinator.store.segment import decode_segment, encode_segment
from golden_journals.facts import facts_of

HERE = Path(__file__).parent
JOURNALS = sorted(HERE.glob("*.journal"))


def records_of(path: Path) -> list[StoredRecord]:
    return decode_segment(path.read_bytes())


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_golden_journal_folds_to_the_recorded_facts(path: Path) -> None:
    facts = facts_of(decode_records(records_of(path), 0, path))
    recorded = json.loads(path.with_suffix(".json").read_text())
    told = json.loads(json.dumps(facts))
    for name, values in recorded.items():
        assert told[name] == values, name


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_folded_golden_journal_keeps_the_invariants(path: Path) -> None:
    state = State()
    for record in decode_records(records_of(path), 0, path):
        evolve(state, record.event, record.at_ms)
    invariants.check(state)


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_events_of_a_golden_journal_encode_to_the_same_bytes(path: Path) -> None:
    stored = records_of(path)
    for lying, record in zip(stored, decode_records(stored, 0, path), strict=True):
        assert encode_event(record.event) == lying.event
    assert encode_segment(stored) == path.read_bytes()


def test_golden_journals_hold_every_kind_of_event() -> None:
    """A kind that is in none: record a new journal (`record.py`), never an old one again."""
    seen = {type(record.event) for path in JOURNALS for record in decode_records(records_of(path), 0, path)}
    assert {kind.event for kind in KINDS} - seen == set()


def test_changed_byte_of_a_golden_journal_is_noticed() -> None:
    data = bytearray(JOURNALS[0].read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises((StorageFailed, EventUnreadable)):
        decode_records(decode_segment(bytes(data)), 0, JOURNALS[0])


def test_torn_segment_is_told_so() -> None:
    with pytest.raises(EventUnreadable, match=r"ends inside record|damaged"):
        decode_segment(JOURNALS[0].read_bytes()[:-3])
