"""Values of annotated types come back as they were; types that are not covered are refused before any value is seen."""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import Any, NamedTuple, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.ranges import RangeSet
from fallow_coordinator.store.typed_json import Codecs, TypeNotCovered, plain_of, value_of

Name = NewType("Name", str)
Half = NewType("Half", bytes)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Odd(Enum):
    FIRST = "1st"
    SECOND = "2nd"


class Place(NamedTuple):
    name: Name
    colour: Colour


@dataclass(frozen=True, slots=True)
class Leaf:
    data: bytes
    number: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    text: str


@dataclass(slots=True)
class Everything:
    name: Name
    half: Half | None
    level: Level
    odd: Odd
    share: float
    flag: bool
    leaf: Leaf | None
    either: Leaf | Note | None
    pair: tuple[int, Colour]
    many: tuple[Leaf, ...]
    places: dict[Place, list[tuple[int, str]]] = field(default_factory=dict[Place, list[tuple[int, str]]])
    ordered: dict[Name, None] = field(default_factory=dict[Name, None])
    queue: deque[Half] = field(default_factory=deque[Half])
    colours: frozenset[Colour] = frozenset()
    counts: Counter[str] = field(default_factory=Counter[str])
    done: RangeSet = field(default_factory=RangeSet)


CODECS = Codecs()

leaves = st.builds(Leaf, st.binary(max_size=40), st.integers())
names = st.text(max_size=12)
everything = st.builds(
    Everything,
    name=names,
    half=st.none() | st.binary(max_size=4),
    level=st.sampled_from(Level),
    odd=st.sampled_from(Odd),
    share=st.floats(allow_nan=False),
    flag=st.booleans(),
    leaf=st.none() | leaves,
    either=st.none() | leaves | st.builds(Note, names),
    pair=st.tuples(st.integers(), st.sampled_from(Colour)),
    many=st.lists(leaves, max_size=3).map(tuple),
    places=st.dictionaries(
        st.builds(Place, names, st.sampled_from(Colour)),
        st.lists(st.tuples(st.integers(), names), max_size=2),
        max_size=3,
    ),
    ordered=st.lists(names, max_size=4).map(dict.fromkeys),
    queue=st.lists(st.binary(max_size=3), max_size=3).map(deque),
    colours=st.frozensets(st.sampled_from(Colour)),
    counts=st.lists(names, max_size=5).map(Counter),
    done=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=4).map(RangeSet),
)


@given(everything)
def test_values_come_back_as_they_were(value: Everything) -> None:
    codec = CODECS.of(Everything)
    plain = plain_of(codec, value)
    again = value_of(codec, json.loads(json.dumps(plain)))
    assert again == value
    assert list(again.places) == list(value.places) and list(again.ordered) == list(value.ordered)
    assert type(again.level) is Level and type(again.pair[1]) is Colour and type(again.queue) is deque
    assert json.dumps(plain_of(codec, again)) == json.dumps(plain), "equal values are written alike"


def test_equal_words_become_one_object() -> None:
    codec = CODECS.of(list[tuple[Name, Half]])
    read = value_of(codec, json.loads(json.dumps(plain_of(codec, [(Name("a worker"), Half(b"12")) for _ in range(2)]))))
    assert read[0][0] is read[1][0] and read[0][1] is read[1][1]


@pytest.mark.parametrize(
    "annotation", [Any, object, list, dict, bytearray, complex, Leaf | int | Name | str, type[int]]
)
def test_type_that_is_not_covered_is_refused_with_its_place(annotation: Any) -> None:
    with pytest.raises(TypeNotCovered):
        Codecs().of(annotation, "State.new_field")


def test_field_that_is_not_covered_is_named() -> None:
    @dataclass
    class Careless:
        number: int
        anything: object

    # What a local class refers to is global here.
    with pytest.raises(TypeNotCovered, match=r"Careless\.anything: .*object.* can't be written down; use int, str"):
        Codecs().of(Careless)


def test_shape_changes_with_names_types_and_members() -> None:
    @dataclass
    class Leaf:  # the same name as above, other fields
        data: bytes

    assert Codecs().of(Leaf).shape != CODECS.of(globals()["Leaf"]).shape
    assert "number: int" in CODECS.of(globals()["Leaf"]).shape
    assert "'blue'" in CODECS.of(Colour).shape


@pytest.mark.parametrize("plain", [[], [0, 1], "words", None, 7, [1, 2, 3]])
def test_what_nobody_wrote_is_an_error(plain: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        value_of(CODECS.of(Leaf), plain)
