"""Every event goes to bytes and comes back whole; equal events give equal bytes; a leaf is what its definition says."""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from enum import StrEnum
from typing import Any, get_args

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store.encoding import KINDS, EventUnreadable, decode_event, encode_event, leaf_of
from fallow_coordinator.store.event_kind import AnyKind

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1
EVENTS: tuple[type, ...] = get_args(ev.Event)
KIND_OF: dict[type, AnyKind] = {kind.event: kind for kind in KINDS}


def values_of(shape: Any, integers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Values of an annotation as the domain types use them."""
    origin, arguments = typing.get_origin(shape), get_args(shape)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: integers,
        bool: st.booleans(),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=40),
        float: st.floats(allow_nan=False),
    }
    if isinstance(shape, typing.NewType):
        made = values_of(shape.__supertype__, integers)
    elif origin in {typing.Union, types.UnionType}:
        made = st.one_of(*(values_of(argument, integers) for argument in arguments))
    elif shape is type(None):
        made = st.none()
    elif origin is tuple and arguments[-1] is Ellipsis:
        made = st.lists(values_of(arguments[0], integers), max_size=3).map(tuple)
    elif origin is tuple:
        made = st.tuples(*(values_of(argument, integers) for argument in arguments))
    elif origin is frozenset:
        made = st.frozensets(values_of(arguments[0], integers), max_size=3)
    elif isinstance(shape, type) and issubclass(shape, StrEnum):
        made = st.sampled_from(list(shape))
    elif dataclasses.is_dataclass(shape):
        made = instances_of(typing.cast("type", shape))
    else:
        made = simple[shape]
    return made


def instances_of(kind: type) -> st.SearchStrategy[Any]:
    """Instances of a frozen dataclass; integers as wide as the proto's field of the same name."""
    hints = typing.get_type_hints(kind)
    descriptor = getattr(pb, kind.__name__).DESCRIPTOR if kind in KIND_OF else None
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        wide = descriptor is not None and field.name in descriptor.fields_by_name
        number_type = descriptor.fields_by_name[field.name].type if wide and descriptor is not None else None
        if number_type == descriptor_type("TYPE_UINT64"):
            integers = st.integers(0, U64_MAX)
        elif number_type == descriptor_type("TYPE_SINT32"):
            integers = st.integers(-(2**31), 2**31 - 1)
        else:
            integers = st.integers(0, U32_MAX)
        fields[field.name] = values_of(hints[field.name], integers)
    return st.builds(kind, **fields)


def descriptor_type(name: str) -> int:
    number: int = getattr(pb.Event.DESCRIPTOR.fields[0], name)
    return number


def message_of(kind: AnyKind) -> Descriptor:
    message = pb.Event.DESCRIPTOR.fields_by_name[kind.name].message_type
    assert message is not None
    return message


def test_every_event_of_the_core_has_a_kind() -> None:
    assert set(KIND_OF) == set(EVENTS)
    assert len(KINDS) == len(EVENTS)


def test_every_kind_names_its_class() -> None:
    """The proto says the same word as the core."""
    for kind in KINDS:
        assert message_of(kind).name == kind.event.__name__


def test_every_field_of_an_event_stands_in_its_message() -> None:
    for event in EVENTS:
        ours = {field.name for field in dataclasses.fields(event)}
        if event is ev.SessionOpened:
            ours = ours - {"kept"} | {"kept_lease_ids"}
        assert ours == set(message_of(KIND_OF[event]).fields_by_name), event.__name__


@pytest.mark.parametrize("event_class", EVENTS, ids=lambda event: event.__name__)
def test_event_comes_back_whole_and_gives_the_same_bytes_again(event_class: type) -> None:
    @settings(max_examples=50, deadline=None)
    @given(instances_of(event_class))
    def round_trip(event: Any) -> None:
        data = encode_event(event)
        back = decode_event(data)
        assert back == event
        assert type(back) is event_class
        assert encode_event(back) == data

    round_trip()


def test_numbers_of_kinds_are_for_ever() -> None:
    """A kind that has shipped keeps its number; add lines here, change none."""
    assert {field.name: field.number for field in pb.Event.DESCRIPTOR.fields} == {
        "task_created": 1,
        "pack_requested": 2,
        "task_input_packed": 3,
        "lease_granted": 4,
        "lease_ended": 5,
        "commitment_recorded": 6,
        "task_settled": 7,
        "task_abandoned": 8,
        "task_dropped": 9,
        "job_submitted": 10,
        "job_state_changed": 11,
        "job_archived": 12,
        "blob_recorded": 13,
        "packing_failed": 14,
        "session_opened": 16,
        "session_closed": 17,
        "capability_reported": 18,
        "journal_started": 19,
        "restarted": 20,
        "account_created": 21,
        "pool_created": 22,
        "token_issued": 23,
        "token_revoked": 24,
        "party_enrolled": 25,
        "certificate_issued": 26,
        "party_revoked": 27,
        "worker_quarantined": 28,
        "worker_released": 29,
        "bundle_registered": 30,
        "bundle_inspected": 31,
        "bundle_held": 32,
        "bundle_crashed": 33,
        "job_deleted": 34,
        "blobs_forgotten": 35,
        "blob_quota_set": 36,
        "worker_struck": 40,
        "late_lease_settled": 42,
        "worker_warmed": 41,
        "account_admitted": 75,
        "account_expelled": 76,
        "inspection_rows_given": 77,
        "bundle_cleared": 85,
        "bundle_released": 86,
        "pool_mode_changed": 50,
        "credits_granted": 51,
        "credits_released": 52,
        "allotment_set": 53,
        "allotment_renewed": 54,
        "job_funded": 55,
        "challenge_issued": 60,
        "challenge_answered": 61,
        "device_measured": 62,
        "device_certificate_ended": 63,
        "challenge_ended": 64,
        "forecasts_recorded": 65,
        "carbon_planned": 66,
        "job_deferred": 67,
        "job_resumed": 68,
        "bundle_cost_learned": 70,
        "draw_secret_set": 90,
        "audits_drawn": 91,
        "audit_compared": 92,
        "referee_reported": 93,
        "verdict_reached": 94,
        "rows_corrected": 95,
        "evidence_released": 96,
        "pay_voided": 97,
        "worker_distrusted": 98,
        "worker_trusted": 99,
        "assurance_accepted": 100,
        "audit_given_up": 101,
        "deviations_learned": 110,
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        # Field 1000 of Event: a kind from the future.
        b"\xc2\x3e\x00",
        # JobStateChanged with state 99.
        b"\x5a\x02\x10\x63",
        # TaskCreated of kind MAP with half a span.
        b"\x0a\x05\x10\x01\x32\x01\x05",
    ],
    ids=["nothing", "garbage", "unknown kind", "unknown state", "half a span"],
)
def test_bytes_that_are_no_event_are_told_so(data: bytes) -> None:
    with pytest.raises(EventUnreadable):
        decode_event(data)


def test_leaf_is_the_hash_that_its_definition_says() -> None:
    salt = bytes(range(16))
    expected = hashlib.sha256(
        b"\x00"
        + salt
        + (7).to_bytes(8, "big")
        + (1_700_000_000_123).to_bytes(8, "big")
        + (3).to_bytes(8, "big")
        + b"event"
    ).digest()
    assert leaf_of(salt=salt, sequence=7, at_ms=1_700_000_000_123, epoch=3, event=b"event") == expected
